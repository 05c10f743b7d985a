"""Seconds planted in a part's forward or backward turn up there and nowhere else, and all parts add up to the step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moesaic.infer.token_loop import generate_ids
from moesaic.models import build_model
from moesaic.models.config import DepthConfig, ModelConfig, MoEConfig, RouterConfig
from moesaic.models.decoder import Decoder
from moesaic.ops import phases
from moesaic.profile.clock import Clock, Lap
from moesaic.profile.measure import Work, _batch
from moesaic.profile.trace import OTHER, SAMPLING, places, traced
from moesaic.train import step as step_module
from moesaic.train.optim import OptimConfig, make_optimizer
from moesaic.train.recompute import recompute_activations
from moesaic.train.step import train_step
from tests.models.tiny import sparse, tiny

NAP = 0.03  # seconds; tiny steps take about ten times less in each part


class _Slow(torch.autograd.Function):
    """The identity, whose backward takes a nap."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        time.sleep(NAP)
        return grad


@contextmanager
def nap(module: nn.Module, backward: bool) -> Iterator[None]:
    """Make ``module`` slow from inside, where a profiler's hooks on it cannot see it coming."""
    plain = module.forward

    def slow(x: Tensor, *args: Any, **named: Any) -> Any:
        if backward:
            return plain(_Slow.apply(x), *args, **named)
        time.sleep(NAP)
        return plain(x, *args, **named)

    module.forward = slow  # type: ignore[method-assign]
    try:
        yield
    finally:
        module.forward = plain  # type: ignore[method-assign]


def step_of(model: Decoder, micro_batches: int = 1) -> tuple[Lap, float]:
    """The lap of one traced training step (after a warm-up), and its seconds on another clock."""
    work = Work(batch=2, seq=16, prompt=4, new_tokens=2)
    generator = torch.Generator().manual_seed(0)
    batches = [_batch(model, work, generator) for _ in range(micro_batches)]
    optimizer = make_optimizer(model, OptimConfig())
    train_step(model, optimizer, batches, lr=0.0, clip=1.0, step=0)
    with phases.listen() as seconds, traced(model, clock := Clock(phases=seconds), optimizer):
        start = time.perf_counter()
        clock.start(OTHER)
        train_step(model, optimizer, batches, lr=0.0, clip=1.0, step=1)
        lap = clock.stop()
        return lap, time.perf_counter() - start


def settled(measure: Callable[[], Any], is_right: Callable[[Any], bool]) -> Any:
    """The first of three measurements that is right, else the last: another program may take the processor at any moment."""
    for _ in range(3):
        found = measure()
        if is_right(found):
            break
    return found


def adds_up(found: tuple[Lap, float]) -> bool:
    """Whether a lap is the same step on a clock outside all hooks: nothing is missing, nothing is counted twice."""
    lap, seconds = found
    return lap.seconds + lap.own == pytest.approx(seconds, rel=0.01, abs=2e-4)


def by(lap: Lap, direction: str, *parts: str) -> float:
    return sum(s for slot, s in lap.parts.items() if slot.direction == direction and slot.part in parts)


SPARSE = ("dispatch", "experts", "grouping", "gather", "products", "activation", "combine")
MODELS = {
    "sparse": sparse(losses={"switch": 0.01, "z": 0.001}),
    "loop": sparse(backend="loop"),
    "shared": sparse(shared=1, dense_first=1),
    "untied": tiny(MoEConfig(num_experts=4, k=2, hidden=12, heads=2), tie_embeddings=False),
    "dense": tiny(),
    "soft": sparse(RouterConfig("soft_moe", allow_leak=True)),
    "depth": tiny(MoEConfig(num_experts=4, k=2, hidden=12), depth=DepthConfig(capacity=0.5, allow_leak=True)),
}


