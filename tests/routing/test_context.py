"""What routers are told: the context of one layer is the model's with that layer's two fields, and a value like it."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields, replace

import pytest
import torch

from moesaic.plan import Gate
from moesaic.routing import TokenContext


def test_the_context_in_a_layer_is_a_copy_with_two_other_fields() -> None:
    gate, state = Gate(torch.zeros(2, 3), torch.zeros(2, 3)), {"mean_BD": torch.zeros(1, 4)}
    outside = TokenContext(ids_T=torch.tensor([4, 5]), num_sequences=1, metadata={"minor": torch.tensor([0, 1])})
    inside, expected = outside.in_layer(gate, state), replace(outside, previous=gate, state=state)
    assert type(inside) is TokenContext
    for f in fields(TokenContext):
        assert getattr(inside, f.name) is getattr(expected, f.name), f.name
    assert outside.previous is outside.state is None
    with pytest.raises(FrozenInstanceError):
        inside.num_sequences = 2  # type: ignore[misc]
    assert inside.in_layer(None, None).previous is None
