"""A model directory: ``config.json``, ``model.safetensors`` (or shards and index), ``tokenizer.json``, a manifest.

>>> save_model(model, "my-model", tokenizer)               # whole or not at all; an older "my-model" survives a failure
>>> model = load_model("my-model")                         # the saved bits; dtype=torch.bfloat16 converts on the way
>>> config = load_config("my-model")                       # no tensor is touched

Loading trusts nothing: every byte is checked against the manifest, every tensor must be expected, present and of the
right shape before the first one is used, and no format that can run code is opened.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

from moesaic.checkpoint.aside import open_aside, write_aside
from moesaic.checkpoint.atomic import MANIFEST, atomic_folder, settle, verify_folder
from moesaic.checkpoint.parts import refuse_sharded
from moesaic.checkpoint.shards import (
    MAX_SHARD_BYTES,
    TensorInfo,
    find_tensors,
    names_in_words,
    read_tensors,
    refuse_pickle,
    write_tensors,
)
from moesaic.checkpoint.untrusted import read_json, safe_member, show
from moesaic.config import from_dict, to_dict
from moesaic.errors import CheckpointError
from moesaic.models.build import build_model
from moesaic.models.config import ModelConfig
from moesaic.models.decoder import Decoder
from moesaic.ops.pages import prefer_huge

FORMAT = "moesaic"
VERSION = 1
MAX_LAYERS = 10_000
C = TypeVar("C")
# What ``integrations/hf_model.py`` registers; older folders of ours lack both.
_HUGGING_FACE = {"model_type": "moesaic", "architectures": ["MoesaicForCausalLM"]}
_RESERVED = ("config.json", "tokenizer.json", MANIFEST)


class Tokenizer(Protocol):
    """What saving needs of a tokenizer (``tokenizers.Tokenizer`` has it)."""

    def to_str(self) -> str:
        """The content of ``tokenizer.json``."""


def save_model(
    model: nn.Module,
    folder: str | os.PathLike[str],
    tokenizer: Tokenizer | None = None,
    extra_files: Mapping[str, bytes | dict[str, Any]] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Save ``model`` (with its ``model.config``) as the model directory ``folder``, replacing an older one of ours.

    Every tensor keeps its dtype; tied weights are written once. ``extra_files``: name -> bytes, or a dict for JSON.
    Raises ``MoesaicError`` (a sentence) where the disk refuses or ``folder`` holds files that are not ours.
    """
    with atomic_folder(folder) as partial:
        fill_model_folder(partial, model, tokenizer, extra_files, max_shard_bytes)
    if isinstance(model, Decoder) and model.aside is not None and model.aside.lies_in(Path(folder)):
        model.aside = open_aside(Path(folder))


