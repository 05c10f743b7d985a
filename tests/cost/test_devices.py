"""The doctor: facts parsed from known texts, advice for known troubles, numbers a fake clock can check, no crash bare."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from moesaic.cost import devices, machine
from moesaic.cost.devices import GIB, OPTIONAL, Report, Speed, advice, doctor, format_doctor
from moesaic.cost.machine import Gpu, compile_works, grouped_mm_works, memory, parse_cpuinfo, usable_cores
from moesaic.cost.speed import best_rate, matmul_gflops, read_gb_per_s
from moesaic.ops.kernel import Status, build

X86 = "\n\n".join(
    f"processor\t: {n}\nmodel name\t: Example CPU\nphysical id\t: {n // 4}\n"
    f"core id\t\t: {n % 2}\nflags\t\t: fpu avx2 avx512f amx_bf16"
    for n in range(8)
)
ARM = "processor\t: 0\nBogoMIPS\t: 50.00\nFeatures\t: fp asimd sve i8mm bf16\n\nprocessor\t: 1\nFeatures\t: fp asimd\n"


@pytest.fixture(scope="module")
def report() -> Report:
    return doctor()


def healthy_fields(report: Report) -> dict[str, Any]:
    """The real report's fields with every source of advice at rest."""
    fields = {f.name: getattr(report, f.name) for f in dataclasses.fields(report)}
    return fields | {
        "cpu": dataclasses.replace(report.cpu, physical_cores=4, usable_cores=4, torch_threads=4),
        "memory_free": 8 * GIB,
        "disk_free": {"current folder": 100 * GIB},
        "gpus": (Gpu("Example GPU", 80 * GIB, 60 * GIB, "9.0"),),
        "distributed": {"gloo": True},
        "kernel": Status(True, "avx2", 4, "compiled with cc for avx2"),
        "grouped_mm": {"fp32": True, "bf16": True},
        "cpp_compiler": "g++",
        "compile_works": None,
        "speed": Speed(100.0, 300.0, 20.0),
        "advice": (),
    }


def test_report_of_this_machine_is_json_and_true(report: Report) -> None:
    data = json.loads(json.dumps(report.to_dict()))
    assert data["torch"] == torch.__version__
    assert data["cpu"]["logical_cores"] == os.cpu_count()
    assert data["cpu"]["torch_threads"] == torch.get_num_threads()
    assert 1 <= data["cpu"]["usable_cores"] <= os.cpu_count()
    assert data["disk_free"]["current folder"] == pytest.approx(shutil.disk_usage(".").free, rel=0.2)
    assert {p["name"] for p in data["packages"]} == set(OPTIONAL)
    assert next(p["version"] for p in data["packages"] if p["name"] == "tensorboard")
    if sys.platform == "linux":
        assert 0 < data["memory_free"] <= data["memory_total"]


def test_every_fact_is_printed(report: Report) -> None:
    text = format_doctor(report)
    for word in (report.python, report.torch, "GFLOP/s", "GB/s", "gloo", "fp32 works", *OPTIONAL):
        assert word in text
    troubled = dataclasses.replace(report, gpus=(Gpu("Example", 2 * GIB, GIB, "9.0"),), advice=("Do this.",))
    assert "Example, 1.0 GiB free of 2.0 GiB, capability 9.0" in format_doctor(troubled)
    assert format_doctor(troubled).endswith("! Do this.")


