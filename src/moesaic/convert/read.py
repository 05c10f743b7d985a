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
from moesaic.convert.coverage import Coverage, Share
from moesaic.convert.families import FAMILIES
from moesaic.convert.family import Family, Layout, as_released
from moesaic.convert.keys import Keys
from moesaic.convert.pieces import Entry, check_table, fill
from moesaic.convert.storage import Stored, stored_tensors
from moesaic.errors import CheckpointError, ConfigError, nearest
from moesaic.models.config import ModelConfig, pick
from moesaic.models.decoder import Decoder
from moesaic.ops.pages import prefer_huge


@dataclass(frozen=True)
class Foreign:
    """An opened checkpoint that is known to fit, to the last tensor and key; no tensor has been read.

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
        """What was used, counted from the pieces."""
        used = {name for entry in self.table for piece in entry.pieces for name in self.stored[piece.theirs].raw}
        rest = {name for alone in (*self.aside, *self.repeated) for name in self.stored[alone].raw}
        raw = {name: s for s in self.stored.values() for name in s.raw}
        sizes = {name: torch.Size(s.shape).numel() for name, s in self.stored.items()}
        total = {name for name in raw if name not in rest}
        filled = sum(torch.Size(p.shape).numel() for entry in self.table for p in entry.pieces)
        kept = sum(n for name, n in sizes.items() if name not in self.aside and name not in self.repeated)
        width = {name: s.dtype.itemsize for name, s in self.stored.items()}
        read = sum(sizes[p.theirs] * width[p.theirs] for entry in self.table for p in entry.pieces)
        there = sum(
            n * width[name] for name, n in sizes.items() if name not in self.aside and name not in self.repeated
        )
        experts = sum(layer.router.num_experts for layer in self.model.moe_layers().values())
        found = _experts_filled(self.table, self.model)
        return Coverage(
            tensors=Share(len(used & total), len(total)),
            parameters=Share(filled, kept),
            bytes=Share(read, there),
            experts=Share(found, experts),
            config_keys=Share(len({*self.keys.mapped, *self.keys.carried, *self.keys.dropped}), len(self.keys.data)),
            mapped=tuple(dict.fromkeys(self.keys.mapped)),
            carried=tuple(self.keys.carried),
            aside=self.aside,
            aside_parameters=sum(sizes[name] for name in self.aside),
            repeated=tuple(self.repeated),
            notes=tuple(
                f"{name} names code that came with the checkpoint: not followed, and left out of what is written"
                for name in self.keys.dropped
            ),
        )


def _experts_filled(table: list[Entry], model: Decoder) -> int:
    """Experts all of whose numbers are filled, counted through the pieces' own views of the stacks."""
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items() if ".experts." in name}
    filled: dict[tuple[str, int], int] = {}
    for entry in table:
        if entry.ours not in shapes:
            continue
        shape = shapes[entry.ours]
        # Every number of expert e holds e; nothing is allocated, and a view says whose part it is.
        owner = torch.arange(shape[0]).view(-1, *[1] * (len(shape) - 1)).expand(shape)
        for piece in entry.pieces:
            part = piece.part(owner)
            if not part.numel():
                continue
            stacked = part.dim() == len(shape)  # the view still has the dimension of experts
            while part.dim() > stacked:
                part = part.select(-1, 0)
            owners = part.reshape(-1)
            for expert in owners.tolist():
                at = (entry.ours, expert)
                filled[at] = filled.get(at, 0) + torch.Size(piece.shape).numel() // len(owners)
    stacks: dict[tuple[str, int], bool] = {}
    for name, shape in shapes.items():
        for expert in range(shape[0]):
            whole = filled.get((name, expert), 0) == torch.Size(shape[1:]).numel()
            layer = (name.rpartition(".")[0], expert)
            stacks[layer] = stacks.get(layer, True) and whole
    return sum(stacks.values())


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
    if not folder.is_dir():
        raise CheckpointError(f"There is no folder {folder}.")
    if not any(os.path.lexists(folder / f"model.safetensors{end}") for end in ("", ".index.json")):
        refuse_pickle(folder)  # beside safetensors they are never opened
    family, config, keys = _understood(folder)
    infos = find_tensors(folder, "model")
    _refuse_leftovers(folder, {info.file.name for info in infos.values()})
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
    _match(folder, table, there, set(aside), repeated)
    return Foreign(folder, config, family, layout, keys, table, there, aside, repeated, model, infos)


def _refuse_leftovers(folder: Path, used: set[str]) -> None:
    """Raise ``CheckpointError`` for files that look like a part of the model and are not: shards of another save."""
    for path in sorted(folder.glob("model*.safetensors")):
        if path.name not in used:
            raise CheckpointError(
                f"{path} is not among the files of this checkpoint, so it seems to be left over from another; move it away."
            )


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


def _match(
    folder: Path, table: list[Entry], there: dict[str, Stored], aside: set[str], repeated: dict[str, str]
) -> None:
    pieces = {piece.theirs: piece for entry in table for piece in entry.pieces}
    missing = [name for name in pieces if name not in there]
    unknown = [name for name in there if name not in pieces and name not in aside and name not in repeated]
    if missing:
        near = nearest(missing[0], unknown) if unknown else ""
        raise CheckpointError(
            f"{folder} lacks {len(missing)} tensors that its config asks for: {names_in_words(missing)}.{near}"
        )
    if unknown:
        raise CheckpointError(
            f"{folder} holds {len(unknown)} tensors that its config has no place for: {names_in_words(unknown)}. "
            "Either the config is another model's or something of the model would be lost; refused."
        )
    wrong = [name for name, piece in pieces.items() if there[name].shape != piece.shape]
    if wrong:
        raise CheckpointError(
            f"{folder}: {len(wrong)} tensors have the wrong shape, first {show(wrong[0])}: {list(there[wrong[0]].shape)} "
            f"there, {list(pieces[wrong[0]].shape)} by the config."
        )
    odd = [name for name in pieces if not there[name].dtype.is_floating_point]
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
