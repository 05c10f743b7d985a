"""What forecasts of many layouts of one model share: the shapes of its blocks and what they compute."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from moesaic.cost.blocks import blocks_of
from moesaic.cost.count import only
from moesaic.cost.flops import part_flops
from moesaic.models.config import ModelConfig


class Prepared:
    """One model and length of rows.

    Attributes:
        blocks: see ``blocks.py``.
        flops_of: (block, its window) -> forward FLOPs per token by part, and under "row" of one row of its experts.
    """

    def __init__(self, model: ModelConfig, seq_len: int) -> None:
        self.model, self.seq_len = model, seq_len
        self.blocks = blocks_of(model)
        self.flops_of = cache(self._flops_of)

    def _flops_of(self, layer: int, window: int | None) -> dict[str, float]:
        parts = part_flops(replace(only(self.model, [layer]), sliding_window=window), self.seq_len, 1)
        del parts["head"]
        rows = self.blocks[layer].rows
        return {**parts, "row": parts.get("experts", 0.0) / rows if rows else 0.0}
