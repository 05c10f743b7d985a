"""A model as one GGUF file for llama.cpp, from memory or streamed from a model folder, and a count of what was written.

>>> report = export_gguf(model, "model.gguf", kind="q8_0", tokenizer_folder="my-model")
>>> print(report.text())

The file appears whole or not at all. Of a model in a folder, one tensor is in memory at a time.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from torch import Tensor

from moesaic.checkpoint.atomic import sweep
from moesaic.checkpoint.native import open_model
from moesaic.checkpoint.shards import memory_of, read_tensor
from moesaic.convert.gguf.number_types import Kind, check_numbers, encode
from moesaic.convert.gguf.plan import Entry, FilePlan, padding, plan_file
from moesaic.convert.gguf.report import GgufReport
from moesaic.errors import CheckpointError, disk_errors
from moesaic.models.config import ModelConfig
from moesaic.models.decoder import Decoder


def export_gguf(
    model: Decoder,
    path: str | os.PathLike[str],
    *,
    kind: Kind = "f16",
    tokenizer_folder: str | os.PathLike[str] | None = None,
    pre_tokenizer: str | None = None,
) -> GgufReport:
    """Write ``model`` to ``path``.

    Args:
        kind: number type of matrices. Norms, biases, routers and vectors are F32 in all of them.
        tokenizer_folder: a folder with ``tokenizer.json`` and, where there are, ``tokenizer_config.json`` and
            ``chat_template.jinja``; None writes no vocabulary.
        pre_tokenizer: llama.cpp's name of the rule that cuts text into words, where ours is not recognised.

    Raises ``ConfigError`` for a model llama.cpp has no graph for, ``MoesaicError`` for the rest; then nothing is written.
    """
    state = model.state_dict()
    if model.config.tie_embeddings and memory_of(state["head.weight"]) != memory_of(state["embedding.weight"]):
        raise CheckpointError(
            "The model's head is not its embedding although model.tie_embeddings says so, and one of them would be lost; set "
            "head.weight = embedding.weight, or build it with tie_embeddings=False."
        )
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    return export_tensors(
        model.config, shapes, lambda name: state[name], Path(path), kind, tokenizer_folder, pre_tokenizer
    )


def export_gguf_folder(
    folder: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    kind: Kind = "f16",
    tokenizer_folder: str | os.PathLike[str] | None = None,
    pre_tokenizer: str | None = None,
    verify: bool = True,
) -> GgufReport:
    """Write the moesaic model in ``folder`` to ``path``, reading one tensor at a time; ``verify`` hashes its files first.

    The tokenizer is that of ``folder`` unless told otherwise. Else as ``export_gguf``.
    """
    opened = open_model(folder, verify)
    stored = {names[0]: name for name, names in opened.groups.items()}  # a tied matrix goes by its first name
    if tokenizer_folder is None and (opened.folder / "tokenizer.json").is_file():
        tokenizer_folder = opened.folder
    return export_tensors(
        opened.model.config,
        {name: opened.infos[there].shape for name, there in stored.items()},
        lambda name: read_tensor(opened.infos[stored[name]]),
        Path(path),
        kind,
        tokenizer_folder,
        pre_tokenizer,
    )


def export_tensors(
    config: ModelConfig,
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], Tensor],
    path: Path,
    kind: Kind,
    tokenizer_folder: str | os.PathLike[str] | None = None,
    pre_tokenizer: str | None = None,
) -> GgufReport:
    """The same from any source: ``shapes`` of the model's tensors by our names, and ``read``, called once for each.

    A tied head may be left out of ``shapes``; every other tensor of ``config`` must be there and no more.
    """
    return write_file(plan_file(config, shapes, path, kind, tokenizer_folder, pre_tokenizer), read)


def write_file(
    plan: FilePlan, read: Callable[[str], Tensor], progress: Callable[[int, int], None] = lambda done, total: None
) -> GgufReport:
    """Do what was planned; ``progress`` is called with bytes done and bytes in all."""
    report = plan.report
    with disk_errors(report.path), _whole_file(report.path) as partial, open(partial, "wb") as file:

        def write(entry: Entry, tensor: Tensor) -> None:
            start = file.tell()
            for piece in encode(tensor, entry.type, entry.target.name, plan.gguf):
                file.write(piece)
            if (written := file.tell() - start) != entry.bytes:
                raise RuntimeError(f"{entry.target.name}: {written} bytes written, {entry.bytes} promised")
            file.write(bytes(padding(entry.bytes)))
            progress(file.tell(), report.file_bytes)

        file.write(plan.header)
        _each(plan, read, write)
        file.flush()
        os.fsync(file.fileno())
        if (size := file.tell()) != report.file_bytes:
            raise RuntimeError(f"{report.path}: {size} bytes written, {report.file_bytes} promised")
    return report


def check_file(
    plan: FilePlan, read: Callable[[str], Tensor], progress: Callable[[int, int], None] = lambda done, total: None
) -> GgufReport:
    """Every check of ``write_file`` that does not need the disk: each number is read, nothing is written."""
    done = len(plan.header)

    def check(entry: Entry, tensor: Tensor) -> None:
        nonlocal done
        check_numbers(tensor, entry.type, entry.target.name)
        done += entry.bytes + padding(entry.bytes)
        progress(done, plan.report.file_bytes)

    _each(plan, read, check)
    return plan.report


def _each(plan: FilePlan, read: Callable[[str], Tensor], use: Callable[[Entry, Tensor], None]) -> None:
    """What every GGUF tensor is made of, in the order of the file; one of ours is in memory at a time."""
    for name, row in plan.entries.items():
        tensor = read(name)
        for entry in row:
            use(entry, entry.target.take(tensor, plan.config))
        del tensor  # before the next is read
    for entry, tensor in plan.extra:
        use(entry, tensor)


@contextmanager
def _whole_file(path: Path) -> Iterator[Path]:
    """A hidden sibling to fill (a name ``atomic.sweep`` knows); it becomes ``path`` if all goes well and vanishes if not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path.parent, path.name)
    partial = path.parent / f".{path.name}.writing-{os.getpid()}"
    try:
        yield partial
        os.replace(partial, path)
    finally:
        with suppress(OSError):
            partial.unlink()
