"""The contract of balancing losses: names, options, refusals, coefficients, and no NaN where there is nothing to count."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.plan import Gate, SoftPlan, from_topk
from moesaic.routing import LOSSES, Facts, LossContext, NoisyTopK, TokenContext, TopK, balance_loss, check_losses
from moesaic.routing.balance import evidence_needed, prototype_memory
from tests.routing.gates import identity_router, padded, route

# Options without a default need some value in tests that run every loss.
SOME: dict[str, dict[str, Any]] = {"v2_device": {"devices": 2}, "v2_communication": {"devices": 2, "limit": 1}}


def with_evidence(plan: Any, x_TD: Tensor) -> Any:
    """The plan as a sparse layer would return it in training to losses that need more than scores."""
    plan.gate.extra.update(input_TD=x_TD, free_logits_TE=plan.gate.logits_TE)
    return plan


def test_losses_add_up_with_their_coefficients() -> None:
    plan = route(torch.randn(9, 4), 2)
    total, values = balance_loss(plan, {"switch": 0.01, "z": 0.001})
    assert float(total) == pytest.approx(0.01 * float(values["switch"]) + 0.001 * float(values["z"]))
    none, empty = balance_loss(plan, {})
    assert float(none) == 0.0
    assert empty == {}


@pytest.mark.parametrize("name", LOSSES)
def test_no_loss_is_nan_without_valid_tokens(name: str) -> None:
    router = identity_router("topk", 4, 2)
    for x_TD, ctx in (
        (torch.randn(3, 4), padded([0, 0, 0])),
        (torch.randn(0, 4), TokenContext()),
    ):
        x_TD.requires_grad_()
        for scope in ("micro_batch", "sequence", "global_batch"):
            plan = with_evidence(router(x_TD, ctx), x_TD)
            label_T = torch.zeros(len(x_TD), dtype=torch.int64)
            value, _ = balance_loss(plan, {name: 1.0}, LossContext(1, scope, label_T=label_T), SOME)
            assert math.isfinite(float(value.detach()))


@pytest.mark.parametrize("name", LOSSES)
def test_experts_that_rules_forbid_leave_every_gradient_finite(name: str) -> None:
    """A softmax over masked logits holds exact zeros, where an entropy's gradient is 0 * inf unless somebody took care."""
    x_TD = torch.randn(8, 4, requires_grad=True)
    allowed_TE = torch.tensor([True, True, False, True]).expand(8, 4)
    plan = identity_router("noisy_topk" if name == "load" else "topk", 4, 2)(x_TD, TokenContext(allowed_TE=allowed_TE))
    plan = with_evidence(plan, x_TD)
    plan.gate.extra["rules_TE"] = allowed_TE
    if name == "semantic":
        plan.gate.extra["free_logits_TE"] = x_TD
    value, _ = balance_loss(plan, {name: 1.0}, LossContext(2), SOME)
    assert value.isfinite()
    assert value.requires_grad
    (grad_TD,) = torch.autograd.grad(value, x_TD)
    assert grad_TD.isfinite().all()


def test_losses_that_cannot_teach_are_refused() -> None:
    check_losses({"switch": 1e-2, "z": 1e-3, "importance": 1.0}, TopK(4, 4, 2))
    check_losses({"load": 1.0}, NoisyTopK(4, 4, 2))
    with pytest.raises(ConfigError, match='no balancing loss "swich". Did you mean "switch"'):
        check_losses({"swich": 1.0}, TopK(4, 4, 2))
    with pytest.raises(ConfigError, match="TopK has none"):
        check_losses({"load": 1.0}, TopK(4, 4, 2))
    with pytest.raises(ConfigError, match='"semantic" teaches hard rules, and the layer has none'):
        check_losses({"semantic": 1.0}, TopK(4, 4, 2))
    check_losses({"semantic": 1.0}, TopK(4, 4, 2), has_rules=True)

    class Table(TopK):
        facts = Facts(has_gate=False)

    with pytest.raises(ConfigError, match="no gradient path into router Table"):
        check_losses({"z": 1.0}, Table(4, 4, 2))

    class Mixer(TopK):
        facts = Facts(experts="all, mixed")

    check_losses({"z": 1.0, "entropy": 1.0}, Mixer(4, 4, 4))
    with pytest.raises(ConfigError, match='"switch" counts rows, and Mixer mixes all experts'):
        check_losses({"switch": 1.0}, Mixer(4, 4, 4))


