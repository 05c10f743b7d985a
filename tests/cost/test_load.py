"""Shares of rows by hand, from laws and from stored plans."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moesaic.cost.forecast import Training
from moesaic.cost.layout import forecast
from moesaic.cost.load import capped, parse_load, uniform, zipf
from moesaic.errors import ConfigError, DataError
from moesaic.layout import ParallelConfig
from moesaic.models import ModelConfig, MoEConfig, RouterConfig
from moesaic.plan.plan import RoutingPlan, from_topk
from moesaic.plan.store import save_trace

SWITCH = RouterConfig("topk", {"normalize": "none"})
MODEL = ModelConfig(
    vocab_size=16,
    dim=8,
    num_layers=2,
    num_heads=2,
    hidden=16,
    moe=MoEConfig(num_experts=4, k=1, hidden=8, router=SWITCH),
)


def plan_of(experts: list[int]) -> RoutingPlan:
    """One row a token."""
    expert_T1 = torch.tensor(experts)[:, None]
    return from_topk(expert_T1, torch.ones(len(experts), 1), 4)


def test_zipf_by_hand() -> None:
    """1, 1/2, 1/3, 1/4 of 25/12."""
    assert zipf(1.0)(0, 4, 1) == pytest.approx((12 / 25, 6 / 25, 4 / 25, 3 / 25))
    assert zipf(0.0)(0, 4, 1) == pytest.approx((1 / 4,) * 4)
    assert uniform(0, 5, 2) == (0.2,) * 5


def test_no_token_takes_an_expert_twice() -> None:
    """With two rows a token, half of all rows is the most one expert can have; the rest keeps its proportions."""
    assert capped([6, 1, 1], 2) == pytest.approx((1 / 2, 1 / 4, 1 / 4))
    assert capped([6, 3, 1, 0], 2) == pytest.approx((1 / 2, 3 / 8, 1 / 8, 0))
    assert capped([1, 0, 0, 0], 2) == pytest.approx((1 / 2, 1 / 6, 1 / 6, 1 / 6))
    assert capped([0, 0], 1) == pytest.approx((1 / 2, 1 / 2))


@given(st.lists(st.floats(0, 100), min_size=1, max_size=20), st.floats(0.1, 30))
def test_shares_add_up_and_respect_the_cap(weights: list[float], rows: float) -> None:
    shares = capped(weights, rows)
    assert sum(shares) == pytest.approx(1)
    assert max(shares) <= max(1 / rows, 1 / len(weights)) + 1e-9


def test_a_trace_is_what_was_chosen(tmp_path: Path) -> None:
    for step, experts in enumerate([[0, 0, 0, 1], [0, 2, 2, 3]]):
        save_trace(tmp_path / f"step-{step}.safetensors", {0: plan_of(experts), 1: plan_of([3, 3, 3, 3])})
    load = parse_load(str(tmp_path))
    assert load(0, 4, 1) == (4 / 8, 1 / 8, 2 / 8, 1 / 8)
    assert load(1, 4, 1) == (0, 0, 0, 1)
    assert parse_load(str(tmp_path / "step-1.safetensors"))(0, 4, 1) == (1 / 4, 0, 2 / 4, 1 / 4)
    with pytest.raises(ConfigError, match=r"no layer 2, and this model 4"):
        load(2, 4, 1)
    with pytest.raises(ConfigError, match="has 4 experts in layer 0, and this model 8"):
        load(0, 8, 1)
    found = forecast(MODEL, ParallelConfig(ep=2), 2, Training(2, 1, 8), load)
    # Rank 0 has experts 0 and 1: 5 of 8 rows of layer 0 and none of layer 1; 16 tokens each.
    assert {group.ranks: group.expert_rows for group in found.groups} == {(0,): 10, (1,): 22}
    assert found.imbalance == pytest.approx((5 / 8 + 1) / 2 * 2)


def test_skew_by_hand() -> None:
    """Zipf over two ranks: 18/25 of the rows on the first. Both send what is not for them and return what is not theirs."""
    found = forecast(MODEL, ParallelConfig(ep=2), 2, Training(2, 1, 50, dtype="fp32"), zipf(1.0))
    first, second = found.groups
    assert (first.expert_rows, second.expert_rows) == (2 * 72, 2 * 28)
    # Two layers, rows of 32 bytes: dispatch, its gradient; combine, its gradient. Rank 0 sends 14 of its 50, returns 36.
    assert first.traffic.exchange == 2 * 2 * (14 + 36) * 32
    assert second.traffic.exchange == 2 * 2 * (36 + 14) * 32
    assert found.imbalance == pytest.approx(1.44)
    assert first.memory.activations > second.memory.activations


def test_replicas_even_out_what_they_can() -> None:
    """Six slots on two ranks: the busiest experts are copied, and the ranks come out nearly even."""
    found = forecast(MODEL, ParallelConfig(ep=2, replicas=2), 2, Training(2, 1, 50), zipf(1.0))
    assert found.imbalance < 1.1
    experts = {group.parameters.experts for group in found.groups}
    assert experts == {2 * 3 * (3 * 8 * 8)}


@pytest.mark.parametrize("text", ["zipf:x", "zipf:-1", "zipf:1e9", "nowhere"])
def test_what_is_no_load_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is no load"):
        parse_load(text)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no routing plans"):
        parse_load(str(tmp_path))


def test_zipf_without_a_number_is_one() -> None:
    assert parse_load("zipf")(0, 4, 1) == zipf(1.0)(0, 4, 1)
