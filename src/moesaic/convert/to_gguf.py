"""The GGUF side of ``convert``: either kind of source, streamed into one file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moesaic.convert.convert import Report
from moesaic.convert.gguf.export import export_tensors
from moesaic.convert.gguf.number_types import KINDS
from moesaic.convert.source import Source
from moesaic.errors import one_of


def write_gguf(source: Source, target: Path, kind: str) -> Report:
    """Write ``source`` as the GGUF file ``target``, one tensor in memory; ``kind``: its number type."""
    one_of("type", kind, KINDS)
    words = source.folder if "tokenizer.json" in source.companions else None
    arguments: tuple[Any, ...] = (target, kind, words, None)
    made = export_tensors(source.config, source.shapes, lambda name: source.load(name, source.held[name]), *arguments)
    return Report(
        source=source.folder,
        target=target,
        to="gguf",
        family=made.architecture,
        coverage=source.coverage,
        files=1,
        tensors=made.sources,
        parameters=made.parameters,
        bytes=made.file_bytes,
        notes=tuple(made.text().splitlines()[1:]),
        gguf=made.to_dict(),
    )
