"""The account of a conversion, for people and for ``--json``."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from moesaic.convert.coverage import Coverage, size_in_words
from moesaic.convert.target import Target


@dataclass(frozen=True)
class Report:
    """What was converted.

    Attributes:
        to, family: what was written; ``family`` of a Hugging Face folder.
        coverage: what was used of the source.
        files, tensors, parameters, bytes: of the model, in what was written.
        companions: tokenizer files and the like that were copied.
        resumed: files that an earlier process had finished.
        gguf: the report of the GGUF export.
    """

    source: Path
    target: Path
    to: Target
    family: str | None
    coverage: Coverage
    files: int
    tensors: int
    parameters: int
    bytes: int
    companions: tuple[str, ...] = ()
    resumed: int = 0
    notes: tuple[str, ...] = ()
    gguf: dict[str, Any] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """For JSON."""
        plain = asdict(self) | {"source": str(self.source), "target": str(self.target)}
        return plain | {"coverage": self.coverage.record()}

    def lines(self) -> list[str]:
        """For people."""
        kind = {"hf": f"Hugging Face folder ({self.family})", "moesaic": "moesaic folder", "gguf": "GGUF file"}[self.to]
        text = [
            f"{self.target}: {kind}, {self.tensors:,} tensors, {self.parameters:,} parameters, {size_in_words(self.bytes)}"
            f" in {self.files} file{'s' * (self.files != 1)}"
        ]
        if self.companions:
            text.append(f"copied byte for byte: {', '.join(self.companions)}")
        if self.resumed:
            text.append(f"{self.resumed} of the files were finished by an earlier start")
        return [*text, *self.notes]
