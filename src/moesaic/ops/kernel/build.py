"""Compile the C files beside this one and load them: one shared library per instruction set, compiler and source, in a cache.

The cache is ``$XDG_CACHE_HOME/moesaic/kernels`` (``~/.cache`` by default). A library is written whole under another name and
moved in place, so that processes that start together cannot read half of one; and its name ends in a hash of its content, so
that one cut short by a full disk or a power failure is compiled again and never mapped (that would end the process). Threads
are those of the OpenMP runtime that PyTorch has loaded: a second pool would spin against the first on the same cores.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import re
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

from moesaic.errors import ConfigError

# Widest first: "auto" takes the first that this processor has.
FLAGS = {
    "avx512_bf16": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512bf16 -mavx2 -mfma -mprefer-vector-width=512",
    "avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma -mprefer-vector-width=512",
    "avx2": "-mavx2 -mfma",
    "neon": "",  # every 64-bit ARM has it
    "generic": "",  # vectors of four, by whatever the processor always has
}
# Contracting a * b + c into one instruction is what the registers' arithmetic is written for.
_ALWAYS = "-O3 -std=gnu11 -fPIC -ffp-contract=fast -fno-math-errno -fno-semantic-interposition -w"
_SOURCES = ("experts.c", "rows.c")


@dataclass(frozen=True)
class Library:
    """What loading came to. ``functions`` is None when there is none, and ``reason`` says why."""

    functions: ctypes.CDLL | None
    isa: str | None
    threaded: bool
    reason: str


def supported() -> list[str]:
    """Instruction sets of ``FLAGS`` that this processor has, widest first."""
    machine = platform.machine().lower()
    if machine in ("arm64", "aarch64"):
        return ["neon", "generic"]
    if machine not in ("x86_64", "amd64"):
        return ["generic"]
    probes = {
        "avx512_bf16": "_is_avx512_bf16_supported",
        "avx512": "_is_avx512_supported",
        "avx2": "_is_avx2_supported",
    }
    found = []
    for isa, name in probes.items():
        probe: Callable[[], bool] = getattr(torch.cpu, name, lambda: False)
        if probe():
            found.append(isa)
    return [*found, "generic"]


@torch.compiler.assume_constant_result
def has_amx() -> bool:
    """Whether the processor multiplies bf16 tiles, which PyTorch's products use and these kernels do not."""
    probe: Callable[[], bool] = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    return bool(probe())


_lock = threading.Lock()
_chosen: Library | None = None


def available() -> Library:
    """The library for ``MOESAIC_KERNEL`` as it was at the first call, compiled if need be.

    Raises ``ConfigError`` for a value that cannot be.
    """
    global _chosen
    if _chosen is None:
        with _lock:
            _chosen = _available((os.environ.get("MOESAIC_KERNEL") or "auto").lower())
    return _chosen


def forget() -> None:
    """Read ``MOESAIC_KERNEL`` again at the next call (for tests)."""
    global _chosen
    _chosen = None


@functools.cache
def _available(wish: str) -> Library:
    if wish == "off":
        return Library(None, None, False, "switched off by MOESAIC_KERNEL=off")
    isas = supported()
    if wish != "auto" and wish not in isas:
        raise ConfigError(
            f"MOESAIC_KERNEL is {wish!r}, but this processor offers {', '.join(isas)}; use one of these, auto or off."
        )
    isa = isas[0] if wish == "auto" else wish
    compiler = find_compiler()
    if compiler is None:
        return Library(None, None, False, "no C compiler was found (cc, gcc or clang); install one for faster experts")
    try:
        functions, threaded = compiled(compiler, isa)
    except (OSError, subprocess.SubprocessError) as error:
        return Library(None, None, False, f"compiling with {shlex.join(compiler)} failed: {_last_line(error)}")
    _declare(functions)
    words = " ".join([Path(compiler[0]).name, *compiler[1:]])
    return Library(functions, isa, threaded, f"compiled with {words} for {isa}")


def _declare(functions: ctypes.CDLL) -> None:
    """Argument types, so that calls may pass plain addresses and numbers."""
    address, number = ctypes.c_void_p, ctypes.c_int64
    functions.moesaic_group.argtypes = [address, number, number, address, address, address]
    functions.moesaic_top.argtypes = [address, number, number, number, address, number]
    functions.moesaic_rms_norm.argtypes = [address] * 3 + [number] * 2 + [ctypes.c_double] + [number] * 3
    functions.moesaic_linear.argtypes = [address] * 5 + [number] * 6
    for name in ("forward", "backward", "few"):
        getattr(functions, f"moesaic_experts_{name}").argtypes = [address]


def _last_line(error: Exception) -> str:
    text = error.stderr if isinstance(error, subprocess.CalledProcessError) and error.stderr else str(error)
    lines = [line for line in text.splitlines() if "error" in line.lower()] or text.splitlines() or [repr(error)]
    return lines[0].strip()


