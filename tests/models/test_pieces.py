"""A model drawn piece by piece: every number of ``build_model``, one piece at a time in memory."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moesaic.models import ModelConfig, MoEConfig, RouterConfig, build_model
from moesaic.models.config import DepthConfig, LatentConfig
from moesaic.models.pieces import draw_pieces
from tests.models.tiny import sparse, tiny
from tests.routing.cases import CASES, Case

every_router = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)

CONFIGS: dict[str, ModelConfig] = {
    "dense": tiny(attention_bias="all", mlp_bias=True, norm="layernorm"),
    "sparse": sparse(num_experts=5, shared=1, shared_gate=True),
    "untied": tiny(MoEConfig(num_experts=4, hidden=8, dense_first=1), tie_embeddings=False, num_layers=3),
    "special experts": sparse(zero=1, copy=1, constant=2),
    "biases of experts": sparse(expert_bias=True),
    "multi-head": sparse(heads=2, shared=1),
    "single neurons": sparse(
        RouterConfig("product_keys", {"key_dim": 8}), num_experts=16, hidden=1, expert_kind="neuron"
    ),
    "depth": replace(sparse(num_experts=3), num_layers=4, depth=DepthConfig(allow_leak=True)),
    "latent attention": tiny(num_kv_heads=None, latent=LatentConfig(8, 12, nope_dim=8, rope_dim=4, value_dim=8)),
    "prototypes": sparse(losses={"prototype": 1e-2}, loss_options={"prototype": {"ema": 0.9}}),
}


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    return dict([*module.named_parameters(), *module.named_buffers()])


def drawn(config: ModelConfig, slots: Sequence[int]) -> dict[str, Tensor]:
    """Copies of all that the pieces bring, by its name in the model."""
    found: dict[str, Tensor] = {}

    def take(prefix: str, piece: nn.Module) -> None:
        found.update({f"{prefix}.{name}": x.detach().clone() for name, x in tensors_of(piece).items()})

    draw_pieces(config, lambda layer: slots, take)
    return found


def check(config: ModelConfig) -> None:
    torch.manual_seed(3)
    whole = tensors_of(build_model(config))
    after = torch.get_rng_state()
    torch.manual_seed(3)
    experts = 0 if config.moe is None else config.moe.num_experts
    assert isinstance(experts, int)
    found = drawn(config, range(experts))
    assert torch.equal(torch.get_rng_state(), after)
    assert set(found) == set(whole)
    for name, tensor in whole.items():
        assert torch.equal(found[name], tensor), name
        assert found[name].dtype == tensor.dtype


@pytest.mark.parametrize("name", CONFIGS)
def test_the_pieces_are_those_of_the_whole_and_so_is_the_random_state(name: str) -> None:
    check(CONFIGS[name])


@every_router
def test_every_router_comes_with_its_own_numbers(case: Case) -> None:
    check(tiny(case.config()))


@pytest.mark.parametrize("slots", [(1, 3), (4,), (2, 0, 2), ()], ids=str)
@pytest.mark.parametrize("name", ["sparse", "special experts", "biases of experts", "multi-head"])
def test_wanted_experts_have_the_numbers_they_have_among_all(name: str, slots: tuple[int, ...]) -> None:
    config = CONFIGS[name]
    assert config.moe is not None
    slots = tuple(e for e in slots if e < config.moe.num_experts)  # type: ignore[operator]
    torch.manual_seed(3)
    whole = tensors_of(build_model(config))
    after = torch.get_rng_state()
    torch.manual_seed(3)
    found = drawn(config, slots)
    assert torch.equal(torch.get_rng_state(), after)
    stacked = [n for n in whole if n.endswith(("w_in", "w_out", "b_in", "b_out"))]
    assert len(stacked) >= 4
    for key, tensor in whole.items():
        assert torch.equal(found[key], tensor[list(slots)] if key in stacked else tensor), key


def test_a_piece_is_gone_before_the_next_one_is_made() -> None:
    config = CONFIGS["untied"]
    seen: list[str] = []
    alive: list[Any] = []

    def take(name: str, piece: nn.Module) -> None:
        assert [ref() for ref in alive] == [None] * len(alive)
        alive.extend(weakref.ref(x) for x in tensors_of(piece).values())
        seen.append(name)

    def slots(layer: int) -> Sequence[int]:  # asked before the block is made
        assert [ref() for ref in alive] == [None] * len(alive)
        return range(4)

    draw_pieces(config, slots, take)
    assert seen == ["embedding", "head", "norm", "blocks.0", "blocks.1", "blocks.2"]


@every_router
def test_only_parameters_and_buffers_of_a_model_of_shapes_lack_numbers(case: Case) -> None:
    """Nothing else would be given any later."""
    model = build_model(tiny(case.config(shared=1)), device="meta")
    found = [
        f"{name}.{key}"
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if key not in ("_parameters", "_buffers", "_modules") and any(tensor.is_meta for tensor in tensors_in(value))
    ]
    assert found == []


def tensors_in(value: Any) -> Iterator[Tensor]:
    """What lists, tuples, sets, dictionaries and plain objects of ours hold; modules speak for themselves."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple | set | frozenset):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(item)
    elif type(value).__module__.startswith("moesaic") and not isinstance(value, nn.Module):
        yield from tensors_in(getattr(value, "__dict__", {}))
