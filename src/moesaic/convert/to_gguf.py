"""The GGUF side of ``convert``: either kind of source, streamed into one file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from moesaic.convert.gguf.export import check_file, write_file
from moesaic.convert.gguf.number_types import Kind
from moesaic.convert.gguf.plan import FilePlan, plan_file
from moesaic.convert.report import Report
from moesaic.convert.source import Source

Progress = Callable[[int, int], None]


def plan_gguf(source: Source, target: Path, kind: Kind) -> FilePlan:
    """Everything about the file but its numbers; ``kind``: their type."""
    words = source.folder if "tokenizer.json" in source.companions else None
    return plan_file(source.config, source.shapes, target, kind, words)


def write_gguf(source: Source, plan: FilePlan, progress: Progress) -> Report:
    """Write the file, one tensor in memory."""
    write_file(plan, _reader(source), progress)
    return _report(source, plan)


def check_gguf(source: Source, plan: FilePlan, progress: Progress) -> Report:
    """The same without a file: every number is read, and the report is the one that writing would give."""
    check_file(plan, _reader(source), progress)
    return _report(source, plan)


def _reader(source: Source) -> Callable[[str], Tensor]:
    return lambda name: source.load(name, source.held[name])


def _report(source: Source, plan: FilePlan) -> Report:
    made = plan.report
    notes = made.text().splitlines()[1:]
    if source.aside:
        notes.append(
            f"  {len(source.aside)} tensors that were kept aside have no place in a GGUF file and were left out."
        )
    return Report(
        source=source.folder,
        target=made.path,
        to="gguf",
        family=made.architecture,
        coverage=source.coverage,
        files=1,
        tensors=sum(share.tensors for share in made.by_type.values()) - len(made.added),
        parameters=made.parameters,
        bytes=made.file_bytes,
        notes=tuple(notes),
        gguf=made.to_dict(),
    )
