"""A Hugging Face folder as a moesaic model: every tensor and config key accounted for before the first one is used.

>>> foreign = open_folder(Path("mixtral"))           # headers only; CheckpointError or ConfigError names what does not fit
>>> print("\\n".join(foreign.coverage().lines()))
>>> model = read_model(Path("mixtral"), dtype=torch.bfloat16)
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moesaic.checkpoint.aside import Aside
from moesaic.checkpoint.native import MAX_LAYERS, empty_model, materialise, target_dtypes, tied_names
from moesaic.checkpoint.shards import TensorInfo, find_tensors, names_in_words, refuse_pickle
from moesaic.checkpoint.untrusted import read_json, safe_member, show
from moesaic.convert.account import account
from moesaic.convert.coverage import Coverage
from moesaic.convert.families import FAMILIES
from moesaic.convert.family import Family, Layout, as_released
from moesaic.convert.keys import Keys
from moesaic.convert.pieces import Entry, Piece, fill
from moesaic.convert.places import check_table
from moesaic.convert.storage import Stored, stored_tensors
from moesaic.errors import CheckpointError, ConfigError, nearest
from moesaic.models.config import ModelConfig, pick
from moesaic.models.decoder import Decoder
from moesaic.ops.pages import prefer_huge


@dataclass(frozen=True)
class Differences:
    """Names of tensors in which a checkpoint and its config differ: absent there, of no place here, of another shape."""

    missing: list[str]
    unexpected: list[str]
    wrong: list[str]


@dataclass(frozen=True)
class Foreign:
    """An opened checkpoint, understood to the last key; no tensor has been read. From ``open_folder`` it is known to fit.

    Attributes:
        config, family, layout, table: what it is.
        carried: config keys that change nothing, kept for export.
        stored: its tensors by their names.
        aside: names of tensors that are no part of the model (multi-token prediction).
        repeated: their names that hold what another holds as well, by that one's name.
        model: the model without memory.
        infos: the headers.
    """

    folder: Path
    config: ModelConfig
    family: Family
    layout: Layout
    keys: Keys
    table: list[Entry]
    stored: dict[str, Stored]
    aside: tuple[str, ...]
    repeated: dict[str, str]
    model: Decoder
    infos: dict[str, TensorInfo]

    @property
    def source(self) -> dict[str, Any]:
        """What a moesaic folder remembers of where the model came from."""
        return {"family": self.family.model_type, "config": self.keys.carried}

    @cached_property
    def shapes(self) -> dict[str, torch.Size]:
        """Our name -> shape."""
        return {name: tensor.shape for name, tensor in self.model.state_dict().items()}

    @cached_property
    def pieces(self) -> dict[str, Piece]:
        """Their name -> the piece, of all the config asks for."""
        return {piece.theirs: piece for entry in self.table for piece in entry.pieces}

    def differences(self) -> Differences:
        """How the tensors that are stored differ from those the config asks for, by name and shape."""
        apart = {*self.aside, *self.repeated}
        wrong = [n for n, p in self.pieces.items() if n in self.stored and self.stored[n].shape != p.shape]
        for name, other in self.repeated.items():
            if other in self.pieces and self.stored[name].shape != self.pieces[other].shape:
                wrong.append(name)
        return Differences(
            [name for name in self.pieces if name not in self.stored],
            [name for name in self.stored if name not in self.pieces and name not in apart],
            wrong,
        )

    def leftovers(self) -> list[Path]:
        """Files that look like a part of the model and are not: shards of another save."""
        return leftovers(self.folder, {info.file.name for info in self.infos.values()})

    def held(self) -> dict[str, torch.dtype]:
        """Our name -> the dtype its pieces are stored in, fp32 where they differ."""
        held = {}
        for entry in self.table:
            kinds = {self.stored[piece.theirs].dtype for piece in entry.pieces}
            held[entry.ours] = kinds.pop() if len(kinds) == 1 else torch.float32
        return held

    def dtypes(self, dtype: torch.dtype | None) -> dict[str, torch.dtype]:
        """Our name -> dtype: as stored (None) or ``dtype``; what must stay fp32 stays fp32."""
        return target_dtypes(self.model, self.held(), dtype)

    def load(self, entry: Entry, dtype: torch.dtype) -> Tensor:
        """One of our tensors, filled piece by piece: in memory are it and one of theirs."""
        ours = prefer_huge(torch.empty(self.shapes[entry.ours], dtype=dtype))
        for piece in entry.pieces:
            fill(ours, piece, self.stored[piece.theirs].load_for(dtype))
        return ours

    def tensors(self, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
        """All of them, in the order of the table."""
        dtypes = self.dtypes(dtype)
        for entry in self.table:
            yield entry.ours, self.load(entry, dtypes[entry.ours])

    def check_repeated(self) -> None:
        """Raise ``CheckpointError`` where a tensor stored twice differs from what it is tied to."""
        for name, other in self.repeated.items():
            if not torch.equal(self.stored[name].load(), self.stored[other].load()):
                raise CheckpointError(
                    f"{self.folder} holds {show(name)} beside {show(other)}, which its config ties together, and they differ; "
                    "set tie_word_embeddings to false in config.json if both are meant."
                )

    def coverage(self) -> Coverage:
        """What was used, counted by the places the pieces go to."""
        moe = self.config.moe
        experts = 0 if moe is None else sum(pick(moe.num_experts, i) for i in range(len(self.config.moe_layers)))
        shapes = {tied[0]: tuple(self.shapes[tied[0]]) for tied in tied_names(self.model)}
        return account(self.table, shapes, experts, self.stored, self.aside, self.repeated, self.keys)


def leftovers(folder: Path, used: set[str]) -> list[Path]:
    """Files of ``folder`` that are named like parts of a model and are not among those ``used``."""
    return [path for path in sorted(folder.glob("model*.safetensors")) if path.name not in used]


def is_foreign(folder: Path) -> bool:
    """Whether a folder holds a model of a Hugging Face family rather than one of ours."""
    path = folder / "config.json"
    if not path.is_file():
        return False
    data = read_json(path)
    return data.get("format") != "moesaic" and ("model_type" in data or "architectures" in data)


def config_of(folder: Path) -> ModelConfig:
    """The config of a Hugging Face folder in our terms; no tensor is looked at."""
    return _understood(folder)[1]


def _understood(folder: Path) -> tuple[Family, ModelConfig, Keys]:
    path = safe_member(folder, "config.json")
    data = read_json(path)
    kind = data.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        hint = nearest(str(kind), FAMILIES)
        raise CheckpointError(f"{path}: models of type {show(kind)} are not read; known: {', '.join(FAMILIES)}.{hint}")
    family = FAMILIES[kind]
    named = data.get("architectures")
    if named is not None and not isinstance(named, list):
        raise CheckpointError(
            f'{path}: architectures must be a list, such as ["{family.architecture}"], not {show(named)}.'
        )
    if named not in (None, [], [family.architecture]):
        raise CheckpointError(
            f"{path} describes {show(named)}; of this model type moesaic reads {family.architecture} alone."
        )
    keys = Keys(data, str(path))
    keys.get("quantization_config", None)  # understood, key by key, where the tensors are
    layers = data.get("num_hidden_layers")
    if isinstance(layers, int) and layers > MAX_LAYERS:  # before anything enumerates layers
        raise ConfigError(f"{path}: num_hidden_layers={layers} is impossible; at most {MAX_LAYERS} are read.")
    config = as_released(family.read(keys))
    keys.finish()
    return family, config, keys


def open_folder(folder: Path) -> Foreign:
    """Check a Hugging Face folder against its config, from the headers alone.

    Raises ``CheckpointError`` naming the tensor that is missing, unexpected or of the wrong shape, and ``ConfigError`` naming
    the key that is unknown or impossible.
    """
    found = survey(folder)
    for path in found.leftovers():
        raise CheckpointError(
            f"{path} is not among the files of this checkpoint, so it seems to be left over from another; move it away."
        )
    _refuse(found)
    return found


def survey(folder: Path) -> Foreign:
    """What a Hugging Face folder holds beside what its config asks for, from the headers alone; whether it fits is not judged.

    Raises ``CheckpointError`` or ``ConfigError`` for headers and configs that say nothing one could compare.
    """
    if not folder.is_dir():
        raise CheckpointError(f"There is no folder {folder}.")
    if not any(os.path.lexists(folder / f"model.safetensors{end}") for end in ("", ".index.json")):
        refuse_pickle(folder)  # beside safetensors they are never opened
    family, config, keys = _understood(folder)
    infos = find_tensors(folder, "model")
    if config.num_layers > len(infos):  # before building thousands of empty layers
        raise CheckpointError(
            f"{folder} has {len(infos)} tensors, too few for the {config.num_layers} layers of its config."
        )
    stored = stored_tensors(infos, keys.data.get("quantization_config"))
    model = empty_model(config, folder / "config.json")
    ignored = {name for name in stored if family.ignored.fullmatch(name)}
    aside = tuple(name for name in stored if name not in ignored and family.aside(name, config, keys.carried))
    there = {name: s for name, s in stored.items() if name not in ignored}
    layout, table = _best_layout(family, config, keys, there.keys() - set(aside))
    names = [tied[0] for tied in tied_names(model)]
    state = model.state_dict()
    check_table(table, {name: tuple(state[name].shape) for name in names})
    repeated = {}
    if config.tie_embeddings and "lm_head.weight" in there:
        repeated["lm_head.weight"] = "model.embed_tokens.weight"
    return Foreign(folder, config, family, layout, keys, table, there, aside, repeated, model, infos)


def _best_layout(family: Family, config: ModelConfig, keys: Keys, names: set[str]) -> tuple[Layout, list[Entry]]:
    """The layout whose table names most of what is there."""
    experts = 0 if config.moe is None else sum(pick(config.moe.num_experts, i) for i in range(len(config.moe_layers)))
    # A table of one tensor per expert is not even made for more experts than there are tensors.
    possible = [layout for layout in family.layouts if layout != "per_expert" or experts <= len(names)]
    if not possible:
        raise CheckpointError(
            f"{keys.where} asks for {experts:,} experts in all, and the folder has {len(names):,} tensors: too few."
        )
    tables = {layout: family.table(config, layout, keys.carried) for layout in possible}

    def known(layout: Layout) -> int:
        return sum(piece.theirs in names for entry in tables[layout] for piece in entry.pieces)

    best = max(possible, key=known)
    return best, tables[best]


def _refuse(found: Foreign) -> None:
    """Raise ``CheckpointError`` naming the tensor that is missing, unexpected, or of the wrong shape or type."""
    differ, folder, there = found.differences(), found.folder, found.stored
    if differ.missing:
        near = nearest(differ.missing[0], differ.unexpected) if differ.unexpected else ""
        raise CheckpointError(
            f"{folder} lacks {len(differ.missing)} tensors that its config asks for: {names_in_words(differ.missing)}.{near}"
        )
    if differ.unexpected:
        raise CheckpointError(
            f"{folder} holds {len(differ.unexpected)} tensors that its config has no place for: "
            f"{names_in_words(differ.unexpected)}. Either the config is another model's or something of the model would be "
            "lost; refused."
        )
    if differ.wrong:
        first = differ.wrong[0]
        raise CheckpointError(
            f"{folder}: {len(differ.wrong)} tensors have the wrong shape, first {show(first)}: {list(there[first].shape)} "
            f"there, {list(found.pieces[found.repeated.get(first, first)].shape)} by the config."
        )
    odd = [name for name in found.pieces if not there[name].dtype.is_floating_point]
    if odd:
        raise CheckpointError(f"{folder}: the tensor {show(odd[0])} is {there[odd[0]].dtype}, not a floating type.")


def read_model(
    folder: Path,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    progress: Callable[[int], None] | None = None,
) -> Decoder:
    """The model in a Hugging Face folder, in evaluation mode; ``model.source`` remembers what export needs.

    Args:
        dtype: of the parameters; routers stay fp32. None keeps the stored ones.
        progress: called with the bytes of each tensor done.
    """
    foreign = open_folder(folder)
    foreign.check_repeated()
    groups = {names[0]: names for names in tied_names(foreign.model)}

    def loaded() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in foreign.tensors(dtype):
            yield name, tensor.to(device)
            if progress is not None:
                progress(tensor.nbytes)

    model = materialise(foreign.model, loaded(), groups)
    model.source = foreign.source
    if foreign.aside:
        model.aside = Aside(
            {name: foreign.stored[name] for name in foreign.aside}, {info.file for info in foreign.infos.values()}
        )
    return model
