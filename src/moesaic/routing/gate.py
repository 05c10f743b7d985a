"""What all routers share: the contract, the fp32 gate, score functions, and the stable top-k choice.

A router is an ``nn.Module`` with ``forward(x_TD, ctx) -> RoutingPlan``. Its class states facts (``causal``,
``batch_invariant``, ...), its parameters and buffers stay fp32 whatever the model is cast to, and ``forward`` stores nothing.

Legend: T tokens, D model width, E experts, K experts per token.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.errors import ConfigError, one_of
from moesaic.plan.plan import Gate, RoutingPlan, at_least_fp32
from moesaic.routing.context import NO_CONTEXT, TokenContext

Score = Literal["softmax", "sigmoid", "sqrt_softplus"]


class KeepsFp32(nn.Module):
    """A module whose parameters and buffers never fall below fp32: a router rounds to ties in 8 bits of mantissa."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> KeepsFp32:
        """Keep fp32 through ``.to(bfloat16)``, ``.half()`` and the like."""

        def keep_fp32(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if tensor.is_floating_point() and moved.dtype.itemsize < 4:
                return tensor.to(moved.device)
            return moved

        applied: KeepsFp32 = super()._apply(keep_fp32, recurse)
        return applied

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """A checkpoint holding these tensors in half precision is read into fp32."""
        for name, tensor in state_dict.items():
            if name.startswith(prefix) and tensor.is_floating_point() and tensor.dtype.itemsize < 4:
                state_dict[name] = tensor.float()
        super()._load_from_state_dict(state_dict, prefix, *args)


class Router(KeepsFp32, ABC):
    """The contract. Subclasses are final: variations are options or other routers.

    Class facts:
        causal: a token's routing never depends on later tokens of its sequence.
        batch_invariant: nor on other sequences of the batch.
        has_gate: plans carry scores with a gradient, so auxiliary losses on them can teach the router.
        has_load_estimate: plans carry ``gate.load_probs_TE`` (noisy gates), which ``load_loss`` needs.
    """

    causal: ClassVar[bool] = True
    batch_invariant: ClassVar[bool] = True
    has_gate: ClassVar[bool] = True
    has_load_estimate: ClassVar[bool] = False

    num_experts: int
    k: int

    @abstractmethod
    def forward(self, x_TD: Tensor, ctx: TokenContext = NO_CONTEXT) -> RoutingPlan:
        """Decide. ``x_TD`` is the normalised input of the layer, any float dtype."""

    def after_step(self, counts_E: Tensor) -> None:
        """Called once per optimiser step with the step's (all ranks', all micro-batches') choices per expert.

        For state that follows load, such as a selection bias. ``forward`` never changes state.
        """

    def weigh(self, gate: Gate, expert_TK: Tensor) -> Tensor:
        """fp32 (T, K) weights this router would give to these experts; routers that support live replay define it."""
        raise ConfigError(
            f'Router "{type(self).__name__}" cannot weigh experts it did not choose; replay recorded weights.'
        )


class LinearGate(KeepsFp32):
    """Scores ``x W`` (+ bias), computed in fp32 whatever the dtype of ``x``. Weight (E, D) as in ``nn.Linear``."""

    def __init__(self, dim: int, num_experts: int, *, bias: bool = False, init_std: float = 0.02) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, dim, dtype=router_dtype()))
        self.bias = nn.Parameter(torch.zeros(num_experts, dtype=router_dtype())) if bias else None
        if not init_std >= 0:
            raise ConfigError(f"init_std must be at least 0, not {init_std}.")
        self.init_std = init_std
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """N(0, init_std), the DeepSeek/Hugging Face habit; 0 gives Shazeer's zero start."""
        if self.init_std:
            nn.init.normal_(self.weight, std=self.init_std)
        else:
            nn.init.zeros_(self.weight)

    def forward(self, x_TD: Tensor) -> Tensor:
        """fp32 logits (T, E)."""
        with torch.autocast(x_TD.device.type, enabled=False):  # autocast would round logits to bf16 ties
            return F.linear(x_TD.to(self.weight.dtype), self.weight, self.bias)


def router_dtype() -> torch.dtype:
    """What router parameters and buffers are made in: the default dtype, but never less than fp32."""
    return torch.promote_types(torch.get_default_dtype(), torch.float32)


def score(logits_TE: Tensor, how: Score) -> Tensor:
    """fp32 scores (T, E): softmax over experts, or independent sigmoid, or sqrt(softplus) (Megatron-LM)."""
    one_of("score", how, get_args(Score))
    logits_TE = at_least_fp32(logits_TE)
    if how == "softmax":
        return logits_TE.softmax(dim=-1)
    if how == "sigmoid":
        return logits_TE.sigmoid()
    # softplus underflows to 0 below about -104, where the root's gradient would be 0 * inf = NaN.
    return F.softplus(logits_TE).clamp(min=1e-30).sqrt()


def choose(scores_TE: Tensor, k: int) -> Tensor:
    """int64 (T, K): the k best experts, best first; ties go to the lowest expert on every device. Carries no gradient.

    ``torch.topk`` promises no order on equal values, and CPU and GPU differ, hence the stable sort.
    """
    return torch.sort(scores_TE.detach(), dim=-1, descending=True, stable=True).indices[:, :k]


def mask_groups(
    scores_TE: Tensor, num_groups: int, groups_kept: int, group_score: Literal["max", "top2_sum"]
) -> Tensor:
    """Scores with every expert outside a token's best groups at -inf (DeepSeek-V2: "max"; V3: "top2_sum").

    -inf and not 0: with negative selection biases a masked expert at 0 could still win.
    """
    T, E = scores_TE.shape
    grouped_TGM = scores_TE.detach().view(T, num_groups, E // num_groups)
    if group_score == "max":
        best_TG = grouped_TGM.amax(dim=-1)
    else:
        best_TG = grouped_TGM.topk(min(2, E // num_groups), dim=-1).values.sum(dim=-1)
    keep_TG = torch.zeros_like(best_TG, dtype=torch.bool).scatter_(1, choose(best_TG, groups_kept), True)
    return scores_TE.masked_fill(~keep_TG.repeat_interleave(E // num_groups, dim=1), float("-inf"))


def check_k(k: int, num_experts: int) -> None:
    """Raises ``ConfigError`` unless 1 <= k <= E."""
    if num_experts < 1:
        raise ConfigError(f"A MoE layer needs at least 1 expert, not num_experts={num_experts}.")
    if not 1 <= k <= num_experts:
        raise ConfigError(
            f"k={k} experts per token are impossible with num_experts={num_experts}; choose k between 1 and {num_experts}."
        )
