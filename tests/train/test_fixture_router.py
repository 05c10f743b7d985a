"""Adding a router is one class and one line in ``ROUTERS``: this one trains, logs, resumes, is reported and generates."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from moesaic.checkpoint.native import load_model
from moesaic.errors import ConfigError
from moesaic.infer.generate import generate
from moesaic.models.config import MoEConfig, RouterConfig
from moesaic.plan.plan import Gate, RoutingPlan, from_topk
from moesaic.report import write_report
from moesaic.routing import NO_CONTEXT, ROUTERS, LinearGate, Router, StepStats, TokenContext, router_options
from moesaic.routing.gate import check_k, choose
from moesaic.train.config import TrainConfig
from moesaic.train.log import read_metrics
from tests.train.tiny_run import StopAfter, tiny_config, tiny_corpus, train


class CosineRouter(Router):
    """Scores are cosines with one direction per expert, over a temperature; a running mean of load is kept as state."""

    def __init__(
        self,
        dim: int,
        num_experts: int,
        k: int,
        *,
        temperature: float = 0.2,
        noise: bool = True,
        centre: Literal["none", "load"] = "none",
    ) -> None:
        super().__init__()
        check_k(k, num_experts)
        self.num_experts, self.k = num_experts, k
        self.temperature, self.noise, self.centre = temperature, noise, centre
        self.gate = LinearGate(dim, num_experts, init_std=1.0)
        self.register_buffer("mean_load_E", torch.zeros(num_experts))

    def forward(self, x_TD: Tensor, ctx: TokenContext = NO_CONTEXT) -> RoutingPlan:
        """K rows per token."""
        direction_ED = torch.nn.functional.normalize(self.gate.weight, dim=1)
        logits_TE = torch.nn.functional.normalize(x_TD.float(), dim=1) @ direction_ED.T / self.temperature
        probs_TE = logits_TE.softmax(dim=1)
        scores_TE = probs_TE
        if self.training and self.noise:
            scores_TE = scores_TE + 0.1 * torch.rand(scores_TE.shape, generator=ctx.generator)
        if self.centre == "load":
            scores_TE = scores_TE - 0.01 * self.mean_load_E
        expert_TK = choose(scores_TE, self.k)
        weight_TK = probs_TE.gather(1, expert_TK)
        return from_topk(expert_TK, weight_TK, self.num_experts, valid_T=ctx.valid_T, gate=Gate(logits_TE, probs_TE))

    def after_step(self, stats: StepStats) -> None:
        """Exponential mean of each expert's share."""
        self.mean_load_E.mul_(0.9).add_(0.1 * stats.counts_E / stats.counts_E.sum())


@pytest.fixture(autouse=True)
def _known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ROUTERS, "cosine", CosineRouter)


def config(options: dict[str, Any] | None = None, **changes: Any) -> TrainConfig:
    router = RouterConfig("cosine", {"temperature": 0.5, "centre": "load"} if options is None else options)
    moe = {"router": router, "losses": {"switch": 0.05, "z": 1e-3, "importance": 0.01}} | changes
    return tiny_config(moe=moe, steps=16, eval_every=8, checkpoint_every=6)


def steps(folder: Path) -> list[dict[str, Any]]:
    return [
        {k: v for k, v in r.items() if k not in ("time_s", "tokens_per_s")}
        for r in read_metrics(folder)
        if r["kind"] == "step"
    ]


def test_it_trains_logs_resumes_and_is_reported(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(config(), whole).reason == "done"
    assert train(config(), parts, stop=StopAfter(7)).reason == "interrupted"
    assert train(config(), parts, resume=True).reason == "done"

    found = steps(whole)
    assert found[-1]["lm_loss"] < found[0]["lm_loss"] - 0.1
    assert set(found[0]["losses"]) == {"switch", "z", "importance"}
    assert [sum(load) for load in found[0]["load"]] == [2 * 96] * 2
    assert all(0 < e <= 1.3863 for e in found[0]["entropy"])
    assert steps(parts) == found  # its noise and its own state resume bit for bit
    record = read_metrics(whole)[0]
    assert (record["routers"], record["num_experts"]) == (["cosine"], [4, 4])

    page = write_report(whole)
    html = (page if isinstance(page, Path) else whole / "report.html").read_text()
    assert "cosine" in html
    assert json.loads((whole / "config.json").read_text())["model"]["moe"]["router"]["name"] == "cosine"


def test_its_checkpoint_is_a_model_that_generates(tmp_path: Path) -> None:
    train(config(), tmp_path / "run")
    model = load_model(tmp_path / "run" / "checkpoints" / "step-00000016")
    router = model.moe_layers()[0].router
    assert isinstance(router, CosineRouter)
    assert (router.temperature, router.centre) == (0.5, "load")
    assert float(router.mean_load_E.sum()) == pytest.approx(1 - 0.9**16, rel=1e-4)  # one update a step
    text = generate(model, "the ", tiny_corpus().tokenizer, max_new_tokens=5, temperature=0.0)
    assert isinstance(text, str)


@pytest.mark.parametrize("recompute", [False, True])
def test_it_runs_with_everything_else_switched_on(tmp_path: Path, recompute: bool) -> None:
    everything = config(shared=1, zero=1, copy=1, k=3)
    result = train(replace(everything, steps=3, dtype="bf16", accumulate=2, recompute=recompute), tmp_path / "run")
    assert result.val_loss is not None


def test_its_options_are_read_off_its_constructor_and_checked(tmp_path: Path) -> None:
    assert list(router_options("cosine")) == ["temperature", "noise", "centre"]
    for options, words in [
        (
            {"temprature": 1.0},
            'Router "cosine" has no option "temprature". Did you mean "temperature"? Options: temperature',
        ),
        ({"temperature": "hot"}, "Option temperature of router \"cosine\" must be float, not 'hot'."),
        ({"noise": 1}, 'Option noise of router "cosine" must be bool, not 1.'),
        ({"centre": "loud"}, "Option centre of router \"cosine\" must be one of 'none', 'load', not 'loud'."),
    ]:
        with pytest.raises(ConfigError) as caught:
            train(config(options), tmp_path / "run")
        assert str(caught.value).startswith(words)
    assert not (tmp_path / "run").exists()


def test_more_choices_than_experts_are_refused() -> None:
    with pytest.raises(ConfigError, match="model.moe.k=5 is more than the 4 experts of a layer"):
        config(k=5)
    with pytest.raises(ConfigError, match="k=5 experts per token are impossible with num_experts=4"):
        CosineRouter(8, 4, 5)
    assert MoEConfig(num_experts=4).k == 2


def test_an_unknown_name_suggests_it() -> None:
    with pytest.raises(ConfigError, match='There is no router "cosin". Did you mean "cosine"?'):
        train(tiny_config(moe={"router": RouterConfig("cosin")}), Path("never"))
