"""Tasks and domains at inference: which one a text is from, and how to generate in one, or in a mixture.

>>> found = domain_posterior(model, ids_BS)                              # one forward per domain
>>> found.posterior_BSA[0, -1]                                           # p(domain | all of row 0)
>>> model(ids_BS, mixture_BSE=found.posterior_BSA)                       # mixes experts inside each layer, one forward
>>> generate(model, prompt, mixture=found.posterior_BSA[0, -1])          # or task=3; task=-1 is "unknown"
>>> found.log_probs_BSV                                                  # mixes the predictions of whole models (DEMix)

Bayes' rule on the model's own likelihood (Gururangan et al. 2021):
``p(A | x_<=t) = softmax_A(ln p(A) + sum_s<=t ln p(x_s | x_<s, A))``, each factor from a forward with that domain forced.
The sum begins at a row's second token: nothing predicts the first.
The paper's three priors are the uniform one, one that follows the text seen, and one estimated on other text of the same kind
and kept ("cached"): give the mean posterior of such text as ``prior`` for that.

Legend: B rows, S positions, A domains (or tasks), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from moesaic.errors import ConfigError
from moesaic.infer.row_facts import Fact, one_each
from moesaic.models.decoder import Decoder
from moesaic.routing import Router

Mixture = Sequence[float] | Sequence[Sequence[float]] | Tensor


class HasModules(Protocol):
    """Any torch module."""

    def modules(self) -> Iterator[nn.Module]: ...


@dataclass(frozen=True, eq=False)
class DomainPosterior:
    """Where a text seems to be from.

    Attributes:
        posterior_BSA: fp32 p(domain | this row up to and including this position); sums to 1. The prior at first.
        log_probs_BSV: fp32 ln p(next token), the domains' predictions weighted by that posterior (the paper's ensemble).
    """

    posterior_BSA: Tensor
    log_probs_BSV: Tensor


def routers_by_task(model: HasModules) -> list[Router]:
    """The routers of a model that ask for a task or domain."""
    return [module for module in model.modules() if isinstance(module, Router) and "task_T" in module.facts.needs]


def num_domains(routers: Sequence[Router]) -> int:
    """A: the tasks or domains that all of these routers know."""
    return min(int(getattr(router, "num_tasks", router.num_experts)) for router in routers)


@torch.no_grad()
def domain_posterior(
    model: Decoder, ids_BS: Tensor, *, valid_BS: Tensor | None = None, prior: Sequence[float] | Tensor | None = None
) -> DomainPosterior:
    """p(domain | text so far) at every position, by running ``model`` once with every domain forced.

    Args:
        valid_BS: bool, False on padding, which says nothing about the domain.
        prior: A weights before the text, in any scale; None is uniform.

    Raises ``ConfigError`` if no router looks at the domain, or for a prior that is none.
    """
    routers = routers_by_task(model)
    if not routers:
        raise ConfigError(
            "No router of this model looks at the domain, so every domain explains a text equally well; train with the router "
            '"demix" or "task".'
        )
    domains = num_domains(routers)
    weight_A = torch.ones(domains) if prior is None else _weights(prior, "prior")
    if weight_A.shape != (domains,):
        raise ConfigError(
            f"The prior must hold one weight for each of the {domains} domains, not {tuple(weight_A.shape)}."
        )
    log_prior_A = (weight_A / weight_A.sum()).log().to(ids_BS.device)
    target_BS1 = ids_BS[:, 1:, None]
    told_BS = torch.ones_like(ids_BS, dtype=torch.bool) if valid_BS is None else valid_BS
    told_BS = told_BS[:, 1:] & told_BS[:, :-1]
    joint: list[Tensor] = []
    mixed_BSV: Tensor | None = None
    was_training = model.training
    model.eval()
    try:
        for domain in range(domains):
            logits = model(ids_BS, valid_BS=valid_BS, task_BS=torch.full_like(ids_BS, domain)).logits
            log_BSV = logits.float().log_softmax(dim=-1)
            seen_BS = torch.where(told_BS, log_BSV[:, :-1].gather(2, target_BS1)[:, :, 0], 0.0)
            # ln p(domain, text so far): nothing is known at the first position.
            joint_BS = log_prior_A[domain] + nn.functional.pad(seen_BS.cumsum(dim=1), (1, 0))
            joint.append(joint_BS)
            both_BSV = joint_BS[:, :, None] + log_BSV
            mixed_BSV = both_BSV if mixed_BSV is None else torch.logaddexp(mixed_BSV, both_BSV)
    finally:
        model.train(was_training)
    joint_BSA = torch.stack(joint, dim=2)
    assert mixed_BSV is not None
    return DomainPosterior(joint_BSA.softmax(dim=2), mixed_BSV - joint_BSA.logsumexp(dim=2, keepdim=True))


@dataclass(frozen=True, eq=False)
class RowTasks:
    """The task or mixture of each prompt of a generation: ``task_B`` int64, ``mixture_BA`` fp32, or None."""

    task_B: Tensor | None = None
    mixture_BA: Tensor | None = None

    def inputs(self, rows: Sequence[int], length: int, device: torch.device) -> dict[str, Tensor]:
        """Arguments of the model's forward for these rows, ``length`` positions each; none where nothing was given."""
        inputs = {}
        if self.task_B is not None:
            inputs["task_BS"] = self.task_B[list(rows)].to(device)[:, None].expand(-1, length)
        if self.mixture_BA is not None:
            inputs["mixture_BSE"] = self.mixture_BA[list(rows)].to(device)[:, None].expand(-1, length, -1)
        return inputs


def row_tasks(model: HasModules, rows: int, task: Fact | None = None, mixture: Mixture | None = None) -> RowTasks:
    """Check what a caller said about the tasks of ``rows`` prompts: one for all, or one each.

    Raises ``ConfigError`` if the model routes by task and the caller gave none, and for what cannot be.
    """
    routers = routers_by_task(model)
    if task is None and mixture is None:
        if routers:
            raise ConfigError(
                f"This model is routed by task or domain ({type(routers[0]).__name__}): pass task= (a number, or "
                "one per prompt; -1 if it is not known), or mixture= (weights of the domains)."
            )
        return RowTasks()
    task_B = None
    if task is not None:
        task_B = one_each("task", rows, task)
        known = num_domains(routers) if routers else None
        if known is not None and rows and int(task_B.max()) >= known:
            raise ConfigError(f"There is no task {int(task_B.max())}: this model knows 0 to {known - 1}.")
    return RowTasks(task_B, None if mixture is None else _mixtures(mixture, rows))


def _mixtures(mixture: Mixture, rows: int) -> Tensor:
    """fp32 (rows, A), each row summing to 1."""
    weight_BA = _weights(mixture, "mixture")
    if weight_BA.dim() == 1:
        weight_BA = weight_BA.expand(rows, -1)
    if weight_BA.dim() != 2 or len(weight_BA) != rows:
        raise ConfigError(
            f"{rows} prompts need one mixture or as many, but one of shape {tuple(weight_BA.shape)} came."
        )
    return weight_BA / weight_BA.sum(dim=-1, keepdim=True)


def _weights(given: Mixture, name: str) -> Tensor:
    weight = torch.as_tensor(given, dtype=torch.float32)
    if not (weight.isfinite().all() and (weight >= 0).all() and (weight.sum(dim=-1) > 0).all()):
        raise ConfigError(f"The {name} must hold finite weights of at least 0, not all of them 0.")
    return weight