@pytest.mark.parametrize("name", MODELS)
def test_parts_add_up_to_the_step(name: str) -> None:
    found = settled(lambda: step_of(build_model(MODELS[name], seed=0)), adds_up)
    assert adds_up(found), found
    lap, _ = found
    assert sum(lap.parts.values()) == pytest.approx(lap.seconds)
    assert lap.own > 0
    for direction, part in (
        ("forward", "attention"),
        ("backward", "attention"),
        ("backward", "head"),
        ("step", "loss"),
    ):
        assert by(lap, direction, part) > 0
    assert by(lap, "step", "optimiser") > 0
    assert by(lap, "backward", "other") < 0.1 * lap.seconds


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("part", ["attention", "norm", "head", "router", "experts", "shared experts", "feed-forward"])
def test_a_nap_is_found_where_it_was_taken(part: str, backward: bool) -> None:
    model = build_model(sparse(shared=1, dense_first=1, losses={"switch": 0.01}, backend="loop"), seed=0)
    module = next(module for module, place in places(model).items() if place.part == part)
    direction = "backward" if backward else "forward"

    def share() -> tuple[float, float]:
        with nap(module, backward):
            lap, _ = step_of(model)
        here = by(lap, direction, part)
        return here, lap.seconds - here

    # _Slow's node is made inside the module's forward, so its nap counts there.
    here, elsewhere = settled(share, lambda found: found[1] < NAP)
    assert here >= NAP > elsewhere


def test_naps_of_the_loss_and_of_clipping(monkeypatch: pytest.MonkeyPatch) -> None:
    losses, norm = step_module.lm_losses, torch.nn.utils.get_total_norm
    monkeypatch.setattr(step_module, "lm_losses", lambda logits, targets: _Slow.apply(losses(logits, targets)))
    monkeypatch.setattr(torch.nn.utils, "get_total_norm", lambda tensors: (time.sleep(NAP), norm(tensors))[1])
    lap, _ = settled(lambda: step_of(build_model(sparse(), seed=0)), lambda found: found[0].seconds < 3 * NAP)
    assert by(lap, "step", "loss") >= NAP
    assert by(lap, "step", "clipping") >= NAP
    assert lap.seconds < 3 * NAP


def test_several_micro_batches_and_recomputed_activations() -> None:
    model = build_model(sparse(losses={"switch": 0.01}), seed=0)
    once, _ = step_of(model)
    recompute_activations(model)
    found = settled(lambda: step_of(model, micro_batches=3), adds_up)
    assert adds_up(found), found
    lap, _ = found
    assert by(lap, "backward", *SPARSE) > by(once, "backward", *SPARSE)
    assert by(lap, "step", "clipping") > 0


def test_results_and_gradients_are_those_of_an_untraced_step() -> None:
    losses = []
    for trace in (False, True):
        model = build_model(MODELS["sparse"], seed=0)
        optimizer = make_optimizer(model, OptimConfig())
        batch = _batch(model, Work(2, 16, 4, 2), torch.Generator().manual_seed(0))
        for step in range(2):
            clock = Clock()
            if trace:
                with traced(model, clock, optimizer):
                    clock.start(OTHER)
                    reading, _ = train_step(model, optimizer, [batch], lr=0.01, clip=1.0, step=step)
                    clock.stop()
            else:
                reading, _ = train_step(model, optimizer, [batch], lr=0.01, clip=1.0, step=step)
        losses.append((reading.loss, reading.grad_norm))
        assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
    assert losses[0] == losses[1]


def test_decoding() -> None:
    model = build_model(sparse(), seed=0)
    layer = model.blocks[1]
    clock = Clock()
    laps = []
    with nap(layer.attention, backward=False), traced(model, clock):
        clock.start(SAMPLING)
        start = time.perf_counter()
        generate_ids(model, [[1, 2, 3]], max_new_tokens=3, on_token=lambda *_: laps.append(clock.restart(SAMPLING)))
        laps.append(clock.stop())
        seconds = time.perf_counter() - start
    assert sum(lap.seconds for lap in laps) == pytest.approx(seconds, rel=0.02)
    for lap in laps[:3]:
        found = {slot.layer: s for slot, s in lap.parts.items() if slot.part == "attention"}
        assert found[1] >= NAP > found[0]
        assert by(lap, "step", "sampling") > 0
        assert by(lap, "forward", "router") > 0
        assert not any(slot.direction == "backward" for slot in lap.parts)


def test_every_module_with_parameters_is_a_part() -> None:
    for config in MODELS.values():
        assert isinstance(config, ModelConfig)
        model = build_model(config, device="meta")
        held = {id(p) for module in places(model) for p in module.parameters()} | {id(model.embedding.weight)}
        assert {id(p) for p in model.parameters()} <= held
