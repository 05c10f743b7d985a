"""Text from a decoder with a key-value cache: one prompt or a list of them, streamed if asked.

    text = generate(model, "Once upon", max_new_tokens=50, temperature=0.8, top_p=0.95)
    texts = generate(model, ["one", "two"], stop=["\\n"], on_text=lambda row, piece: print(row, piece))

``generate`` returns text; ``generate_texts`` also the ids, the finish reasons and the speed; ``generate_ids`` (in
``token_loop``) needs no tokenizer. A prompt's text does not depend on the prompts beside it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from tokenizers import Tokenizer

from moesaic.errors import ConfigError, DataError
from moesaic.infer.domains import Mixture
from moesaic.infer.row_facts import Fact
from moesaic.infer.sampling import SamplingConfig
from moesaic.infer.stop import StopScanner
from moesaic.infer.token_loop import CausalModel, Finish, Generation, generate_ids
from moesaic.tokenizer import decode_stream, encode, eos_id

__all__ = ["Generation", "generate", "generate_ids", "generate_texts"]

Prompts = TypeVar("Prompts", str, list[str])


def generate(
    model: CausalModel,
    prompts: Prompts,
    tokenizer: Tokenizer | None = None,
    *,
    max_new_tokens: int = 50,
    sampling: SamplingConfig | None = None,
    stop: Sequence[str] = (),
    seed: int | Sequence[int] = 0,
    on_text: Callable[[int, str], None] | None = None,
    eos_ids: Sequence[int] | None = None,
    task: Fact | None = None,
    mixture: Mixture | None = None,
    tenant: Fact | None = None,
    metadata: Mapping[str, Fact] | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    presence_penalty: float | None = None,
    frequency_penalty: float | None = None,
) -> Prompts:
    """The text that follows ``prompts``, without the prompt: a string for a string, a list for a list.

    tokenizer: defaults to ``model.tokenizer``. An empty prompt starts from the end-of-text token.
    sampling: how tokens are drawn; the keywords from ``temperature`` on replace single fields of it. By default the
    model's own distribution is sampled; ``temperature=0`` is greedy.
    stop: the text ends before the first of these strings. eos_ids: ends a row; the tokenizer's own by default.
    on_text(row, piece): receives the text as it becomes certain; the pieces joined are exactly the returned text, no
    piece holds half a character or a part of a stop string.
    seed, max_new_tokens, task, mixture, tenant, metadata, warnings and errors as in ``generate_ids``.
    """
    given = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty,
    }
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    texts, _ = generate_texts(
        model,
        [prompts] if isinstance(prompts, str) else list(prompts),
        tokenizer,
        max_new_tokens=max_new_tokens,
        sampling=replace(sampling or SamplingConfig(), **changes),
        stop=stop,
        seed=seed,
        on_text=on_text,
        eos_ids=eos_ids,
        task=task,
        mixture=mixture,
        tenant=tenant,
        metadata=metadata,
    )
    return texts[0] if isinstance(prompts, str) else texts


def generate_texts(
    model: CausalModel,
    prompts: Sequence[str],
    tokenizer: Tokenizer | None = None,
    *,
    max_new_tokens: int = 50,
    sampling: SamplingConfig | None = None,
    stop: Sequence[str] = (),
    seed: int | Sequence[int] = 0,
    on_text: Callable[[int, str], None] | None = None,
    eos_ids: Sequence[int] | None = None,
    task: Fact | None = None,
    mixture: Mixture | None = None,
    tenant: Fact | None = None,
    metadata: Mapping[str, Fact] | None = None,
) -> tuple[list[str], Generation]:
    """``generate`` for a list of prompts, with the ids, finish reasons and speed beside the texts.

    The ids hold every sampled token, those of a stop string included; the text is cut before it.
    """
    tokenizer = tokenizer if tokenizer is not None else getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise ConfigError(
            "generate needs a tokenizer: pass tokenizer=, or load a model folder that holds a tokenizer.json."
        )
    stops = [stop] if isinstance(stop, str) else list(stop)
    ends = list(eos_ids) if eos_ids is not None else _known_end(tokenizer)
    prompt_ids = [_prompt_ids(tokenizer, prompt, ends) for prompt in prompts]
    decoders = [decode_stream(tokenizer) for _ in prompts]
    scanners = [StopScanner(stops) for _ in prompts]
    pieces: list[list[str]] = [[] for _ in prompts]

    def emit(row: int, piece: str) -> None:
        if piece:
            pieces[row].append(piece)
            if on_text is not None:
                on_text(row, piece)

    def on_token(row: int, token: int) -> bool:
        emit(row, scanners[row].push(decoders[row].feed(token)))
        return scanners[row].hit

    def on_finish(row: int, reason: Finish) -> None:
        emit(row, scanners[row].push(decoders[row].finish()) + scanners[row].finish())

    result = generate_ids(
        model,
        prompt_ids,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        eos_ids=ends,
        banned_ids=_nameless(tokenizer, model.config.vocab_size),
        seed=seed,
        on_token=on_token,
        on_finish=on_finish,
        task=task,
        mixture=mixture,
        tenant=tenant,
        metadata=metadata,
    )
    return ["".join(row) for row in pieces], result


def _known_end(tokenizer: Tokenizer) -> list[int]:
    try:
        return [eos_id(tokenizer)]
    except DataError:  # without one, every row runs to its length
        return []


def _prompt_ids(tokenizer: Tokenizer, prompt: str, ends: list[int]) -> list[int]:
    """The prompt's ids after the control tokens the tokenizer's template puts first (none in ours, BOS in many)."""
    template = tokenizer.encode("a")
    opening = itertools.takewhile(lambda pair: pair[1], zip(template.ids, template.special_tokens_mask, strict=True))
    ids = [token for token, _ in opening] + encode(tokenizer, prompt)
    if not ids and not ends:
        raise ConfigError(
            "The prompt is empty and the tokenizer has no end-of-text token to start from; write a prompt."
        )
    return ids or ends[:1]


def _nameless(tokenizer: Tokenizer, vocab_size: int) -> list[int]:
    """Ids the model can produce but the tokenizer cannot write: embedding rows added to round up the vocabulary."""
    if tokenizer.get_vocab_size() >= vocab_size:
        return []
    return [token for token in range(vocab_size) if tokenizer.id_to_token(token) is None]
