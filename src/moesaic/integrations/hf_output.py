"""What a moesaic model returns to Hugging Face's tools."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from moesaic.plan.plan import RoutingPlan, SoftPlan


@dataclass
class MoesaicOutput(CausalLMOutputWithPast):  # type: ignore[misc]
    """Hugging Face's output and what moesaic's models return.

    Attributes:
        loss: language-model loss, in training with the balancing losses. logits: (B, S, V).
        past_key_values: a ``MoesaicCache``, or None.
        lm_loss, balance_loss: the two parts of ``loss``, detached.
        token_losses: fp32 (B, S), detached; 0 where there is no target.
        plans: sparse layer -> the plan that was executed. depth: the same of Mixture-of-Depths blocks.
    """

    lm_loss: Tensor | None = None
    balance_loss: Tensor | None = None
    token_losses: Tensor | None = None
    plans: dict[int, RoutingPlan | SoftPlan] | None = None
    depth: dict[int, RoutingPlan] | None = None
