"""What a router promises, as data: validation, the linter, ``moesaic routers`` and the docs read these; tests prove each one.

Legend: T tokens, D model width, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Balance = Literal["no", "exact", "approximate", "by table", "learned"]
Teaches = Literal["all", "chosen", "estimated", "none"]
Inference = Literal["same", "noise off", "other rule"]


@dataclass(frozen=True)
class Facts:
    """Facts of a router as it trains. An option that changes one sets ``self.facts`` in the constructor.

    Attributes:
        causal: a token's routing never depends on later tokens of its sequence.
        batch_invariant: nor on other sequences of the batch.
        noisy: training draws random numbers.
        balance: whether loads are equal by construction: "no"; "exact"; "approximate"; "by table" (hashing); "learned" (a
            built-in controller or loss drives it).
        experts: experts per token in words: "k", "1", "0..E".
        varies: whether that number differs between tokens.
        can_drop: whether the router itself may leave a token without any expert.
        needs: fields of ``TokenContext`` without which it cannot route.
        has_gate: plans carry (T, E) scores with a gradient, so auxiliary losses on them can teach the router.
        has_load_estimate: plans carry ``gate.load_probs_TE``, which the "load" loss needs.
        teaches: which experts' scores the task loss gives a gradient: "all", the "chosen" (and whom it normalised them with),
            "estimated" (a stochastic estimator) or "none".
        reads_previous: whether it reads the gate of the previous sparse layer.
        reads_loss: whether its own losses or its memory need the model's loss of every token.
        inference: how evaluation routes: the "same" way, the same with "noise off", or by an "other rule".
        inference_rule: that other rule, in words.
        infer_causal, infer_batch_invariant: the first two facts in evaluation; None means as in training.
        losses: balancing losses recommended with it, name -> coefficient.
        source: the paper.
    """

    causal: bool = True
    batch_invariant: bool = True
    noisy: bool = False
    balance: Balance = "no"
    experts: str = "k"
    varies: bool = False
    can_drop: bool = False
    needs: tuple[str, ...] = ()
    has_gate: bool = True
    has_load_estimate: bool = False
    teaches: Teaches = "chosen"
    reads_previous: bool = False
    reads_loss: bool = False
    inference: Inference = "same"
    inference_rule: str = ""
    infer_causal: bool | None = None
    infer_batch_invariant: bool | None = None
    losses: Mapping[str, float] = field(default_factory=dict)
    source: str = ""

    @property
    def causal_in_evaluation(self) -> bool:
        """``causal``, for evaluation and generation."""
        return self.causal if self.infer_causal is None else self.infer_causal

    @property
    def batch_invariant_in_evaluation(self) -> bool:
        """``batch_invariant``, for evaluation and generation."""
        return self.batch_invariant if self.infer_batch_invariant is None else self.infer_batch_invariant


@dataclass(frozen=True)
class Cost:
    """Price of one routing decision for the T tokens of one sequence (it matters where a router's price grows with length).

    Attributes:
        flops: of matrix products in the forward (a multiply-add counts 2), as ``torch.utils.flop_counter`` counts them;
            elementwise work, sorting and solvers are not in it.
        parameters: trained numbers of the router.
        other: what the first leaves out where it matters, in words ("auction", "iterations * T * E").
    """

    flops: int
    parameters: int
    other: str = ""


def linear_cost(T: int, D: int, E: int) -> Cost:
    """The plain gate ``x W``: 2TDE FLOPs, DE parameters."""
    return Cost(2 * T * D * E, D * E)