@pytest.mark.parametrize(
    ("loss", "options", "words"),
    [
        ("v2_device", {}, r'"v2_device" needs the option devices; set model.moe.loss_options.v2_device.devices'),
        ("v2_device", {"device": 2}, 'Loss "v2_device" has no option "device". Did you mean "devices"?'),
        ("v2_device", {"devices": 2.5}, 'Option devices of loss "v2_device" must be int, not 2.5'),
        ("v2_device", {"devices": 9}, "between 1 and the layer's 8 experts, not 9"),
        ("v2_communication", {"devices": 4, "limit": 5}, "limit must be between 1 and devices=4, not 5"),
        ("switch", {"normalize": "slot"}, 'Did you mean "slots"?'),
        ("z", {"tau": 1.0}, 'Loss "z" has no option "tau".* Options: none'),
        ("entropy_global", {"tau": 2.5}, r"at most ln\(E\) = 2.079 nats"),
        ("entropy_global", {"tau": 0.0}, "tau must be above 0"),
        ("entropy_local", {"labels": []}, "labels must list numbers of labels from 0"),
        ("entropy_local", {"labels": [-1]}, "labels must list numbers of labels from 0"),
        ("prototype", {"tau": 0.0}, "tau .* must be above 0, not 0.0"),
        ("prototype", {"most": 0}, "most .* must be at least 1, not 0"),
        ("prototype", {"ema": 1.0}, "ema .* below 1, not 1.0"),
        ("prototype", {"space": "inputs"}, 'Did you mean "input"?'),
    ],
)
def test_options_are_checked(loss: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_losses({loss: 1.0}, TopK(4, 8, 2), {loss: options})


def test_options_for_a_loss_that_is_not_there_are_refused() -> None:
    with pytest.raises(ConfigError, match='options for loss "swich".* Did you mean "switch"?'):
        check_losses({"switch": 1.0}, TopK(4, 4, 2), {"swich": {}})


def test_what_losses_want_kept() -> None:
    assert evidence_needed({"switch": 1.0, "z": 1.0}) == frozenset()
    assert evidence_needed({"semantic": 1.0}) == {"free_logits_TE"}
    assert evidence_needed({"prototype": 1.0}) == {"input_TD"}
    assert evidence_needed({"prototype": 1.0}, {"prototype": {"space": "router_proj"}}) == {"free_logits_TE"}
    assert evidence_needed({"prototype": 1.0}, {"prototype": {"space": "logits"}}) == frozenset()
    with pytest.raises(ConfigError, match='Loss "prototype" needs input_TD in the plan'):
        balance_loss(route(torch.randn(3, 4), 2), {"prototype": 1.0})
    assert prototype_memory({"prototype": 1.0}, {}, 6, 4) is None
    assert prototype_memory({"switch": 1.0}, {"prototype": {"ema": 0.9}}, 6, 4) is None
    memory = prototype_memory({"prototype": 1.0}, {"prototype": {"ema": 0.9}}, 6, 4)
    assert memory is not None
    assert memory.mean_EV.shape == (4, 6)


def test_a_plan_without_scores_is_refused_in_words() -> None:
    plan = from_topk(torch.tensor([[0]]), torch.ones(1, 1), 2)
    with pytest.raises(ConfigError, match="carries no scores"):
        balance_loss(plan, {"z": 1.0})


def test_losses_on_scores_take_soft_plans() -> None:
    logits_TE = torch.randn(6, 3, requires_grad=True)
    for name in ("z", "logit_l2", "entropy", "entropy_local", "entropy_global"):
        mixture_GTS = logits_TE.softmax(1)[None]
        plan = SoftPlan(mixture_GTS, mixture_GTS, 3, gate=Gate(logits_TE, logits_TE.softmax(1)))
        value, _ = balance_loss(plan, {name: 1.0})
        assert float(torch.autograd.grad(value, logits_TE)[0].abs().sum()) > 0
