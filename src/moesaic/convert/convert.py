"""A checkpoint from one form to another, tensor by tensor: Hugging Face folder, moesaic folder, GGUF file.

>>> report = convert(Path("mixtral"), Path("mixtral-moesaic"))
>>> report = convert(Path("mixtral-moesaic"), Path("again"), to="hf", dtype="bf16")
>>> print("\\n".join(report.lines()))

In memory are one of our tensors (all experts of a layer are one) and one piece of it. What does not fit is refused before
anything is written; a conversion that was killed goes on where it stopped, and its result is the same to the last bit.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from moesaic.checkpoint.aside import STEM
from moesaic.checkpoint.native import config_record
from moesaic.checkpoint.shards import MAX_SHARD_BYTES
from moesaic.checkpoint.stream import Shard, ShardWriter, Slot, index_of, plan_shards
from moesaic.checkpoint.untrusted import show
from moesaic.config import to_dict
from moesaic.convert.coverage import size_in_words
from moesaic.convert.family import Layout
from moesaic.convert.finished import holds, looks_the_same, refused, stands
from moesaic.convert.gguf.number_types import Kind
from moesaic.convert.gguf.plan import FilePlan
from moesaic.convert.pieces import Entry, Piece, extract
from moesaic.convert.places import check_table
from moesaic.convert.report import Report
from moesaic.convert.source import Source, aside_tensors, open_source
from moesaic.convert.target import Target, kind_of_target
from moesaic.convert.to_gguf import check_gguf, plan_gguf, write_gguf
from moesaic.convert.work import forget, work_for
from moesaic.convert.write import plan_export, slots, write_companions
from moesaic.errors import CheckpointError, ConfigError, MoesaicError, one_of

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_STRIP = 2**24
_VERSION = 1  # part of what decides whether a conversion can be gone on with


@dataclass(frozen=True)
class Plan:
    """A conversion that will succeed if the disk lets it; nothing is written yet.

    Attributes:
        table, dtypes: which of their tensors are made of ours, of which dtype.
        shards, aside: the files of the model, and of what is kept beside it.
        files: the small files, name -> content.
        notes: sentences for the report.
        gguf: the file, where one is written; then there are no others.
    """

    source: Source
    target: Path
    to: Target
    family: str | None
    table: list[Entry]
    dtypes: dict[str, torch.dtype]
    shards: list[Shard]
    aside: list[Shard]
    files: dict[str, bytes]
    notes: tuple[str, ...] = ()
    gguf: FilePlan | None = None

    def digest(self) -> str:
        """Of all that determines the result."""
        facts = [
            _VERSION,
            self.to,
            self.source.fingerprint(),
            [[s.file, hashlib.sha256(s.header).hexdigest()] for s in (*self.shards, *self.aside)],
            {name: hashlib.sha256(content).hexdigest() for name, content in self.files.items()},
            [[e.ours, [p.theirs for p in e.pieces]] for e in self.table],
        ]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def report(self, resumed: int = 0) -> Report:
        """What is, or would be, written."""
        places = [slot for shard in self.shards for slot, _ in shard.places.values()]
        return Report(
            source=self.source.folder,
            target=self.target,
            to=self.to,
            family=self.family,
            coverage=self.source.coverage,
            files=len(self.shards),
            tensors=len(places),
            parameters=sum(slot.numel for slot in places),
            bytes=sum(slot.nbytes for slot in places),
            companions=tuple(self.source.companions),
            resumed=resumed,
            notes=self.notes,
        )


def plan_conversion(
    source: Path | Source,
    target: Path,
    to: Target | None = None,
    dtype: str | None = None,
    family: str | None = None,
    layout: Layout | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    verify: bool = True,
    gguf_type: Kind | None = None,
) -> Plan:
    """Open ``source`` unless it is open, check it, decide everything; see ``convert``."""
    to = kind_of_target(target, to, gguf_type)
    if dtype is not None:
        one_of("dtype", dtype, DTYPES)
    if max_shard_bytes < 1:
        raise ConfigError(f"max_shard_bytes must be positive, not {max_shard_bytes}.")
    _refuse_same(source.folder if isinstance(source, Source) else source, target)
    opened = source if isinstance(source, Source) else open_source(source, verify)
    to = to or ("moesaic" if opened.kind == "hf" else "hf")
    if to != "hf" and (family or layout):
        raise ConfigError(f"family and layout say how a Hugging Face folder is written; the target here is {to}.")
    if to == "gguf":
        if dtype is not None:
            raise ConfigError("dtype does not apply to a GGUF file; choose its number type (type) instead.")
        return Plan(opened, target, to, None, [], {}, [], [], {}, gguf=plan_gguf(opened, target, gguf_type or "f16"))
    dtypes = opened.dtypes(None if dtype is None else DTYPES[dtype])
    kept = [Slot(name, stored.dtype, stored.shape) for name, stored in opened.aside.items()]
    notes: tuple[str, ...] = ()
    if to == "moesaic":
        name = None
        table = [Entry(ours, (Piece(ours, shape),)) for ours, shape in opened.shapes.items()]
        record = config_record(to_dict(opened.config), opened.remembered)
        config = json.dumps(record, indent=1, allow_nan=False)
        inside: list[Slot] = []
        beside = plan_shards(kept, STEM, max_shard_bytes) if kept else []
    else:
        export = plan_export(opened.config, opened.remembered, family, layout)
        name, table = export.family.model_type, export.table
        check_table(table, opened.shapes)
        config = export.config_text(dtypes["embedding.weight"])
        back = (opened.remembered or {}).get("family") == name
        inside, beside = kept if back else [], []
        if kept and not back:
            notes = (f"{len(kept)} tensors that were kept aside have no place in a {name} folder and were left out.",)
    shards = plan_shards([*slots(table, dtypes), *inside], "model", max_shard_bytes)
    files = {"config.json": config.encode(), **opened.companions}
    for stem, group in (("model", shards), (STEM, beside)):
        if len(group) > 1:
            files[f"{stem}.safetensors.index.json"] = index_of(group).encode()
    if stands(target) and not looks_the_same(target, [*shards, *beside], files):
        raise refused(target)
    return Plan(opened, target, to, name, table, dtypes, shards, beside, files, notes)


def convert(
    source: Path,
    target: Path,
    to: Target | None = None,
    dtype: str | None = None,
    family: str | None = None,
    layout: Layout | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    resume: bool = True,
    verify: bool = True,
    progress: Callable[[int, int], None] = lambda done, total: None,
    say: Callable[[str], None] = lambda sentence: None,
    gguf_type: Kind | None = None,
) -> Report:
    """Write the checkpoint in ``source`` as ``target``: whole, or not at all under that name.

    Args:
        to: None means "gguf" if ``target`` ends in .gguf or ``gguf_type`` is given, else "moesaic" for a Hugging Face folder
            and "hf" for one of ours.
        dtype: "bf16", "fp16" or "fp32" for parameters; routers and their biases stay fp32. None keeps what is stored.
        family, layout: of a Hugging Face target; else those the model came from, or the first that can hold it.
        resume: go on where an earlier call with the same source and settings stopped.
        verify: hash the files of a moesaic source against its manifest first.
        progress: called with bytes done and bytes in all. ``say``: with sentences.
        gguf_type: number type of a GGUF file; None means "f16".

    Raises ``CheckpointError`` or ``ConfigError`` for a source that does not fit, naming what; ``MoesaicError`` where the disk
    refuses, ``target`` is not ours to replace, or another process writes it.
    """
    plan = plan_conversion(source, target, to, dtype, family, layout, max_shard_bytes, verify, gguf_type)
    return run_plan(plan, resume, progress, say)


def run_plan(
    plan: Plan,
    resume: bool = True,
    progress: Callable[[int, int], None] = lambda done, total: None,
    say: Callable[[str], None] = lambda sentence: None,
) -> Report:
    """Do what was planned; arguments as in ``convert``."""
    if plan.gguf is not None:
        return write_gguf(plan.source, plan.gguf, progress)
    shards = [*plan.shards, *plan.aside]
    total = sum(shard.data_bytes for shard in shards)
    if stands(plan.target):
        return _already(plan, lambda done: progress(done, total))
    with work_for(plan.target, plan.digest(), resume, say) as work:
        resumed = len(work.done)
        done = sum(shard.data_bytes for shard in shards if shard.file in work.done)
        _refuse_small_disk(work.out, sum(shard.nbytes for shard in shards if shard.file not in work.done), plan.target)
        write_companions(work.out, plan.files)
        progress(done, total)
        with ShardWriter(work.out, shards, work.done, work.finish) as writer:
            for name, tensor in _tensors(plan, writer.wants):
                writer.write(name, tensor)
                done += tensor.nbytes
                del tensor  # it may be all of ours, and the next is on its way
                progress(done, total)
    return plan.report(resumed)


def check_plan(plan: Plan, progress: Callable[[int, int], None] = lambda done, total: None) -> Report:
    """What ``run_plan`` would say, without writing. For GGUF and fp16 every number is read: not all types can hold all."""
    if plan.gguf is not None:
        return check_gguf(plan.source, plan.gguf, progress)
    if torch.float16 in plan.dtypes.values():
        done, total = 0, sum(shard.data_bytes for shard in [*plan.shards, *plan.aside])
        for _, tensor in _tensors(plan, lambda name: True):
            done += tensor.nbytes
            progress(done, total)
    return plan.report()


def _already(plan: Plan, progress: Callable[[int], None]) -> Report:
    """The report of a target that is this conversion's own result. Raises ``MoesaicError`` where it is anything else."""
    shards, done = [*plan.shards, *plan.aside], 0

    def compared(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        progress(done)

    if not looks_the_same(plan.target, shards, plan.files) or not holds(
        plan.target, shards, _tensors(plan, lambda name: True), compared
    ):
        raise refused(plan.target)
    forget(plan.target)
    found = plan.report(len(shards))
    words = "It was there already, whole and the same to the last bit; nothing was written."
    return replace(found, notes=(*found.notes, words))


def _tensors(plan: Plan, wants: Callable[[str], bool]) -> Iterator[tuple[str, Tensor]]:
    """Everything that is still missing, one at a time."""
    for entry in plan.table:
        wanted = [piece for piece in entry.pieces if wants(piece.theirs)]
        if not wanted:
            continue
        ours = plan.source.load(entry.ours, plan.dtypes[entry.ours])
        if ours.dtype == torch.float16:
            _refuse_overflow(plan.source, entry.ours, ours)
        for piece in wanted:
            yield piece.theirs, extract(ours, piece)
        del ours  # before the next is made
    yield from aside_tensors({name: s for name, s in plan.source.aside.items() if wants(name)})


def _refuse_overflow(source: Source, name: str, tensor: Tensor) -> None:
    # In strips, as looking at all of it makes another tensor; a NaN must not hide what lies beside it.
    strips = tensor.flatten().split(_STRIP) if source.held[name] != torch.float16 else ()
    if any(bool(strip.isinf().any()) for strip in strips):
        raise CheckpointError(
            f"{source.folder}: the tensor {show(name)} holds values beyond 65504, the largest of fp16; choose bf16 or fp32."
        )


def _refuse_small_disk(folder: Path, needed: int, target: Path) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise MoesaicError(
            f"Cannot write to {target}: it needs {size_in_words(needed)} and {size_in_words(free)} are free; free some "
            "space or choose another folder."
        )


def _refuse_same(source: Path, target: Path) -> None:
    here, there = Path(os.path.realpath(source)), Path(os.path.realpath(target))
    if there == here or there.is_relative_to(here) or here.is_relative_to(there):
        raise MoesaicError(f"The target {target} and the source {source} lie in each other; choose another folder.")
