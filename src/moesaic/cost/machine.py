"""What this machine is: processor, memory, disks, accelerators, compilers, each read where the platform tells it.

Every function answers None (or nothing) for what a platform does not tell; none raises.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed

# What matters to a matrix product: our name -> the flag in /proc/cpuinfo.
INSTRUCTION_SETS = {
    "avx2": "avx2",
    "avx512f": "avx512f",
    "avx512_bf16": "avx512_bf16",
    "avx512_vnni": "avx512_vnni",
    "amx_bf16": "amx_bf16",
    "neon": "asimd",
    "sve": "sve",
    "arm_bf16": "bf16",
    "arm_i8mm": "i8mm",
}


@dataclass(frozen=True)
class Cpu:
    """The processor. ``usable_cores`` is what this process may use (affinity and container limits)."""

    model: str | None
    physical_cores: int | None
    logical_cores: int | None
    usable_cores: int
    torch_threads: int
    instruction_sets: tuple[str, ...]
    torch_capability: str


@dataclass(frozen=True)
class Gpu:
    """One accelerator; memory in bytes, capability as CUDA counts it ("9.0"), None where there is no such thing."""

    name: str
    memory_total: int | None
    memory_free: int | None
    capability: str | None


def version_of(package: str) -> str | None:
    """The version of an installed package (its distribution's name), None when it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def torch_build() -> str:
    """Which accelerator this torch was built for: "CUDA 13.0", "ROCm 7.0" or "CPU only"."""
    if torch.version.cuda:
        return f"CUDA {torch.version.cuda}"
    return f"ROCm {torch.version.hip}" if torch.version.hip else "CPU only"


def cpu() -> Cpu:
    """The processor of this machine."""
    text = read_text("/proc/cpuinfo")
    model, physical, flags = parse_cpuinfo(text)
    if sys.platform == "darwin":
        model = model or _sysctl("machdep.cpu.brand_string")
        physical = physical or int(_sysctl("hw.physicalcpu") or 0) or None
    sets = tuple(name for name, flag in INSTRUCTION_SETS.items() if flag in flags)
    if not sets and platform.machine().lower() in ("arm64", "aarch64"):
        sets = ("neon",)  # part of every 64-bit ARM
    return Cpu(
        model=model or platform.processor() or None,
        physical_cores=physical,
        logical_cores=os.cpu_count(),
        usable_cores=usable_cores(),
        torch_threads=torch.get_num_threads(),
        instruction_sets=sets,
        torch_capability=torch.backends.cpu.get_cpu_capability(),
    )


def parse_cpuinfo(text: str) -> tuple[str | None, int | None, frozenset[str]]:
    """(model name, physical cores, instruction-set flags) from the text of /proc/cpuinfo, x86 or ARM."""
    model, flags, cores = None, frozenset[str](), set()
    for block in text.split("\n\n"):
        fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in block.splitlines())}
        model = model or fields.get("model name")
        flags = flags or frozenset((fields.get("flags") or fields.get("Features") or "").split())
        if "core id" in fields:
            cores.add((fields.get("physical id"), fields["core id"]))
    return model, len(cores) or None, flags


