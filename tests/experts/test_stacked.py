"""Dropout inside experts: on the hidden units, scaled to the same mean, in training only, the same again in recomputation."""

from __future__ import annotations

import torch

from moesaic.experts import StackedExperts
from moesaic.models import build_model
from moesaic.train.recompute import recompute_activations
from tests.models.tiny import some_ids, sparse


def test_hidden_units_are_dropped_and_the_rest_scaled() -> None:
    torch.manual_seed(0)
    experts = StackedExperts(2, 4, 1000, "relu", gated=False, dropout=0.4)
    with torch.no_grad():
        experts.w_in.fill_(0.25)
        experts.w_out.fill_(1.0)
    counts_E = torch.tensor([3, 2])
    x_ND = torch.ones(5, 4)  # every hidden unit is 1: an output is the number of units left / .6
    y_ND = experts.train()(x_ND, counts_E)
    left_N = y_ND[:, 0] * 0.6
    torch.testing.assert_close(left_N, left_N.round(), atol=1e-2, rtol=0)
    # 600 of 1000 are left, standard deviation 15.5; each row draws its own.
    assert ((left_N - 600).abs() < 4 * 15.5).all()
    assert len(set(left_N.round().tolist())) > 1
    torch.testing.assert_close(experts.eval()(x_ND, counts_E), torch.full((5, 4), 1000.0))
    torch.testing.assert_close(experts.train().compute_one(0, x_ND), torch.full((5, 4), 1000.0))


def test_without_dropout_training_and_evaluation_agree() -> None:
    experts = StackedExperts(2, 4, 8)
    x_ND, counts_E = torch.randn(5, 4), torch.tensor([3, 2])
    assert torch.equal(experts.train()(x_ND, counts_E), experts.eval()(x_ND, counts_E))


def test_recomputed_experts_drop_the_same_units() -> None:
    """The backward pass draws again from the saved state, so gradients are those of the forward that was run."""
    gradients = []
    for recompute in (False, True):
        model = build_model(sparse(expert_dropout=0.5), seed=0).train()
        if recompute:
            recompute_activations(model)
        torch.manual_seed(7)
        model(some_ids(2, 8)).logits.square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again)
