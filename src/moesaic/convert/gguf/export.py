"""A model as one GGUF file for llama.cpp, from memory or streamed from a model folder, and a count of what was written.

>>> report = export_gguf(model, "model.gguf", kind="q8_0", tokenizer_folder="my-model")
>>> print(report.text())

The file appears whole or not at all. Of a model in a folder, one tensor is in memory at a time.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from moesaic.checkpoint.atomic import sweep
from moesaic.checkpoint.native import open_model
from moesaic.checkpoint.shards import memory_of, read_tensor
from moesaic.convert.gguf.architectures import architecture_of
from moesaic.convert.gguf.metadata import metadata_of, rope_factors
from moesaic.convert.gguf.number_types import FILE_TYPES, KINDS, Kind, bytes_of, encode, type_of
from moesaic.convert.gguf.report import GgufReport, Share
from moesaic.convert.gguf.tensors import Target, plan_of
from moesaic.convert.gguf.tokens import vocabulary_of
from moesaic.errors import CheckpointError, MoesaicError, disk_errors, one_of
from moesaic.models.build import build_model
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


@dataclass(frozen=True)
class _Entry:
    """One GGUF tensor, where it stands in the file."""

    target: Target
    shape: tuple[int, ...]
    type: str
    bytes: int
    reduced: bool


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
    one_of("kind", kind, KINDS)
    gguf = _package()
    arch = architecture_of(config)
    notes: list[str] = []
    values = metadata_of(config, arch, notes)
    words = vocabulary_of(tokenizer_folder, config.vocab_size, pre_tokenizer, notes)
    empty = build_model(config, seed=0, device="meta").state_dict()
    plan = plan_of(shapes, {name: tuple(tensor.shape) for name, tensor in empty.items()}, config, arch)
    entries = {name: [_entry(target, empty[name], config, kind) for target in plan[name]] for name in plan}
    factors = rope_factors(config, arch)
    extra = [] if factors is None else [_entry(Target("rope_freqs.weight", _same, exact=True), factors, config, kind)]
    listed = [entry for row in entries.values() for entry in row] + extra
    # A tied head may have to be a tensor of its own there: the embedding's numbers a second time.
    second = {"output.weight"} if config.tie_embeddings else set()
    added = second & {entry.target.name for entry in listed} | {entry.target.name for entry in extra}
    parameters = sum(_numel(shapes[name]) for name in plan)
    if parameters != (made := sum(_numel(entry.shape) for entry in listed if entry.target.name not in added)):
        raise RuntimeError(f"{made} numbers would be written of {parameters}")

    with disk_errors(path), _whole_file(path) as partial:
        writer = gguf.GGUFWriter(partial, arch.name)
        try:
            _describe(writer, gguf, path.stem, kind, {f"{arch.name}.{key}": v for key, v in values.items()} | words)
            for entry in listed:
                writer.add_tensor_info(
                    entry.target.name, entry.shape, "float32", entry.bytes, gguf.GGMLQuantizationType[entry.type]
                )
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            (file,) = writer.fout
            writer.write_padding(file, file.tell())
            for name, row in entries.items():
                tensor = read(name)
                for entry in row:
                    _write(file, writer, gguf, entry, entry.target.take(tensor, config))
                del tensor  # before the next is read
            for entry in extra:
                assert factors is not None
                _write(file, writer, gguf, entry, factors)
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
        finally:
            writer.close()
    return GgufReport(
        path=path,
        kind=kind,
        architecture=arch.name,
        families=arch.families,
        sources=len(plan),
        parameters=parameters,
        file_bytes=size,
        vocabulary=str(words["tokenizer.ggml.model"]),
        by_type=_by_type(listed),
        added=tuple(sorted(added)),
        fallbacks=tuple(entry.target.name for entry in listed if entry.reduced),
        notes=tuple(notes),
    )


def _same(tensor: Tensor, config: ModelConfig) -> Tensor:
    return tensor


def _entry(target: Target, source: Tensor, config: ModelConfig, kind: Kind) -> _Entry:
    shape = tuple(target.take(source, config).shape)
    type_, reduced = type_of(target.name, shape, kind, target.exact)
    return _Entry(target, shape, type_, bytes_of(shape, type_), reduced)


def _describe(writer: Any, gguf: Any, name: str, kind: Kind, values: Mapping[str, Any]) -> None:
    """All keys; a value's GGUF type follows from its Python type (in lists: int32, float32, bool, string)."""
    general = {"general.type": "model", "general.name": name, "general.file_type": FILE_TYPES[kind]}
    if kind in ("q8_0", "q4_0", "mxfp4"):
        general["general.quantization_version"] = gguf.GGML_QUANT_VERSION
    kinds = gguf.GGUFValueType
    types = {bool: kinds.BOOL, int: kinds.UINT32, float: kinds.FLOAT32, str: kinds.STRING, list: kinds.ARRAY}
    for key, value in (general | dict(values)).items():
        writer.add_key_value(key, value, types[type(value)])


def _write(file: Any, writer: Any, gguf: Any, entry: _Entry, tensor: Tensor) -> None:
    """One tensor's bytes and the padding to the next. The writer's own way needs a whole array, and loses the disk's reason."""
    start = file.tell()
    for piece in encode(tensor, entry.type, entry.target.name, gguf):
        file.write(piece)
    written = file.tell() - start
    if written != entry.bytes:
        raise RuntimeError(f"{entry.target.name}: {written} bytes written, {entry.bytes} promised")
    writer.write_padding(file, written)


def _by_type(listed: list[_Entry]) -> dict[str, Share]:
    shares: dict[str, Share] = {}
    for entry in listed:
        old = shares.get(entry.type, Share())
        shares[entry.type] = Share(old.tensors + 1, old.parameters + _numel(entry.shape), old.bytes + entry.bytes)
    return shares


def _numel(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _package() -> Any:
    try:
        import gguf
    except ImportError:
        raise MoesaicError(
            'Writing GGUF needs the package "gguf", which is not installed; run: pip install "gguf>=0.17"'
        ) from None
    return gguf


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
