"""A family of checkpoints: its config keys both ways and its table of tensors; and the parts that families share.

Adding one: docs/playbooks/add-a-model-family.md.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

from torch import Tensor

from moesaic.convert.keys import Keys
from moesaic.convert.pieces import SAME, TRANSPOSED, Entry, Piece, Turn, whole
from moesaic.convert.rope import read_rope, write_rope
from moesaic.errors import ConfigError
from moesaic.models.config import ModelConfig, MoEConfig, pick

# How a checkpoint holds experts: one tensor per matrix and expert, or one per matrix for all of them.
Layout = Literal["per_expert", "stacked"]


@dataclass(frozen=True)
class Family:
    """What is to be known of one ``model_type``.

    Attributes:
        model_type, architecture: as in ``config.json``.
        read: from keys to our config. Asks for every key that matters, and ``fixed`` for those of which it knows one value.
        write: from our config to keys: total; what it cannot say shows when it is read again (``meaning``).
        table: config, layout, carried keys -> entries.
        layouts: layouts that are read; export writes the first unless told otherwise.
        aside: name, config, carried keys -> whether the tensor is no part of the model, kept and written back (layers of
            multi-token prediction).
        ignored: names of tensors that are recomputed anyway (buffers of old versions).
    """

    model_type: str
    architecture: str
    read: Callable[[Keys], ModelConfig]
    write: Callable[[ModelConfig], dict[str, Any]]
    table: Callable[[ModelConfig, Layout, dict[str, Any]], list[Entry]]
    layouts: tuple[Layout, ...] = ("per_expert", "stacked")
    aside: Callable[[str, ModelConfig, dict[str, Any]], bool] = field(default=lambda name, config, carried: False)
    ignored: re.Pattern[str] = re.compile(r".*\.rotary_emb\.inv_freq")


# ---- config keys ----


ACTIVATION_NAMES = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
    "relu2": "squared_relu",
}


def activation_name(activation: str) -> str:
    """The name Hugging Face has for one of our activations; ours where it has none (which reading refuses)."""
    return next((theirs for theirs, ours in ACTIVATION_NAMES.items() if ours == activation), activation)


def common_keys(
    keys: Keys, *, tie_default: bool, theta_default: float = 10000.0, eps_default: float = 1e-6
) -> dict[str, Any]:
    """Fields of ``ModelConfig`` that all families spell alike. Sparse and dense feed-forward layers are the family's own."""
    heads = keys.whole("num_attention_heads")
    longest = keys.whole("max_position_embeddings")
    theta, scaling = read_rope(keys, theta_default, longest)
    if scaling is not None and scaling.kind == "dynamic":
        longest = int(longest * scaling.factor)  # its base follows the input, past the old context
    keys.fixed("attention_dropout", 0.0)
    return {
        "vocab_size": keys.whole("vocab_size"),
        "dim": keys.whole("hidden_size"),
        "num_layers": keys.whole("num_hidden_layers"),
        "num_heads": heads,
        "activation": keys.choice("hidden_act", ACTIVATION_NAMES, "silu"),
        "norm_eps": keys.number("rms_norm_eps", eps_default),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "max_seq_len": longest,
        "tie_embeddings": keys.flag("tie_word_embeddings", tie_default),
    }


def common_values(config: ModelConfig) -> dict[str, Any]:
    """The inverse of ``common_keys``."""
    scaling = config.rope_scaling
    longest = config.max_seq_len
    if scaling is not None and scaling.kind == "dynamic":
        longest = scaling.original_max_seq_len or longest
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "hidden_act": activation_name(config.activation),
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": longest,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_dropout": 0.0,
        **write_rope(config),
    }


