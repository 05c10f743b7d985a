"""A GGUF file decided to the last byte before any of it is written: its header, its tensors in order, and the report on it."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from torch import Tensor

from moesaic.convert.gguf.architectures import architecture_of
from moesaic.convert.gguf.metadata import metadata_of, rope_factors
from moesaic.convert.gguf.number_types import FILE_TYPES, KINDS, Kind, bytes_of, type_of
from moesaic.convert.gguf.report import GgufReport, Share
from moesaic.convert.gguf.tensors import Target, plan_of
from moesaic.convert.gguf.tokens import vocabulary_of
from moesaic.errors import MoesaicError, one_of
from moesaic.models.build import build_model
from moesaic.models.config import ModelConfig

_ALIGNMENT = 32  # of every tensor's data, GGUF's default


@dataclass(frozen=True)
class Entry:
    """One GGUF tensor. ``reduced``: F16 only because its rows are no whole number of blocks."""

    target: Target
    shape: tuple[int, ...]
    type: str
    bytes: int
    reduced: bool


@dataclass(frozen=True)
class FilePlan:
    """A file that will be whole if every number fits its type and the disk lets it.

    Attributes:
        header: all that comes before the tensors' data.
        entries: our name -> the GGUF tensors made of it, in the order of the file.
        extra: GGUF tensors after those that are made of none of ours.
        report: what will have been written.
        gguf: the optional package.
    """

    config: ModelConfig
    header: bytes
    entries: dict[str, list[Entry]]
    extra: list[tuple[Entry, Tensor]]
    report: GgufReport
    gguf: Any


def plan_file(
    config: ModelConfig,
    shapes: Mapping[str, tuple[int, ...]],
    path: Path,
    kind: Kind,
    tokenizer_folder: str | os.PathLike[str] | None = None,
    pre_tokenizer: str | None = None,
) -> FilePlan:
    """Everything but the numbers; arguments as in ``export_tensors``. Raises what that raises."""
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
    extra: list[tuple[Entry, Tensor]] = []
    if factors is not None:
        extra.append((_entry(Target("rope_freqs.weight", _same, exact=True), factors, config, kind), factors))
    listed = [entry for row in entries.values() for entry in row] + [entry for entry, _ in extra]
    # A tied head may have to be a tensor of its own there: the embedding's numbers a second time.
    second = {"output.weight"} if config.tie_embeddings else set()
    added = second & {entry.target.name for entry in listed} | {entry.target.name for entry, _ in extra}
    parameters = sum(prod(shapes[name]) for name in plan)
    if parameters != (made := sum(prod(entry.shape) for entry in listed if entry.target.name not in added)):
        raise RuntimeError(f"{made} numbers would be written of {parameters}")
    keys = _general(path.stem, kind, gguf) | {f"{arch.name}.{key}": value for key, value in values.items()} | words
    header = _header(gguf, arch.name, keys, listed)
    report = GgufReport(
        path=path,
        kind=kind,
        architecture=arch.name,
        families=arch.families,
        sources=len(plan),
        parameters=parameters,
        file_bytes=len(header) + sum(entry.bytes + padding(entry.bytes) for entry in listed),
        vocabulary=str(words["tokenizer.ggml.model"]),
        by_type=_by_type(listed),
        added=tuple(sorted(added)),
        fallbacks=tuple(entry.target.name for entry in listed if entry.reduced),
        notes=tuple(notes),
    )
    return FilePlan(config, header, entries, extra, report, gguf)


def padding(written: int) -> int:
    """Bytes up to where the next tensor may begin."""
    return -written % _ALIGNMENT


def _same(tensor: Tensor, config: ModelConfig) -> Tensor:
    return tensor


def _entry(target: Target, source: Tensor, config: ModelConfig, kind: Kind) -> Entry:
    shape = tuple(target.take(source, config).shape)
    type_, reduced = type_of(target.name, shape, kind, target.exact)
    return Entry(target, shape, type_, bytes_of(shape, type_), reduced)


def _general(name: str, kind: Kind, gguf: Any) -> dict[str, Any]:
    general = {"general.type": "model", "general.name": name, "general.file_type": FILE_TYPES[kind]}
    if kind in ("q8_0", "q4_0", "mxfp4"):
        general["general.quantization_version"] = gguf.GGML_QUANT_VERSION
    return general


def _header(gguf: Any, arch: str, keys: Mapping[str, Any], listed: list[Entry]) -> bytes:
    """Keys and the list of tensors. A value's GGUF type follows from its Python type (in lists: int32, float32, bool, string).

    Only this is left to the package: it wants whole arrays to write, and loses the disk's reason.
    """
    writer = gguf.GGUFWriter(None, arch)
    kinds = gguf.GGUFValueType
    types = {bool: kinds.BOOL, int: kinds.UINT32, float: kinds.FLOAT32, str: kinds.STRING, list: kinds.ARRAY}
    for key, value in keys.items():
        writer.add_key_value(key, value, types[type(value)])
    for entry in listed:
        writer.add_tensor_info(
            entry.target.name, entry.shape, "float32", entry.bytes, gguf.GGMLQuantizationType[entry.type]
        )
    made = io.BytesIO()
    writer.fout, writer.state = [made], gguf.gguf_writer.WriterState.EMPTY  # as after opening a file
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    header = made.getvalue()
    return header + bytes(padding(len(header)))


def _by_type(listed: list[Entry]) -> dict[str, Share]:
    shares: dict[str, Share] = {}
    for entry in listed:
        old = shares.get(entry.type, Share())
        shares[entry.type] = Share(old.tensors + 1, old.parameters + prod(entry.shape), old.bytes + entry.bytes)
    return shares


def _package() -> Any:
    try:
        import gguf
    except ImportError:
        raise MoesaicError(
            'Writing GGUF needs the package "gguf", which is not installed; run: pip install "gguf>=0.17"'
        ) from None
    return gguf
