"""Which of llama.cpp's architectures computes what a config says: one row per architecture, one column per setting.

An architecture of llama.cpp is a fixed graph: what its row does not allow, no metadata can ask for. Read off
``src/models/*.cpp`` of llama.cpp (as in llama-cpp-python 0.3.36); ``test_parity.py`` holds each row against it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moesaic.convert.meaning import meaning
from moesaic.errors import ConfigError
from moesaic.models.config import ModelConfig, pick

_MOST_LAYERS, _MOST_EXPERTS = 512, 1024


@dataclass(frozen=True)
class Architecture:
    """One graph of llama.cpp.

    Attributes:
        name: ``general.architecture``.
        families: what it is known as, for messages.
        allows: setting -> values it can compute; a setting left out must have its value in ``_PLAIN``.
        interleaved: rotary pairs are neighbours (2i, 2i + 1) there, not halves (i, i + R/2).
        own_head: the head must be a tensor of its own, also where it is tied.
        windows: it knows sliding windows.
        factors: it reads a table of rotary frequency factors, so that any fixed scaling can be said.
    """

    name: str
    families: str
    allows: Mapping[str, tuple[Any, ...]]
    interleaved: bool = False
    own_head: bool = False
    windows: bool = False
    factors: bool = False


# The value every architecture computes, of each setting that some cannot.
_PLAIN: dict[str, Any] = {
    "latent": False,
    "moe.layers": "none",
    "qk_norm": "none",
    "attention_bias": "none",
    "mlp_bias": False,
    "activation": "silu",
    "attention_sinks": False,
    "num_heads * head_dim": "free",
    "num_kv_heads": "free",
    "moe.shared": "none",
    "moe.expert_bias": False,
    "moe.router.score": "softmax",
    "moe.router.normalize": "none",
    "moe.router.scale": "1",
    "moe.router.gate_bias": False,
    "moe.router.balance_bias": False,
    "moe.router.groups": "none",
}
# What makes an architecture the one meant, rather than a setting of it.
_STRUCTURE = ("latent", "moe.layers", "qk_norm", "attention_sinks", "moe.shared")
_SHAPES = ("free", "dim", "num_heads")  # whatever the widths of heads are
_GROUPS = ("none", "top2_sum")
_ROPES = (None, "linear", "yarn")

ARCHITECTURES = (
    Architecture(
        "llama",
        "Llama, Mistral, Mixtral",
        {
            "moe.layers": ("none", "all"),
            "attention_bias": ("none", "qkv", "all"),
            "mlp_bias": (False, True),
            "num_heads * head_dim": _SHAPES,
            "num_kv_heads": _SHAPES,
            "moe.router.normalize": ("chosen",),
            "moe.router.groups": _GROUPS,
            "rope_scaling.kind": (*_ROPES, "llama3"),
        },
        interleaved=True,
        factors=True,
    ),
    Architecture(
        "qwen3",
        "Qwen3",
        {
            "qk_norm": ("head",),
            "attention_bias": ("none", "qkv"),
            "num_heads * head_dim": _SHAPES,
            "num_kv_heads": _SHAPES,
        },
    ),
    Architecture(
        "qwen3moe",
        "Qwen3-MoE",
        {
            "moe.layers": ("all",),
            "qk_norm": ("head",),
            "attention_bias": ("none", "qkv"),
            "num_heads * head_dim": _SHAPES,
            "num_kv_heads": _SHAPES,
            "moe.router.normalize": ("chosen",),
            "moe.router.groups": _GROUPS,
        },
    ),
    Architecture(
        "qwen2moe",
        "Qwen2-MoE",
        {
            "moe.layers": ("all",),
            "attention_bias": ("none", "qkv"),
            "num_heads * head_dim": ("dim",),
            "num_kv_heads": _SHAPES,
            "moe.shared": ("gated",),
            "moe.router.groups": _GROUPS,
        },
        own_head=True,
    ),
    Architecture(
        "olmoe",
        "OLMoE",
        {
            "moe.layers": ("all",),
            "qk_norm": ("projection",),
            "num_heads * head_dim": ("dim",),
            "num_kv_heads": ("num_heads",),
            "moe.router.groups": _GROUPS,
        },
        own_head=True,
    ),
    Architecture(
        "deepseek2",
        "DeepSeek-V2, DeepSeek-V3",
        {
            "latent": (True,),
            "moe.layers": ("none", "all", "all but the first"),
            "num_heads * head_dim": _SHAPES,
            "num_kv_heads": _SHAPES,
            "moe.shared": ("plain",),
            "moe.router.score": ("softmax", "sigmoid"),
            "moe.router.normalize": ("none", "chosen"),
            "moe.router.scale": ("1", "free"),
            "moe.router.balance_bias": (False, True),
            "moe.router.groups": _GROUPS,
        },
        interleaved=True,
    ),
    Architecture(
        "gpt-oss",
        "gpt-oss",
        {
            "moe.layers": ("all",),
            "attention_bias": ("all",),
            "activation": ("clamped_swiglu",),
            "attention_sinks": (True,),
            "num_heads * head_dim": _SHAPES,
            "num_kv_heads": _SHAPES,
            "moe.expert_bias": (True,),
            "moe.router.normalize": ("chosen",),
            "moe.router.gate_bias": (True,),
        },
        own_head=True,
        windows=True,
    ),
)


def architecture_of(config: ModelConfig) -> Architecture:
    """The architecture that computes ``config``; ``ConfigError`` says what the nearest one cannot."""
    _refuse_everywhere(config)
    found = features(config)
    misfits = {arch.name: _misfits(arch, found) for arch in ARCHITECTURES}
    best = min(ARCHITECTURES, key=lambda arch: sum(100 if name in _STRUCTURE else 1 for name in misfits[arch.name]))
    if misfits[best.name]:
        parts = [
            f"it needs {name} = {' or '.join(map(json.dumps, allowed))}, and this model has {json.dumps(found[name])}"
            for name, allowed in misfits[best.name].items()
        ]
        raise ConfigError(
            f'llama.cpp cannot compute this model. The nearest of its architectures is "{best.name}" ({best.families}), but '
            f"{'; '.join(parts)}."
        )
    return best


def features(config: ModelConfig) -> dict[str, Any]:
    """The settings that tell architectures apart, in a few words each."""
    found = _PLAIN | {
        "latent": config.latent is not None,
        "qk_norm": config.qk_norm,
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias and len(config.moe_layers) < config.num_layers,
        "activation": config.activation,
        "attention_sinks": config.attention_sinks,
        "rope_scaling.kind": None if config.rope_scaling is None else config.rope_scaling.kind,
    }
    if config.latent is None:
        found["num_heads * head_dim"] = "dim" if config.num_heads * config.heads_dim == config.dim else "free"
        found["num_kv_heads"] = "num_heads" if config.kv_heads == config.num_heads else "free"
    if config.moe is not None:
        options = meaning(config)["moe"]["router"]["options"]
        score, scale = options.get("score", "softmax"), options.get("scale", 1)
        normalize = options.get("normalize", "chosen")
        found |= {
            "moe.layers": _sparse_layers(config),
            "moe.shared": "none" if not config.moe.shared else "gated" if config.moe.shared_gate else "plain",
            "moe.expert_bias": config.moe.expert_bias,
            "moe.router.score": score,
            # softmax over the chosen is softmax over all, divided by the sum of the chosen
            "moe.router.normalize": "chosen" if normalize == "softmax_chosen" else normalize,
            "moe.router.scale": "1" if scale == 1 else "free",
            "moe.router.gate_bias": options.get("gate_bias", False),
            "moe.router.balance_bias": options.get("balance_bias", False),
            "moe.router.groups": options.get("group_score", "max") if options.get("groups_kept") else "none",
        }
    return found


def _sparse_layers(config: ModelConfig) -> str:
    sparse, layers = config.moe_layers, config.num_layers
    if len(sparse) == layers:
        return "all"
    return "all but the first" if sparse == tuple(range(layers - len(sparse), layers)) else "some"


def _misfits(arch: Architecture, found: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
    """Settings whose value ``arch`` does not compute -> the values it does."""
    wrong = {}
    for setting, value in found.items():
        plain = _ROPES if setting == "rope_scaling.kind" else (_PLAIN[setting],)
        allowed = arch.allows.get(setting, plain)
        if found["moe.layers"] == "none" and setting.startswith("moe.") and setting != "moe.layers":
            continue
        if value not in allowed:
            wrong[setting] = allowed
    return wrong


def _refuse_everywhere(config: ModelConfig) -> None:
    """What no architecture of llama.cpp computes."""
    wrong: list[str] = []

    def must(name: str, value: Any, wanted: Any) -> None:
        if value != wanted:
            wrong.append(f"model.{name}={value!r} (it must be {wanted!r})")

    for name, wanted in (("norm", "rmsnorm"), ("norm_placement", "pre"), ("gated", True), ("clip_qkv", None)):
        must(name, getattr(config, name), wanted)
    if config.depth is not None:
        wrong.append("Mixture-of-Depths blocks (model.depth)")
    if config.rope_scaling is not None and config.rope_scaling.kind == "dynamic":
        wrong.append('model.rope_scaling.kind="dynamic", whose frequencies follow the length of the text')
    if config.latent is not None:
        must("attention_bias", config.attention_bias, "none")
        if config.norm_eps != 1e-6:
            wrong.append(f"model.norm_eps={config.norm_eps}, where it has one for all norms and latent ones have 1e-6")
    dense = {pick(config.hidden, i) for i in range(config.num_layers) if i not in config.moe_layers}
    if len(dense) > 1:
        wrong.append(f"dense layers of several widths (model.hidden={config.hidden})")
    if config.num_layers > _MOST_LAYERS:
        wrong.append(f"model.num_layers={config.num_layers}, above {_MOST_LAYERS}")
    wrong += _refuse_experts(config)
    if wrong:
        raise ConfigError(f"No architecture of llama.cpp computes {'; nor '.join(wrong)}.")


def _refuse_experts(config: ModelConfig) -> list[str]:
    moe = config.moe
    if moe is None:
        return []
    wrong = []
    plain = {"zero": 0, "copy": 0, "constant": 0, "heads": 1, "expert_kind": "ffn", "rules": None}
    for name, wanted in plain.items():
        if getattr(moe, name) != wanted:
            wrong.append(f"model.moe.{name}={getattr(moe, name)!r} (it must be {wanted!r})")
    for name in ("num_experts", "k", "hidden"):
        value = getattr(moe, name)
        if isinstance(value, tuple) and len(set(value)) > 1:
            wrong.append(f"model.moe.{name} that differs by layer ({list(value)})")
    if moe.capacity is not None and moe.capacity.eval_factor is not None:
        wrong.append(f"expert capacity in evaluation (model.moe.capacity.eval_factor={moe.capacity.eval_factor})")
    sizes = meaning(config)["moe"]
    experts, router = sizes["num_experts"][0], sizes["router"]
    if router["name"] != "topk":
        wrong.append(f'model.moe.router.name="{router["name"]}" (only plain token choice, "topk")')
    elif router["options"].get("groups_kept") and experts == router["options"].get("groups"):
        wrong.append(f"groups of one expert (model.moe.router.options.groups={experts})")
    if experts > _MOST_EXPERTS:
        wrong.append(f"model.moe.num_experts={experts}, above {_MOST_EXPERTS}")
    if config.latent is not None and moe.shared and sizes["shared"][0] % sizes["hidden"][0]:
        wrong.append(
            f"a shared expert of width {sizes['shared'][0]}, no multiple of model.moe.hidden={sizes['hidden'][0]}"
        )
    return wrong
