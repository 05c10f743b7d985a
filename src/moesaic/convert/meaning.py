"""What a config computes in inference, in one canonical form: with equal meaning and equal weights logits are equal (where
two spellings differ in the order of operations, up to rounding).

A family can hold a config exactly if reading what it wrote gives the same meaning back; nothing else decides about exports.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

from moesaic.config import to_dict
from moesaic.models.config import ModelConfig, MoEConfig, RouterConfig, pick
from moesaic.nn.rope import RopeScaling
from moesaic.routing import ROUTERS

# Options of routers that act in training alone.
_TRAINING = (
    "bias_rule", "bias_rate", "bias_p", "bias_i", "bias_d", "bias_limit", "bias_bins", "init_std", "idle", "jitter", "ffn_rows",
)  # fmt: skip


def meaning(config: ModelConfig) -> dict[str, Any]:
    """The settings inference depends on, every rule and default written out layer by layer."""
    layers = range(config.num_layers)
    sparse = config.moe_layers
    dense = [i for i in layers if i not in sparse]
    found = to_dict(replace(config, moe=None))
    for key in ("init_scale", "hidden", "num_kv_heads", "head_dim"):
        found.pop(key)
    if config.latent is None:
        found |= {"num_kv_heads": config.kv_heads, "head_dim": config.heads_dim}
    found["hidden"] = {i: pick(config.hidden, i) for i in dense}
    if not dense:
        found.pop("mlp_bias")
    found["sliding_window"] = [config.window(i) for i in layers]
    if config.rope_scaling is not None:
        found["rope_scaling"] = _rope_meaning(config.rope_scaling, config.latent is not None)
    if config.moe is not None:
        found["moe"] = _moe_meaning(config.moe, sparse)
    return found


def _rope_meaning(scaling: RopeScaling, latent: bool) -> dict[str, Any]:
    """What the kind uses of it; of "yarn" the factors that come out."""
    found: dict[str, Any] = {"kind": scaling.kind, "factor": scaling.factor}
    if scaling.kind != "linear":
        found["original_max_seq_len"] = scaling.original_max_seq_len
    if scaling.kind == "yarn":
        found |= {name: getattr(scaling, name) for name in ("beta_fast", "beta_slow", "truncate", "table_scale")}
        if latent:
            found["score_scale"] = scaling.score_scale
    if scaling.kind == "llama3":
        found |= {name: getattr(scaling, name) for name in ("low_freq_factor", "high_freq_factor")}
    return found


def _moe_meaning(moe: MoEConfig, sparse: tuple[int, ...]) -> dict[str, Any]:
    rows = range(len(sparse))
    widths = [pick(moe.hidden, i) for i in rows]
    kept = ("shared_gate", "expert_bias", "zero", "copy", "constant", "heads", "expert_kind", "rules")
    found = {name: to_dict(getattr(moe, name)) for name in kept}
    if moe.capacity is not None and moe.capacity.eval_factor is not None:
        found["capacity"] = to_dict(moe.capacity)
    found |= {
        "layers": list(sparse),
        "num_experts": [pick(moe.num_experts, i) for i in rows],
        "k": [pick(moe.k, i) for i in rows],
        "hidden": widths,
        "shared": [moe.shared and (moe.shared_hidden or moe.shared * width) for width in widths],
        "router": _router_meaning(moe.router, [pick(moe.k, i) for i in rows]),
    }
    return found


def _router_meaning(router: RouterConfig, ks: list[int]) -> dict[str, Any]:
    known = inspect.signature(ROUTERS[router.name]).parameters if router.name in ROUTERS else {}
    options = {
        name: value
        for name, value in router.options.items()
        if name not in _TRAINING and not (name in known and known[name].default == value)
    }
    name = router.name
    if name == "switch" and set(ks) == {1}:  # in inference the chosen probability, as token choice without normalising
        name, options = "topk", {"normalize": "none"}
    if name == "topk" and options.get("normalize") == "softmax_chosen":  # of the chosen logits, the same weights
        options = {key: value for key, value in options.items() if key != "normalize"}
    groups = options.get("groups", 1)
    if name == "topk" and options.get("groups_kept", groups) == groups:
        options = {key: value for key, value in options.items() if key not in ("groups", "groups_kept", "group_score")}
    return {"name": name, "options": options}