def test_nothing_breaks_where_the_platform_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "read_text", lambda path: "")
    monkeypatch.setattr(machine.os, "cpu_count", lambda: None)
    monkeypatch.delattr(machine.os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(machine.sys, "platform", "darwin")  # and no sysctl to ask
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    monkeypatch.setattr(machine.torch.distributed, "is_available", lambda: False)
    # Asked as it is, it would remember for the rest of this process that there is no compiler.
    monkeypatch.setattr(devices, "kernel_status", lambda: Status(False, None, None, "no C compiler was found"))
    bare = doctor(measure=False)
    assert (bare.memory_total, bare.memory_free, bare.cpu.physical_cores, bare.cpp_compiler) == (None, None, None, None)
    assert bare.speed is None
    assert "unknown free of unknown" in format_doctor(bare)
    assert any("one process" in sentence for sentence in bare.advice)


def test_cpuinfo_of_x86_and_arm() -> None:
    assert parse_cpuinfo(X86) == ("Example CPU", 4, {"fpu", "avx2", "avx512f", "amx_bf16"})  # 2 sockets of 2 cores
    assert parse_cpuinfo(ARM) == (None, None, {"fp", "asimd", "sve", "i8mm", "bf16"})
    assert parse_cpuinfo("") == (None, None, frozenset())


def test_instruction_sets_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "read_text", lambda path: X86)
    assert machine.cpu().instruction_sets == ("avx2", "avx512f", "amx_bf16")
    monkeypatch.setattr(machine, "read_text", lambda path: ARM)
    assert machine.cpu().instruction_sets == ("neon", "sve", "arm_bf16", "arm_i8mm")


@pytest.mark.parametrize(
    ("limit", "used", "expected"),
    [
        ("max", "5", (8 * 1024 * 1024, 6 * 1024 * 1024)),
        ("4194304", "1048576", (4194304, 3145728)),
        ("4194304", "5000000", (4194304, 0)),
        ("99999999999", "5", (8 * 1024 * 1024, 6 * 1024 * 1024)),
    ],
)
def test_memory_respects_the_container(tmp_path: Path, limit: str, used: str, expected: tuple[int, int]) -> None:
    (tmp_path / "meminfo").write_text(
        "MemTotal:  8192 kB\nMemFree: 100 kB\nMemAvailable:   6144 kB\nHugePages_Total: 0\n"
    )
    (tmp_path / "memory.max").write_text(limit + "\n")
    (tmp_path / "memory.current").write_text(used + "\n")
    assert memory(str(tmp_path / "meminfo"), str(tmp_path)) == expected


def test_cores_respect_the_container(tmp_path: Path) -> None:
    everything = usable_cores(str(tmp_path))
    for text, cores in (("max 100000", everything), ("50000 100000", 1), ("99900000 100000", everything)):
        (tmp_path / "cpu.max").write_text(text + "\n")
        assert usable_cores(str(tmp_path)) == cores


def test_best_rate_is_amount_over_the_fastest_call() -> None:
    now, durations = [0.0], iter([9.0, 4.0, 2.0, 5.0, 99.0])

    def run() -> None:
        now[0] += next(durations)

    # The first call (9 s) warms up; 4 + 2 + 5 seconds fill a budget of 10.
    assert best_rate(run, 100.0, 10.0, lambda: now[0]) == 50.0
    assert best_rate(lambda: None, 1.0, 0.0, lambda: 0.0) == pytest.approx(1e9)  # a clock that stands still


def test_matmul_counts_two_n_cubed(monkeypatch: pytest.MonkeyPatch) -> None:
    amounts = []

    def one_millisecond(run: Any, amount: float, budget_s: float) -> float:
        run()
        amounts.append(amount)
        return amount / 1e-3

    monkeypatch.setattr("moesaic.cost.speed.best_rate", one_millisecond)
    assert matmul_gflops(torch.float32) == pytest.approx(2 * 1024**3 / 1e-3 / 1e9)  # short products: the largest size
    assert amounts[-1] == 2 * 1024**3
    monkeypatch.setattr("moesaic.cost.speed.best_rate", lambda run, amount, budget_s: amount / 1.0)
    assert matmul_gflops(torch.float32) == pytest.approx(2 * 128**3 / 1e9)  # a second each: stays at the smallest


