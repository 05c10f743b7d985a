"""One optimiser step against hand-written sums: losses, accumulation, clipping, readings, bias updates."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moesaic.data.packing import IGNORE, Batch
from moesaic.models import Decoder, ModelConfig, RouterConfig, build_model
from moesaic.plan import read
from moesaic.plan.capacity import CapacityRule
from moesaic.train.optim import OptimConfig, make_optimizer
from moesaic.train.step import forward, lm_losses, train_step
from tests.models.tiny import lively, some_ids, sparse, tiny


def batch_of(rows: int, length: int = 9, *, gaps: bool = True, seed: int = 3) -> Batch:
    """Rows with very different numbers of targets: row r is padded behind position ``length - r`` (if ``gaps``)."""
    ids = some_ids(rows, length, seed)
    targets = some_ids(rows, length, seed + 1)
    valid = torch.ones(rows, length, dtype=torch.bool)
    documents, labels = torch.zeros(rows, length, dtype=torch.int64), torch.zeros(rows, length, dtype=torch.int64)
    if gaps:
        for row in range(rows):
            valid[row, max(2, length - row) :] = False
        documents[:, length // 2 :] = 1
        documents[~valid] = 2
        targets[:, length // 2 - 1] = IGNORE
        labels[:, length // 2 :] = 1
        labels[~valid] = -1
        targets[~valid] = IGNORE
    return Batch(ids, targets, valid, documents, labels)


def rows_of(batch: Batch, start: int, stop: int) -> Batch:
    return Batch(*(getattr(batch, name)[start:stop] for name in batch.__dataclass_fields__))


def one_step(
    config: ModelConfig, batches: list[Batch], clip: float = 0.0, lr: float = 0.1
) -> tuple[Decoder, dict[str, Tensor], object]:
    """The model after a step, and the gradients it used (plain SGD, so that the update is the gradient)."""
    model = lively(config)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    reading, _ = train_step(model, optimizer, batches, lr=lr, clip=clip, step=1)
    gradients = {n: (before[n] - p.detach()) / lr for n, p in model.named_parameters()}
    assert all(p.grad is None for p in model.parameters())
    return model, gradients, reading


def test_the_loss_of_a_step_by_hand() -> None:
    config = sparse(losses={"switch": 0.5, "z": 0.25}, capacity=CapacityRule(factor=0.75, minimum=0))
    batch = batch_of(3)
    model = lively(config).train()
    with torch.no_grad():
        output = forward(model, batch)
    logp = output.logits.double().log_softmax(-1)
    summed, targets = 0.0, 0
    for row in range(3):
        for place in range(9):
            target = int(batch.targets_BS[row, place])
            if target != IGNORE:
                summed -= float(logp[row, place, target])
                targets += 1
    valid = batch.valid_BS.flatten()
    switch, z = [], []
    for plan in output.plans.values():
        assert plan.gate is not None
        share = torch.stack([(plan.choice_N == e).sum() for e in range(4)]) / (2 * valid.sum())  # type: ignore[union-attr]
        switch.append(4 * float((share * plan.gate.probs_TE[valid].mean(0)).sum()))
        z.append(float(plan.gate.logits_TE[valid].exp().sum(1).log().square().mean()))
    _, _, reading = one_step(config, [batch])
    assert reading.targets == targets
    assert reading.lm_loss == pytest.approx(summed / targets, rel=1e-5)
    assert reading.losses == pytest.approx({"switch": sum(switch) / 2, "z": sum(z) / 2}, rel=1e-5)
    assert reading.loss == pytest.approx(summed / targets + 0.5 * sum(switch) / 2 + 0.25 * sum(z) / 2, rel=1e-5)

    record = reading.record()
    loads = [read.load(p) for p in output.plans.values()]
    assert record["load"] == [load.tolist() for load in loads]
    assert [sum(load) for load in record["load"]] == [2 * int(valid.sum())] * 2
    assert record["max_vio"] == pytest.approx([float(load.max() / load.double().mean() - 1) for load in loads])
    dropped = [int((p.choice_N.lt(4) & p.expert_N.eq(4)).sum()) for p in output.plans.values()]
    assert min(dropped) > 0
    assert record["drop_rate"] == pytest.approx([d / (2 * int(valid.sum())) for d in dropped])
    for name, by_hand in (("entropy", _entropy), ("margin", _margin)):
        wanted = [by_hand(p.gate.probs_TE[valid].detach()) for p in output.plans.values()]
        assert record[name] == pytest.approx(wanted, rel=1e-5)


def _entropy(probs_TE: Tensor) -> float:
    return float(-(probs_TE * probs_TE.log()).sum(1).mean())


def _margin(probs_TE: Tensor) -> float:
    best = probs_TE.sort(dim=1, descending=True).values
    return float((best[:, 0] - best[:, 1]).mean())


@pytest.mark.parametrize("sizes", [(2, 2, 2, 2), (1, 7), (3, 5), (8,)], ids=str)
@pytest.mark.parametrize("name", ["dense", "sparse"])
def test_micro_batches_of_unequal_targets_equal_one_batch(name: str, sizes: tuple[int, ...]) -> None:
    """Mean over the step's targets, not mean of means. Rows are independent, so any cut gives the same gradients."""
    config = tiny() if name == "dense" else sparse(shared=1)
    whole = batch_of(8)
    targets = [int((rows_of(whole, i, i + 1).targets_BS != IGNORE).sum()) for i in range(8)]
    assert max(targets) > 3 * min(targets)
    cuts = [0]
    for size in sizes:
        cuts.append(cuts[-1] + size)
    parts = [rows_of(whole, a, b) for a, b in itertools.pairwise(cuts)]
    model_1, gradient_1, reading_1 = one_step(config, [whole])
    model_n, gradient_n, reading_n = one_step(config, parts)
    assert reading_n.loss == pytest.approx(reading_1.loss, rel=1e-6)
    assert reading_n.targets == reading_1.targets
    assert reading_n.grad_norm == pytest.approx(reading_1.grad_norm, rel=1e-5)
    for key, gradient in gradient_1.items():
        assert gradient.abs().max() > 0, key
        torch.testing.assert_close(gradient_n[key], gradient, rtol=1e-4, atol=1e-5, msg=key)
    for key, p in model_1.state_dict().items():
        torch.testing.assert_close(model_n.state_dict()[key], p, rtol=1e-5, atol=1e-6, msg=key)
    one, many = reading_1.record(), reading_n.record()
    assert one["load"] == many["load"]
    for key in ("entropy", "margin", "drop_rate"):
        assert many[key] == pytest.approx(one[key], rel=1e-5)  # weighted by tokens, not by micro-batch


