"""Domains at inference: Bayes' rule against plain loops, the right domain found, mixtures and tasks in generation."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.infer import generate_ids
from moesaic.infer.domains import DomainPosterior, domain_posterior, routers_by_task, row_tasks
from moesaic.infer.sampling import SamplingConfig
from moesaic.models import Decoder, build_model
from tests.models.tiny import VOCAB, lively, some_ids, sparse

GREEDY = SamplingConfig(temperature=0.0)
LETTERS = 12
NEXT = torch.stack([torch.randperm(LETTERS, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)])


def text(domain: int, rows: int, length: int, seed: int) -> Tensor:
    """(rows, length) letters: in domain d a letter is followed by NEXT[d] of it, but by any letter three times in ten."""
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randint(LETTERS, (rows, length), generator=rng)
    for t in range(1, length):
        regular = torch.rand(rows, generator=rng) < 0.7
        ids[:, t] = torch.where(regular, NEXT[domain][ids[:, t - 1]], ids[:, t])
    return ids


@cache
def trained(router: str) -> Decoder:
    """A one-layer model taught both domains, half a batch each."""
    model = build_model(replace(sparse(router, num_experts=2, k=2), num_layers=1, max_seq_len=32), seed=0)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    for step in range(70):
        ids = torch.cat([text(domain, 8, 17, seed=2 * step + domain) for domain in (0, 1)])
        task = torch.arange(2).repeat_interleave(8)[:, None].expand(16, 16)
        logits = model(ids[:, :-1], task_BS=task).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize("router", ["demix", "task"])
def test_it_finds_the_domain_a_text_is_from(router: str) -> None:
    model = trained(router)
    for domain in (0, 1):
        ids = text(domain, 20, 16, seed=1000 + domain)
        found = domain_posterior(model, ids).posterior_BSA
        torch.testing.assert_close(found[:, 0], torch.full((20, 2), 0.5))  # one token says nothing yet
        assert float(found[:, -1, domain].mean()) > 0.95
        assert float(found[:, 4, domain].mean()) < float(found[:, -1, domain].mean())


def test_a_text_that_changes_its_domain_changes_the_posterior() -> None:
    ids = torch.cat([text(0, 20, 8, seed=3), text(1, 20, 24, seed=4)], dim=1)
    found_SA = domain_posterior(trained("demix"), ids).posterior_BSA.mean(dim=0)
    assert float(found_SA[7, 0]) > 0.8
    assert float(found_SA[-1, 1]) > 0.8


def test_the_mixture_of_predictions_beats_the_wrong_domain_and_nears_the_right_one() -> None:
    model, ids = trained("demix"), text(1, 40, 16, seed=77)
    target = ids[:, 1:, None]

    def loss(log_BSV: Tensor) -> float:
        return -float(log_BSV[:, :-1].gather(2, target).mean())

    with torch.no_grad():
        forced = [loss(model(ids, task_BS=torch.full_like(ids, d)).logits.log_softmax(-1)) for d in (0, 1)]
        mixture = domain_posterior(model, ids)
        inside = loss(model(ids, mixture_BSE=mixture.posterior_BSA).logits.log_softmax(-1))
    ensemble = loss(mixture.log_probs_BSV)
    assert forced[1] < ensemble < forced[1] + 0.3 < forced[0] - 0.5
    assert forced[1] - 0.05 < inside < forced[0] - 0.5


def slow(model: Decoder, ids: Tensor, prior: list[float], valid: Tensor | None = None) -> DomainPosterior:
    """Bayes' rule in plain loops over probabilities."""
    B, S = ids.shape
    posterior, mixed = torch.zeros(B, S, len(prior)), torch.zeros(B, S, VOCAB)
    with torch.no_grad():
        probs = [
            model(ids, valid_BS=valid, task_BS=torch.full_like(ids, d)).logits.softmax(-1) for d in range(len(prior))
        ]
    for b in range(B):
        weight = [p / sum(prior) for p in prior]
        for t in range(S):
            if t and (valid is None or bool(valid[b, t] & valid[b, t - 1])):
                weight = [w * float(probs[d][b, t - 1, ids[b, t]]) for d, w in enumerate(weight)]
                weight = [w / sum(weight) for w in weight]
            posterior[b, t] = torch.tensor(weight)
            mixed[b, t] = sum(w * probs[d][b, t] for d, w in enumerate(weight))  # type: ignore[assignment]
    return DomainPosterior(posterior, mixed.log())