def find_compiler() -> list[str] | None:
    """The C compiler: ``$CC`` with its arguments ("ccache gcc") if there is such a program, else cc, gcc or clang."""
    for name in (os.environ.get("CC", ""), "cc", "gcc", "clang"):
        words = name.split()
        path = shutil.which(words[0]) if words else None
        if path:
            return [path, *words[1:]]
    return None


def cache_folder() -> Path:
    """Where libraries are kept; the user's own folder beside temporary files where the cache cannot be written."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folders = [Path(home) / "moesaic" / "kernels"]
    if hasattr(os, "getuid"):
        folders.append(Path(tempfile.gettempdir()) / f"moesaic-kernels-{os.getuid()}")
    for folder in folders:
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if _own(folder) and os.access(folder, os.W_OK):
                return folder
        except OSError:
            continue
    return Path(tempfile.mkdtemp(prefix="moesaic-kernels-"))


def _own(path: Path) -> bool:
    """Whether nobody else could have put this here: what lies in it gets loaded."""
    if not hasattr(os, "getuid"):
        return True
    facts = path.lstat()
    return not stat.S_ISLNK(facts.st_mode) and facts.st_uid == os.getuid() and not facts.st_mode & 0o022


def compiled(compiler: list[str], isa: str) -> tuple[ctypes.CDLL, bool]:
    """The library and whether it has threads, from the cache or compiled now.

    Raises ``subprocess.SubprocessError`` or ``OSError`` when the compiler cannot.
    """
    here = Path(__file__).parent
    version = _say([*compiler, "--version"], timeout=20)
    runtime = _openmp_runtime()
    parts = [version, *compiler[1:], FLAGS[isa], _ALWAYS, str(bool(runtime)), platform.machine()]
    parts += [path.read_text("utf-8") for path in sorted(here.glob("*.[ch]"))]
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    folder = cache_folder()
    for threaded in (True, False) if runtime else (False,):
        name = f"{isa}-{digest}-{'threads' if threaded else 'single'}"
        path = next(filter(_whole, sorted(folder.glob(f"{name}-*.so"))), None)
        try:
            if threaded and runtime:
                # The library names no OpenMP runtime of its own: its symbols are found in the one made global here.
                ctypes.CDLL(runtime, mode=ctypes.RTLD_GLOBAL)
            if path is None:
                with _one_at_a_time(folder):  # whoever waited finds it made
                    path = next(filter(_whole, sorted(folder.glob(f"{name}-*.so"))), None)
                    path = path or _compile(compiler, isa, threaded, folder, name)
            return ctypes.CDLL(str(path)), threaded
        except (subprocess.CalledProcessError, OSError):
            # A compiler without OpenMP, or with another one than PyTorch's: one thread is better than none.
            if not threaded:
                raise
    raise OSError("no library was made")


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Processes that start together compile in turn, where the system has locks; a lock ends with its process."""
    if fcntl is None:
        yield
        return
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _whole(path: Path) -> bool:
    """Whether the library is ours and its content what its name says."""
    return _own(path) and path.stem.endswith(f"-{_hash(path)}")


def _say(command: list[str], timeout: float) -> str:
    # Messages come in the user's language and need not be in the encoding that Python expects.
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=timeout, check=True)
    return done.stdout


def _compile(compiler: list[str], isa: str, threaded: bool, folder: Path, name: str) -> Path:
    here = Path(__file__).parent
    with tempfile.TemporaryDirectory(dir=folder, prefix=".compiling-") as scratch:
        objects = []
        running = []
        for source in _SOURCES:
            objects.append(os.path.join(scratch, source + ".o"))
            flags = [*_ALWAYS.split(), *FLAGS[isa].split()]
            flags += ["-fopenmp"] if threaded else ["-Wno-unknown-pragmas"]
            command = [*compiler, *flags, "-c", str(here / source), "-o", objects[-1]]
            streams: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
            running.append(subprocess.Popen(command, text=True, errors="replace", **streams))
        try:
            errors = [process.communicate(timeout=300)[1] for process in running]
        finally:  # on a time limit or an interrupt, nobody waits for them any more
            for process in running:
                with process:  # waits, and closes its pipe
                    process.terminate()
        for process, error in zip(running, errors, strict=True):
            if process.returncode:
                raise subprocess.CalledProcessError(process.returncode, process.args, stderr=error)
        made = Path(scratch) / "made.so"
        undefined = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
        _say([*compiler, "-shared", *undefined, *objects, "-o", str(made), "-lm"], timeout=120)
        path = folder / f"{name}-{_hash(made)}.so"
        os.replace(made, path)
        return path


def _openmp_runtime() -> str | None:
    """The OpenMP library that PyTorch has loaded into this process, None where it cannot be told."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return None
    found = re.search(r"(/[^\n]*/lib(?:gomp|iomp5|omp)[\w.-]*\.so[\w.]*)$", maps, re.MULTILINE)
    return found[1] if found else None
