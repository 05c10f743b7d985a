"""Bytes that training keeps per parameter, by recipe (fieldguide 4.6, 7.3; DeepSeek-V3's report, 3.3)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Precision:
    """Bytes per parameter.

    Attributes:
        weight: what the forward reads. gradient: what is accumulated.
        optimizer: master copy and moments.
        words: what they are.
    """

    weight: int
    gradient: int
    optimizer: int
    words: str

    @property
    def total(self) -> int:
        """All together."""
        return self.weight + self.gradient + self.optimizer


PRECISIONS: dict[str, Precision] = {
    "moesaic": Precision(4, 4, 8, "fp32 weights, gradients and both AdamW moments, as moesaic trains"),
    "bf16-mixed": Precision(2, 2, 12, "bf16 weights and gradients, fp32 master copy and moments"),
    "bf16-mixed-fp32-gradient": Precision(2, 4, 12, "bf16 weights, fp32 gradients, master copy and moments"),
    "deepseek-v3": Precision(2, 4, 8, "bf16 weights, fp32 gradients and master copy, bf16 moments"),
}