def fill_model_folder(
    partial: Path,
    model: nn.Module,
    tokenizer: Tokenizer | None = None,
    extra_files: Mapping[str, bytes | dict[str, Any]] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write the files of a model directory into ``partial``, a folder from ``atomic_folder``. Raises ``OSError``."""
    config = config_record(to_dict(model.config), getattr(model, "source", None))
    (partial / "config.json").write_text(json.dumps(config, indent=1, allow_nan=False), encoding="utf-8")
    if tokenizer is not None:
        (partial / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    for name, content in (extra_files or {}).items():
        path = safe_member(partial, name)
        if name in _RESERVED or path.suffix == ".safetensors":
            raise CheckpointError(f"The extra file cannot be called {name}: a model directory uses that name itself.")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content, indent=1).encode())
    write_tensors(model.state_dict(), partial, "model", max_shard_bytes)
    aside = getattr(model, "aside", None)
    if aside is not None:
        write_aside(partial, aside, max_shard_bytes)


def config_record(model: dict[str, Any], source: dict[str, Any] | None = None) -> dict[str, Any]:
    """The content of a ``config.json``: ours, and the two keys by which Hugging Face's Auto classes know the folder.

    ``source``: what a converter noted of where the model came from; passed through.
    """
    record = {"format": FORMAT, "version": VERSION, **_HUGGING_FACE, "model": model}
    return record if source is None else {**record, "source": source}


def load_config(folder: str | os.PathLike[str]) -> ModelConfig:
    """The ``ModelConfig`` of a model directory. Raises ``CheckpointError`` or ``ConfigError`` saying what is wrong."""
    return _read_config(settle(folder), ModelConfig)[0]


def _read_config(folder: Path, kind: type[C]) -> tuple[C, dict[str, Any] | None]:
    """The config and the ``source`` of a model directory."""
    if not folder.is_dir():
        what = "is a file; give the folder that holds it" if folder.exists() else "does not exist"
        raise CheckpointError(f"The model directory {folder} {what}.")
    refuse_pickle(folder)
    path = safe_member(folder, "config.json")
    data = read_json(path)
    if data.get("format") != FORMAT:
        foreign = "model_type" in data or "architectures" in data
        if foreign and data.get("model_type") != _HUGGING_FACE["model_type"]:
            family = show(data.get("model_type", data.get("architectures")))
            raise CheckpointError(
                f"{folder} is a Hugging Face folder (model type {family}), not a moesaic one; "
                "conversion comes with a later version."
            )
        raise CheckpointError(f'{path} is not the config of a moesaic model: it lacks "format": "{FORMAT}".')
    version = data.get("version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise CheckpointError(
            f"{path} has the version {show(version)}; it should be a whole number from 1 to {VERSION}."
        )
    if version > VERSION:
        raise CheckpointError(
            f"{folder} was saved in format version {version}; this moesaic reads up to {VERSION}. Update moesaic."
        )
    unknown = sorted(set(data) - {"format", "version", "model", "source", *_HUGGING_FACE})
    if unknown:
        raise CheckpointError(f"{path} holds the unknown key {show(unknown[0])}; refused.")
    for key, value in _HUGGING_FACE.items():
        if data.get(key, value) != value:
            raise CheckpointError(f"{path} has the {key} {show(data[key])}; a moesaic model has {show(value)}.")
    source = data.get("source")
    if source is not None and not isinstance(source, dict):
        raise CheckpointError(f"{path} has the source {show(source)}, which is not a table; take it out.")
    sizes = data.get("model")
    layers = sizes.get("num_layers", 0) if isinstance(sizes, dict) else 0
    if isinstance(layers, int) and layers > MAX_LAYERS:  # a config lists its layers already when it is made
        raise CheckpointError(f"{path}: model.num_layers={layers} is impossible; at most {MAX_LAYERS} layers are read.")
    return from_dict(kind, sizes, f"{path}: model"), source


def load_model(
    folder: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    verify: bool = True,
) -> Decoder:
    """The model saved in ``folder``, in evaluation mode, its parameters trainable and tied as its config says.

    ``dtype``: None keeps every tensor as it was saved. A floating dtype converts as ``model.to(dtype)`` does, so that
    what the modules keep in fp32 (routers and their biases) stays fp32. ``verify`` hashes every file first: about a
    second per GB, and the only way to notice a flipped byte; False also accepts a folder without manifest.
    Raises ``CheckpointError`` naming the file or tensor that is missing, unexpected, damaged or of the wrong shape.
    """
    opened = open_model(folder, verify)
    dtypes = target_dtypes(opened.model, {name: info.dtype for name, info in opened.infos.items()}, dtype)
    tensors = ((name, prefer_huge(t.to(dtypes[name]), written=True)) for name, t in read_tensors(opened.infos, device))
    model = materialise(opened.model, tensors, opened.groups)
    model.aside = open_aside(opened.folder)
    return model


@dataclass(frozen=True)
class Opened:
    """A model directory that fits its config; no tensor has been read.

    Attributes:
        infos: the stored tensors. groups: stored name -> the model's names of it, several where tied.
        model: without memory, its ``source`` set.
    """

    folder: Path
    infos: dict[str, TensorInfo]
    groups: dict[str, list[str]]
    model: Decoder


def open_model(
    folder: str | os.PathLike[str], verify: bool = True, infos: dict[str, TensorInfo] | None = None
) -> Opened:
    """Check a model directory against its config and, with ``verify``, its manifest; raises as ``load_model`` does.

    ``infos``: the stored tensors, of a folder whose files the caller has checked and reads itself.
    """
    folder = settle(folder)
    config, source = _read_config(folder, ModelConfig)
    infos = _checked_tensors(folder, verify) if infos is None else infos
    if config.num_layers > len(infos):  # before building thousands of empty layers
        raise CheckpointError(
            f"{folder} has {len(infos)} tensors, too few for the {config.num_layers} layers of its config."
        )
    model = empty_model(config, folder / "config.json")
    model.source = source
    return Opened(folder, infos, match_tensors(model, infos, folder), model)


def empty_model(config: ModelConfig, source: Path) -> Decoder:
    """The model without memory: its modules only say which tensors exist, of what shape, tied to which.

    Raises ``CheckpointError`` naming ``source`` where the sizes are beyond any tensor.
    """
    try:
        return build_model(config, seed=0, device="meta")  # the seed keeps draws away from the caller's random state
    except (RuntimeError, TypeError) as error:
        if "overflow" not in str(error).lower():
            raise
        raise CheckpointError(f"{source} asks for impossible sizes: {str(error).splitlines()[0]}.") from error


def materialise(
    model: Decoder, tensors: Iterable[tuple[str, torch.Tensor]], groups: Mapping[str, list[str]]
) -> Decoder:
    """Give a model built on the meta device its tensors; ``groups``: name -> all its names (several where tied)."""
    modules = model.state_dict(keep_vars=True)
    state: dict[str, torch.Tensor] = {}
    for name, loaded in tensors:
        old = modules[name]
        if isinstance(old, nn.Parameter):
            # One object under every tied name: separate Parameters over one memory would get separate gradients.
            loaded = nn.Parameter(loaded, requires_grad=old.requires_grad)
        state.update(dict.fromkeys(groups[name], loaded))
    model.load_state_dict(state, strict=True, assign=True)
    left = [name for name, t in [*model.named_parameters(), *model.named_buffers()] if t.is_meta]
    if left:
        raise RuntimeError(f"{left} are not in the state dict, so a loaded model has no values for them")
    return model.eval()


def load_into(model: nn.Module, folder: str | os.PathLike[str], verify: bool = True) -> None:
    """Copy the tensors saved in ``folder`` into ``model``, in place: its parameters stay the ones an optimizer holds.

    Everything is checked before the first tensor changes. Raises ``CheckpointError`` as ``load_model`` does, and when
    the folder's config differs from ``model.config`` (naming the settings) or a tensor from the model's dtype.
    """
    folder = settle(folder)
    theirs, ours = to_dict(_read_config(folder, type(model.config))[0]), to_dict(model.config)
    differences = config_differences(theirs, ours)
    if differences:
        raise CheckpointError(f"{folder} holds a model of another architecture: {'; '.join(differences[:3])}.")
    infos = _checked_tensors(folder, verify)
    groups = match_tensors(model, infos, folder)
    state = model.state_dict()
    for saved, info in infos.items():
        if info.dtype != state[saved].dtype:
            raise CheckpointError(
                f"{info.file}: the tensor {show(saved)} is {_name(info.dtype)} and {_name(state[saved].dtype)} in this "
                "model; resume with the precision it was trained in."
            )
    with torch.no_grad():
        for saved, tensor in read_tensors(infos):
            state[groups[saved][0]].copy_(tensor)


def read_header(folder: str | os.PathLike[str]) -> dict[str, TensorInfo]:
    """Name -> (dtype, shape, file) of every tensor of a model directory, from the file headers alone."""
    folder = settle(folder)
    if folder.is_dir():
        refuse_pickle(folder)
    refuse_sharded(folder)
    return find_tensors(folder, "model")


def config_differences(theirs: Any, ours: Any, where: str = "") -> list[str]:
    """Sentence parts such as ``"moe.k is 2 there and 4 here"`` for each setting in which two plain configs differ."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        keys = list(dict.fromkeys([*ours, *theirs]))
        prefix = f"{where}." if where else ""
        return [d for key in keys for d in config_differences(theirs.get(key), ours.get(key), f"{prefix}{key}")]
    return [] if theirs == ours else [f"{where} is {show(theirs)} there and {show(ours)} here"]


def _checked_tensors(folder: Path, verify: bool) -> dict[str, TensorInfo]:
    """The headers of the model's tensors; with ``verify`` only of files that match the manifest."""
    refuse_sharded(folder)
    listed = verify_folder(folder) if verify else None
    infos = find_tensors(folder, "model")
    if listed is not None and "config.json" not in listed:
        raise CheckpointError(
            f"{folder / 'config.json'} is not listed in {MANIFEST}, so it was not saved with the rest."
        )
    return infos


def target_dtypes(
    model: nn.Module, saved: Mapping[str, torch.dtype], dtype: torch.dtype | None
) -> dict[str, torch.dtype]:
    """The dtype of each tensor after loading. Casts the empty ``model`` (on the meta device, so this costs nothing)."""
    # Casting asks each module which of its tensors may leave fp32, so that routers need not be known by name here.
    model.to(torch.bfloat16 if dtype is None else dtype)
    cast = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    if dtype is not None:
        return cast
    # As saved; only what the modules never hold below fp32 is widened, should a file hold it narrower.
    return {name: cast[name] if kind.itemsize < cast[name].itemsize else kind for name, kind in saved.items()}


def tied_names(model: nn.Module) -> list[list[str]]:
    """The names of every tensor of the state dict, those of one tied tensor together."""
    tied: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():  # the Parameters themselves: ties show by identity
        tied.setdefault(id(tensor), []).append(name)
    return list(tied.values())


def match_tensors(model: nn.Module, infos: Mapping[str, TensorInfo], folder: Path) -> dict[str, list[str]]:
    """Saved name -> the model's names of that tensor (several when tied); raises on anything that does not fit."""
    expected = model.state_dict()
    groups: dict[str, list[str]] = {}
    missing = []
    for names in tied_names(model):
        present = next((name for name in names if name in infos), None)
        if present is None:
            missing.append(names[0])
        else:
            groups[present] = names
    if missing:
        raise CheckpointError(f"{folder} lacks {len(missing)} tensors of the model: {names_in_words(missing)}.")
    unexpected = [name for name in infos if name not in groups]
    if unexpected:
        raise CheckpointError(
            f"{folder} holds {len(unexpected)} tensors that its config has no place for: {names_in_words(unexpected)}."
        )
    wrong = [name for name, info in infos.items() if info.shape != tuple(expected[name].shape)]
    if wrong:
        first = infos[wrong[0]]
        raise CheckpointError(
            f"{first.file}: {len(wrong)} tensors have the wrong shape, first {show(wrong[0])}: "
            f"{list(first.shape)} there, {list(expected[wrong[0]].shape)} by the config."
        )
    for name, info in infos.items():
        kind = expected[name].dtype
        if info.dtype != kind and not (info.dtype.is_floating_point and kind.is_floating_point):
            raise CheckpointError(f"{info.file}: the tensor {show(name)} is {_name(info.dtype)}, not {_name(kind)}.")
    return groups


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
