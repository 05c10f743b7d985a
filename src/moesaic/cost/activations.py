"""Bytes that the forward of a block keeps for its backward, on the path of rows (as on a GPU), tensor by tensor.

What autograd saves of our modules, counted by hand and held against what it does save (tests/cost/test_activations.py). On top
come what products need while they run, and fragments; experts on the processor keep less (``ops/fused.py``).

Legend: T tokens, N rows, D model width, H width of a network, E experts, b bytes of an activation (4 or 2).
"""

from __future__ import annotations

from dataclasses import dataclass

from moesaic.cost.blocks import BlockShape
from moesaic.models.config import ModelConfig

# Of a row: expert, weight and place, kept by the plan; order, token and weights again, kept by its execution.
_PLAN_ROW, _EXECUTED_ROW = 16, 28


@dataclass(frozen=True)
class Activations:
    """Bytes of one block and micro-batch.

    Attributes:
        kept: until the backward.
        recomputed: of them what is kept although activations are recomputed: inputs, norms, and the routing decision.
        casts: 16-bit copies of fp32 weights that products keep; they are there once for every micro-batch.
    """

    kept: int
    recomputed: int
    casts: int


def block_activations(
    model: ModelConfig,
    block: BlockShape,
    tokens: float,
    sent: float,
    received: float,
    b: int,
    *,
    tp: int = 1,
    etp: int = 1,
    casts: int = 0,
) -> Activations:
    """Of one micro-batch on one rank.

    Args:
        tokens: T of this rank. sent, received: rows its tokens own, rows its experts compute.
        casts: numbers in matrices that are kept in 16 bits as well where b is 2.
    """
    T = tokens * block.taken
    norms = 2 * T * _norm(model, model.dim, b)
    inside = T * _attention(model, b) / tp
    plan = 0.0
    if block.experts:
        # fp32 scores; the router reads its input in fp32.
        plan = T * 4 * (block.experts + block.special) + sent * _PLAN_ROW + (T * 4 * model.dim if b < 4 else 0)
        width = model.dim // block.heads
        # Rows come back to be summed in fp32.
        inside += received * (width * b + _network(model, block.hidden, b) / etp) + sent * (width * 4 + _EXECUTED_ROW)
        inside += T * _network(model, block.shared, b) / tp
        if b < 4 and not block.shared:  # the norm's output: the router has its own copy, experts their rows
            inside -= T * model.dim * b
    else:
        inside += T * _network(model, block.hidden, b) / tp
    return Activations(round(norms + plan + inside), round(norms + plan), 2 * casts if b < 4 else 0)


def head_activations(model: ModelConfig, tokens: float, b: int) -> int:
    """Of the final norm and the head: normalised input, logits and, in the backward, their gradient."""
    return round(tokens * (_norm(model, model.dim, b) + 2 * model.vocab_size * b))


def _norm(model: ModelConfig, width: int, b: int) -> int:
    """Input and normalised input in fp32, output in b, one statistic."""
    return width * (8 + b) + 4 if model.norm == "rmsnorm" else width * (4 + b) + 8


def _network(model: ModelConfig, width: int, b: int) -> int:
    """Gate and up, activated gate, their product; ungated before and after the activation."""
    return width * b * (4 if model.gated else 2)


def _attention(model: ModelConfig, b: int) -> int:
    heads, statistic = model.num_heads, 4 * model.num_heads
    if (latent := model.latent) is not None:
        keys = heads * model.heads_dim
        made = heads * (latent.nope_dim + latent.value_dim)
        # The output twice, in the order of heads and in that of positions; latent and rotary key side by side.
        kept = (2 * keys + made + 2 * heads * latent.value_dim + latent.rope_dim * (2 if b == 4 else 1)) * b + statistic
        return kept + _norm(model, latent.kv_rank, b) + (_norm(model, latent.q_rank, b) if latent.q_rank else 0)
    turned = (heads + model.kv_heads) * model.heads_dim
    kept = (turned + model.kv_heads * model.heads_dim + heads * model.heads_dim) * b + statistic
    if model.qk_norm != "none":
        kept += 8 * turned + 4 * (heads + model.kv_heads if model.qk_norm == "head" else 2)
    if model.clip_qkv is not None:
        kept += (turned + model.kv_heads * model.heads_dim) * b
    return kept
