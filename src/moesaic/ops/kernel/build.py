"""Compile the C files beside this one and load them: one shared library per instruction set, compiler and source, in a cache.

The cache is ``$XDG_CACHE_HOME/moesaic/kernels`` (``~/.cache`` by default). A library is written whole under another name and
moved in place, so that processes that start together cannot read half of one. Threads are those of the OpenMP runtime that
PyTorch has loaded: a second pool would spin against the first on the same cores.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

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
_ALWAYS = "-O3 -g -std=gnu11 -fPIC -shared -ffp-contract=fast -fno-math-errno -fno-semantic-interposition -w"
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
            _chosen = _available(os.environ.get("MOESAIC_KERNEL", "auto"))
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
        path, threaded = compiled(compiler, isa)
        functions = ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        return Library(None, None, False, f"compiling with {compiler} failed: {_last_line(error)}")
    _declare(functions)
    return Library(functions, isa, threaded, f"compiled with {Path(compiler).name} for {isa}")


def _declare(functions: ctypes.CDLL) -> None:
    """Argument types, so that calls may pass plain addresses and numbers."""
    address, number = ctypes.c_void_p, ctypes.c_int64
    functions.moesaic_group.argtypes = [address, number, number, address, address, address]
    functions.moesaic_top.argtypes = [address, number, number, number, address, number]
    functions.moesaic_linear.argtypes = [address] * 5 + [number] * 6
    for name in ("forward", "backward", "few"):
        getattr(functions, f"moesaic_experts_{name}").argtypes = [address]


def _last_line(error: Exception) -> str:
    text = error.stderr if isinstance(error, subprocess.CalledProcessError) and error.stderr else str(error)
    lines = [line for line in text.splitlines() if "error" in line.lower()] or text.splitlines() or [repr(error)]
    return lines[0].strip()


def find_compiler() -> str | None:
    """The C compiler: ``$CC`` if set, else cc, gcc or clang."""
    for name in (os.environ.get("CC", ""), "cc", "gcc", "clang"):
        path = shutil.which(name.split()[0]) if name.split() else None
        if path:
            return path
    return None


def cache_folder() -> Path:
    """Where libraries are kept; a private temporary folder where the user's cache cannot be written."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = Path(home) / "moesaic" / "kernels"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="moesaic-kernels-"))


def compiled(compiler: str, isa: str) -> tuple[Path, bool]:
    """Path of the library and whether it has threads, from the cache or compiled now.

    Raises ``subprocess.SubprocessError`` or ``OSError`` when the compiler cannot.
    """
    here = Path(__file__).parent
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=20, check=True).stdout
    runtime = _openmp_runtime()
    parts = [version, FLAGS[isa], _ALWAYS, str(bool(runtime)), platform.machine()]
    parts += [path.read_text() for path in sorted(here.glob("*.[ch]"))]
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    folder = cache_folder()
    for threaded in (True, False) if runtime else (False,):
        path = folder / f"{isa}-{digest}{'' if threaded else '-single'}.so"
        if not path.exists():
            try:
                _compile(compiler, isa, threaded, path, here)
            except subprocess.CalledProcessError:
                if threaded:
                    continue  # a compiler without OpenMP: one thread is better than none
                raise
        if threaded and runtime:
            # The library names no OpenMP runtime of its own: its symbols are found in the one made global here.
            ctypes.CDLL(runtime, mode=ctypes.RTLD_GLOBAL)
        return path, threaded
    raise OSError("no library was made")


def _compile(compiler: str, isa: str, threaded: bool, path: Path, here: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".compiling-") as scratch:
        objects = []
        running = []
        for source in _SOURCES:
            objects.append(os.path.join(scratch, source + ".o"))
            flags = [*_ALWAYS.replace("-shared ", "").split(), *FLAGS[isa].split()]
            flags += ["-fopenmp"] if threaded else ["-Wno-unknown-pragmas"]
            command = [compiler, *flags, "-c", str(here / source), "-o", objects[-1]]
            running.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True))
        errors = [process.communicate(timeout=300)[1] for process in running]
        for process, error in zip(running, errors, strict=True):
            if process.returncode:
                raise subprocess.CalledProcessError(process.returncode, process.args, stderr=error)
        made = os.path.join(scratch, path.name)
        undefined = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
        link = [compiler, "-shared", *undefined, *objects, "-o", made]
        subprocess.run(link, capture_output=True, text=True, timeout=120, check=True)
        os.replace(made, path)


def _openmp_runtime() -> str | None:
    """The OpenMP library that PyTorch has loaded into this process, None where it cannot be told."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return None
    found = re.search(r"(/\S*/lib(?:gomp|iomp5|omp)[\w.-]*\.so[\w.]*)", maps)
    return found[1] if found else None
