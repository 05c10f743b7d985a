"""The count of what a GGUF file holds, for people and for ``--json``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moesaic.convert.gguf.number_types import Kind


@dataclass(frozen=True)
class Share:
    """What a file holds of one number type."""

    tensors: int = 0
    parameters: int = 0
    bytes: int = 0


@dataclass(frozen=True)
class GgufReport:
    """What was written.

    Attributes:
        architecture, families: llama.cpp's name for the graph, and what it is known as.
        sources, parameters: tensors of the model and numbers in them: all of them, else nothing would have been written.
        by_type: number type -> what the file holds of it.
        added: GGUF tensors that are no part of the model (a second copy of a tied head, rotary factors).
        fallbacks: GGUF tensors kept in F16 because their rows are no multiple of 32.
        vocabulary: "gpt2", "llama" or "none".
        notes: sentences on what is not quite the same there.
    """

    path: Path
    kind: Kind
    architecture: str
    families: str
    sources: int
    parameters: int
    file_bytes: int
    vocabulary: str
    by_type: dict[str, Share] = field(default_factory=dict)
    added: tuple[str, ...] = ()
    fallbacks: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def text(self) -> str:
        """Lines for people."""
        lines = [
            f'{self.path}: architecture "{self.architecture}" ({self.families}), {self.kind}, {self.file_bytes:,} bytes',
            f"  {self.sources} of {self.sources} tensors, {self.parameters:,} of {self.parameters:,} parameters; "
            f'vocabulary "{self.vocabulary}"',
        ]
        lines += [
            f"  {name:5} {share.tensors:5} tensors {share.parameters:15,} parameters {share.bytes:15,} bytes"
            for name, share in self.by_type.items()
        ]
        if self.added:
            lines.append(f"  not parameters of the model: {', '.join(self.added)}")
        if self.fallbacks:
            lines.append(f"  in F16, rows being no multiple of 32: {', '.join(self.fallbacks)}")
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        plain = {**vars(self), "path": str(self.path)}
        return plain | {"by_type": {name: vars(share) for name, share in self.by_type.items()}}