def test_row_losses_add_up_over_micro_batches() -> None:
    """Losses that are means over tokens agree between cuts where every part has as many tokens."""
    whole = batch_of(8, gaps=False)
    config = sparse(losses={"z": 0.5})
    _, gradient_1, reading_1 = one_step(config, [whole])
    _, gradient_n, reading_n = one_step(config, [rows_of(whole, i, i + 2) for i in (0, 2, 4, 6)])
    assert reading_n.losses["z"] == pytest.approx(reading_1.losses["z"], rel=1e-6)
    assert reading_n.loss == pytest.approx(reading_1.loss, rel=1e-6)
    for key, gradient in gradient_1.items():
        torch.testing.assert_close(gradient_n[key], gradient, rtol=1e-4, atol=1e-5, msg=key)


def test_the_global_batch_scope_counts_the_step_so_far() -> None:
    whole = batch_of(6, gaps=False)
    parts = [rows_of(whole, i, i + 2) for i in (0, 2, 4)]
    config = sparse(losses={"switch": 1.0}, loss_scope="global_batch")
    model = lively(config).train()
    plans = [forward(model, part).plans for part in parts]
    wanted, local = 0.0, 0.0
    for layer in (0, 1):
        seen = torch.zeros(4)
        for step in plans:
            probs = step[layer].gate.probs_TE.detach().mean(0)  # type: ignore[union-attr]
            here = read.load(step[layer]).float()
            seen = seen + here
            wanted += 4 * float((seen / seen.sum() * probs).sum()) / 3 / 2
            local += 4 * float((here / here.sum() * probs).sum()) / 3 / 2
    _, _, reading = one_step(config, parts)
    assert reading.losses["switch"] == pytest.approx(wanted, rel=1e-6)
    assert abs(wanted - local) > 1e-3
    _, _, micro = one_step(sparse(losses={"switch": 1.0}), parts)
    assert micro.losses["switch"] == pytest.approx(local, rel=1e-6)


