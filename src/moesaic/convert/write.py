"""A moesaic model as a checkpoint of a Hugging Face family, one that loads with no moesaic installed.

>>> write_hf(model, Path("out"))                     # the family it came from, or the one that can hold it
>>> family, values = family_for(model.config)        # ConfigError says, family by family, what stands in the way
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moesaic.checkpoint.aside import Aside
from moesaic.checkpoint.atomic import atomic_folder
from moesaic.checkpoint.native import config_differences, tied_names
from moesaic.checkpoint.shards import MAX_SHARD_BYTES, find_tensors
from moesaic.checkpoint.stream import Slot, plan_shards, write_shards
from moesaic.checkpoint.untrusted import safe_member, show
from moesaic.convert.families import FAMILIES
from moesaic.convert.family import Family, Layout
from moesaic.convert.keys import DROPPED, REFUSED, Keys
from moesaic.convert.meaning import meaning
from moesaic.convert.pieces import Entry, extract
from moesaic.convert.places import check_table
from moesaic.errors import ConfigError, MoesaicError
from moesaic.models.config import ModelConfig
from moesaic.models.decoder import Decoder


@dataclass(frozen=True)
class Export:
    """How a model will be written: its family, the keys of ``config.json``, the table of tensors."""

    family: Family
    values: dict[str, Any]
    table: list[Entry]

    def config_text(self, dtype: torch.dtype) -> str:
        """The content of ``config.json`` for parameters of ``dtype`` (routers aside)."""
        values = self.values | {"torch_dtype": str(dtype).removeprefix("torch.")}
        return json.dumps(values, indent=2, allow_nan=False)


def family_for(config: ModelConfig, name: str | None = None) -> tuple[Family, dict[str, Any]]:
    """The family that can hold ``config`` and its config keys: the named one, or the first that can.

    A family can hold a config exactly if reading what it writes means the same. Raises ``ConfigError`` saying what does not
    fit.
    """
    if name is not None and name not in FAMILIES:
        raise ConfigError(f'There is no family "{name}"; known: {", ".join(FAMILIES)}.')
    reasons = []
    for family in FAMILIES.values() if name is None else [FAMILIES[name]]:
        reason, values = _written(family, config)
        if reason is None:
            return family, values
        reasons.append(f"{family.model_type} ({reason})")
    what = "that family" if name else "any family of Hugging Face that is known here"
    raise ConfigError(
        f"This model cannot be exported as {what}: {'; '.join(reasons)}. A moesaic folder holds everything, and loads in "
        "transformers after `import moesaic`."
    )


def _written(family: Family, config: ModelConfig) -> tuple[str | None, dict[str, Any]]:
    """Why the family cannot hold the config (None if it can), and the keys."""
    try:
        values = family.write(config)
        again = family.read(Keys(json.loads(json.dumps(values)), family.model_type))
    except MoesaicError as error:
        return str(error).rstrip("."), {}
    differences = config_differences(meaning(again), meaning(config))
    # What follows from another difference says less: an all-sparse reading has no dense layers to have biases or widths.
    differences.sort(key=lambda difference: difference.startswith(("mlp_bias", "hidden")))
    return (differences[0] if differences else None), values


def plan_export(
    config: ModelConfig, source: dict[str, Any] | None = None, family: str | None = None, layout: Layout | None = None
) -> Export:
    """Decide how ``config`` is written. ``source``: what was remembered of where the model came from."""
    origin, kept = _remembered(source)
    name = family
    if name is None and origin in FAMILIES and _written(FAMILIES[origin], config)[0] is None:
        name = origin
    chosen, written = family_for(config, name)
    carried = dict(kept) if origin == chosen.model_type else {}
    for stale in (
        "dtype",
        "torch_dtype",
        "transformers_version",
        *DROPPED,
        *REFUSED,
    ):  # the last two: a folder may be anyone's
        carried.pop(stale, None)
    wanted = layout or chosen.layouts[0]
    if wanted not in chosen.layouts:
        raise ConfigError(
            f'The family "{chosen.model_type}" has no layout "{wanted}"; it has {", ".join(chosen.layouts)}.'
        )
    values = {
        **carried,
        "architectures": [chosen.architecture],
        "model_type": chosen.model_type,
        **written,  # null included: an absent key would mean the family's default
    }
    if carried:  # they came from a folder that may be anyone's
        _check_kept(chosen, values, config)
    # What a written key says does not count as carried.
    silent = {key: value for key, value in carried.items() if key not in written}
    return Export(chosen, values, chosen.table(config, wanted, silent))


def _remembered(source: dict[str, Any] | None) -> tuple[str | None, dict[str, Any]]:
    """The family and the config keys that ``model.source`` names. Raises ``ConfigError`` for other kinds of values."""
    found = Keys(source or {}, "source (where a moesaic folder's config.json says what its model came from)")
    kept = found.get("config", {})
    if not isinstance(kept, dict):
        raise ConfigError(f"{found.where}: config must be a table of settings, not {show(kept)}.")
    return found.text("family", None), kept


def _check_kept(family: Family, values: dict[str, Any], config: ModelConfig) -> None:
    """Raise ``ConfigError`` where keys kept from import are not all known, or would make it another model."""
    keys = Keys(json.loads(json.dumps(values)), "source.config of the moesaic folder's config.json")
    again = family.read(keys)
    keys.finish()
    if differences := config_differences(meaning(again), meaning(config)):
        raise ConfigError(f"{keys.where} does not go with the model beside it: {differences[0]}. Correct or remove it.")


def write_hf(
    model: Decoder,
    folder: Path,
    family: str | None = None,
    layout: Layout | None = None,
    companions: dict[str, bytes] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Export:
    """Write ``model`` as a Hugging Face checkpoint: whole or not at all. Every tensor keeps its dtype and its bits.

    What is kept aside is written back to the family it came from; another has no place for it.

    Raises ``ConfigError`` where no family can hold it, ``MoesaicError`` where the disk refuses.
    """
    export = plan_export(model.config, model.source, family, layout)
    state = model.state_dict()
    names = [tied[0] for tied in tied_names(model)]
    check_table(export.table, {name: tuple(state[name].shape) for name in names})
    aside = model.aside if (model.source or {}).get("family") == export.family.model_type else None
    kept = [] if aside is None else aside.slots
    own = slots(export.table, {name: state[name].dtype for name in names})
    shards = plan_shards([*own, *kept], "model", max_shard_bytes)
    with atomic_folder(folder) as partial:
        (partial / "config.json").write_text(export.config_text(model.embedding.weight.dtype), encoding="utf-8")
        write_companions(partial, companions or {})
        write_shards(
            partial,
            "model",
            shards,
            chain(pieces_of(export.table, state), aside.tensors() if aside is not None else ()),
        )
    if aside is not None and aside.lies_in(folder):
        moved = find_tensors(folder, "model")
        model.aside = Aside.of({slot.name: moved[slot.name] for slot in kept})
    return export


def slots(table: list[Entry], dtypes: Mapping[str, torch.dtype]) -> Iterator[Slot]:
    """Their tensors as they will be stored, in the order of the table; ``dtypes``: of ours, by our names."""
    for entry in table:
        for piece in entry.pieces:
            yield Slot(piece.theirs, dtypes[entry.ours], piece.shape)


def pieces_of(table: list[Entry], state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Their tensors out of ours, in the order of the table, each made when it is asked for."""
    for entry in table:
        for piece in entry.pieces:
            yield piece.theirs, extract(state[entry.ours].detach(), piece)


def write_companions(folder: Path, companions: Mapping[str, bytes]) -> None:
    """Tokenizer, templates and the like, byte for byte. Raises ``OSError``."""
    for name, content in companions.items():
        path = safe_member(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
