"""What some routers need to know about the tokens besides their vectors. All optional; a router says what it lacks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moesaic.errors import ConfigError


@dataclass(frozen=True, eq=False)
class TokenContext:
    """Side inputs of a router, one entry per flattened token (T = B * S).

    Attributes:
        ids_T: int64 vocabulary ids.
        position_T: int64 position within the document (padding excluded).
        sequence_T: int64 row of the batch each token belongs to.
        valid_T: bool, False on padding; None when every token is real.
        task_T: int64 task or domain ids.
        generator: random numbers for noisy routers; None uses torch's global generator.
    """

    ids_T: Tensor | None = None
    position_T: Tensor | None = None
    sequence_T: Tensor | None = None
    valid_T: Tensor | None = None
    task_T: Tensor | None = None
    generator: torch.Generator | None = None

    def need(self, field: str, router: str) -> Tensor:
        """The named field, or ``ConfigError`` naming the router that misses it."""
        value = getattr(self, field)
        if value is None:
            raise ConfigError(f'Router "{router}" needs {field} of TokenContext, and the caller gave none.')
        tensor: Tensor = value
        return tensor


NO_CONTEXT = TokenContext()
