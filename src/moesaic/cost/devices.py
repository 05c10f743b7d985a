"""What of moesaic works on this machine and how fast: ``moesaic doctor``.

>>> report = doctor()             # about a second; deep=True also compiles a small function
>>> print(format_doctor(report))
>>> report.to_dict()              # plain JSON

Facts a platform does not tell (no /proc, no sysctl) are None, never an error.
"""

from __future__ import annotations

import dataclasses
import platform
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from moesaic.cost.machine import (
    Cpu,
    Gpu,
    backend_available,
    compile_works,
    cpp_compiler,
    cpu,
    disk_free,
    gpus,
    grouped_mm_works,
    memory,
    torch_build,
    version_of,
)
from moesaic.cost.speed import matmul_gflops, read_gb_per_s
from moesaic.errors import ConfigError
from moesaic.ops.kernel import Status
from moesaic.ops.kernel import status as kernel_status

GIB = 1 << 30
# Optional package -> (what it unlocks, how to get it).
OPTIONAL = {
    "tensorboard": ("training curves in TensorBoard", 'pip install "moesaic[train]"'),
    "pyarrow": ("parquet files as training text", 'pip install "moesaic[data]"'),
    "datasets": ("Hugging Face data sets as training text", 'pip install "moesaic[data]"'),
    "transformers": ("comparing a converted model with its Hugging Face original", 'pip install "moesaic[hf]"'),
    "huggingface_hub": ("downloading models by hub id", 'pip install "moesaic[hf]"'),
    "triton": ("torch.compile on NVIDIA GPUs", "comes with a CUDA build of torch"),
}


@dataclass(frozen=True)
class Package:
    """An optional package: its version or None, what it unlocks, how to install it."""

    name: str
    version: str | None
    unlocks: str
    install: str


@dataclass(frozen=True)
class Speed:
    """Measured on all torch threads: 10^9 operations a second of a square product, 10^9 bytes a second read."""

    fp32_gflops: float
    bf16_gflops: float
    read_gb_per_s: float


@dataclass(frozen=True)
class Report:
    """Everything ``moesaic doctor`` knows. Bytes are bytes; ``advice`` are sentences, empty when nothing is wrong.

    ``kernel`` is the C kernel of the experts, ``grouped_mm`` torch's own grouped product.
    """

    python: str
    platform: str
    moesaic: str | None
    torch: str
    torch_build: str
    cpu: Cpu
    memory_total: int | None
    memory_free: int | None
    disk_free: dict[str, int]
    gpus: tuple[Gpu, ...]
    distributed: dict[str, bool]
    kernel: Status
    grouped_mm: dict[str, bool]
    cpp_compiler: str | None
    compile_works: bool | None
    packages: tuple[Package, ...]
    speed: Speed | None
    advice: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return dataclasses.asdict(self)


def doctor(deep: bool = False, measure: bool = True) -> Report:
    """Look at this machine. ``deep`` compiles and runs a small function (many seconds); ``measure`` times the CPU."""
    memory_total, memory_free = memory()
    compiler = cpp_compiler()
    room = memory_free is None or memory_free > GIB
    report = Report(
        python=platform.python_version(),
        platform=platform.platform(),
        moesaic=version_of("moesaic"),
        torch=torch.__version__,
        torch_build=torch_build(),
        cpu=cpu(),
        memory_total=memory_total,
        memory_free=memory_free,
        disk_free=disk_free(),
        gpus=gpus(),
        distributed={name: backend_available(name) for name in ("gloo", "nccl", "mpi", "ucc")},
        kernel=expert_kernel(),
        grouped_mm={name: grouped_mm_works(dtype) for name, dtype in _FORMATS.items()},
        cpp_compiler=compiler,
        compile_works=compile_works() if deep else None,
        packages=tuple(Package(name, version_of(name), *about) for name, about in OPTIONAL.items()),
        speed=speed() if measure and room else None,
    )
    return dataclasses.replace(report, advice=tuple(advice(report)))


_FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def expert_kernel() -> Status:
    """The C kernel of the experts, compiled if nobody has yet; a setting that cannot be is a reason, not an error."""
    try:
        return kernel_status()
    except ConfigError as error:
        return Status(False, None, None, str(error).rstrip("."))


def speed() -> Speed:
    """Time this CPU: about half a second."""
    return Speed(matmul_gflops(torch.float32), matmul_gflops(torch.bfloat16), read_gb_per_s())


