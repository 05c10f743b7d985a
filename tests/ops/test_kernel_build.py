"""Compiling, caching, doing without: every way in which a machine can lack the kernel leaves a layer that works and says so."""

from __future__ import annotations

import ctypes
import os
import shutil
import stat
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from moesaic.errors import ConfigError
from moesaic.experts import MoE
from moesaic.ops import kernel
from moesaic.ops.fused import pick_fused
from moesaic.ops.kernel import build
from tests.ops.experts_by_hand import assert_close, run, some_batch, truth
from tests.ops.kernels import needs_compiler

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Nothing loaded, an empty cache, and quick unoptimised libraries of the smallest instruction set."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("MOESAIC_KERNEL", "generic")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(build, "_ALWAYS", build._ALWAYS.replace("-O3", "-O0"))
    _forget()
    yield tmp_path / "cache" / "moesaic" / "kernels"
    monkeypatch.undo()
    _forget()


def _forget() -> None:
    build.forget()
    build._available.cache_clear()


def _layer_works() -> None:
    """The layer as users build it, and the experts against the loops with whatever "auto" picks."""
    y_TD, _ = MoE(16, 8, 4, 2)(torch.randn(6, 16))
    y_TD.sum().backward()
    batch = some_batch(torch.arange(20) % 3, 9, 3, 20, 12)
    assert_close(run(batch, None), truth(batch), torch.float32)


def _no_kernel(reason: str) -> str:
    status = kernel.status()
    assert not status.in_use
    assert (status.isa, status.threads) == (None, None)
    assert reason in status.reason
    assert "\n" not in status.reason
    assert pick_fused(torch.zeros(2, 4), torch.zeros(1, 4, 4), 2) == "tiles"
    _layer_works()
    return status.reason


def _kept(folder: Path) -> list[Path]:
    """What the cache holds besides its lock: libraries, and work that somebody left."""
    return [path for path in folder.iterdir() if path.name != ".lock"]


def _script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


# ---- doing without -------------------------------------------------------------------------------------------------------


def test_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOESAIC_KERNEL", "off")
    _no_kernel("switched off by MOESAIC_KERNEL=off")


def test_an_instruction_set_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOESAIC_KERNEL", "mmx")
    with pytest.raises(ConfigError, match="MOESAIC_KERNEL is 'mmx', but this processor offers .*generic.*auto or off"):
        kernel.status()
    with pytest.raises(ConfigError, match="mmx"):  # and again: a refusal is not remembered as an answer
        MoE(16, 8, 4, 2)(torch.randn(6, 16))


def test_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    _no_kernel("no C compiler was found")


def test_a_compiler_that_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fresh: Path) -> None:
    fails = 'printf "x.c:1: note\\nx.c:2: error: no \\344 such thing\\nmore\\n" >&2; exit 1'
    says = f'case "$1" in --version) echo 1;; *) {fails};; esac'
    monkeypatch.setenv("CC", _script(tmp_path / "broken", says))
    reason = _no_kernel("failed: x.c:2: error: no")  # the byte that is no UTF-8 does not matter
    assert str(tmp_path / "broken") in reason
    assert _kept(fresh) == []


def test_a_compiler_that_cannot_even_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CC", _script(tmp_path / "odd", "exit 3"))
    _no_kernel("failed")
    _forget()
    (tmp_path / "odd").write_text("no program at all \0")
    _no_kernel("failed")


def test_a_compiler_that_does_not_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fresh: Path) -> None:
    """The time limit ends it, and no compiler is left behind."""
    says = f'case "$1" in --version) echo 1;; *) echo $$ >> {tmp_path}/pids; exec sleep 100;; esac'
    monkeypatch.setenv("CC", _script(tmp_path / "endless", says))
    communicate = subprocess.Popen.communicate

    def hurried(self: Any, input: Any = None, timeout: float | None = None) -> Any:
        return communicate(self, input, 1.0 if timeout == 300 else timeout)

    monkeypatch.setattr(subprocess.Popen, "communicate", hurried)
    _no_kernel("timed out")
    pids = (tmp_path / "pids").read_text().split()
    assert len(pids) == 2
    for pid in map(int, pids):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert _kept(fresh) == []


