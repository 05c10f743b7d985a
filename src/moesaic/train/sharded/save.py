"""Save what all ranks hold of a model and its training as one checkpoint, whole or not at all.

>>> group = saving_group(range(world), rank)              # background.py; on gloo and patient, made once
>>> save_sharded("runs/a/checkpoints/step-00000100", tensors, {"step": 100}, group=group)

``tensors``: name -> (``Held``, local tensor), on every rank what that rank has. Names are those of a model of one process;
names with a "/" are training state ("optimizer/exp_avg/NAME"). Every region is written once, by one of the ranks that hold it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.state_dict_saver import save

from moesaic.checkpoint.aside import Aside, write_aside
from moesaic.checkpoint.atomic import MANIFEST, hidden_folder, publish
from moesaic.checkpoint.parts import FILE
from moesaic.checkpoint.shards import MAX_SHARD_BYTES
from moesaic.checkpoint.untrusted import safe_member
from moesaic.errors import CheckpointError, disk_errors
from moesaic.parallel.comm import Group
from moesaic.train.sharded.agree import as_one, first_says, together
from moesaic.train.sharded.checkpoint import EXTRA, describe, row_of
from moesaic.train.sharded.entries import Tensors, entries_of, whole_of
from moesaic.train.sharded.plan import RegionSavePlanner
from moesaic.train.sharded.storage import ShardedWriter

_RESERVED = (FILE, EXTRA, MANIFEST, ".metadata")


def save_sharded(
    folder: str | os.PathLike[str],
    tensors: Tensors,
    extra: Mapping[str, Any],
    *,
    group: Group,
    files: Mapping[str, bytes | Mapping[str, Any]] | None = None,
    layout: str = "",
    aside: Aside | None = None,
) -> Path:
    """Write the checkpoint ``folder``, replacing what is there once the new one is whole; every rank of ``group`` calls.

    Args:
        extra: JSON data, the first rank's counts; comes back from ``load_sharded``.
        files: more files of the folder (name -> bytes, or a mapping for JSON), of the first rank.
        layout: in words, for people.
        aside: the first rank's ``model.aside``, tensors that belong to the model's source.

    Files are filled in a hidden folder beside it, flushed, hashed by the rank that wrote them, and put in place by the first
    rank when all are done; a failure or kill before leaves an older ``folder`` as it was. Raises ``CheckpointError`` with the
    same sentence on all ranks where any of them failed, ``MoesaicError`` where a rank died.
    """
    final = Path(os.path.realpath(folder))
    with ExitStack() as stack:

        def begin() -> str:
            for name in files or {}:
                if name in _RESERVED or name.endswith(".safetensors"):
                    raise CheckpointError(
                        f"The extra file cannot be called {name}: a checkpoint uses that name itself."
                    )
            return str(stack.enter_context(hidden_folder(final, overwrite=True)))

        partial = Path(first_says(group, "checkpoint: begin", begin))

        def prepare() -> RegionSavePlanner:
            if not partial.is_dir():
                raise CheckpointError(
                    f"{partial} does not appear on this machine; a run on several machines needs a folder that all share."
                )
            return RegionSavePlanner(entries_of(tensors))

        planner = together(group, "checkpoint: begin", prepare)
        writer = ShardedWriter(partial, final)
        _write(planner, writer, group)
        rows = {name: row_of(whole_of(held, x)) for name, (held, x) in tensors.items()}
        told = group.values({"digests": writer.digests, "rows": rows}, what="checkpoint: tell")

        def finish() -> None:
            digests = {file: digest for theirs in told for file, digest in theirs["digests"].items()}
            for file in digests:
                if not (partial / file).is_file():
                    raise CheckpointError(
                        f"{partial / file} was written and is not there; is the folder shared by all machines?"
                    )
            table = {name: row for theirs in told for name, row in theirs["rows"].items()}
            text = describe(table, writer.fingerprints, group.size, layout)
            with disk_errors(final):
                for name, content in {**(files or {}), FILE: text.encode(), EXTRA: extra}.items():
                    path = safe_member(partial, name)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content, indent=1).encode())
                if aside is not None:
                    write_aside(partial, aside, MAX_SHARD_BYTES)
                publish(partial, final, digests)

        first_says(group, "checkpoint: finish", finish)
    return final


def _write(planner: RegionSavePlanner, writer: ShardedWriter, group: Group) -> None:
    if group.size > 1:
        with as_one(group, "checkpoint: write"):
            save({}, storage_writer=writer, planner=planner, process_group=group.handle)
        return
    # The same steps alone. torch's save would do them too, with a warning that it is alone.
    planner.set_up_planner({}, writer.storage_meta(), is_coordinator=True)
    writer.set_up_storage_writer(is_coordinator=True)
    plans, metadata = planner.create_global_plan([writer.prepare_local_plan(planner.create_local_plan())])
    plan = planner.finish_plan(writer.prepare_global_plan(plans)[0])
    writer.finish(metadata, [writer.write_data(plan, planner).wait()])
