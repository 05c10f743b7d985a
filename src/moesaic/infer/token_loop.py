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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from moesaic.errors import ConfigError, RoutingWarning
from moesaic.experts.layer import MoE
from moesaic.infer.domains import Mixture, RowTasks, row_tasks
from moesaic.infer.row_facts import Fact, RowFacts, row_facts
from moesaic.infer.sampling import History, SamplingConfig, sample
from moesaic.routing import Router

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
    def __call__(
        self, ids_BS: Tensor, *, valid_BS: Tensor | None, cache: Any, last_only: bool, **side_inputs: Any
    ) -> Any: ...


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
    task: Fact | None = None,
    mixture: Mixture | None = None,
    tenant: Fact | None = None,
    metadata: Mapping[str, Fact] | None = None,
) -> Generation:
    """Continue every prompt (token ids, none empty) by up to ``max_new_tokens``.

    eos_ids end a row; banned_ids are never chosen; pad_id fills the batch and is masked, so its value does not matter.
    seed: one for all rows, or one per row. on_token(row, id) sees every new token and ends the row by returning True;
    on_finish(row, reason) follows a row's last token. Exceptions they raise end the call.
    task, mixture: for models routed by task or domain: its number, or weights over all of them; one for all prompts or one
    each. Every token of the prompt and of the continuation counts as of that task.
    tenant, metadata: numbers that routing rules and memories of the model ask for, by name; one for all prompts or one each.

    Warns when ``model.config.max_seq_len`` leaves room for fewer tokens than asked, and (``RoutingWarning``) when the model's
    routers decide by another rule than in training, or by tokens that do not exist yet. Raises ``ConfigError`` when it
    leaves none, for an empty prompt, for ids the model does not know, and where a model routed by task is given none;
    ``NonFiniteError`` for NaN logits.
    """
    sampling = sampling or SamplingConfig()
    if not hasattr(model, "new_cache"):
        raise ConfigError(f"generate needs a decoder with a key-value cache, but {type(model).__name__} has none.")
    room = _room(prompts, max_new_tokens, model.config)
    streams = _random_streams(prompts, seed)
    _warn_of_other_routing(model)
    side = (row_tasks(model, len(prompts), task, mixture), row_facts(len(prompts), tenant, metadata))
    new: list[list[int]] = [[] for _ in prompts]
    finish: dict[int, Finish] = {}

    def take(row: int, token: int) -> bool:
        """Append one sampled token to its row; True if that was its last."""
        if token in eos_ids:
            finish[row] = "eos"
        else:
            new[row].append(token)
            if on_token is not None and on_token(row, token):
                finish[row] = "stop"
            elif len(new[row]) == room[row]:
                finish[row] = "length"
        if row in finish and on_finish is not None:
            on_finish(row, finish[row])
        return row in finish

    clock = _Clock()
    with _evaluating(model), torch.inference_mode():
        for rows in _batches([len(prompt) for prompt in prompts], room, model.config.max_seq_len):
            batch = [prompts[row] for row in rows]
            generators = [streams[row] for row in rows]
            steps = max(room[row] for row in rows)
            _run_batch(model, rows, batch, side, steps, sampling, generators, pad_id, banned_ids, take, clock)
    return Generation(
        ids=tuple(tuple(row) for row in new),
        finish=tuple(finish[row] for row in range(len(prompts))),
        prefill_tokens=sum(len(prompt) for prompt in prompts),
        prefill_seconds=clock.prefill,
        decode_tokens=clock.decoded,
        decode_seconds=clock.decode,
    )


@dataclass
class _Clock:
    """Seconds of each phase and tokens decoded, the caller's callbacks excluded."""

    prefill: float = 0.0
    decode: float = 0.0
    decoded: int = 0


