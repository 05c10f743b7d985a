"""lm-eval on moesaic's models: any folder ``moesaic.load`` reads, any router, without transformers.

>>> from moesaic.integrations.lm_eval import MoesaicLM          # also registers the name "moesaic" with lm_eval
>>> lm_eval.simple_evaluate(model=MoesaicLM("my-model"), tasks=["arc_easy"])

Scores equal those of lm_eval's own "hf" model on the same weights: the same windows, truncation from the left, and stops.
Legend: B rows, S positions, V vocabulary, C tokens of a continuation.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from moesaic.checkpoint.native import load_model
from moesaic.convert.companions import read_companions
from moesaic.convert.hub import resolve
from moesaic.convert.read import is_foreign, read_model
from moesaic.errors import ConfigError
from moesaic.infer.sampling import SamplingConfig
from moesaic.infer.token_loop import generate_ids
from moesaic.models.decoder import Decoder
from moesaic.tokenizer import decode_stream, eos_id, load_tokenizer
from moesaic.train.snapshot import resolve_model_folder

_ROWS = 16
_NEW_TOKENS = 256  # lm_eval's default
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")

Request = tuple[Any, list[int], list[int]]  # (texts, context ids, continuation ids)


@register_model("moesaic")
class MoesaicLM(TemplateLM):  # type: ignore[misc]
    """A moesaic model under lm_eval's interface.

    Args:
        pretrained: a model, or what ``moesaic.load`` takes: a model directory, a Hugging Face folder of a known family, a run.
        batch_size: rows of a batch. max_length: of a window; the model's context unless given.
        dtype, device: where ``pretrained`` is a folder.
    """

    backend = "causal"

    def __init__(
        self,
        pretrained: Decoder | str | os.PathLike[str],
        batch_size: int | str = _ROWS,
        max_length: int | None = None,
        dtype: str | None = None,
        device: str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(pretrained, Decoder):
            pretrained = _loaded(pretrained, dtype, device)
        if pretrained.tokenizer is None:
            raise ConfigError(
                "lm_eval works on text, and this model has no tokenizer; put its tokenizer.json into the folder."
            )
        self.model, self.tokenizer = pretrained.eval(), pretrained.tokenizer
        self.rows = int(batch_size) if str(batch_size).isdigit() and int(batch_size) else _ROWS  # "auto" included
        context = pretrained.config.max_seq_len
        self.max_length = min(max_length or context, context)
        self._device = pretrained.embedding.weight.device
        self._settings: dict[str, Any] = json.loads(pretrained.companions.get("tokenizer_config.json", b"{}"))

    @property
    def eot_token_id(self) -> int:
        """The end-of-text token."""
        end = self._named("eos_token")
        return eos_id(self.tokenizer) if end is None else end

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context: the beginning-of-text token where there is one."""
        begin = self._named("bos_token")
        return self.eot_token_id if begin is None else begin

    @property
    def tokenizer_name(self) -> str:
        """Named in the cache of requests."""
        return "moesaic"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids, with the control tokens the tokenizer's own template puts around a text unless told not to."""
        begin = self._named("bos_token")
        if add_special_tokens is None and begin is not None:
            add_special_tokens = not string.startswith(self.tokenizer.id_to_token(begin))
        return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens is not False).ids)

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """(log-probability, whether greedy) of each continuation after its context, both truncated from the left."""
        found: dict[int, tuple[float, bool]] = {}
        longest_first = sorted(range(len(requests)), key=lambda i: -len(requests[i][1]) - len(requests[i][2]))
        for start in range(0, len(longest_first), self.rows):
            some = longest_first[start : start + self.rows]
            for index, score in zip(some, self._score([requests[i] for i in some]), strict=True):
                found[index] = score
                self.cache_hook.add_partial("loglikelihood", requests[index][0], score)
        return [found[index] for index in range(len(requests))]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each whole text, in windows of the model's context that predict every token once."""
        windows: list[Request] = []
        owner: list[int] = []
        for index, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for pair in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1):
                windows.append((None, *make_disjoint_window(pair)))
                owner.append(index)
        totals = [0.0] * len(requests)
        for index, (score, _) in zip(owner, self._loglikelihood_tokens(windows), strict=True):
            totals[index] += score
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The text after each context, up to the first of its stop strings."""
        texts: dict[int, str] = {}
        for settings, indices in _by_settings([request.args[1] for request in requests]):
            for start in range(0, len(indices), self.rows):
                some = indices[start : start + self.rows]
                made = self._generate([requests[i].args[0] for i in some], settings)
                for index, text in zip(some, made, strict=True):
                    texts[index] = text
                    self.cache_hook.add_partial("generate_until", requests[index].args, text)
        return [texts[index] for index in range(len(requests))]

    @torch.inference_mode()
    def _score(self, requests: Sequence[Request]) -> Iterator[tuple[float, bool]]:
        inputs = [(context + more)[-(self.max_length + 1) :][:-1] for _, context, more in requests]
        width = max(map(len, inputs))
        ids_BS = torch.zeros(len(inputs), width, dtype=torch.int64)
        valid_BS = torch.zeros_like(ids_BS, dtype=torch.bool)
        for row, ids in enumerate(inputs):
            ids_BS[row, : len(ids)], valid_BS[row, : len(ids)] = torch.tensor(ids), True
        known_BS = None if bool(valid_BS.all()) else valid_BS.to(self._device)
        logits_BSV = self.model(ids_BS.to(self._device), valid_BS=known_BS).logits
        for row, (_, _, more) in enumerate(requests):
            end = len(inputs[row])
            log_probs_CV = logits_BSV[row, end - len(more) : end].float().log_softmax(dim=-1)
            wanted_C = torch.tensor(more, device=log_probs_CV.device)
            chosen_C = log_probs_CV.gather(1, wanted_C[:, None])
            yield float(chosen_C.sum()), bool((log_probs_CV.argmax(dim=-1) == wanted_C).all())

    def _generate(self, contexts: Sequence[str], settings: dict[str, Any]) -> list[str]:
        options = normalize_gen_kwargs(settings, _NEW_TOKENS)
        stops, new = [stop for stop in options.pop("until") if stop], options.pop("max_gen_toks")
        if not options.pop("do_sample", False):
            options["temperature"] = 0.0
        unknown = sorted(set(options) - set(_SAMPLING))
        if unknown:
            raise ConfigError(
                f"The task asks to generate with {unknown[0]}, which moesaic has not; use {', '.join(_SAMPLING)}."
            )
        if new >= self.max_length:
            raise ConfigError(f"The task asks for {new} new tokens, and the model's context is {self.max_length}.")
        prompts = [
            self.tok_encode(context)[-(self.max_length - new) :] or [self.prefix_token_id] for context in contexts
        ]
        streams, texts = [decode_stream(self.tokenizer) for _ in prompts], ["" for _ in prompts]

        def stopped(row: int, token: int) -> bool:
            texts[row] += streams[row].feed(token)
            return any(stop in texts[row] for stop in stops)

        made = generate_ids(
            self.model,
            prompts,
            max_new_tokens=new,
            sampling=SamplingConfig(**options),
            eos_ids=[self.eot_token_id],
            on_token=stopped,
        )
        whole = [self.tokenizer.decode(list(ids)) for ids in made.ids]
        return [_before(text, stops) for text in whole]

    def _named(self, name: str) -> int | None:
        """Id of a control token that ``tokenizer_config.json`` names."""
        token = self._settings.get(name)
        text = token.get("content") if isinstance(token, dict) else token
        return self.tokenizer.token_to_id(text) if isinstance(text, str) else None


def _loaded(name: str | os.PathLike[str], dtype: str | None, device: str | None) -> Decoder:
    kind = None if dtype in (None, "auto") else getattr(torch, str(dtype), None)
    if dtype not in (None, "auto") and not isinstance(kind, torch.dtype):
        raise ConfigError(f'dtype={dtype!r} is none of torch\'s; write one such as "bfloat16".')
    folder: Path = resolve(name)
    if is_foreign(folder):
        model = read_model(folder, kind, device or "cpu")
    else:
        folder = resolve_model_folder(folder)
        model = load_model(folder, kind, device or "cpu")
    model.tokenizer = load_tokenizer(folder) if (folder / "tokenizer.json").exists() else None
    model.companions = read_companions(folder)
    return model


def _by_settings(settings: Sequence[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], list[int]]]:
    """Requests that generate alike, by number."""
    groups: dict[str, list[int]] = {}
    for index, one in enumerate(settings):
        groups.setdefault(json.dumps(one, sort_keys=True, default=str), []).append(index)
    for indices in groups.values():
        yield dict(settings[indices[0]]), indices


def _before(text: str, stops: Sequence[str]) -> str:
    for stop in stops:
        text = text.split(stop)[0]
    return text
