"""Between the program and a terminal: arguments in, each mistake one sentence; text out, without control characters.

>>> call = parse(train, "train", ["--data", "books/"])      # ConfigError: There is no option "--dat" ...
>>> status = guarded(call)                                   # errors become a sentence and an exit status
>>> print(visible(text_a_model_wrote))                       # an escape sequence in it cannot reach the terminal
"""

from __future__ import annotations

import functools
import inspect
import io
import itertools
import json as json_module
import os
import re
import signal
import sys
import threading
import unicodedata
from collections.abc import Callable, Container, Sequence
from contextlib import redirect_stderr
from typing import Any, get_origin

import tyro
from tyro.conf import AvoidSubcommands, FlagCreatePairsOff

from moesaic.errors import ConfigError, MoesaicError, nearest

Command = Callable[..., int]


def visible(text: str) -> str:
    """``text`` with control characters other than newline and tab, and lone surrogates, replaced by U+FFFD."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs") else "\ufffd" for c in text)


def options(function: Command) -> dict[str, bool]:
    """The option names of a command, "--help" included, and whether each takes a list of values."""
    found = {}
    for parameter in inspect.signature(function, eval_str=True).parameters.values():
        if not any("Positional" in str(mark) for mark in getattr(parameter.annotation, "__metadata__", ())):
            kind = getattr(parameter.annotation, "__origin__", parameter.annotation)
            found["--" + parameter.name.strip("_").replace("_", "-")] = get_origin(kind) is tuple
    return {**found, "--help": False}


def parse(function: Command, name: str, args: Sequence[str]) -> Callable[[], int]:
    """``function`` with the arguments in ``args`` bound. Prints help and exits if asked to.

    A list option given twice adds its values to the first (``--set a=1 --set b=2``); of any other the last counts.
    Raises ``ConfigError`` for an unknown option (naming the nearest), a missing argument, or a value of the wrong type.
    """
    known = options(function)
    for word in args:
        option = word.partition("=")[0]
        if re.match(r"--[A-Za-z]", word) and option.replace("_", "-") not in known:
            raise ConfigError(f'"{name}" has no option {option}.{nearest(option, known)} Options: {", ".join(known)}.')

    @functools.wraps(function)
    def bind(*values: Any, **named: Any) -> Callable[[], int]:
        return functools.partial(function, *values, **named)

    said = io.StringIO()
    try:
        with redirect_stderr(said):
            call: Any = tyro.cli(
                bind,
                args=_joined(args, [option for option, takes_list in known.items() if takes_list]),
                prog=f"moesaic {name}",
                description=inspect.getdoc(function),
                config=(AvoidSubcommands, FlagCreatePairsOff),
            )
    except SystemExit as end:
        if not end.code:
            raise
        raise ConfigError(_sentence(said.getvalue(), name)) from None
    return call


def guarded(call: Callable[[], int], json: bool = False) -> int:
    """The exit status of ``call``, every failure of the user's or the machine's making put into one sentence.

    2 for a mistake, 130 for Ctrl-C or SIGTERM (Ctrl-C is then ignored), 141 for a reader that went away. ``json`` also
    prints the sentence as ``{"error": ...}`` on standard output. An error of ours keeps its traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without UTF-8 shows "?" instead of ending the command
    main_thread = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, signal.default_int_handler) if main_thread else None
    hook = threading.excepthook
    # A full disk ends TensorBoard's own thread, which tells its caller: the traceback on the way is noise.
    threading.excepthook = lambda args: None if issubclass(args.exc_type, OSError) else hook(args)
    try:
        status = call()
        sys.stdout.flush()  # here, where a reader that went away is dealt with
        return status
    except MoesaicError as error:
        return _stand_by() if error.told else _fail(str(error), json)
    except KeyboardInterrupt:
        if main_thread:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # a third Ctrl-C must not break into the interpreter's own end
        return _fail("interrupted.", json, 130)
    except BrokenPipeError:  # moesaic ... | head: there is nobody left to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:  # reading or writing for which nothing below had better words
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}{error.strerror or error}.", json)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not re.search("allocate memory|out of memory", str(error)):
            raise
        return _fail(
            "There is not enough memory; lower batch_size, seq_len or the sizes of the model, or set recompute=true.",
            json,
        )
    finally:
        threading.excepthook = hook
        if main_thread:
            signal.signal(signal.SIGTERM, before)


def _stand_by(seconds: float = 10.0) -> int:
    """Status 2 once torchrun ends this process, or after some seconds: it kills the others as soon as one has failed, and
    the one that prints for all must not be killed before it has.
    """
    if threading.current_thread() is threading.main_thread() and hasattr(signal, "sigtimedwait"):
        ends = {signal.SIGTERM, signal.SIGINT}
        signal.pthread_sigmask(signal.SIG_BLOCK, ends)
        signal.sigtimedwait(ends, seconds)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ends)
    return 2


def _fail(sentence: str, json: bool, status: int = 2) -> int:
    sentence = " ".join(visible(sentence).split("\n"))
    if json:
        print(json_module.dumps({"error": sentence}))
    print(f"moesaic: {sentence}", file=sys.stderr)
    return status


def _joined(args: Sequence[str], lists: Container[str]) -> list[str]:
    """``args`` with the values of a repeated list option moved to its first place: the parser would keep the last alone."""
    current: list[str] = []
    groups, first = [current], {}
    for word in args:
        option, equals, value = word.partition("=")
        if not re.match(r"--[A-Za-z]", word):
            current.append(word)
        elif option not in lists:
            groups.append(current := [word])
        else:
            if option not in first:
                first[option] = [option]
                groups.append(first[option])
            current = first[option]
            current += [value] if equals else []
    return [word for group in groups for word in group]


def _sentence(box: str, name: str) -> str:
    """The parser's framed message in our own words; words we do not know are passed on without the frame."""
    # Title, a rule in plain ASCII frames, the message, a rule, hints.
    lines = [line.strip("│╭╮╰╯ ") for line in box.splitlines()[1:]]
    parts = [" ".join(group) for rule, group in itertools.groupby(lines, lambda line: not line.strip("─-")) if not rule]
    text = " ".join(parts[0].split()) if parts else "The arguments cannot be read"
    see = f"see moesaic {name} --help."
    if found := re.fullmatch(r"Unrecognized options: (.*)", text):
        return f'"{name}" does not know what to do with "{found[1]}"; {see}'
    if found := re.fullmatch(r"Missing from moesaic \S+: (\S+) (.*?)\.? \(required\)", text):
        return f'"{name}" needs a {found[1]} before its options ({found[2].lower()}); {see}'
    if found := re.match(r"Missing value for argument '([^']*)'", text):
        return f"{found[1]} needs a value; {see}"
    if found := re.match(r"invalid choice '(.*?)' for argument '(.*?)'. Expected one of \((.*?)\)", text):
        choices = re.findall("'([^']*)'", found[3])
        return f'{found[2]} must be one of {", ".join(choices)}, not "{found[1]}".{nearest(found[1], choices)}'
    if found := re.match(r"Error parsing (\S+): .*?(int|INT|float|FLOAT)\b.*?'(.*?)'\]?(?: Got errors.*|\.?$)", text):
        kind = "a whole number" if found[2].lower() == "int" else "a number"
        return f'{found[1]} must be {kind}, not "{found[3]}".'
    return f"{text.rstrip('.')}; {see}"