def advice(report: Report) -> list[str]:
    """What is wrong or slow here and what to do about it, a sentence each."""
    said, cpu = [], report.cpu
    if cpu.torch_threads > cpu.usable_cores:
        said.append(
            f"torch uses {cpu.torch_threads} threads on {cpu.usable_cores} usable cores, which slows everything down; "
            f"set OMP_NUM_THREADS={cpu.usable_cores}."
        )
    if cpu.physical_cores and cpu.torch_threads < min(cpu.physical_cores, cpu.usable_cores):
        said.append(
            f"torch uses {cpu.torch_threads} of {min(cpu.physical_cores, cpu.usable_cores)} cores; unset "
            f"OMP_NUM_THREADS to use them all."
        )
    for place, free in report.disk_free.items():
        if free < 5 * GIB:
            said.append(
                f"Only {free / GIB:.1f} GiB of disk are free in the {place}; a training run keeps several checkpoints "
                f"there, so free some space or choose another disk."
            )
    if report.memory_free is not None and report.memory_free < 2 * GIB:
        said.append(
            f"Only {report.memory_free / GIB:.1f} GiB of memory are free; close other programs before training."
        )
    if not report.gpus and report.torch_build == "CPU only" and shutil.which("nvidia-smi"):
        said.append(
            "There is an NVIDIA driver but this torch is built for the CPU; install a CUDA build from pytorch.org."
        )
    if not report.gpus and report.torch_build.startswith("CUDA") and shutil.which("nvidia-smi"):
        said.append(
            "torch is built for CUDA but finds no GPU; check that nvidia-smi works and the driver is new enough."
        )
    if not report.kernel.in_use:
        said.append(
            f"The C kernel of the experts is not in use, so they are slower on this processor: {report.kernel.reason}."
        )
    for name, works in report.grouped_mm.items():
        if not works:
            said.append(
                f"torch's grouped product does not work here in {name}; experts run one by one, right but slower. "
                f"A newer torch (2.10 or later) has it."
            )
    if report.cpp_compiler is None:
        said.append("No C++ compiler was found, so torch.compile cannot be used on the CPU; install g++ or clang.")
    if report.compile_works is False and report.cpp_compiler is not None:
        said.append("torch.compile failed on a small function; train without --compile, or repair the C++ tool chain.")
    if not any(report.distributed.values()):
        said.append("torch has no distributed back end here, so every run uses one process.")
    if report.speed is not None and report.speed.bf16_gflops < 0.8 * report.speed.fp32_gflops:
        said.append("bf16 products are slower than fp32 ones on this CPU; train and generate in fp32 here.")
    return said


def format_doctor(report: Report) -> str:
    """The report as text for a terminal: one fact a line, then the advice."""
    cpu, speed = report.cpu, report.speed
    rows = [
        ("python", f"{report.python} on {report.platform}"),
        ("moesaic", report.moesaic or "not installed (running from a source folder)"),
        ("torch", f"{report.torch} ({report.torch_build})"),
        ("processor", cpu.model or "unknown"),
        (
            "cores",
            f"{_known(cpu.physical_cores)} physical, {_known(cpu.logical_cores)} logical, {cpu.usable_cores} usable; "
            f"torch uses {cpu.torch_threads} threads",
        ),
        ("instructions", f"{' '.join(cpu.instruction_sets) or 'unknown'} (torch uses {cpu.torch_capability})"),
        ("memory", f"{_gib(report.memory_free)} free of {_gib(report.memory_total)}"),
        *(("disk", f"{_gib(free)} free in the {place}") for place, free in report.disk_free.items()),
        *(("gpu", _gpu(gpu)) for gpu in report.gpus),
        *([] if report.gpus else [("gpu", "none; everything runs on the processor")]),
        ("distributed", ", ".join(name for name, there in report.distributed.items() if there) or "none"),
        ("expert kernel", _kernel(report.kernel)),
        ("grouped product", _works(report.grouped_mm.items())),
        ("torch.compile", _compile(report)),
        *(
            [
                ("products", f"fp32 {speed.fp32_gflops:.0f}, bf16 {speed.bf16_gflops:.0f} GFLOP/s (measured)"),
                ("memory reads", f"{speed.read_gb_per_s:.1f} GB/s (measured)"),
            ]
            if speed
            else []
        ),
        *(
            ("optional", f"{p.name} {p.version}" if p.version else f"{p.name} absent: {p.unlocks} ({p.install})")
            for p in report.packages
        ),
    ]
    lines = [f"{name:<16} {fact}" for name, fact in rows]
    lines += ["", *(f"! {sentence}" for sentence in report.advice)] if report.advice else ["", "Nothing to mend."]
    return "\n".join(lines)


def _known(value: int | None) -> str:
    return "?" if value is None else str(value)


def _gib(num_bytes: int | None) -> str:
    return "unknown" if num_bytes is None else f"{num_bytes / GIB:.1f} GiB"


def _gpu(gpu: Gpu) -> str:
    parts = [gpu.name]
    if gpu.memory_total is not None:
        parts.append(f"{_gib(gpu.memory_free)} free of {_gib(gpu.memory_total)}")
    if gpu.capability is not None:
        parts.append(f"capability {gpu.capability}")
    return ", ".join(parts)


def _kernel(kernel: Status) -> str:
    if not kernel.in_use:
        return f"none, experts run on PyTorch's products: {kernel.reason}"
    threads = f"{kernel.threads} thread{'s' * (kernel.threads != 1)}"
    return f"C for {kernel.isa}, {threads} ({kernel.reason})"


def _works(formats: Iterable[tuple[str, bool]]) -> str:
    return ", ".join(f"{name} {'works' if works else 'does not work'}" for name, works in formats)


def _compile(report: Report) -> str:
    if report.compile_works is not None:
        return "works" if report.compile_works else "fails on a small function"
    return f"not tried; {'C++ compiler ' + report.cpp_compiler if report.cpp_compiler else 'no C++ compiler found'}"
