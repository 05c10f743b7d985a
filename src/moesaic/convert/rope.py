"""Rotary base and scaling in ``config.json``, in the forms of transformers 4 and 5, both ways."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from moesaic.checkpoint.untrusted import show
from moesaic.convert.keys import WHOLE_LIMIT, Keys
from moesaic.errors import ConfigError
from moesaic.models.config import ModelConfig
from moesaic.nn.rope import RopeScaling

_ROPE_FIELDS = {
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "truncate": "truncate",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
    "attention_factor": "attention_factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
}
_ROPE_FIELDS_OF = {
    "linear": (),
    "dynamic": (),
    "yarn": ("beta_fast", "beta_slow", "truncate", "mscale", "mscale_all_dim", "attention_factor"),
    "llama3": ("low_freq_factor", "high_freq_factor"),
}


def read_rope(keys: Keys, theta_default: float, longest: int) -> tuple[float, RopeScaling | None]:
    """Rotary base and scaling, from ``rope_theta`` and ``rope_scaling`` (transformers 4) or ``rope_parameters`` (5)."""
    theta = keys.number("rope_theta", None)
    table = keys.get("rope_parameters", None)
    old = keys.get("rope_scaling", None)
    if table is not None and old is not None and table != old:
        raise ConfigError(f"{keys.where} has both rope_parameters and rope_scaling, and they differ; keep one.")
    table = old if table is None else table
    if table is None:
        return theta_default if theta is None else theta, None
    if not isinstance(table, dict):
        raise ConfigError(f"{keys.where}: rope_parameters must be a table of settings, not {show(table)}.")
    inner = Keys(table, f"{keys.where}: rope_parameters")
    own = inner.number("rope_theta", None)
    if own is not None and theta is not None and own != theta:
        raise ConfigError(f"{keys.where} gives two rotary bases, rope_theta={theta} and {own}; keep one.")
    theta = own if own is not None else theta_default if theta is None else theta
    kind: Any = inner.text("rope_type", None) or inner.text("type", None) or "default"
    inner.carry("rope_type", "type")
    inner.fixed("partial_rotary_factor", 1.0)
    if kind == "default":
        _finish_rope(inner)
        return theta, None
    if kind not in _ROPE_FIELDS_OF:
        raise ConfigError(
            f"{keys.where}: the rope type {show(kind)} is not supported; known: default, {', '.join(_ROPE_FIELDS_OF)}."
        )
    values: dict[str, Any] = {}
    for name in _ROPE_FIELDS_OF[kind]:
        value = inner.flag(name, None) if name == "truncate" else inner.number(name, None)
        if value is not None:
            values[name] = value
    original = inner.whole("original_max_position_embeddings", None)
    factor = inner.number("factor", None)
    if kind != "linear":
        original = longest if original is None or kind == "dynamic" else original
        values["original_max_seq_len"] = original
        if original < 1:
            raise ConfigError(
                f"{keys.where}: the context a model was trained with must be at least 1, not {original} "
                f"({'max_position_embeddings' if original is longest else 'original_max_position_embeddings'})."
            )
    if factor is None and kind == "yarn":
        factor = longest / original
    if factor is None:
        raise ConfigError(f'{keys.where}: the rope type "{kind}" needs a factor.')
    if kind == "dynamic" and factor * longest >= WHOLE_LIMIT:
        raise ConfigError(
            f"{keys.where}: the rope type dynamic stretches {longest} tokens by factor={factor}, which is impossible."
        )
    _finish_rope(inner)
    return theta, RopeScaling(kind=kind, factor=factor, **values)


def _finish_rope(inner: Keys) -> None:
    unknown = sorted(set(inner.data) - {*inner.mapped, *inner.carried})
    if unknown:
        raise ConfigError(f"{inner.where}: the key {show(unknown[0])} is unknown for this rope type; refused.")


def write_rope(config: ModelConfig) -> dict[str, Any]:
    """``rope_theta`` and ``rope_scaling``, which transformers 4 and 5 both read."""
    scaling = config.rope_scaling
    if scaling is None:
        return {"rope_theta": config.rope_theta, "rope_scaling": None}
    table: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind in ("yarn", "llama3"):
        table["original_max_position_embeddings"] = scaling.original_max_seq_len
    table |= {name: getattr(scaling, name) for name in _ROPE_FIELDS_OF[scaling.kind]}
    if scaling.kind == "yarn":  # what an absent key means
        defaults = {field.name: field.default for field in fields(RopeScaling)}
        table = {name: value for name, value in table.items() if value != defaults.get(name)}
    return {
        "rope_theta": config.rope_theta,
        "rope_scaling": {name: value for name, value in table.items() if value is not None},
    }
