"""The same layer once more, expert by expert in fp32, and the check that a contender computes it: output and all gradients.

Figures of layers that compute different things are worthless, so no sparse contender is timed before it has passed.

Legend: T tokens, D model width, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from common import BenchError
from peers import Peer, Weights
from torch import Tensor

# Relative error allowed against the fp32 reference, per tensor. bf16 keeps 8 bits of mantissa.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Truth:
    """What a sparse layer must give: fp32 output, gradients of input and router, and of each expert (None: no token).

    ``router_scale`` is the norm that the router's gradient has where the terms of a token's experts do not cancel. They may
    cancel (two experts whose outputs help alike), and what rounding leaves then is no error.
    """

    y: Tensor
    x: Tensor | None
    router: Tensor | None
    w_in: list[Tensor | None]
    w_out: list[Tensor | None]
    router_scale: float


def reference(x_TD: Tensor, weights: Weights, k: int, grad_TD: Tensor | None = None) -> Truth:
    """The layer expert by expert in fp32, with gradients where ``grad_TD`` (of the output) is given."""
    with torch.set_grad_enabled(grad_TD is not None):
        leaf = grad_TD is not None
        x_TD = x_TD.detach().float().requires_grad_(leaf)
        router_ED = weights.router_ED.detach().requires_grad_(leaf)
        top = F.linear(x_TD, router_ED).softmax(dim=-1).topk(k, dim=-1)
        weight_TK = top.values / top.values.sum(dim=-1, keepdim=True)
        tokens, rows, ins, outs = [], [], [], []
        for w_in, w_out, expert in zip(weights.w_in, weights.w_out, range(len(weights.w_in)), strict=True):
            token, place = (top.indices == expert).nonzero(as_tuple=True)
            w_in, w_out = (w.detach().float().requires_grad_(leaf) if len(token) else None for w in (w_in, w_out))
            ins.append(w_in)
            outs.append(w_out)
            if w_in is not None and w_out is not None:
                gate, up = (x_TD[token] @ w_in).chunk(2, dim=-1)
                rows.append(((F.silu(gate) * up) @ w_out) * weight_TK[token, place, None])
                tokens.append(token)
        y_TD = torch.zeros_like(x_TD).index_add(0, torch.cat(tokens), torch.cat(rows))
        if grad_TD is not None:
            torch.autograd.backward(y_TD, grad_TD.float())
    scale = 0.0
    if grad_TD is not None:  # rows are weighted outputs, so g . row / sqrt(D) is the usual size of a term
        sizes = (
            row_ND.detach().norm(dim=1) * grad_TD[t].float().norm(dim=1) * x_TD.detach()[t].norm(dim=1)
            for row_ND, t in zip(rows, tokens, strict=True)
        )
        scale = float(torch.cat(list(sizes)).square().sum() / x_TD.shape[1]) ** 0.5
    w_in_grads, w_out_grads = ([None if w is None else w.grad for w in stack] for stack in (ins, outs))
    return Truth(y_TD.detach(), x_TD.grad, router_ED.grad, w_in_grads, w_out_grads, scale)


def check(name: str, peer: Peer, x_TD: Tensor, truth: Truth, grad_TD: Tensor | None = None) -> dict[str, float]:
    """Relative errors of output and, where ``grad_TD`` is given, of all gradients. Raises ``BenchError`` over the tolerance."""
    peer.clear()
    x_TD = x_TD.detach().requires_grad_(grad_TD is not None)
    with torch.set_grad_enabled(grad_TD is not None):
        y_TD = peer.forward(x_TD)
        errors = {"output": _error([y_TD.detach()], [truth.y])}
        if grad_TD is not None:
            torch.autograd.backward(y_TD, grad_TD)
            errors["x"] = _error([x_TD.grad], [truth.x])
            grads = peer.gradients()
            errors["router"] = _error([grads["router"]], [truth.router], truth.router_scale)
            for key, wanted in (("w_in", truth.w_in), ("w_out", truth.w_out)):
                stacked = grads[key]
                errors[key] = _error([None] * len(wanted) if stacked is None else list(stacked), wanted)
    peer.clear()
    limit = TOLERANCE[y_TD.dtype]
    for what, error in errors.items():
        if not error <= limit:
            quantity = "output" if what == "output" else f"gradient of {what}"
            raise BenchError(
                f"{name} does not compute the same layer: its {quantity} is off by {error:.1e} (allowed: {limit:.0e})."
            )
    return errors


def _error(mine: Sequence[Tensor | None], wanted: Sequence[Tensor | None], scale: float = 0.0) -> float:
    """Norm of the difference over that of what is wanted, or over ``scale`` if larger; by matrix, so that copies stay small.

    None is a gradient of zeros where it is wanted, and infinitely wrong where it is given.
    """
    off = size = 0.0
    for a, b in zip(mine, wanted, strict=True):
        if a is None:
            return float("inf")
        off += float((a.float() if b is None else a.float() - b).square().sum(dtype=torch.float64))
        size += 0.0 if b is None else float(b.square().sum(dtype=torch.float64))
    size = max(size, scale**2)
    return (off / size) ** 0.5 if size else float(off > 0)
