"""Feed-forward experts as stacked parameters: ``w_in`` (E, D, 2H or H) and ``w_out`` (E, H, D).

Contract of everything that computes experts: ``forward(x_ND, counts_E) -> y_ND`` on rows grouped by expert; rows past the last
group give zeros; an expert without rows keeps a zero gradient. Those that offer ``fuses`` may be called with a third argument,
``sources``, to go from tokens to the weighted sum of each token's rows without the rows in between (``ops/fused.py``).

Legend: N rows, E experts, D model width, H expert width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.errors import ConfigError, one_of
from moesaic.nn.linear import init_fan_in_
from moesaic.nn.mlp import ACTIVATIONS, Activation, apply_activation
from moesaic.ops.fused import Sources, as_they_are, experts_mlp
from moesaic.ops.grouped import BACKENDS, Backend, grouped_mm
from moesaic.ops.pages import prefer_huge


class StackedExperts(nn.Module):
    """E feed-forward networks of one shape, gated ``(act(x Wg) * (x Wu)) Wd`` or plain ``act(x W1) W2``.

    Args:
        num_experts, dim, hidden: E, D, H.
        activation, gated: as in ``nn.MLP``; gate and up share ``w_in`` side by side, so that one product feeds both.
        backend: "kernel" or "tiles" (``ops/fused.py``); "loop", "grouped_mm" or "reference" products (``ops/grouped.py``);
            "auto" takes the kernel on the processor where there is one, else tiles; and ``grouped_mm`` on a GPU.
        dropout: in training, share of hidden units set to 0 (Switch fine-tunes with 0.4 here and 0.1 elsewhere).
    """

    def __init__(
        self,
        num_experts: int,
        dim: int,
        hidden: int,
        activation: Activation = "silu",
        gated: bool = True,
        backend: Backend = "auto",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if not 0 <= dropout < 1:
            raise ConfigError(f"Dropout inside experts must be at least 0 and below 1, not {dropout}.")
        one_of("activation", activation, ACTIVATIONS)
        one_of("backend", backend, BACKENDS)
        self.num_experts, self.dim, self.hidden = num_experts, dim, hidden
        self.activation, self.gated = activation, gated
        self.backend: Backend = backend
        self.dropout = dropout
        self.w_in = nn.Parameter(prefer_huge(torch.empty(num_experts, dim, hidden * (2 if gated else 1))))
        self.w_out = nn.Parameter(prefer_huge(torch.empty(num_experts, hidden, dim)))
        self.reset_parameters()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StackedExperts:
        """Casts and moves make new tensors, whose pages are to be large again."""

        def with_pages(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved is tensor else prefer_huge(moved, written=not tensor.is_meta)

        applied: StackedExperts = super()._apply(with_pages, recurse)
        return applied

    def reset_parameters(self, scale: float = 1.0, out_scale: float = 1.0) -> None:
        """Fan-in initialisation per expert, each from its own seed, so that a rank holding expert e draws the same values."""
        if self.w_in.is_meta:
            return
        base = int(torch.randint(2**31, ()))
        for expert in range(self.num_experts):
            generator = torch.Generator(self.w_in.device).manual_seed(base + expert)
            init_fan_in_(self.w_in.data[expert], self.dim, scale, generator)
            init_fan_in_(self.w_out.data[expert], self.hidden, scale * out_scale, generator)

    def forward(self, x: Tensor, counts_E: Tensor, sources: Sources | None = None) -> Tensor:
        """Rows grouped by expert, (N, D) to (N, D), in ``x``'s dtype; with ``sources`` tokens to tokens, (T, D) to (T, D)."""
        if sources is not None or self.fuses(x):
            return experts_mlp(
                x, self.w_in, self.w_out, counts_E, sources or as_they_are(x), self.activation, self.gated,
                "kernel" if self.backend == "kernel" else "tiles" if self.backend == "tiles" else None,
            )  # fmt: skip
        hidden = grouped_mm(x, self.w_in.to(x.dtype), counts_E, self.backend)
        hidden = apply_activation(hidden, self.activation, self.gated)
        if self.dropout and self.training:
            hidden = F.dropout(hidden, self.dropout)
        return grouped_mm(hidden, self.w_out.to(x.dtype), counts_E, self.backend)

    def fuses(self, x: Tensor) -> bool:
        """Whether gather, experts and combine of such tokens are one operation here: ``forward`` with ``sources``."""
        if (self.dropout and self.training) or type(self).forward is not StackedExperts.forward:
            return False  # a subclass with a forward of its own knows rows alone
        return self.backend in ("kernel", "tiles") or (self.backend == "auto" and x.device.type == "cpu")

    def expert(self, index: int) -> dict[str, Tensor]:
        """Named views of one expert's matrices: ``gate`` and ``up`` (D, H) or ``in`` (D, H), and ``out`` (H, D)."""
        if not 0 <= index < self.num_experts:
            raise ConfigError(f"There is no expert {index}: this layer has experts 0 to {self.num_experts - 1}.")
        w_in, w_out = self.w_in[index], self.w_out[index]
        if not self.gated:
            return {"in": w_in, "out": w_out}
        gate, up = w_in.chunk(2, dim=-1)
        return {"gate": gate, "up": up, "out": w_out}

    def compute_one(self, index: int, x_ND: Tensor) -> Tensor:
        """One expert on rows (N, D), by plain products: the specification of ``forward`` for a single group, dropout aside."""
        hidden = apply_activation(x_ND @ self.w_in[index].to(x_ND.dtype), self.activation, self.gated)
        return hidden @ self.w_out[index].to(x_ND.dtype)
