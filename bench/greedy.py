"""Who continues a prompt greedily in ``decode.py``, and when each token was known: moesaic, and Hugging Face in two ways."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from hf_models import backend_of, our_name, set_backend
from rounds import Laps
from torch import Tensor

from moesaic.infer.sampling import SamplingConfig
from moesaic.infer.token_loop import generate_ids
from moesaic.models.decoder import Decoder

Text = list[int]
Writer = Callable[[Text, int], tuple[Text, Laps]]  # a prompt and how many new tokens; these tokens, and seconds


def writers(model: Decoder, hf: Any, backends: Sequence[str], hf_backends: Sequence[str]) -> dict[str, Writer]:
    """All contenders by name, moesaic first. ``hf`` is not used where ``hf_backends`` is empty."""
    found = {our_name(backend): _ours(model, backend) for backend in backends}
    for backend in hf_backends:
        for way, write in (("generate", hf_generate_text), ("loop", hf_loop_text)):
            found[f"hf {backend} {way}"] = _theirs(write, hf, backend)
    return found


def _ours(model: Decoder, backend: str) -> Writer:
    def write(prompt: Text, new: int) -> tuple[Text, Laps]:
        set_backend(model, backend)
        return moesaic_text(model, prompt, new)

    return write


def _theirs(write: Callable[..., tuple[Text, Laps]], hf: Any, backend: str) -> Writer:
    return lambda prompt, new: write(hf, backend, prompt, new)


class Stamps:
    """When each new token was known. Hugging Face's ``generate`` takes it as a streamer, which is first given the prompt."""

    def __init__(self, switch: Callable[[], None] | None = None) -> None:
        self.switch, self.given, self.at = switch, 0, [time.perf_counter()]

    def token(self) -> None:
        """A new token is known."""
        self.at.append(time.perf_counter())

    def put(self, _ids: Tensor) -> None:
        """As a streamer. After the first new token ``switch`` is called."""
        if self.given:
            self.token()
        self.given += 1
        if self.given == 2 and self.switch is not None:
            self.switch()

    def end(self) -> None:
        """As a streamer."""

    def laps(self) -> Laps:
        """Seconds of the prompt with the first token, and per later token: over all, and of the typical one."""
        steps = sorted(after - before for before, after in pairwise(self.at[1:]))
        return {
            "prefill": self.at[1] - self.at[0],
            "token": sum(steps) / len(steps),
            "median_token": steps[len(steps) // 2],
        }


def moesaic_text(model: Decoder, prompt: Text, new: int) -> tuple[Text, Laps]:
    """The continuation and its times."""
    stamps = Stamps()
    greedy = SamplingConfig(temperature=0)
    result = generate_ids(
        model, [prompt], max_new_tokens=new, sampling=greedy, on_token=lambda _row, _token: stamps.token()
    )
    return list(result.ids[0]), stamps.laps()


def hf_generate_text(hf: Any, backend: str, prompt: Text, new: int) -> tuple[Text, Laps]:
    """Through ``model.generate``."""
    with backend_of(hf, reads_prompt(backend)):
        stamps = Stamps(lambda: hf.set_experts_implementation(backend))
        ids_BS = torch.tensor([prompt])
        known = torch.ones_like(ids_BS)
        options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "use_cache": True}
        made_BS = hf.generate(ids_BS, attention_mask=known, streamer=stamps, **options)
    return made_BS[0, len(prompt) :].tolist(), stamps.laps()


@torch.inference_mode()
def hf_loop_text(hf: Any, backend: str, prompt: Text, new: int) -> tuple[Text, Laps]:
    """Through the shortest loop over its forward: no mask, no processors, no stopping rules, logits of one position."""
    from transformers import DynamicCache

    with backend_of(hf, reads_prompt(backend)):
        stamps, text = Stamps(), Text()
        cache, ids_BS = DynamicCache(config=hf.config), torch.tensor([prompt])
        for _ in range(new):
            out = hf(input_ids=ids_BS, past_key_values=cache, use_cache=True, logits_to_keep=1)
            ids_BS = out.logits[:, -1].argmax(-1, keepdim=True)
            text.append(int(ids_BS))
            stamps.token()
            if len(text) == 1:
                hf.set_experts_implementation(backend)
    return text, stamps.laps()


def reads_prompt(backend: str) -> str:
    """The back end that reads a prompt for this one: ``batched_mm`` would copy the experts of every row."""
    return "grouped_mm" if backend == "batched_mm" else backend