@pytest.mark.parametrize("prior", [None, [1.0, 2.0, 0.0, 5.0]])
@pytest.mark.parametrize("padded", [False, True])
def test_against_plain_loops(prior: list[float] | None, padded: bool) -> None:
    model, ids = lively(sparse("demix", k=3)), some_ids(3, 7)
    valid = None
    if padded:
        valid = torch.ones(3, 7, dtype=torch.bool)
        valid[1, :2] = False
        valid[2, 5:] = False
    fast, plain = domain_posterior(model, ids, valid_BS=valid, prior=prior), slow(model, ids, prior or [1.0] * 4, valid)
    torch.testing.assert_close(fast.posterior_BSA, plain.posterior_BSA, rtol=1e-4, atol=1e-6)
    keep = torch.ones(3, 7, dtype=torch.bool) if valid is None else valid
    torch.testing.assert_close(fast.log_probs_BSV[keep], plain.log_probs_BSV[keep], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(fast.log_probs_BSV.exp().sum(-1)[keep], torch.ones(int(keep.sum())))


def test_the_posterior_is_causal_and_leaves_the_model_as_it_was() -> None:
    model, ids = lively(sparse("task")).train(), some_ids(2, 8)
    whole = domain_posterior(model, ids).posterior_BSA
    assert model.training
    torch.testing.assert_close(domain_posterior(model, ids[:, :5]).posterior_BSA, whole[:, :5])


def test_generation_in_a_domain_and_in_a_mixture() -> None:
    model = trained("demix")
    prompts = [[3, 7], [5]]
    by_domain = {}
    for domain in (0, 1):
        made = generate_ids(model, prompts, max_new_tokens=6, sampling=GREEDY, task=domain)
        by_domain[domain] = made.ids
        for prompt, new in zip(prompts, made.ids, strict=True):
            chain = [prompt[-1], *new]
            assert chain[1:] == [int(NEXT[domain][letter]) for letter in chain[:-1]]
    assert by_domain[0] != by_domain[1]
    each = generate_ids(model, prompts, max_new_tokens=6, sampling=GREEDY, task=[1, 0])
    assert each.ids == (by_domain[1][0], by_domain[0][1])
    sure = generate_ids(model, prompts, max_new_tokens=6, sampling=GREEDY, mixture=[[0.0, 3.0], [1.0, 0.0]])
    assert sure.ids == each.ids
    assert (
        generate_ids(model, prompts, max_new_tokens=6, sampling=GREEDY, mixture=torch.tensor([1.0, 0.0])).ids
        == by_domain[0]
    )
    # What the posterior says of the prompt is enough to go on in its domain.
    ids = text(1, 1, 14, seed=5)
    found = domain_posterior(model, ids).posterior_BSA[0, -1]
    made = generate_ids(model, ids.tolist(), max_new_tokens=6, sampling=GREEDY, mixture=found)
    assert made.ids == generate_ids(model, ids.tolist(), max_new_tokens=6, sampling=GREEDY, task=1).ids


def test_unknown_is_said_with_a_negative_number() -> None:
    model = lively(sparse("task"))
    uniform = generate_ids(model, [[3, 7]], max_new_tokens=5, sampling=GREEDY, mixture=[1.0] * 4)
    assert generate_ids(model, [[3, 7]], max_new_tokens=5, sampling=GREEDY, task=-1).ids == uniform.ids


def test_refusals() -> None:
    model, plain, ids = lively(sparse("demix")), lively(sparse()), some_ids(1, 4)
    assert len(routers_by_task(model)) == 2
    assert row_tasks(plain, 2).inputs([0], 3, torch.device("cpu")) == {}
    for words, call in [
        ("routed by task or domain (Demix): pass task=", lambda: generate_ids(model, [[1]])),
        ("There is no task 4: this model knows 0 to 3.", lambda: generate_ids(model, [[1]], task=4)),
        ("2 prompts need one task or as many", lambda: generate_ids(model, [[1], [2]], task=[0, 1, 1])),
        ("2 prompts need one mixture or as many", lambda: row_tasks(model, 2, mixture=[[1.0]] * 3)),
        ("The mixture must hold finite weights", lambda: row_tasks(model, 1, mixture=[1.0, -1.0, 0.0, 0.0])),
        ("The mixture must hold finite weights", lambda: row_tasks(model, 1, mixture=[0.0] * 4)),
        ("The mixture must hold finite weights", lambda: row_tasks(model, 1, mixture=[math.nan] * 4)),
        ("knows 4 tasks or domains, but the mixture is over 3", lambda: generate_ids(model, [[1]], mixture=[1.0] * 3)),
        ("No router of this model looks at the domain", lambda: domain_posterior(plain, ids)),
        ("one weight for each of the 4 domains", lambda: domain_posterior(model, ids, prior=[1.0, 1.0])),
    ]:
        with pytest.raises(ConfigError) as caught:
            call()
        assert words in str(caught.value)
