"""Single-neuron experts, up to millions of them (PEER, He 2024): ``y = act(x . u_e) v_e``, from two (E, D) tables.

Contract as in ``stacked.py``: rows grouped by expert; rows past the last group give zeros; an expert without rows keeps a zero
gradient. Work and memory follow the N rows, except the gradient tables: dense ones hold all E experts (what clipping, AdamW and
weight decay in ``train`` expect), sparse ones only the experts that were used.

    experts = NeuronExperts(1024**2, 256, sparse_grad=True)
    torch.optim.SparseAdam(experts.parameters())          # AdamW cannot take sparse gradients

Backward keeps x and N dot products; rows of the tables are gathered again rather than kept. Dots and products run in at least
fp32, since no matrix unit is involved: half precision would save nothing.

Legend: N rows, E experts, D model width.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from moesaic.errors import ConfigError, one_of
from moesaic.nn.linear import init_fan_in_
from moesaic.nn.mlp import ACTIVATIONS, Activation
from moesaic.plan.plan import at_least_fp32

ExpertKind = Literal["ffn", "neuron"]


class NeuronExperts(nn.Module):
    """E experts of one hidden unit each, never gated.

    Args:
        num_experts, dim: E, D.
        activation: as in ``nn.MLP``.
        sparse_grad: gradients of both tables as sparse tensors, for ``torch.optim.SparseAdam``; experts outside a batch then
            have no entry in them, which stands for zero.
    """

    hidden = 1

    def __init__(
        self, num_experts: int, dim: int, activation: Activation = "gelu", *, sparse_grad: bool = False
    ) -> None:
        super().__init__()
        one_of("activation", activation, ACTIVATIONS)
        self.num_experts, self.dim, self.activation, self.sparse_grad = num_experts, dim, activation, sparse_grad
        self.w_in = nn.Parameter(torch.empty(num_experts, dim))
        self.w_out = nn.Parameter(torch.empty(num_experts, dim))
        self.reset_parameters()

    def reset_parameters(self, scale: float = 1.0, out_scale: float = 1.0) -> None:
        """Fan-in initialisation, as of feed-forward experts of width 1: fan-in D, then 1.

        Drawn in blocks of experts, because drawing needs a temporary as large as what is drawn.
        """
        if self.w_in.is_meta:
            return
        for block_ED in self.w_in.data.split(2**16):
            init_fan_in_(block_ED, self.dim, scale)
        for block_ED in self.w_out.data.split(2**16):
            init_fan_in_(block_ED, self.hidden, scale * out_scale)

    def forward(self, x_ND: Tensor, counts_E: Tensor) -> Tensor:
        """Rows grouped by expert, (N, D) to (N, D), in ``x``'s dtype."""
        place_N = torch.arange(x_ND.shape[0], device=x_ND.device)
        expert_N = torch.searchsorted(counts_E.cumsum(0), place_N, right=True)  # E past the last group
        row_N, inside_N = expert_N.clamp(max=self.num_experts - 1), expert_N < self.num_experts
        dot_N = _Dots.apply(x_ND, self.w_in, row_N, inside_N, self.sparse_grad)
        hidden_N = ACTIVATIONS[self.activation](dot_N)
        y_ND: Tensor = _Outputs.apply(hidden_N, self.w_out, row_N, inside_N, self.sparse_grad)
        return y_ND.to(x_ND.dtype)

    def expert(self, index: int) -> dict[str, Tensor]:
        """Named views of one expert's vectors, shaped as of a plain feed-forward expert: ``in`` (D, 1) and ``out`` (1, D)."""
        if not 0 <= index < self.num_experts:
            raise ConfigError(f"There is no expert {index}: this layer has experts 0 to {self.num_experts - 1}.")
        return {"in": self.w_in[index, :, None], "out": self.w_out[index, None, :]}

    def compute_one(self, index: int, x_ND: Tensor) -> Tensor:
        """One expert on rows (N, D), by plain products: the specification of ``forward`` for a single group."""
        hidden_N = ACTIVATIONS[self.activation](x_ND @ self.w_in[index].to(x_ND.dtype))
        return hidden_N[..., None] * self.w_out[index].to(x_ND.dtype)


class _Dots(torch.autograd.Function):
    """``x . u_e`` (N,); 0 past the last group, whatever stands there."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, u_ED: Tensor, row_N: Tensor, inside_N: Tensor, sparse: bool) -> Tensor:
        ctx.save_for_backward(x_ND, u_ED, row_N, inside_N)
        ctx.sparse = sparse
        return torch.where(inside_N, (at_least_fp32(x_ND) * u_ED[row_N]).sum(dim=1), 0.0)

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, u_ED, row_N, inside_N = ctx.saved_tensors
        grad_N1 = torch.where(inside_N, grad_N, 0.0)[:, None]
        grad_x_ND = grad_u_ED = None
        if ctx.needs_input_grad[0]:
            grad_x_ND = (grad_N1 * u_ED[row_N]).to(x_ND.dtype)
        if ctx.needs_input_grad[1]:
            rows_ND = torch.where(inside_N[:, None], grad_N1 * x_ND, 0.0)
            grad_u_ED = _table_gradient(rows_ND, row_N, inside_N, u_ED, ctx.sparse)
        return grad_x_ND, grad_u_ED, None, None, None


class _Outputs(torch.autograd.Function):
    """``h v_e`` (N, D); 0 past the last group."""

    @staticmethod
    def forward(ctx: Any, hidden_N: Tensor, v_ED: Tensor, row_N: Tensor, inside_N: Tensor, sparse: bool) -> Tensor:
        ctx.save_for_backward(hidden_N, v_ED, row_N, inside_N)
        ctx.sparse = sparse
        return torch.where(inside_N[:, None], hidden_N[:, None] * v_ED[row_N], 0.0)

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        hidden_N, v_ED, row_N, inside_N = ctx.saved_tensors
        grad_ND = torch.where(inside_N[:, None], grad_ND, 0.0)
        grad_hidden_N = grad_v_ED = None
        if ctx.needs_input_grad[0]:
            grad_hidden_N = (grad_ND * v_ED[row_N]).sum(dim=1)
        if ctx.needs_input_grad[1]:
            grad_v_ED = _table_gradient(hidden_N[:, None] * grad_ND, row_N, inside_N, v_ED, ctx.sparse)
        return grad_hidden_N, grad_v_ED, None, None, None


def _table_gradient(rows_ND: Tensor, row_N: Tensor, inside_N: Tensor, table_ED: Tensor, sparse: bool) -> Tensor:
    """The rows added up by expert: a zero-filled table, or a sparse tensor of the rows that reached one."""
    rows_ND = rows_ND.to(table_ED.dtype)
    if sparse:
        index_1N = row_N[inside_N][None]
        return torch.sparse_coo_tensor(index_1N, rows_ND[inside_N], table_ED.shape, check_invariants=False)
    total_ED = torch.zeros_like(table_ED)
    if table_ED.is_cuda:
        return total_ED.index_put_((row_N,), rows_ND, accumulate=True)  # sorts: the same sum in every run
    return total_ED.index_add_(0, row_N, rows_ND)
