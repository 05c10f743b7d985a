"""The decoding loop on token ids: a left-padded batch, a key-value cache, and a reason why each row ended.

    result = generate_ids(model, [[5, 9, 2], [7]], max_new_tokens=20, eos_ids=[0])
    result.ids[0], result.finish[0], result.decode_tokens_per_s

A row's tokens do not depend on the rows beside it: every row has its own length limit and draws from its own random
stream, derived from the seed, the prompt's ids, and how many equal prompts come before it (so that a repeated prompt
gives different samples). What remains is the rounding of the logits, which a batch may change in the last bit.
A finished row is fed padding marked invalid, so nothing of it is routed. Legend: B rows, S columns, V vocabulary.
"""

from __future__ import annotations

import hashlib
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from moesaic.errors import ConfigError
from moesaic.infer.sampling import History, SamplingConfig, sample

Finish = Literal["stop", "length", "eos"]


class Sizes(Protocol):
    """What generation reads from a model's config."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def max_seq_len(self) -> int: ...


class CausalModel(Protocol):
    """The part of ``models.Decoder`` that generation uses; any module with these methods can generate."""

    @property
    def config(self) -> Sizes: ...
    def new_cache(self, batch: int, max_len: int) -> Any: ...
    def modules(self) -> Iterator[nn.Module]: ...
    def parameters(self) -> Iterator[nn.Parameter]: ...
    def __call__(self, ids_BS: Tensor, *, valid_BS: Tensor | None, cache: Any) -> Any: ...


@dataclass(frozen=True)
class Generation:
    """What ``generate_ids`` produced. The first new token of a row counts as prefill, the others as decoding.

    ids: the new tokens of each row, without the end-of-text token.
    finish: why each row ended: "stop" (``on_token`` said so), "length" (no more tokens allowed) or "eos".
    """

    ids: tuple[tuple[int, ...], ...]
    finish: tuple[Finish, ...]
    prefill_tokens: int
    prefill_seconds: float
    decode_tokens: int
    decode_seconds: float

    @property
    def prefill_tokens_per_s(self) -> float:
        """Prompt tokens read per second, all rows together; 0 when there were none."""
        return self.prefill_tokens / self.prefill_seconds if self.prefill_tokens else 0.0

    @property
    def decode_tokens_per_s(self) -> float:
        """Tokens generated per second after each row's first, all rows together; 0 when there were none."""
        return self.decode_tokens / self.decode_seconds if self.decode_tokens else 0.0