@needs_compiler
def test_a_library_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("failed to map segment from shared object")

    monkeypatch.setattr(build.ctypes, "CDLL", refuse)
    _no_kernel("failed to map segment")


@needs_compiler
def test_a_compiler_without_openmp(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither the option nor the header: one thread, the same results."""
    found = build.find_compiler()
    assert found is not None
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "omp.h").write_text("#error there is no OpenMP here\n")
    refuses = (
        'for a in "$@"; do [ "$a" != -fopenmp ] || { echo "error: unsupported option -fopenmp" >&2; exit 1; }; done'
    )
    monkeypatch.setenv("CC", _script(tmp_path / "single", f'{refuses}\nexec {found[0]} -isystem {tmp_path}/none "$@"'))
    torch.set_num_threads(2)
    status = kernel.status()
    assert status.in_use, status.reason
    assert status.threads == 1
    library = build.available().functions
    assert library is not None
    symbols = Path(library._name).read_bytes()
    assert b"omp_get_thread_num" not in symbols
    assert b"GOMP_" not in symbols
    _layer_works()


# ---- the compiler and the cache ------------------------------------------------------------------------------------------


@needs_compiler
def test_what_is_compiled_is_kept(monkeypatch: pytest.MonkeyPatch, fresh: Path) -> None:
    status = kernel.status()
    assert status.in_use, status.reason
    assert status.isa == "generic"
    assert status.reason.endswith("for generic")
    assert pick_fused(torch.zeros(2, 4), torch.zeros(1, 4, 4), 2) == "kernel"
    _layer_works()
    (library,) = _kept(fresh)  # and nothing of the work is left
    _forget()
    monkeypatch.setattr(build, "_compile", None)  # a second look does not compile
    assert kernel.status() == status
    assert _kept(fresh) == [library]


@needs_compiler
def test_a_library_cut_short_is_compiled_again(fresh: Path) -> None:
    """Mapping half a library can end the process; a new process would meet it like this."""
    assert kernel.status().in_use
    (library,) = _kept(fresh)
    whole = library.read_bytes()
    library.unlink()  # the mapped one stays as it is
    for keep in (0, 1000, len(whole) - 1):
        library.write_bytes(whole[:keep])
        assert not build._whole(library)
    _forget()
    status = kernel.status()
    assert status.in_use, status.reason
    assert any(build._whole(path) for path in fresh.glob("*.so"))
    _layer_works()


@needs_compiler
def test_the_source_and_the_options_are_part_of_the_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder, names = tmp_path / "source", []
    shutil.copytree(Path(build.__file__).parent, folder)
    monkeypatch.setattr(build, "__file__", str(folder / "build.py"))
    monkeypatch.setattr(build, "_compile", lambda *args: names.append(args[-1]) or folder)
    monkeypatch.setattr(ctypes, "CDLL", lambda *args, **kwargs: None)
    monkeypatch.setattr(build.ctypes, "CDLL", lambda *_, **__: None)
    compiler = build.find_compiler()
    assert compiler is not None
    build.compiled(compiler, "generic")
    build.compiled(compiler, "generic")
    assert len(set(names)) == 1
    with (folder / "job.h").open("a") as file:
        file.write("// another line\n")
    build.compiled(compiler, "generic")
    build.compiled([*compiler, "-DANYTHING"], "generic")
    monkeypatch.setattr(build, "_ALWAYS", build._ALWAYS + " -DMORE")
    build.compiled(compiler, "generic")
    assert len(set(names)) == 4


@needs_compiler
def test_a_compiler_with_arguments(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """CC="ccache gcc" and the like; a CC that does not exist falls back on the usual names."""
    found = build.find_compiler()
    assert found is not None
    through = _script(tmp_path / "cache-of", 'exec "$@"')
    monkeypatch.setenv("CC", f"{through} {found[0]}")
    status = kernel.status()
    assert status.in_use, status.reason
    assert status.reason == f"compiled with cache-of {found[0]} for generic"
    monkeypatch.setenv("CC", "no-such-compiler -O9")
    assert build.find_compiler() == found


@needs_compiler
@pytest.mark.skipif(not hasattr(os, "getuid"), reason="users by number")
def test_a_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A file where the folder should be (root may write to anything else): the user's own folder beside temporary files."""
    (tmp_path / "cache").write_text("in the way")
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(build.tempfile, "tempdir", str(tmp_path / "tmp"))
    status = kernel.status()
    assert status.in_use, status.reason
    (own,) = (tmp_path / "tmp").iterdir()
    assert stat.S_IMODE(own.stat().st_mode) == 0o700
    assert build.cache_folder() == own  # the next process finds it again
    own.chmod(0o777)  # others can write there: what it holds must not be loaded
    assert build.cache_folder() != own


@pytest.mark.slow
@needs_compiler
def test_two_processes_that_start_together(fresh: Path) -> None:
    code = (
        "from moesaic.ops.kernel import build, status; build._ALWAYS = build._ALWAYS.replace('-O3', '-O0'); "
        "import torch; from moesaic.experts import MoE; assert status().in_use, status(); "
        "MoE(16, 8, 4, 2)(torch.randn(6, 16))[0].sum().backward()"
    )
    several = [subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE) for _ in range(2)]
    assert [process.communicate(timeout=100)[1] for process in several] == [b"", b""]
    assert [process.returncode for process in several] == [0, 0]
    assert all(path.suffix == ".so" and build._whole(path) for path in _kept(fresh))


