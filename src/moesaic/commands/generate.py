"""``moesaic generate``: continue one text or several."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

import moesaic
from moesaic.commands.options import device, whole_number
from moesaic.commands.output import Json, print_json
from moesaic.errors import ConfigError
from moesaic.infer.generate import generate_texts
from moesaic.infer.sampling import SamplingConfig
from moesaic.terminal import visible


def generate(
    model: Annotated[Positional[Path], arg(metavar="MODEL", help="Model directory, run or comparison folder.")],
    prompt: Annotated[tuple[str, ...], arg(help="One prompt or several; without it, the start of a document.")] = ("",),
    max_new_tokens: Annotated[int, arg(help="Longest continuation.")] = 100,
    temperature: Annotated[float, arg(help="0 is greedy.")] = 0.8,
    top_k: Annotated[int, arg(help="Keep the k likeliest tokens; 0 keeps all.")] = 0,
    top_p: Annotated[float, arg(help="Keep the likeliest tokens of this total probability.")] = 0.95,
    min_p: Annotated[float, arg(help="Keep tokens at least this likely, relative to the likeliest.")] = 0.0,
    repetition_penalty: Annotated[float, arg(help="Above 1 discourages tokens already seen.")] = 1.0,
    stop: Annotated[tuple[str, ...], arg(help="Stop before any of these strings.")] = (),
    seed: Annotated[int, arg(help="Seed of sampling.")] = 0,
    task: Annotated[int | None, whole_number("Task or domain, for models routed by it; -1 if unknown.", "none")] = None,
    tenant: Annotated[
        int | None, whole_number("Whose prompts these are, for models with rules or memories.", "none")
    ] = None,
    metadata: Annotated[tuple[str, ...], arg(help="Further facts that rules ask for, as name=number.")] = (),
    json: Json = False,
) -> int:
    """Continue a text, streaming it to the terminal.

    Examples:
      moesaic generate quickstart --prompt 'def main('
      moesaic generate runs/books --prompt 'It was' 'She said' --temperature 0
      moesaic generate runs/books --max-new-tokens 300 --top-p 0.9 --stop '\\n\\n'
    """
    if not prompt:
        raise ConfigError('--prompt needs a text, for example --prompt "Once upon"; leave it out to start a document.')
    stops = tuple(map(_unescaped, stop))
    sampling = SamplingConfig(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty
    )
    loaded = moesaic.load(str(model), device=device())
    prompts = list(prompt)
    live = len(prompts) == 1 and not json
    unshown = prompts[0]

    def show(_row: int, piece: str) -> None:
        nonlocal unshown
        sys.stdout.write(visible(unshown + piece))
        sys.stdout.flush()
        unshown = ""

    texts, generation = generate_texts(
        loaded,
        prompts,
        loaded.tokenizer,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        stop=stops,
        seed=seed,
        on_text=show if live else None,
        task=task,
        tenant=tenant,
        metadata=dict(map(_fact, metadata)),
    )
    if json:
        rows = [
            {"prompt": p, "text": t, "finish": f} for p, t, f in zip(prompts, texts, generation.finish, strict=True)
        ]
        print_json({"results": rows, "decode_tokens_per_s": generation.decode_tokens_per_s})
        return 0
    if not live:
        for p, text in zip(prompts, texts, strict=True):
            print(visible(f"--- {p}\n{p}{text}\n"))
    else:
        print(visible(unshown))
    rate = generation.decode_tokens_per_s
    print(
        f"[{generation.decode_tokens} tokens at {rate:.0f} tokens/s, {', '.join(generation.finish)}]", file=sys.stderr
    )
    return 0


def _fact(text: str) -> tuple[str, int]:
    name, _, number = text.partition("=")
    try:
        return name, int(number)
    except ValueError:
        raise ConfigError(f'--metadata needs name=number, for example minor=1, not "{text}".') from None


def _unescaped(text: str) -> str:
    """A stop string with its escapes (``\\n``, ``\\t``, ``\\\\``) read."""
    try:
        return text.encode("latin-1", "backslashreplace").decode("unicode_escape")
    except UnicodeDecodeError:
        raise ConfigError(f'The stop string "{text}" ends in half an escape; write a backslash as \\\\.') from None