def generate_ids(
    model: CausalModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 50,
    sampling: SamplingConfig | None = None,
    eos_ids: Sequence[int] = (),
    pad_id: int = 0,
    banned_ids: Sequence[int] = (),
    seed: int | Sequence[int] = 0,
    on_token: Callable[[int, int], bool | None] | None = None,
    on_finish: Callable[[int, Finish], None] | None = None,
) -> Generation:
    """Continue every prompt (token ids, none empty) by up to ``max_new_tokens``.

    eos_ids end a row; banned_ids are never chosen; pad_id fills the batch and is masked, so its value does not matter.
    seed: one for all rows, or one per row. on_token(row, id) sees every new token and ends the row by returning True;
    on_finish(row, reason) follows a row's last token. Exceptions they raise end the call.

    Warns when ``model.config.max_seq_len`` leaves room for fewer tokens than asked. Raises ``ConfigError`` when it
    leaves none, for an empty prompt and for ids the model does not know; ``NonFiniteError`` for NaN logits.
    """
    sampling = sampling or SamplingConfig()
    if not hasattr(model, "new_cache"):
        raise ConfigError(f"generate needs a decoder with a key-value cache, but {type(model).__name__} has none.")
    room_B = _room(prompts, max_new_tokens, model.config)
    rows = range(len(prompts))
    generators = _random_streams(prompts, seed)
    new: list[list[int]] = [[] for _ in rows]
    finish: dict[int, Finish] = {}
    if not prompts:
        return Generation((), (), 0, 0.0, 0, 0.0)

    width, steps = max(len(prompt) for prompt in prompts), max(room_B)
    device = next(model.parameters()).device
    ids_BS = torch.full((len(prompts), width + steps), pad_id, dtype=torch.int64)
    valid_BS = torch.zeros_like(ids_BS, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        ids_BS[row, width - len(prompt) : width] = torch.tensor(prompt)
        valid_BS[row, width - len(prompt) : width] = True
    sampler = torch.device("cpu") if device.type == "mps" else device  # sampling needs fp64, which MPS lacks
    ids_BS, valid_BS = ids_BS.to(sampler), valid_BS.to(sampler)
    banned = torch.tensor(list(banned_ids), dtype=torch.int64, device=sampler)

    def take(row: int, token: int) -> None:
        """Append one sampled token to its row, and end the row if that was its last."""
        if token in eos_ids:
            finish[row] = "eos"
        else:
            new[row].append(token)
            if on_token is not None and on_token(row, token):
                finish[row] = "stop"
            elif len(new[row]) == room_B[row]:
                finish[row] = "length"
        if row in finish and on_finish is not None:
            on_finish(row, finish[row])

    sampled, seconds, start = [0, 0], [0.0, 0.0], time.perf_counter()  # [prefill, decode]
    with _evaluating(model), torch.inference_mode():
        cache = model.new_cache(len(prompts), width + steps - 1)  # the last token is never fed
        begin, end = 0, width
        while True:
            fed_BS, fed_valid_BS = ids_BS[:, begin:end].to(device), valid_BS[:, begin:end].to(device)
            output = model(fed_BS, valid_BS=fed_valid_BS, cache=cache)
            cache = output.cache
            logits_BV = output.logits[:, -1].to(sampler, torch.float32, copy=True)
            logits_BV[:, banned] = -torch.inf
            logits_BV[list(finish)] = 0.0  # a finished row computes on padding alone, and nobody reads it
            history = History(ids_BS[:, :end], valid_BS[:, :end], width)
            token_B = sample(logits_BV, history, sampling, generators).tolist()
            live = [row for row in rows if row not in finish]
            phase = min(begin, 1)
            sampled[phase] += len(live)
            seconds[phase] += time.perf_counter() - start
            for row in live:  # the caller's time in its callbacks is not the model's
                take(row, token_B[row])
            if len(finish) == len(prompts):
                break
            start = time.perf_counter()
            ids_BS[:, end] = torch.tensor([pad_id if row in finish else token_B[row] for row in rows])
            valid_BS[:, end] = torch.tensor([row not in finish for row in rows])
            begin, end = end, end + 1

    return Generation(
        ids=tuple(tuple(row) for row in new),
        finish=tuple(finish[row] for row in rows),
        prefill_tokens=sum(len(prompt) for prompt in prompts),
        prefill_seconds=seconds[0],
        decode_tokens=sampled[1],
        decode_seconds=seconds[1],
    )


def _room(prompts: Sequence[Sequence[int]], max_new_tokens: int, sizes: Sizes) -> list[int]:
    """How many tokens each row may generate; refuses what cannot run at all."""
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens must be a whole number of at least 1, but it is {max_new_tokens!r}.")
    context, room_B = sizes.max_seq_len, []
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise ConfigError(f"Prompt {row} has no token to start from; begin it with the end-of-text token.")
        strange = next((token for token in prompt if not 0 <= token < sizes.vocab_size), None)
        if strange is not None:
            raise ConfigError(
                f"Prompt {row} holds token id {strange}, but the model knows only ids 0 to {sizes.vocab_size - 1}; "
                "the tokenizer belongs to another model."
            )
        if len(prompt) >= context:
            raise ConfigError(
                f"Prompt {row} has {len(prompt)} tokens, which leaves no room for new ones in the model's context of "
                f"{context}; shorten the prompt to at most {context - 1} tokens."
            )
        room_B.append(min(max_new_tokens, context - len(prompt)))
    if room_B and min(room_B) < max_new_tokens:
        row = room_B.index(min(room_B))
        warnings.warn(
            f"Prompt {row} has {len(prompts[row])} tokens and the model's context is {context}, so it gets at most "
            f"{room_B[row]} new tokens instead of {max_new_tokens}.",
            stacklevel=3,
        )
    return room_B


def _random_streams(prompts: Sequence[Sequence[int]], seed: int | Sequence[int]) -> list[torch.Generator]:
    """One CPU generator per row, seeded by (seed, prompt ids, number of equal rows before it)."""
    seeds = [seed] * len(prompts) if isinstance(seed, int) else list(seed)
    if len(seeds) != len(prompts):
        raise ConfigError(f"{len(prompts)} prompts need one seed or as many seeds, but {len(seeds)} were given.")
    before: Counter[str] = Counter()
    streams = []
    for prompt, row_seed in zip(prompts, seeds, strict=True):
        key = f"{row_seed}:{','.join(map(str, prompt))}"
        digest = hashlib.sha256(f"{key}:{before[key]}".encode()).digest()
        before[key] += 1
        streams.append(torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1))
    return streams


@contextmanager
def _evaluating(model: CausalModel) -> Iterator[None]:
    """Evaluation mode inside; each module's own mode again afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
