"""N processes compute what one does: losses, every gradient, weights and moments, over layouts, routers, losses and traps.

In fp64 to 1e-12 of a tensor's largest entry. The layouts once more in fp32 to 1e-6 of its root mean square.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from torch import Tensor

from moesaic.layout import ParallelConfig as Of
from moesaic.models.config import DepthConfig
from moesaic.plan.capacity import CapacityRule
from tests.distributed import run_distributed
from tests.parallel.truth import Case, run_cases

FP64 = "float64"
FOUR_LAYERS = {"num_layers": 4}
EVERY_LOSS = {
    "losses": {
        "switch": 1e-2,
        "sequence": 1e-2,
        "importance": 1e-2,
        "z": 1e-3,
        "logit_l2": 1e-3,
        "entropy": 1e-2,
        "entropy_local": 1e-2,
        "entropy_global": 1e-2,
        "v2_expert": 1e-2,
        "v2_device": 1e-2,
        "v2_communication": 1e-2,
        "prototype": 1e-2,
    },
    "loss_options": {
        "v2_device": {"devices": 4},
        "v2_communication": {"devices": 4, "limit": 2},
        "prototype": {"warmup": 0, "most": 3},
    },
}
SKEW, STARVE = {"edit": "skew"}, {"edit": "starve"}
LONELY = dict.fromkeys((0, 1), ((0, 1, 2, 3, 4, 5, 6), (7,)))  # the last expert alone
QUANTILE = {"score": "sigmoid", "balance_bias": True, "bias_rule": "quantile"}
DEPTH = {"depth": DepthConfig(capacity=0.5, allow_leak=True)}

# name: (processes, case). Layouts first: each is also run in fp32 and over 20 steps.
LAYOUTS: dict[str, tuple[int, Case]] = {
    "ep2": (2, Case("", Of(ep=2))),
    "ep2, 10 experts": (2, Case("", Of(ep=2), {"num_experts": 10})),
    "ep3": (3, Case("", Of(ep=3), batch=3)),
    "ep3, 10 experts": (3, Case("", Of(ep=3), {"num_experts": 10}, batch=6)),
    "ep4": (4, Case("", Of(ep=4))),
    "ep4, 10 experts": (4, Case("", Of(ep=4), {"num_experts": 10})),
    "dp2": (2, Case("", Of())),
    "fsdp2": (2, Case("", Of(fsdp=True))),
    "tp2": (2, Case("", Of(tp=2))),
    "pp2": (2, Case("", Of(pp=2))),
    "ep2 x dp2": (4, Case("", Of(ep=2))),
    "ep2 x tp2": (4, Case("", Of(ep=2, tp=2))),
    "fsdp2 x ep2": (4, Case("", Of(ep=2, fsdp=True))),
    "pp2 x ep2": (4, Case("", Of(pp=2, ep=2), accumulate=2)),
    "ep2 folded over tp2": (2, Case("", Of(ep=2, tp=2))),
    "ep4 folded over dp2 x tp2": (4, Case("", Of(ep=4, tp=2))),
    "tp2, experts whole": (2, Case("", Of(tp=2, etp=1))),
    "pp2 interleaved": (
        2,
        Case("", Of(pp=2, schedule="interleaved", stages_per_rank=2), model=FOUR_LAYERS, accumulate=2),
    ),
    "pp2 x tp2": (4, Case("", Of(pp=2, tp=2), accumulate=2)),
    "pp2 x fsdp2": (4, Case("", Of(pp=2, fsdp=True), accumulate=3)),
    "hierarchical": (4, Case("", Of(ep=4, exchange="hierarchical"), ranks_per_node=2)),
}

EP = Of(ep=2)
SETTINGS: dict[str, tuple[int, Case]] = {
    "accumulation 3": (2, Case("", EP, accumulate=3)),
    "recomputation": (2, Case("", EP, {"shared": 1}, recompute=True, accumulate=3)),
    "recomputation, tp2": (2, Case("", Of(tp=2), {"shared": 1}, recompute=True)),
    "recomputation, pp2": (2, Case("", Of(pp=2), {"shared": 1}, recompute=True, accumulate=3)),
    "recomputation, fsdp2 x ep2": (4, Case("", Of(ep=2, fsdp=True), recompute=True)),
    "skewed routing": (2, Case("", EP, **SKEW)),  # type: ignore[arg-type]
    "skewed routing, ep4": (4, Case("", Of(ep=4), accumulate=2, **SKEW)),  # type: ignore[arg-type]
    "an expert nobody uses": (4, Case("", Of(ep=4), **STARVE)),  # type: ignore[arg-type]
    "a rank whose experts nobody uses": (2, Case("", EP, placements=LONELY, **STARVE)),  # type: ignore[arg-type]
    "the same in chunks": (2, Case("", Of(ep=2, chunks=3), {"shared": 1}, placements=LONELY, **STARVE)),  # type: ignore[arg-type]
    "the same padded": (2, Case("", Of(ep=2, padded=True), placements=LONELY, **STARVE)),  # type: ignore[arg-type]
    "the same recomputed": (2, Case("", EP, placements=LONELY, recompute=True, accumulate=3, **STARVE)),  # type: ignore[arg-type]
    "an expert nobody uses, fsdp": (4, Case("", Of(ep=2, fsdp=True), **STARVE)),  # type: ignore[arg-type]
    "a rank with padding alone": (2, Case("", EP, short=2)),
    "a rank without rows": (2, Case("", EP, batch=1)),
    "rows that do not divide": (4, Case("", Of(ep=2), batch=5, accumulate=3)),
    "capacity drops": (2, Case("", EP, {"capacity": CapacityRule(factor=0.6, minimum=1, groups=2)})),
    "capacity drops by score": (
        4,
        Case("", Of(ep=4), {"capacity": CapacityRule(factor=0.6, minimum=1, groups=4, priority="probability")}),
    ),
    "capacity drops, padding": (2, Case("", EP, {"capacity": CapacityRule(factor=0.6, minimum=1, groups=2)}, short=1)),
    "shared experts": (2, Case("", EP, {"shared": 1, "shared_gate": True})),
    "special experts": (2, Case("", EP, {"zero": 1, "copy": 1, "constant": 2})),
    "special experts, tp2": (2, Case("", Of(tp=2), {"zero": 1, "copy": 1, "constant": 2})),
    "special experts, fsdp2": (2, Case("", Of(ep=2, fsdp=True), {"zero": 1, "constant": 2})),
    "chunks": (2, Case("", Of(ep=2, chunks=2), {"shared": 1})),
    "chunks, fsdp2 x ep2": (4, Case("", Of(ep=2, chunks=2, fsdp=True), accumulate=2)),
    "padded": (2, Case("", Of(ep=2, padded=True), {"shared": 1, "zero": 1})),
    "padded, hierarchical": (4, Case("", Of(ep=4, padded=True, exchange="hierarchical"), ranks_per_node=2)),
    "bias balancing": (
        2,
        Case("", EP, router={"score": "sigmoid", "balance_bias": True, "bias_rate": 1e-2}, steps=5, accumulate=2),
    ),
    "bias balancing, pid": (
        4,
        Case(
            "",
            Of(ep=2),
            router={"score": "sigmoid", "balance_bias": True, "bias_rate": 1e-2, "bias_rule": "pid"},
            steps=5,
        ),
    ),
    "bias balancing, quantile": (2, Case("", Of(), router=QUANTILE, steps=5, accumulate=2, short=1)),
    "bias balancing, quantile, ep2": (4, Case("", EP, router=QUANTILE, steps=5)),
    "bias balancing, quantile, pp2": (2, Case("", Of(pp=2), router=QUANTILE, steps=5, accumulate=2)),
    "experts that come and go": (
        4,
        Case("", EP, router={"threshold": 0.4, "adapt_every": 2}, router_name="top_any", steps=5, accumulate=2),
    ),
    "depth": (2, Case("", EP, model=FOUR_LAYERS | DEPTH, accumulate=2, short=1)),
    "depth, pp2 x fsdp2": (4, Case("", Of(pp=2, fsdp=True), model=FOUR_LAYERS | DEPTH, accumulate=2)),
    "every loss": (2, Case("", EP, EVERY_LOSS, accumulate=3, short=1)),
    "every loss, pp2 x dp2": (4, Case("", Of(pp=2), EVERY_LOSS, accumulate=3)),
    "scope sequence": (2, Case("", EP, {"loss_scope": "sequence"}, accumulate=3)),
    "scope global batch": (2, Case("", EP, {"loss_scope": "global_batch"}, accumulate=3)),
    "scope global batch, pp2 x ep2": (4, Case("", Of(pp=2, ep=2), {"loss_scope": "global_batch"}, accumulate=3)),
    "hash router": (2, Case("", EP, {"losses": {}}, router_name="hash")),
    "expert choice": (2, Case("", EP, router={"group": "sequence"}, router_name="expert_choice")),
    "soft, fsdp2": (
        2,
        Case("", Of(fsdp=True), {"losses": {}}, router_name="soft_moe"),
    ),  # a parameter without dimensions
    "more chunks than slots": (2, Case("", Of(ep=2, chunks=9))),
    "soft": (4, Case("", Of(ep=4), {"losses": {}}, router_name="soft_moe")),
    "top-p": (2, Case("", EP, router_name="top_p")),
    "dense first, tp2": (2, Case("", Of(tp=2, ep=2), {"dense_first": 1})),
    "biases": (2, Case("", Of(tp=2), {"expert_bias": True}, model={"attention_bias": "all", "mlp_bias": True})),
    "untied, pp2": (2, Case("", Of(pp=2), model={"tie_embeddings": False})),
}


def _named(cases: dict[str, tuple[int, Case]], world: int, **changes: object) -> list[Case]:
    return [replace(case, name=name, **changes) for name, (size, case) in cases.items() if size == world]


def _check(
    world: int, cases: list[Case], tolerance: float, moments: float | None = None, timeout: float = 110.0
) -> None:
    limits = {"load": 0.0, "moment": moments or tolerance}
    found: list[dict[str, Tensor]] = run_distributed(world, run_cases, cases, world, timeout=timeout)
    wrong = {
        f"rank {rank}, {what}": float(value)
        for rank, answer in enumerate(found)
        for what, value in answer.items()
        if not float(value) <= limits.get(what.split(": ")[-1], tolerance)
    }
    assert not wrong, wrong
    assert len(found[0]) == 6 * len(cases)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_layouts(world: int) -> None:
    _check(world, _named(LAYOUTS, world, dtype=FP64), 1e-12)


@pytest.mark.parametrize("world", [2, 4])
def test_settings(world: int) -> None:
    _check(world, _named(SETTINGS, world, dtype=FP64), 1e-12)


COMPILED: dict[str, tuple[int, Case]] = {
    "compiled, tp2": (2, Case("", Of(tp=2, compile=True))),
    "compiled, pp2, recomputed": (2, Case("", Of(pp=2, compile=True), {"shared": 1}, recompute=True, accumulate=2)),
    "compiled, fsdp2 x ep2": (4, Case("", Of(ep=2, fsdp=True, compile=True), {"shared": 1})),
    "compiled, fsdp2 x ep2, recomputed": (
        4,
        Case("", Of(ep=2, fsdp=True, compile=True), {"dense_first": 1}, recompute=True),
    ),
}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("world", [2, 4])
def test_compiled(world: int) -> None:
    _check(world, _named(COMPILED, world, dtype=FP64), 1e-12, timeout=580.0)


FP32 = (1e-6, 3e-6)  # moments are squares of gradients too: twice their error, summed up over the steps


@pytest.mark.parametrize("world", [2, 3, 4])
def test_layouts_in_fp32(world: int) -> None:
    _check(world, _named(LAYOUTS, world), *FP32)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3, 4])
def test_layouts_over_twenty_steps_in_fp32(world: int) -> None:
    _check(world, _named(LAYOUTS, world, steps=20), *FP32)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3, 4])
def test_layouts_over_twenty_steps(world: int) -> None:
    _check(world, _named(LAYOUTS, world, dtype=FP64, steps=20), 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_settings_over_twenty_steps(world: int) -> None:
    _check(world, _named(SETTINGS, world, dtype=FP64, steps=20), 1e-12)
