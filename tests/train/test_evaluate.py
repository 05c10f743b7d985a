"""Validation by hand: means over targets, by domain, and where each domain's tokens go."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from moesaic.data.packing import IGNORE, PackedRows
from moesaic.errors import DataError
from moesaic.layout import Layout, ParallelConfig
from moesaic.models import RouterConfig, build_model
from moesaic.parallel.apply import apply
from moesaic.parallel.world import World
from moesaic.plan.capacity import CapacityRule
from moesaic.train.evaluate import Evaluation, evaluate, evenly
from tests.distributed import run_distributed
from tests.models.tiny import lively
from tests.train.tiny_run import tiny_config, tiny_corpus


def rows(seq_len: int = 24) -> PackedRows:
    return PackedRows(tiny_corpus().val, seq_len)


@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_losses_are_means_over_targets_however_they_are_batched(batch_size: int) -> None:
    data, model = rows(), lively(tiny_config().model)
    indices = torch.arange(len(data))
    sums, counts = {"code": 0.0, "prose": 0.0}, {"code": 0, "prose": 0}
    loads = {name: torch.zeros(2, 4, dtype=torch.int64) for name in sums}
    for row in indices:
        batch = data.batch(row[None])
        with torch.no_grad():
            output = model(batch.ids_BS, valid_BS=batch.valid_BS, document_BS=batch.document_BS)
        logp = output.logits[0].double().log_softmax(-1)
        for place in range(24):
            if not batch.valid_BS[0, place]:
                continue
            name = data.labels[int(batch.label_BS[0, place])]
            for i, plan in enumerate(output.plans.values()):
                loads[name][i] += torch.bincount(plan.choice_TK[place], minlength=4)  # type: ignore[union-attr]
            target = int(batch.targets_BS[0, place])
            if target != IGNORE:
                sums[name] -= float(logp[place, target])
                counts[name] += 1
    found = evaluate(model, data, indices, batch_size)
    assert min(counts.values()) > 50
    assert counts["code"] != counts["prose"]  # so that a mean of means would show
    assert found.tokens == sum(counts.values())
    assert found.loss == pytest.approx(sum(sums.values()) / found.tokens, rel=1e-6)
    assert found.by_domain == pytest.approx({n: sums[n] / counts[n] for n in sums}, rel=1e-6)
    assert found.perplexity == pytest.approx(math.exp(found.loss))
    assert found.domain_load == {n: loads[n].tolist() for n in sums}
    tokens = min(tiny_corpus().val.num_tokens, len(data) * 24)  # no padding
    placed = sum(sum(layer) for load in found.domain_load.values() for layer in load)
    assert placed == 2 * 2 * tokens
    assert set(found.record()) == {"loss", "ppl", "by_domain", "domain_load"}


def test_only_the_rows_asked_for_count() -> None:
    data, model = rows(), lively(tiny_config().model)
    parts = [evaluate(model, data, torch.tensor([i]), 1) for i in (0, 2)]
    both = evaluate(model, data, torch.tensor([2, 0]), 2)
    assert both.tokens == sum(p.tokens for p in parts)
    assert both.loss == pytest.approx(sum(p.loss * p.tokens for p in parts) / both.tokens, rel=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_validation_changes_nothing_and_runs_without_noise(training: bool) -> None:
    config = tiny_config(moe={"capacity": CapacityRule(0.25, None, minimum=1)})  # drops in training only
    model = build_model(config.model, seed=0).train(training)
    before, state = {n: t.clone() for n, t in model.state_dict().items()}, torch.get_rng_state()
    modes: list[bool] = []
    model.register_forward_pre_hook(lambda m, _a: modes.append(m.training))
    calls: list[tuple[int, int]] = []
    evaluate(model, rows(), torch.arange(5), 2, lambda done, of: calls.append((done, of)))
    assert model.training is training
    assert modes == [False] * 3
    assert calls == [(2, 5), (4, 5), (5, 5)]
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())


def test_a_failing_model_is_given_back_in_its_mode() -> None:
    model = build_model(tiny_config().model, seed=0).train()
    model.blocks[0].register_forward_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("broken")))
    with pytest.raises(RuntimeError, match="broken"):
        evaluate(model, rows(), torch.arange(1), 1)
    assert model.training


def test_domain_load_is_what_was_chosen_before_capacity() -> None:
    loose = lively(tiny_config().model)
    asked = {"capacity": CapacityRule(1.0, 0.25, minimum=1), "router": RouterConfig(allow_leak=True)}
    tight = lively(tiny_config(moe=asked).model)
    one, other = (evaluate(m, rows(), torch.arange(4), 4) for m in (loose, tight))
    assert other.loss != one.loss
    first = [[one.domain_load[n][0], other.domain_load[n][0]] for n in one.domain_load]
    assert all(a == b for a, b in first)  # the first layer sees the same input


def test_nothing_to_predict_is_refused_in_words() -> None:
    model = lively(tiny_config().model)
    with pytest.raises(DataError, match="holds no token to predict; give more text or a larger data.val_fraction"):
        evaluate(model, rows(), torch.arange(0), 1)


def test_perplexity_does_not_overflow() -> None:
    assert Evaluation(loss=1000.0, tokens=1).perplexity == math.inf


@pytest.mark.parametrize("count", [1, 2, 3, 7, 10])
def test_rows_are_spread_evenly_from_first_to_last(count: int) -> None:
    data = rows()
    found = evenly(data, count).tolist()
    assert len(set(found)) == len(found) == count
    assert found == sorted(found)
    assert found[0] == 0
    assert count == 1 or found[-1] == len(data) - 1
    gaps = {b - a for a, b in itertools.pairwise(found)}
    assert not gaps or max(gaps) - min(gaps) <= 1
    assert evenly(data, 10_000).tolist() == list(range(len(data)))


LAYOUTS = {"ep2": ParallelConfig(ep=2), "pp2": ParallelConfig(pp=2), "tp2": ParallelConfig(tp=2)}


def _spread_out(rank: int) -> dict[str, torch.Tensor]:
    """0 where an evaluation of two processes is that of one, batches that do not divide included."""
    found = {}
    data, config = rows(), tiny_config().model
    alone = evaluate(lively(config), data, torch.arange(7), 3)
    for name, parallel in LAYOUTS.items():
        spread = apply(lively(config), World(Layout.of(parallel, 2), rank), parallel)
        many = evaluate(spread.model, data, torch.arange(7), 3, spread=spread)
        assert (many.tokens, many.domain_load) == (alone.tokens, alone.domain_load), name
        assert list(many.by_domain) == list(alone.by_domain) == ["code", "prose"]
        pairs = [(many.loss, alone.loss), *((many.by_domain[n], alone.by_domain[n]) for n in alone.by_domain)]
        found[name] = torch.tensor(max(abs(a / b - 1) for a, b in pairs))
    return found


def test_many_processes_find_what_one_does() -> None:
    for answer in run_distributed(2, _spread_out):
        assert list(answer) == list(LAYOUTS)
        assert all(float(wrong) < 1e-6 for wrong in answer.values()), answer