def _run_batch(
    model: CausalModel,
    rows: list[int],
    prompts: list[Sequence[int]],
    side: tuple[RowTasks, RowFacts],
    steps: int,
    sampling: SamplingConfig,
    generators: list[torch.Generator],
    pad_id: int,
    banned_ids: Sequence[int],
    take: Callable[[int, int], bool],
    clock: _Clock,
) -> None:
    """Decode one left-padded batch until ``take(row, token)`` has returned True for every row; ``rows`` are its names."""
    width, device = max(len(prompt) for prompt in prompts), next(model.parameters()).device
    ids_BS = torch.full((len(rows), width + steps), pad_id, dtype=torch.int64)
    valid_BS = torch.zeros_like(ids_BS, dtype=torch.bool)
    for b, prompt in enumerate(prompts):
        ids_BS[b, width - len(prompt) : width] = torch.tensor(prompt)
        valid_BS[b, width - len(prompt) : width] = True
    sampler = torch.device("cpu") if device.type == "mps" else device  # sampling needs fp64, which MPS lacks
    ids_BS, valid_BS = ids_BS.to(sampler), valid_BS.to(sampler)
    banned = torch.tensor(list(banned_ids), dtype=torch.int64, device=sampler)

    start = time.perf_counter()
    ragged = min(len(prompt) for prompt in prompts) < width
    cache = model.new_cache(len(rows), width + steps - 1)  # the last token is never fed
    live = [True] * len(rows)
    begin, end = 0, width
    while True:
        # What has no padding is not masked: neither attention nor routing then looks for it.
        padded = not all(live) or (begin == 0 and ragged)
        fed_BS, fed_valid_BS = ids_BS[:, begin:end].to(device), valid_BS[:, begin:end].to(device) if padded else None
        inputs = {name: fact for facts in side for name, fact in facts.inputs(rows, end - begin, device).items()}
        output = model(fed_BS, valid_BS=fed_valid_BS, cache=cache, last_only=True, **inputs)
        cache = output.cache
        logits_BV = output.logits[:, -1].to(sampler, torch.float32, copy=True)
        if banned_ids:
            logits_BV[:, banned] = -torch.inf
        if not all(live):
            # A finished row computes on padding alone, and nobody reads it: it must not count as NaN.
            logits_BV[[b for b, alive in enumerate(live) if not alive]] = 0.0
        history = History(ids_BS[:, :end], valid_BS[:, :end], width)
        token_B = sample(logits_BV, history, sampling, generators, rows).tolist()
        if begin == 0:
            clock.prefill += time.perf_counter() - start
        else:
            clock.decode += time.perf_counter() - start
            clock.decoded += sum(live)
        live = [alive and not take(row, token) for alive, row, token in zip(live, rows, token_B, strict=True)]
        if not any(live):
            return
        start = time.perf_counter()
        ids_BS[:, end] = torch.tensor([token if alive else pad_id for alive, token in zip(live, token_B, strict=True)])
        valid_BS[:, end] = torch.tensor(live)
        begin, end = end, end + 1


def _warn_of_other_routing(model: CausalModel) -> None:
    """Say what each router of another rule, or of a leak, does here; each sentence once."""
    said: dict[str, None] = {}
    for module in model.modules():
        if isinstance(module, MoE) and module.capacity is not None:
            if module.capacity.eval_factor is not None:
                said["Capacity drops tokens here by the other rows and tokens, so a text depends on its company."] = (
                    None
                )
            else:
                said["The model was trained with a capacity that dropped tokens; generation drops none."] = None
        if not isinstance(module, Router):
            continue
        facts, name = module.facts, type(module).__name__
        if not (facts.causal_in_evaluation and facts.batch_invariant_in_evaluation):
            said[f"{name} routes by later tokens or other rows, so text read at once and text generated differ."] = None
        elif facts.inference == "other rule":
            said[f"{name} was trained by another routing than it generates with: {facts.inference_rule}."] = None
    for sentence in said:
        warnings.warn(sentence, RoutingWarning, stacklevel=3)


def _batches(lengths: list[int], room: list[int], context: int) -> list[list[int]]:
    """Rows that decode together: as many as fit, padding included, in the context the model allows.

    Usually all. A long prompt beside a short one with many tokens to go would need more columns than either alone; the
    model counts columns, so such rows run one batch after the other.
    """
    batches: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: lengths[row]):
        # The first of a batch is its shortest prompt, which may generate the most.
        if batches and lengths[row] + room[batches[-1][0]] - 1 <= context:
            batches[-1].append(row)
        else:
            batches.append([row])
    return [sorted(batch) for batch in batches]


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