def grouped_heads(
    keys: Keys, fields: dict[str, Any], *, kv_default: int | None = None, width_default: int | None = None
) -> dict[str, Any]:
    """``num_kv_heads`` and ``head_dim`` of grouped-query attention; absent keys as in Hugging Face.

    ``num_key_value_heads`` that is null means as many as heads, even where an absent one means another number.
    """
    heads, dim = fields["num_heads"], fields["dim"]
    width = keys.whole("head_dim", width_default or (dim // heads if heads else None))
    if width is not None and width < 1:
        raise ConfigError(
            f"{keys.where}: heads must be at least 1 wide, not {width}: correct head_dim, or hidden_size={dim} and "
            f"num_attention_heads={heads}."
        )
    as_many = kv_default is None or "num_key_value_heads" in keys.data
    return {"num_kv_heads": keys.whole("num_key_value_heads", heads if as_many else kv_default), "head_dim": width}


def grouped_values(config: ModelConfig) -> dict[str, Any]:
    """The inverse of ``grouped_heads``."""
    return {"num_key_value_heads": config.kv_heads, "head_dim": config.heads_dim}


# ---- tables ----


def linear(ours: str, theirs: str, out: int, width: int, *, bias: bool = False, turn: Turn = SAME) -> list[Entry]:
    """A linear map, the same way round in both, and its bias."""
    entries = [Entry(f"{ours}.weight", (Piece(f"{theirs}.weight", (out, width), turn=turn),))]
    if bias:
        entries.append(Entry(f"{ours}.bias", (Piece(f"{theirs}.bias", (out,), turn=turn),)))
    return entries


def vector(ours: str, theirs: str, width: int) -> Entry:
    """A vector, or anything of one dimension."""
    return Entry(ours, (Piece(theirs, (width,)),))


def frame(config: ModelConfig) -> list[Entry]:
    """Embedding, final norm, head and the norms of every block, named as in Llama."""
    V, D = config.vocab_size, config.dim
    entries = [
        Entry("embedding.weight", (Piece("model.embed_tokens.weight", (V, D)),)),
        vector("norm.weight", "model.norm.weight", D),
    ]
    if not config.tie_embeddings:
        entries.append(Entry("head.weight", (Piece("lm_head.weight", (V, D)),)))
    for i in range(config.num_layers):
        ours, theirs = f"blocks.{i}", f"model.layers.{i}"
        entries.append(vector(f"{ours}.norm1.weight", f"{theirs}.input_layernorm.weight", D))
        entries.append(vector(f"{ours}.norm2.weight", f"{theirs}.post_attention_layernorm.weight", D))
    return entries


def grouped_attention(config: ModelConfig, i: int) -> list[Entry]:
    """Grouped-query attention of block ``i``, named as in Llama."""
    ours, theirs = f"blocks.{i}.attention", f"model.layers.{i}.self_attn"
    D, R = config.dim, config.heads_dim
    q, kv = config.num_heads * R, config.kv_heads * R
    has_bias = config.attention_bias != "none"
    entries = []
    for name, width in (("q", q), ("k", kv), ("v", kv)):
        entries += linear(f"{ours}.w{name}", f"{theirs}.{name}_proj", width, D, bias=has_bias)
    entries += linear(f"{ours}.wo", f"{theirs}.o_proj", D, q, bias=config.attention_bias == "all")
    if config.qk_norm != "none":
        widths = (R, R) if config.qk_norm == "head" else (q, kv)
        entries += [
            vector(f"{ours}.{n}_norm.weight", f"{theirs}.{n}_norm.weight", w) for n, w in zip("qk", widths, strict=True)
        ]
    if config.attention_sinks:
        entries.append(vector(f"{ours}.sinks", f"{theirs}.sinks", config.num_heads))
    return entries


def gated_mlp(ours: str, theirs: str, dim: int, hidden: int, *, bias: bool = False) -> list[Entry]:
    """A dense SwiGLU network: gate and up are rows of one matrix here."""

    def gate(w: Tensor) -> Tensor:
        return w[:hidden]

    def up(w: Tensor) -> Tensor:
        return w[hidden:]

    entries = [
        Entry(
            f"{ours}.w_in.weight",
            (
                Piece(f"{theirs}.gate_proj.weight", (hidden, dim), gate),
                Piece(f"{theirs}.up_proj.weight", (hidden, dim), up),
            ),
        ),
        *linear(f"{ours}.w_out", f"{theirs}.down_proj", dim, hidden, bias=bias),
    ]
    if bias:
        pieces = (Piece(f"{theirs}.gate_proj.bias", (hidden,), gate), Piece(f"{theirs}.up_proj.bias", (hidden,), up))
        entries.append(Entry(f"{ours}.w_in.bias", pieces))
    return entries


def gated_experts(
    ours: str,
    theirs: str,
    num_experts: int,
    dim: int,
    hidden: int,
    layout: Layout,
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
) -> list[Entry]:
    """Stacked SwiGLU experts, ours (E, D, gate | up) and (E, H, D).

    Theirs: ``{theirs}.{e}.{name}.weight``, (H, D), (H, D), (D, H); or stacked, ``{theirs}.gate_up_proj`` (E, 2H, D) and
    ``{theirs}.down_proj`` (E, D, H).
    """
    if layout == "stacked":
        return [
            Entry(
                f"{ours}.w_in",
                (Piece(f"{theirs}.gate_up_proj", (num_experts, 2 * hidden, dim), whole, TRANSPOSED),),
            ),
            Entry(f"{ours}.w_out", (Piece(f"{theirs}.down_proj", (num_experts, dim, hidden), whole, TRANSPOSED),)),
        ]
    inward, outward = [], []
    for e in range(num_experts):
        gate, up, down = (f"{theirs}.{e}.{name}.weight" for name in names)
        inward.append(Piece(gate, (hidden, dim), partial(_columns, expert=e, first=0, end=hidden), TRANSPOSED))
        inward.append(Piece(up, (hidden, dim), partial(_columns, expert=e, first=hidden, end=2 * hidden), TRANSPOSED))
        outward.append(Piece(down, (dim, hidden), partial(_columns, expert=e, first=0, end=dim), TRANSPOSED))
    return [Entry(f"{ours}.w_in", tuple(inward)), Entry(f"{ours}.w_out", tuple(outward))]


def _columns(w_EDW: Tensor, expert: int, first: int, end: int) -> Tensor:
    return w_EDW[expert, :, first:end]


def router_gate(i: int, theirs: str, num_experts: int, dim: int, *, bias: bool = False) -> list[Entry]:
    """The linear gate of block ``i``."""
    return linear(f"blocks.{i}.ffn.router.gate", theirs, num_experts, dim, bias=bias)


def of_sparse(config: ModelConfig, i: int) -> tuple[MoEConfig, int, int]:
    """The sparse settings, and experts and expert width of block ``i``."""
    assert config.moe is not None
    at = config.moe_layers.index(i)
    return config.moe, pick(config.moe.num_experts, at), pick(config.moe.hidden, at)


def as_released(config: ModelConfig) -> ModelConfig:
    """With one expert per token at weight 1 a gate cannot learn, and training refuses it; what was released so still runs."""
    moe = config.moe
    if moe is None or moe.k != 1 or moe.router.options.get("normalize", "chosen") == "none":
        return config
    return replace(config, moe=replace(moe, router=replace(moe.router, options={**moe.router.options, "idle": True})))


def one_value(value: int | tuple[int, ...]) -> int:
    """The value of a per-layer setting where all layers share it, else the first: reading it again shows the difference."""
    return value if isinstance(value, int) else value[0]


def moe_of(config: ModelConfig) -> MoEConfig:
    """The sparse settings. Raises ``ConfigError`` for a dense model: the family is a sparse one."""
    if config.moe is None:
        raise ConfigError("This model has no experts, and the family is one of sparse models.")
    return config.moe


def by_layer(config: ModelConfig, *parts: Callable[[ModelConfig, int], Iterable[Entry]]) -> list[Entry]:
    """The entries of all blocks."""
    return [entry for i in range(config.num_layers) for part in parts for entry in part(config, i)]