def test_a_selection_bias_moves_once_per_step_by_the_counts_of_all_its_micro_batches() -> None:
    config = sparse("topk", {"balance_bias": True, "bias_rate": 0.1, "bias_rule": "proportional"})
    whole = batch_of(6)
    parts = [rows_of(whole, 0, 1), rows_of(whole, 1, 6)]
    for batches in ([whole], parts):
        model, _, reading = one_step(config, batches)
        for layer, sparse_layer in model.moe_layers().items():
            load = reading.layers[layer].load_E.double()
            wanted = 0.1 * (load.mean() - load) / load.mean()
            assert wanted.abs().max() > 0.001
            torch.testing.assert_close(sparse_layer.router.choice_bias_E, wanted.float())
    model = lively(config)
    with torch.no_grad():
        forward(model.train(), whole)
    assert not model.moe_layers()[0].router.choice_bias_E.any()  # a forward alone changes nothing


def test_clipping_scales_every_gradient_alike_and_the_norm_is_the_one_before() -> None:
    batch = batch_of(4)
    _, free, reading = one_step(sparse(), [batch])
    norm = float(torch.stack([g.double().square().sum() for g in free.values()]).sum().sqrt())
    assert reading.grad_norm == pytest.approx(norm, rel=1e-4)
    clip = norm / 4
    _, clipped, reading = one_step(sparse(), [batch], clip=clip)
    assert reading.grad_norm == pytest.approx(norm, rel=1e-4)
    for key, gradient in free.items():
        torch.testing.assert_close(clipped[key], gradient / 4, rtol=1e-3, atol=2e-5, msg=key)
    _, loose, _ = one_step(sparse(), [batch], clip=norm * 2)
    for key, gradient in free.items():
        torch.testing.assert_close(loose[key], gradient, rtol=0, atol=0, msg=key)


def test_gradients_within_the_limit_are_not_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[float] = []
    scale = torch.nn.utils.clip_grads_with_norm_
    monkeypatch.setattr(
        torch.nn.utils, "clip_grads_with_norm_", lambda p, most, norm: (calls.append(most), scale(p, most, norm))
    )
    _, _, reading = one_step(sparse(), [batch_of(2)])
    one_step(sparse(), [batch_of(2)], clip=reading.grad_norm * 1.01)
    assert not calls
    one_step(
        sparse(), [batch_of(2)], clip=reading.grad_norm
    )  # the divisor is the norm and a bit: PyTorch's scales this one
    one_step(sparse(), [batch_of(2)], clip=reading.grad_norm * 0.99)
    assert len(calls) == 2


def test_the_given_learning_rate_is_the_one_used() -> None:
    model = build_model(tiny(), seed=0)
    optimizer = make_optimizer(model, OptimConfig(lr=7.0))
    train_step(model, optimizer, [batch_of(2)], lr=0.125, clip=1.0, step=1)
    assert [g["lr"] for g in optimizer.param_groups] == [0.125, 0.125]
    assert model.training


def test_masks_are_left_out_where_they_would_say_nothing() -> None:
    model = lively(sparse())
    seen: list[tuple[object, object]] = []
    model.register_forward_pre_hook(
        lambda _m, _a, kw: seen.append((kw["valid_BS"], kw["document_BS"])), with_kwargs=True
    )
    plain = batch_of(2, gaps=False)
    forward(model, plain)
    forward(model, replace(plain, document_BS=plain.document_BS + 3))
    assert seen == [(None, None)] * 2
    forward(model, batch_of(2))
    assert seen[2][0] is not None
    assert seen[2][1] is not None


def test_cross_entropy_is_summed_in_fp32_whatever_the_logits_are() -> None:
    logits = torch.randn(2, 3, 8) * 4
    targets = torch.tensor([[1, IGNORE, 2], [IGNORE, IGNORE, 7]])
    found = lm_losses(logits.bfloat16(), targets).sum()
    assert found.dtype == torch.float32
    exact = logits.bfloat16().double().log_softmax(-1)
    wanted = -(exact[0, 0, 1] + exact[0, 2, 2] + exact[1, 2, 7])
    torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1e-6)


def test_a_batch_without_targets_still_steps() -> None:
    batch = batch_of(2)
    batch.targets_BS.fill_(IGNORE)
    _, gradients, reading = one_step(sparse(), [batch])
    assert (reading.lm_loss, reading.targets) == (0.0, 0)
    assert all(not g.any() for g in gradients.values())


def test_a_step_learns() -> None:
    model = build_model(sparse("topk", {"balance_bias": True}, shared=1), seed=0)
    optimizer = make_optimizer(model, OptimConfig(lr=0.01))
    batch = batch_of(4)
    losses = [train_step(model, optimizer, [batch], lr=0.01, clip=1.0, step=s)[0].lm_loss for s in range(25)]
    assert losses[-1] < losses[0] - 1
    assert isinstance(model.config.moe.router, RouterConfig)  # type: ignore[union-attr]
