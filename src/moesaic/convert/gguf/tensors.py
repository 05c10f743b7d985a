"""The table from our tensors to llama.cpp's: name, part and order of rows.

Legend: D model width, H width of a feed-forward network, E experts, A heads, R width of what rotary positions turn in a head,
N and P parts of a latent head's query without and with them, W width of its value, C latent rank.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from moesaic.checkpoint.shards import names_in_words
from moesaic.convert.gguf.architectures import Architecture
from moesaic.errors import CheckpointError
from moesaic.models.config import ModelConfig

Shape = tuple[int, ...]
Take = Callable[[Tensor, ModelConfig], Tensor]  # the part of a tensor, in GGUF's order; a view where it can be


@dataclass(frozen=True)
class Target:
    """One GGUF tensor made from one of ours. ``exact``: stays F32 whatever the file's type."""

    name: str
    take: Take
    exact: bool = False


def interleave(rows: Tensor, heads: int) -> Tensor:
    """Rows (heads * R, ...) from halves (first R/2, second R/2) to neighbouring pairs (0, R/2, 1, R/2 + 1, ...)."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _whole(t: Tensor, cfg: ModelConfig) -> Tensor:
    return t


def _vector(t: Tensor, cfg: ModelConfig) -> Tensor:
    return t.reshape(-1)


def _first_rows(t: Tensor, cfg: ModelConfig) -> Tensor:
    return t.chunk(2)[0]


def _last_rows(t: Tensor, cfg: ModelConfig) -> Tensor:
    return t.chunk(2)[1]


def _gate_EHD(t: Tensor, cfg: ModelConfig) -> Tensor:
    return t.chunk(2, dim=2)[0].transpose(1, 2)


def _up_EHD(t: Tensor, cfg: ModelConfig) -> Tensor:
    return t.chunk(2, dim=2)[1].transpose(1, 2)


def _down_EDH(t: Tensor, cfg: ModelConfig) -> Tensor:
    return t.transpose(1, 2)


def _gate_EH(t: Tensor, cfg: ModelConfig) -> Tensor:
    return t.chunk(2, dim=1)[0]


def _up_EH(t: Tensor, cfg: ModelConfig) -> Tensor:
    return t.chunk(2, dim=1)[1]


def _queries(t: Tensor, cfg: ModelConfig) -> Tensor:
    return interleave(t, cfg.num_heads)


def _keys(t: Tensor, cfg: ModelConfig) -> Tensor:
    return interleave(t, cfg.kv_heads)


def _latent_queries(t: Tensor, cfg: ModelConfig) -> Tensor:
    """(A * (N + P), D): the rotary part of every head, its last P rows, in pairs."""
    assert cfg.latent is not None
    heads = t.clone().view(cfg.num_heads, -1, *t.shape[1:])
    rope = heads[:, cfg.latent.nope_dim :]
    rope.copy_(interleave(rope.flatten(0, 1), cfg.num_heads).view_as(rope))
    return heads.flatten(0, 1)


def _latent_keys(t: Tensor, cfg: ModelConfig) -> Tensor:
    """(C + P, D): the last P rows in pairs."""
    assert cfg.latent is not None
    copy = t.clone()
    copy[cfg.latent.kv_rank :] = interleave(t[cfg.latent.kv_rank :], 1)
    return copy


def _to_keys_ACN(t: Tensor, cfg: ModelConfig) -> Tensor:
    """From (A * (N + W), C); transposed, since queries are multiplied by it (absorption)."""
    assert cfg.latent is not None
    return t.view(cfg.num_heads, -1, cfg.latent.kv_rank)[:, : cfg.latent.nope_dim].transpose(1, 2)


def _to_values_AWC(t: Tensor, cfg: ModelConfig) -> Tensor:
    assert cfg.latent is not None
    return t.view(cfg.num_heads, -1, cfg.latent.kv_rank)[:, cfg.latent.nope_dim :]


def _exact(name: str, take: Take = _whole) -> tuple[Target, ...]:
    return (Target(name, take, exact=True),)


def _cast(name: str, take: Take = _whole) -> tuple[Target, ...]:
    return (Target(name, take),)


_TABLE: dict[str, tuple[Target, ...]] = {
    "embedding.weight": _cast("token_embd.weight"),
    "head.weight": _cast("output.weight"),
    "norm.weight": _exact("output_norm.weight"),
    "norm1.weight": _exact("attn_norm.weight"),
    "norm2.weight": _exact("ffn_norm.weight"),
    **{f"attention.{o}.weight": _cast(f"attn_{g}.weight") for o, g in zip(("wq", "wk", "wv"), "qkv", strict=True)},
    **{f"attention.{o}.bias": _exact(f"attn_{g}.bias") for o, g in zip(("wq", "wk", "wv"), "qkv", strict=True)},
    "attention.wo.weight": _cast("attn_output.weight"),
    "attention.wo.bias": _exact("attn_output.bias"),
    "attention.q_norm.weight": _exact("attn_q_norm.weight"),
    "attention.k_norm.weight": _exact("attn_k_norm.weight"),
    "attention.sinks": _exact("attn_sinks.weight"),
    "ffn.w_in.weight": _cast("ffn_gate.weight", _first_rows) + _cast("ffn_up.weight", _last_rows),
    "ffn.w_in.bias": _exact("ffn_gate.bias", _first_rows) + _exact("ffn_up.bias", _last_rows),
    "ffn.w_out.weight": _cast("ffn_down.weight"),
    "ffn.w_out.bias": _exact("ffn_down.bias"),
    "ffn.router.gate.weight": _exact("ffn_gate_inp.weight"),
    "ffn.router.gate.bias": _exact("ffn_gate_inp.bias"),
    "ffn.router.choice_bias_E": _exact("exp_probs_b.bias"),
    "ffn.experts.w_in": _cast("ffn_gate_exps.weight", _gate_EHD) + _cast("ffn_up_exps.weight", _up_EHD),
    "ffn.experts.w_out": _cast("ffn_down_exps.weight", _down_EDH),
    "ffn.experts.b_in": _exact("ffn_gate_exps.bias", _gate_EH) + _exact("ffn_up_exps.bias", _up_EH),
    "ffn.experts.b_out": _exact("ffn_down_exps.bias"),
    "ffn.shared.mlp.w_in.weight": _cast("ffn_gate_shexp.weight", _first_rows)
    + _cast("ffn_up_shexp.weight", _last_rows),
    "ffn.shared.mlp.w_out.weight": _cast("ffn_down_shexp.weight"),
    "ffn.shared.output_gate.weight": _exact("ffn_gate_inp_shexp.weight", _vector),
}

# What differs where rotary pairs are neighbours.
_INTERLEAVED = {
    "attention.wq.weight": _cast("attn_q.weight", _queries),
    "attention.wq.bias": _exact("attn_q.bias", _queries),
    "attention.wk.weight": _cast("attn_k.weight", _keys),
    "attention.wk.bias": _exact("attn_k.bias", _keys),
}

_LATENT = {
    "attention.wq.weight": _cast("attn_q.weight", _latent_queries),
    "attention.wq_a.weight": _cast("attn_q_a.weight"),
    "attention.q_norm.weight": _exact("attn_q_a_norm.weight"),
    "attention.wq_b.weight": _cast("attn_q_b.weight", _latent_queries),
    "attention.wkv_a.weight": _cast("attn_kv_a_mqa.weight", _latent_keys),
    "attention.kv_norm.weight": _exact("attn_kv_a_norm.weight"),
    "attention.wkv_b.weight": _cast("attn_k_b.weight", _to_keys_ACN) + _cast("attn_v_b.weight", _to_values_AWC),
}

_GPT_OSS = {"norm2.weight": _exact("post_attention_norm.weight")}

_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")


def targets_of(name: str, config: ModelConfig, arch: Architecture) -> tuple[Target, ...] | None:
    """The GGUF tensors made from our tensor ``name``, with their full names; None where the table has no place for it."""
    match = _BLOCK.fullmatch(name)
    row, prefix = (name, "") if match is None else (match[2], f"blk.{match[1]}.")
    table = _TABLE
    if config.latent is not None:
        table = table | _LATENT
    elif arch.interleaved:
        table = table | _INTERLEAVED
    if arch.name == "gpt-oss":
        table = table | _GPT_OSS
    found = table.get(row)
    if found is None:
        return None
    targets = tuple(Target(prefix + target.name, target.take, target.exact) for target in found)
    if name == "embedding.weight" and config.tie_embeddings and arch.own_head:
        targets += _cast("output.weight")
    return targets


def plan_of(
    shapes: Mapping[str, Shape], expected: Mapping[str, Shape], config: ModelConfig, arch: Architecture
) -> dict[str, tuple[Target, ...]]:
    """Our name -> GGUF tensors, for every tensor there is; a tied head comes from the embedding.

    Raises ``CheckpointError`` naming tensors that are missing, left over or of another shape than the config's.
    """
    tied = {"head.weight"} if config.tie_embeddings else set()
    wanted = {name: shape for name, shape in expected.items() if name not in tied}
    _name(wanted.keys() - shapes.keys(), "lacks")
    plan, left = {}, []
    for name in shapes:
        targets = targets_of(name, config, arch)
        if name in tied:
            continue
        if name not in wanted or targets is None:
            left.append(name)
        else:
            plan[name] = targets
    _name(left, f'has no place in architecture "{arch.name}" for')
    wrong = [name for name in plan if shapes[name] != wanted[name]]
    if wrong:
        raise CheckpointError(
            f"{len(wrong)} tensors have another shape than the config says, first {wrong[0]}: {list(shapes[wrong[0]])} instead "
            f"of {list(wanted[wrong[0]])}."
        )
    return plan


def _name(names: Iterable[str], what: str) -> None:
    names = sorted(names)
    if names:
        raise CheckpointError(f"The model {what} {len(names)} tensors: {names_in_words(names)}.")
