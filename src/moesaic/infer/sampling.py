"""From logits to the next token: pure functions on ``logits_BV``, and ``sample`` which applies them in one fixed order.

The order is: repetition penalty, presence and frequency penalties, temperature, top-k, top-p, min-p, draw. Each filter
sees the distribution the one before it left, renormalised. A filtered token gets the logit -inf; the filters never
remove the most likely token. Equal logits are ranked by id, the lowest first, in greedy choice and in every filter.

    config = SamplingConfig(temperature=0.8, top_p=0.95)
    ids_B = sample(logits_BV, history, config, [torch.Generator().manual_seed(seed) for seed in seeds])

Every row draws one number per step from its own generator on the CPU, so what a row draws depends neither on the other
rows nor on the device. Legend: B rows, V vocabulary, S tokens so far.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from moesaic.errors import ConfigError, NonFiniteError

_RANGES: dict[str, tuple[float, float, str]] = {  # penalties are bounded so that no finite logit can overflow
    "repetition_penalty": (0.01, 100.0, "1 turns it off"),
    "presence_penalty": (-100.0, 100.0, "0 turns it off"),
    "frequency_penalty": (-100.0, 100.0, "0 turns it off"),
    "min_p": (0.0, 1.0, "0 turns it off"),
}


@dataclass(frozen=True)
class SamplingConfig:
    """How the next token is drawn. The defaults sample from the model's own distribution, unchanged.

    temperature: 0 takes the most likely token (greedy); 1 leaves the distribution; larger is flatter.
    top_k: keep this many tokens; 0 keeps all.
    top_p: keep the smallest set of most likely tokens whose probability reaches this; 1 keeps all.
    min_p: keep tokens at least this fraction as likely as the most likely one; 0 keeps all.
    repetition_penalty: divide positive, multiply negative logits of tokens in the prompt or the text so far; 1 is off.
    presence_penalty: subtracted once from the logit of every token already generated (the prompt does not count).
    frequency_penalty: subtracted once per time the token was generated (the prompt does not count).

    Raises ``ConfigError`` for a value outside its range, NaN included.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ConfigError(f"{field.name} must be a number, but it is {value!r}.")
            if not math.isfinite(value):
                raise ConfigError(f"{field.name} must be a finite number, but it is {value}.")
        if self.temperature < 0:
            raise ConfigError(f"temperature must be 0 (greedy) or more, but it is {self.temperature}.")
        if not isinstance(self.top_k, int):
            raise ConfigError(f"top_k must be a whole number of tokens, but it is {self.top_k}.")
        if self.top_k < 0:
            raise ConfigError(f"top_k must be 0 (keep all tokens) or more, but it is {self.top_k}.")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must be above 0 and at most 1 (1 keeps all tokens), but it is {self.top_p}.")
        for name, (low, high, off) in _RANGES.items():
            if not low <= getattr(self, name) <= high:
                raise ConfigError(
                    f"{name} must be between {low:g} and {high:g} ({off}), but it is {getattr(self, name)}."
                )

    @property
    def needs_history(self) -> bool:
        """Whether any penalty is on, so that ``sample`` reads the tokens so far."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


@dataclass(frozen=True)
class History:
    """The tokens so far: ``ids_BS`` int64, ``valid_BS`` bool (False = padding), the first ``prompt`` columns given."""

    ids_BS: Tensor
    valid_BS: Tensor
    prompt: int

    def seen_BV(self, vocab_size: int) -> Tensor:
        """bool (B, V): the token occurs in the prompt or in the generated text."""
        return _counts_BV(self.ids_BS, self.valid_BS, vocab_size) > 0

    def generated_BV(self, vocab_size: int) -> Tensor:
        """int64 (B, V): how often the token was generated."""
        return _counts_BV(self.ids_BS[:, self.prompt :], self.valid_BS[:, self.prompt :], vocab_size)


def _counts_BV(ids_BS: Tensor, valid_BS: Tensor, vocab_size: int) -> Tensor:
    counts_BV = torch.zeros(ids_BS.shape[0], vocab_size, dtype=torch.int64, device=ids_BS.device)
    return counts_BV.scatter_add_(1, ids_BS, valid_BS.to(torch.int64))


def repetition_penalty(logits_BV: Tensor, seen_BV: Tensor, penalty: float) -> Tensor:
    """Divide the positive and multiply the negative logits of tokens already seen (Keskar et al. 2019, as in HF)."""
    penalised_BV = torch.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty)
    return torch.where(seen_BV, penalised_BV, logits_BV)


def count_penalties(logits_BV: Tensor, generated_BV: Tensor, presence: float, frequency: float) -> Tensor:
    """Subtract ``presence`` once and ``frequency`` per occurrence from tokens already generated (OpenAI's formula)."""
    return logits_BV - presence * (generated_BV > 0).to(logits_BV.dtype) - frequency * generated_BV.to(logits_BV.dtype)


def temperature(logits_BV: Tensor, value: float) -> Tensor:
    """``(logits - max) / value`` for ``value`` > 0. The shift changes no probability and no small value overflows."""
    shifted_BV = logits_BV.double() - logits_BV.double().amax(-1, keepdim=True)
    return (shifted_BV / value).to(logits_BV.dtype)


def top_k(logits_BV: Tensor, k: int) -> Tensor:
    """Keep exactly the ``k`` largest logits (all when ``k`` is 0 or at least V); of equal ones the lowest ids."""
    if k == 0 or k >= logits_BV.shape[-1]:
        return logits_BV
    order_BV = logits_BV.argsort(dim=-1, descending=True, stable=True)
    return logits_BV.scatter(-1, order_BV[:, k:], -math.inf)


def top_p(logits_BV: Tensor, p: float) -> Tensor:
    """Keep the smallest prefix of tokens, most likely first, whose cumulative probability is at least ``p``.

    At least one token stays. Probabilities are summed in fp64. Source: Holtzman et al. 2020.
    """
    if p >= 1:  # a rounded cumulative sum could reach 1 early and cut the tail
        return logits_BV
    sorted_BV, order_BV = logits_BV.sort(dim=-1, descending=True, stable=True)
    probs_BV = sorted_BV.double().softmax(-1)
    before_BV = probs_BV.cumsum(-1).roll(1, dims=-1)  # what the tokens before this one already hold
    before_BV[:, 0] = 0.0
    return logits_BV.masked_fill((before_BV >= p).gather(-1, order_BV.argsort(-1)), -math.inf)


def min_p(logits_BV: Tensor, p: float) -> Tensor:
    """Keep tokens whose probability is at least ``p`` times that of the most likely one (Nguyen et al. 2024)."""
    if p == 0:
        return logits_BV
    ratio_BV = (logits_BV.double() - logits_BV.double().amax(-1, keepdim=True)).exp()
    return logits_BV.masked_fill(ratio_BV < p, -math.inf)


def process(logits_BV: Tensor, history: History | None, config: SamplingConfig) -> Tensor:
    """The logits ``sample`` draws from, fp64 (B, V): penalties, temperature (unless 0), top-k, top-p, min-p.

    ``history`` may be None when no penalty is on. Raises ``ConfigError`` when it is needed and missing.
    """
    logits_BV = logits_BV.double()
    if config.needs_history:
        logits_BV = _penalised(logits_BV, history, config)
    if config.temperature > 0:
        logits_BV = temperature(logits_BV, config.temperature)
    return min_p(top_p(top_k(logits_BV, config.top_k), config.top_p), config.min_p)


def _penalised(logits_BV: Tensor, history: History | None, config: SamplingConfig) -> Tensor:
    if history is None:
        raise ConfigError("The repetition, presence and frequency penalties need the tokens so far; pass history.")
    vocab_size = logits_BV.shape[-1]
    if config.repetition_penalty != 1:
        logits_BV = repetition_penalty(logits_BV, history.seen_BV(vocab_size), config.repetition_penalty)
    generated_BV = history.generated_BV(vocab_size)
    return count_penalties(logits_BV, generated_BV, config.presence_penalty, config.frequency_penalty)


def sample(
    logits_BV: Tensor,
    history: History | None,
    config: SamplingConfig,
    generators: Sequence[torch.Generator],
    names: Sequence[int] | None = None,
) -> Tensor:
    """The next token of every row, ids_B int64 on the device of ``logits_BV``.

    ``generators``: one CPU generator per row; each draws one uniform number per call unless the choice is greedy.
    ``names``: what an error calls each row; its index by default.
    A logit of -inf is a token that may not be chosen. Raises ``NonFiniteError`` naming the row when a logit is NaN or
    +inf or when every token of a row is -inf.
    """
    _check_finite(logits_BV, range(logits_BV.shape[0]) if names is None else names)
    if config.temperature == 0:  # the filters never remove the most likely token
        if config.needs_history:
            logits_BV = _penalised(logits_BV.double(), history, config)
        return logits_BV.argmax(-1)  # torch documents: the first of equal maxima
    logits_BV = process(logits_BV, history, config)
    if len(generators) != logits_BV.shape[0]:
        raise ConfigError(f"{logits_BV.shape[0]} rows need as many generators, but {len(generators)} were given.")
    uniform_B1 = torch.stack([torch.rand(1, generator=g, dtype=torch.float64) for g in generators])
    probs_BV = logits_BV.softmax(-1)
    cdf_BV = probs_BV.cumsum(-1)
    # The first token whose cumulative probability exceeds the drawn one; `right` skips tokens of probability 0.
    ids_B = torch.searchsorted(cdf_BV, uniform_B1.to(cdf_BV.device) * cdf_BV[:, -1:], right=True).squeeze(-1)
    last_B = probs_BV.shape[-1] - 1 - (probs_BV.flip(-1) > 0).to(torch.int8).argmax(-1)  # rounding may reach the end
    return torch.minimum(ids_B, last_B)


def _check_finite(logits_BV: Tensor, names: Sequence[int]) -> None:
    # One pass instead of six where nothing is wrong: the maximum is NaN if any logit is, and -inf only if all are.
    if bool(logits_BV.amax(-1).isfinite().all()):
        return
    bad_B = (logits_BV.isnan() | (logits_BV == math.inf)).any(-1)
    if bool(bad_B.any()):
        row = names[int(bad_B.to(torch.int8).argmax())]
        raise NonFiniteError(
            f"The model's logits for row {row} hold NaN or infinity, so no token can be chosen; "
            "the weights may be damaged, or the model may need a wider dtype such as float32."
        )
    empty_B = (logits_BV == -math.inf).all(-1)
    if bool(empty_B.any()):
        row = names[int(empty_B.to(torch.int8).argmax())]
        raise NonFiniteError(f"Every logit of row {row} is minus infinity, so no token can be chosen.")