def test_the_c_files_are_in_the_package() -> None:
    """What a wheel takes along is what pyproject names: every file that is not Python, matched by one of its patterns."""
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    patterns = setup["tool"]["setuptools"]["package-data"]["moesaic"]
    package = ROOT / "src" / "moesaic"
    named = {path for pattern in patterns for path in package.glob(pattern)}
    files = {path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert sorted(path for path in files - named if path.suffix != ".py") == []
    assert {package / "ops" / "kernel" / name for name in build._SOURCES} <= named


def test_openmp_runtime_under_a_path_with_spaces(monkeypatch: pytest.MonkeyPatch) -> None:
    maps = "7f00-7f01 r-xp 0000 00:1f 12   /home/a b/lib/libgomp-a34b3233.so.1\n7f02-7f03 rw-p 00 00:00 0  [heap]\n"
    monkeypatch.setattr(build.Path, "read_text", lambda *_: maps)
    assert build._openmp_runtime() == "/home/a b/lib/libgomp-a34b3233.so.1"


@pytest.mark.slow
@pytest.mark.timeout(1800)
@needs_compiler
def test_under_sanitizers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every odd shape again with libraries that stop at the first read or write outside of a tensor or a buffer."""
    names = [subprocess.run(["gcc", f"-print-file-name=lib{name}.so"], capture_output=True, text=True).stdout.strip()
             for name in ("asan", "ubsan")] if shutil.which("gcc") else []  # fmt: skip
    if not names or not all(os.path.isabs(name) for name in names):
        pytest.skip("needs gcc with its sanitizers")
    sanitize = "-O1 -fsanitize=address,undefined -fno-sanitize-recover=undefined"
    environment = {
        **os.environ,
        "CC": _script(tmp_path / "sanitizing", f'exec gcc "$@" {sanitize}'),
        "LD_PRELOAD": ":".join(names),
        "ASAN_OPTIONS": "detect_leaks=0",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "pytest", "tests/ops/test_fused.py", "tests/ops/test_linear.py", "-q", "-x"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1700)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
