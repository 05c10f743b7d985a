"""Experts that are not feed-forward networks: shared (always on), zero, copy and constant (MoE++, Jin et al. 2024).

Zero-computation experts take the last indices of a layer: FFN experts 0..F-1, then zero, copy, constant ones, in that order.

Legend: N rows, T tokens, E experts in all, F of them feed-forward, D model width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moesaic.experts.neurons import NeuronExperts
from moesaic.experts.stacked import StackedExperts
from moesaic.nn.mlp import MLP, Activation
from moesaic.ops.fused import Sources
from moesaic.routing.gate import LinearGate


class WithSpecialExperts(nn.Module):
    """Stacked experts followed by zero (output 0), copy (output x) and constant experts, under one ``forward``.

    A constant expert gives ``a1 * x + a2 * v`` with a trained vector v and ``(a1, a2) = softmax(x W_c)``.
    """

    def __init__(
        self, stacked: StackedExperts | NeuronExperts, zero: int = 0, copy: int = 0, constant: int = 0
    ) -> None:
        super().__init__()
        self.stacked = stacked
        self.zero, self.copy, self.constant = zero, copy, constant
        self.num_experts = stacked.num_experts + zero + copy + constant
        if constant:
            self.constant_v = nn.Parameter(torch.zeros(constant, stacked.dim))
            self.constant_mix = nn.Parameter(torch.empty(constant, stacked.dim, 2).normal_(std=0.02))

    def reset_parameters(self, scale: float = 1.0, out_scale: float = 1.0) -> None:
        """Initialise the stacked experts; constants start as the average of x and 0."""
        self.stacked.reset_parameters(scale, out_scale)
        if self.constant:
            nn.init.zeros_(self.constant_v)
            nn.init.normal_(self.constant_mix, std=0.02)

    def forward(self, x_ND: Tensor, counts_E: Tensor, sources: Sources | None = None) -> Tensor:
        """Rows grouped by expert, (N, D) to (N, D), or with ``sources`` tokens to tokens.

        No host synchronisation: kinds are told apart by row number.
        """
        if sources is not None:
            return self._from_tokens(x_ND, counts_E, sources)
        F = self.stacked.num_experts
        # Rows of special experts lie past the stacked ones' last group and come back as zeros.
        y_ND = self.stacked(x_ND, counts_E[:F])
        ends_E = counts_E.cumsum(0)
        row_N1 = torch.arange(x_ND.shape[0], device=x_ND.device)[:, None]

        def end_of(expert: int) -> Tensor:
            return ends_E[expert - 1] if expert else ends_E.new_zeros(())

        first_copy, first_constant = F + self.zero, F + self.zero + self.copy
        if self.copy:
            is_copy_N1 = (row_N1 >= end_of(first_copy)) & (row_N1 < end_of(first_constant))
            y_ND = torch.where(is_copy_N1, x_ND, y_ND)
        for c in range(self.constant):
            mine_N1 = (row_N1 >= end_of(first_constant + c)) & (row_N1 < end_of(first_constant + c + 1))
            mix_N2 = (x_ND @ self.constant_mix[c].to(x_ND.dtype)).softmax(dim=-1)
            constant_ND = mix_N2[:, :1] * x_ND + mix_N2[:, 1:] * self.constant_v[c].to(x_ND.dtype)
            y_ND = torch.where(mine_N1, constant_ND, y_ND)
        return y_ND

    def fuses(self, x: Tensor) -> bool:
        """Whether the stacked experts do."""
        return isinstance(self.stacked, StackedExperts) and self.stacked.fuses(x)

    def _from_tokens(self, x_TD: Tensor, counts_E: Tensor, sources: Sources) -> Tensor:
        # A special expert's output is a function of its token, so its rows are only a weight per token.
        (token_N, weight_N, order_N), F = sources, self.stacked.num_experts
        y_TD = self.stacked(x_TD, counts_E[:F], sources)
        if not self.copy + self.constant:
            return y_TD
        ends_E = counts_E.cumsum(0)
        place_N = torch.arange(len(order_N), device=order_N.device)
        sorted_N, sorted_token_N = weight_N[order_N], token_N[order_N]

        def weight_of(first: int, count: int) -> Tensor:
            """(T, 1): each token's weight on experts first .. first + count."""
            begin = ends_E[first - 1] if first else ends_E.new_zeros(())
            mine_N = (place_N >= begin) & (place_N < ends_E[first + count - 1])
            total_T = sorted_N.new_zeros(x_TD.shape[0])
            return total_T.index_add(0, sorted_token_N, torch.where(mine_N, sorted_N, 0.0))[:, None]

        total_TD = y_TD.to(weight_N.dtype)
        if self.copy:
            total_TD = total_TD + weight_of(F + self.zero, self.copy) * x_TD
        for c in range(self.constant):
            constant_TD = self.compute_one(F + self.zero + self.copy + c, x_TD)
            total_TD = total_TD + weight_of(F + self.zero + self.copy + c, 1) * constant_TD
        return total_TD.to(x_TD.dtype)

    def compute_one(self, index: int, x_ND: Tensor) -> Tensor:
        """One expert on rows (N, D), the specification."""
        special = index - self.stacked.num_experts
        if special < 0:
            return self.stacked.compute_one(index, x_ND)
        if special < self.zero:
            return torch.zeros_like(x_ND)
        if special < self.zero + self.copy:
            return x_ND
        c = special - self.zero - self.copy
        mix_N2 = (x_ND @ self.constant_mix[c].to(x_ND.dtype)).softmax(dim=-1)
        return mix_N2[..., :1] * x_ND + mix_N2[..., 1:] * self.constant_v[c].to(x_ND.dtype)


class SharedExperts(nn.Module):
    """Experts that see every token: one feed-forward network of width ``count * hidden`` (DeepSeekMoE).

    Args:
        gated_output: multiply the output by ``sigmoid(x w)``, a scalar per token (Qwen2-MoE); it is the weight of an expert, so
            it is computed and kept in fp32 as a router's are.
        width: of the network, where it is not ``count * hidden``.
    """

    def __init__(
        self,
        count: int,
        dim: int,
        hidden: int,
        activation: Activation = "silu",
        gated: bool = True,
        gated_output: bool = False,
        width: int | None = None,
    ) -> None:
        super().__init__()
        self.mlp = MLP(dim, width or count * hidden, activation, gated)
        self.output_gate = LinearGate(dim, 1) if gated_output else None

    def reset_parameters(self, scale: float = 1.0, out_scale: float = 1.0) -> None:
        """Fan-in initialisation of the network; the output gate starts at N(0, 0.02)."""
        self.mlp.reset_parameters(scale, out_scale)
        if self.output_gate is not None:
            self.output_gate.reset_parameters()

    def forward(self, x_TD: Tensor) -> Tensor:
        """(T, D) to (T, D)."""
        y_TD: Tensor = self.mlp(x_TD)
        if self.output_gate is not None:
            y_TD = (y_TD * self.output_gate(x_TD).sigmoid()).to(y_TD.dtype)
        return y_TD
