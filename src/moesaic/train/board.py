"""TensorBoard beside metrics.jsonl: the same records, as tags. The package is optional and imported on use.

Tags: loss/total, loss/lm, loss/<auxiliary loss>, val/loss, val/<domain>, optim/lr, optim/grad_norm, speed/tokens_per_s,
balance/{max_vio,dead,drop_rate,entropy}/layer_<i> with the layer's index in the model, and the load of every layer as
a histogram with one bucket per expert.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moesaic.errors import disk_errors

Record = Mapping[str, Any]


def scalars(record: Record, layers: Sequence[int] = ()) -> dict[str, float]:
    """The TensorBoard tags of a record: {tag: value}, without what is null or not finite.

    ``layers`` are the indices of the MoE layers in the model; per-layer tags carry them (balance/max_vio/layer_3).
    """
    tags: dict[str, Any] = {}
    if record["kind"] == "step":
        tags = {
            "loss/total": record.get("loss"),
            "loss/lm": record.get("lm_loss"),
            **{f"loss/{name}": value for name, value in record.get("losses", {}).items()},
            "optim/lr": record.get("lr"),
            "optim/grad_norm": record.get("grad_norm"),
            "speed/tokens_per_s": record.get("tokens_per_s"),
        }
        for name in ("max_vio", "dead", "drop_rate", "entropy"):
            tags |= {f"balance/{name}/layer_{_layer(layers, i)}": v for i, v in enumerate(record.get(name, ()))}
    elif record["kind"] == "val":
        tags = {"val/loss": record.get("loss")}
        tags |= {f"val/{domain}": value for domain, value in record.get("by_domain", {}).items()}
    return {tag: float(value) for tag, value in tags.items() if value is not None and math.isfinite(value)}


def _layer(layers: Sequence[int], i: int) -> int:
    return layers[i] if i < len(layers) else i


class Board:
    """A TensorBoard writer that takes metrics records. Made by ``open``, which is None without the package."""

    def __init__(self, writer: Any, histogram_every: int) -> None:
        self._writer = writer
        self._every = histogram_every

    @classmethod
    def open(
        cls, folder: Path, resume_step: int | None, histogram_every: int, say: Callable[[str], None]
    ) -> Board | None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            say('TensorBoard is off (metrics.jsonl is written all the same); to have it: pip install "moesaic[train]"')
            return None
        # purge_step hides what an earlier process wrote after the checkpoint we resume from.
        purge = None if resume_step is None else resume_step + 1
        with disk_errors(folder):
            return cls(SummaryWriter(str(folder), purge_step=purge), histogram_every)

    def write(self, record: Record, layers: Sequence[int]) -> None:
        step = record.get("step", 0)
        for tag, value in scalars(record, layers).items():
            self._writer.add_scalar(tag, value, step)
        if record["kind"] == "step" and step % self._every == 0:
            for i, load_E in enumerate(record.get("load", ())):
                self._load_histogram(f"load/layer_{_layer(layers, i)}", load_E, step)
        elif record["kind"] == "sample":
            self._writer.add_text("sample", str(record.get("text", "")), step)
        elif record["kind"] in ("val", "end"):
            self._writer.flush()

    def _load_histogram(self, tag: str, load_E: Sequence[int], step: int) -> None:
        """One bucket per expert, as high as the tokens it got: experts along the axis, not a histogram of loads."""
        E, total = len(load_E), sum(load_E)
        if total == 0:
            return
        self._writer.add_histogram_raw(
            tag,
            min=0,
            max=E,
            num=total,
            sum=sum((e + 0.5) * n for e, n in enumerate(load_E)),
            sum_squares=sum((e + 0.5) ** 2 * n for e, n in enumerate(load_E)),
            bucket_limits=[e + 1 for e in range(E)],
            bucket_counts=list(load_E),
            global_step=step,
        )

    def close(self) -> None:
        self._writer.close()
