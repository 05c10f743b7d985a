"""What a caller says about the prompts of a generation besides their tasks: tenants and further facts, for rules and memories.

>>> generate(model, prompts, tenant=3, metadata={"minor": [0, 1]})       # one number for all prompts, or one each

Every token of a prompt and of its continuation carries its prompt's facts. Legend: B rows, S positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moesaic.errors import ConfigError

Fact = int | Sequence[int]


@dataclass(frozen=True, eq=False)
class RowFacts:
    """The facts of each prompt: int64 (B,), or None where nothing was said."""

    tenant_B: Tensor | None = None
    metadata: dict[str, Tensor] = field(default_factory=dict)

    def inputs(self, rows: Sequence[int], length: int, device: torch.device) -> dict[str, Any]:
        """Arguments of the model's forward for these rows, ``length`` positions each; none where nothing was said."""

        def spread(fact_B: Tensor) -> Tensor:
            return fact_B[list(rows)].to(device)[:, None].expand(-1, length)

        inputs: dict[str, Any] = {}
        if self.tenant_B is not None:
            inputs["tenant_BS"] = spread(self.tenant_B)
        if self.metadata:
            inputs["metadata"] = {name: spread(fact_B) for name, fact_B in self.metadata.items()}
        return inputs


def row_facts(rows: int, tenant: Fact | None = None, metadata: Mapping[str, Fact] | None = None) -> RowFacts:
    """The facts of ``rows`` prompts. Raises ``ConfigError`` unless there is one whole number for all, or one each."""
    facts = {name: one_each(f"metadata {name}", rows, fact) for name, fact in (metadata or {}).items()}
    return RowFacts(None if tenant is None else one_each("tenant", rows, tenant), facts)


def one_each(name: str, rows: int, fact: Fact) -> Tensor:
    """int64 (rows,): one number for all, or one for each."""
    numbers = list(fact) if isinstance(fact, Sequence) else [fact] * rows
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, int):
            raise ConfigError(f"{name} must be a whole number, or one per prompt, not {number!r}.")
    if len(numbers) != rows:
        raise ConfigError(f"{rows} prompts need one {name} or as many, but {len(numbers)} were given.")
    return torch.tensor(numbers, dtype=torch.int64)