def usable_cores(cgroup: str = "/sys/fs/cgroup") -> int:
    """Cores this process may use: its affinity, and the container's CPU quota rounded up."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = re.fullmatch(r"(\d+) (\d+)", read_text(f"{cgroup}/cpu.max").strip())
    if quota and int(quota[2]):
        cores = min(cores, max(1, -(-int(quota[1]) // int(quota[2]))))
    return cores


def memory(meminfo: str = "/proc/meminfo", cgroup: str = "/sys/fs/cgroup") -> tuple[int | None, int | None]:
    """(total, free) bytes of memory this process may use: the machine's, or the container's limit where it is lower."""
    kib = {key: int(value) for key, value in re.findall(r"^(\w+):\s+(\d+) kB", read_text(meminfo), re.MULTILINE)}
    total = kib["MemTotal"] * 1024 if "MemTotal" in kib else None
    free = kib["MemAvailable"] * 1024 if "MemAvailable" in kib else None
    if total is None and sys.platform == "darwin":
        total = int(_sysctl("hw.memsize") or 0) or None
    limit, used = read_text(f"{cgroup}/memory.max").strip(), read_text(f"{cgroup}/memory.current").strip()
    if limit.isdigit() and (total is None or int(limit) < total):
        total = int(limit)
        left = max(0, total - int(used)) if used.isdigit() else total
        free = left if free is None else min(free, left)
    return total, free


def disk_free() -> dict[str, int]:
    """Bytes free where runs are written (the current folder) and where downloads are kept (the Hugging Face cache)."""
    cache = Path(os.path.expanduser(os.environ.get("HF_HOME") or "~/.cache/huggingface")).absolute()
    free = {}
    for name, folder in (("current folder", Path.cwd()), ("download cache", cache)):
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        try:
            free[name] = shutil.disk_usage(folder).free
        except OSError:  # a folder that cannot be looked at says nothing
            continue
    return free


def bf16_is_fast() -> bool:
    """Whether bf16 products have their own instructions here: a GPU, or a processor with AMX or AVX-512 BF16.

    Elsewhere bf16 is emulated and slower than fp32. Read off the machine, not timed, so that the answer never wavers.
    """
    return torch.cuda.is_available() or not {"amx_bf16", "avx512_bf16"}.isdisjoint(cpu().instruction_sets)


def gpus() -> tuple[Gpu, ...]:
    """The accelerators torch can use: CUDA or ROCm devices, or the GPU of an Apple machine."""
    found = []
    try:
        for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
            free, total = torch.cuda.mem_get_info(index)
            major, minor = torch.cuda.get_device_capability(index)
            found.append(Gpu(torch.cuda.get_device_name(index), total, free, f"{major}.{minor}"))
    except RuntimeError:  # a driver that answers "available" and then fails: advice() tells of the mismatch
        pass
    if torch.backends.mps.is_available():
        found.append(Gpu("Apple GPU (mps)", None, None, None))
    return tuple(found)


def backend_available(name: str) -> bool:
    """Whether torch was built with this back end of torch.distributed."""
    return torch.distributed.is_available() and torch.distributed.is_backend_available(name)


def grouped_mm_works(dtype: torch.dtype, device: str = "cpu") -> bool:
    """Whether torch's grouped product runs here and agrees with one product per group (an empty group among them)."""
    if not hasattr(torch.nn.functional, "grouped_mm"):
        return False
    x_ND = (torch.arange(5 * 8, device=device).view(5, 8) % 7 - 3).to(dtype)
    w_EDH = (torch.arange(3 * 8 * 8, device=device).view(3, 8, 8) % 5 - 2).to(dtype)
    ends = [2, 2, 5]
    try:
        offsets_E = torch.tensor(ends, dtype=torch.int32, device=device)
        y_NH = torch.nn.functional.grouped_mm(x_ND, w_EDH, offs=offsets_E)
    except (RuntimeError, NotImplementedError):
        return False
    loop_NH = torch.cat([x_ND[a:b] @ w_EDH[e] for e, (a, b) in enumerate(zip([0, *ends], ends, strict=False))])
    return torch.equal(y_NH, loop_NH)  # small whole numbers: exact in every format


def cpp_compiler() -> str | None:
    """The C++ compiler torch.compile would use on the CPU, or None."""
    for name in filter(None, (os.environ.get("CXX"), "g++", "clang++", "c++", "cl")):
        if path := shutil.which(name):
            return path
    return None


def compile_works(timeout_s: float = 300.0) -> bool:
    """Compile and run a small function in a process of its own, where a broken tool chain can do no harm."""
    code = "import torch; print(torch.compile(lambda x: (x * 2).sin().sum(), fullgraph=True)(torch.zeros(8)).item())"
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=timeout_s, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0 and done.stdout.strip().endswith("0.0")


def read_text(path: str) -> str:
    """A small system file, or nothing where there is none."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _sysctl(name: str) -> str | None:
    try:
        done = subprocess.run(["sysctl", "-n", name], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