def test_read_counts_four_bytes_an_element(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moesaic.cost.speed.best_rate", lambda run, amount, budget_s: amount / 1e-3)
    assert read_gb_per_s(4_000_000) == pytest.approx(4.0)


def test_grouped_product_is_really_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    if not hasattr(torch.nn.functional, "grouped_mm"):
        assert not grouped_mm_works(torch.float32)
        return
    honest = torch.nn.functional.grouped_mm
    assert grouped_mm_works(torch.float32)
    monkeypatch.setattr(torch.nn.functional, "grouped_mm", lambda *a, **k: honest(*a, **k) * 1.01)
    assert not grouped_mm_works(torch.float32)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("not on this device")

    monkeypatch.setattr(torch.nn.functional, "grouped_mm", refuse)
    assert not grouped_mm_works(torch.float32)
    monkeypatch.delattr(torch.nn.functional, "grouped_mm")
    assert not grouped_mm_works(torch.float32)


def test_a_healthy_machine_gets_no_advice(report: Report) -> None:
    well = Report(**healthy_fields(report))
    assert advice(well) == []
    assert format_doctor(well).endswith("Nothing to mend.")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"torch_threads": 9}, r"9 threads on 4 usable cores.*OMP_NUM_THREADS=4"),
        ({"torch_threads": 1}, r"1 of 4 cores"),
        ({"disk_free": {"current folder": GIB}}, r"Only 1\.0 GiB of disk.*current folder"),
        ({"memory_free": GIB}, r"Only 1\.0 GiB of memory"),
        ({"grouped_mm": {"fp32": True, "bf16": False}}, r"does not work here in bf16"),
        (
            {"kernel": Status(False, None, None, "no C compiler was found")},
            r"kernel.*slower.*: no C compiler was found\.$",
        ),
        ({"cpp_compiler": None}, r"No C\+\+ compiler"),
        ({"compile_works": False}, r"torch\.compile failed"),
        ({"distributed": {"gloo": False}}, r"one process"),
        ({"speed": Speed(100.0, 50.0, 20.0)}, r"bf16 products are slower"),
        ({"gpus": (), "torch_build": "CPU only"}, r"NVIDIA driver.*CUDA build"),
        ({"gpus": (), "torch_build": "CUDA 13.0"}, r"finds no GPU"),
    ],
)
def test_each_trouble_gets_one_sentence(
    report: Report, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], sentence: str
) -> None:
    monkeypatch.setattr(devices.shutil, "which", lambda name: f"bin/{name}")
    fields = healthy_fields(report)
    if "torch_threads" in changes:
        changes = {"cpu": dataclasses.replace(fields["cpu"], **changes)}
    said = advice(Report(**{**fields, **changes}))
    assert len(said) == 1
    assert re.search(sentence, said[0])


def row(report: Report, name: str) -> str:
    """What the doctor prints beside a name."""
    return next(line for line in format_doctor(report).splitlines() if line.startswith(name))


@pytest.mark.skipif(build.find_compiler() is None, reason="needs a C compiler")
def test_the_expert_kernel_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOESAIC_KERNEL", raising=False)
    found = doctor(measure=False)
    assert found.kernel.in_use
    assert found.kernel.isa in build.supported()
    assert re.fullmatch(
        rf"expert kernel +C for {found.kernel.isa}, \d+ threads? \(compiled with .*\)", row(found, "expert kernel")
    )
    assert json.loads(json.dumps(found.to_dict()))["kernel"]["isa"] == found.kernel.isa
    assert not any("kernel" in sentence for sentence in found.advice)


@pytest.mark.parametrize(
    ("value", "why"), [("off", "switched off by MOESAIC_KERNEL=off"), ("mmx", "MOESAIC_KERNEL is 'mmx'")]
)
def test_the_expert_kernel_not_in_use(monkeypatch: pytest.MonkeyPatch, value: str, why: str) -> None:
    monkeypatch.setenv("MOESAIC_KERNEL", value)
    build.forget()
    found = doctor(measure=False)
    build.forget()
    assert not found.kernel.in_use
    assert f"none, experts run on PyTorch's products: {why}" in row(found, "expert kernel")
    said = [sentence for sentence in found.advice if "kernel" in sentence]
    assert len(said) == 1
    assert why in said[0]
    assert said[0].endswith(".")
    assert not said[0].endswith("..")


@pytest.mark.slow
@pytest.mark.skipif(machine.cpp_compiler() is None, reason="needs a C++ compiler")
def test_deep_compiles(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    assert compile_works()
    monkeypatch.setenv("CXX", "/nowhere/c++")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "empty"))
    assert not compile_works()
