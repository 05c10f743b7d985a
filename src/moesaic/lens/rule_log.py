"""How many tokens each routing rule applied to, over any number of forwards, without touching them: for audits.

>>> with rule_log(model) as log:
...     model(ids, tenant_BS=tenants)
>>> log.counts[3]           # RuleCounts(tokens=512, matched={'Rule 1 "minors"': 40}, without=0) of block 3

What the rules then did to routing is in the plans (``trace``); this counts where they applied. It asks the device once per
forward and rule.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn

from moesaic.errors import ConfigError
from moesaic.experts.layer import MoE
from moesaic.models.decoder import Decoder
from moesaic.routing import NO_CONTEXT, RuleCounts, TokenContext


@dataclass
class RuleLog:
    """What ``rule_log`` counted.

    Attributes:
        counts: block index -> sums over the forwards so far.
    """

    counts: dict[int, RuleCounts] = field(default_factory=dict)

    def add(self, layer: int, counts: RuleCounts) -> None:
        """Add the counts of one forward."""
        before = self.counts.get(layer, RuleCounts(0, dict.fromkeys(counts.matched, 0), 0))
        matched = {rule: before.matched.get(rule, 0) + tokens for rule, tokens in counts.matched.items()}
        self.counts[layer] = RuleCounts(
            before.tokens + counts.tokens, before.matched | matched, before.without + counts.without
        )


@contextmanager
def rule_log(model: Decoder) -> Iterator[RuleLog]:
    """Count, in every forward inside the block, the tokens that each rule of each sparse layer applies to.

    Raises ``ConfigError`` if no layer has rules.
    """
    ruled = {layer: sparse for layer, sparse in model.moe_layers().items() if sparse.rules is not None}
    if not ruled:
        raise ConfigError(
            "This model has no routing rules to count; set model.moe.rules, or rules of its sparse layers."
        )
    log = RuleLog()
    handles = [
        sparse.register_forward_pre_hook(partial(_count, log, layer), with_kwargs=True)
        for layer, sparse in ruled.items()
    ]
    try:
        yield log
    finally:
        for handle in handles:
            handle.remove()


def _count(log: RuleLog, layer: int, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
    assert isinstance(module, MoE)
    if module.rules is None:  # lifted meanwhile
        return
    x = named["x"] if "x" in named else inputs[0]
    ctx: TokenContext = named.get("ctx", inputs[1] if len(inputs) > 1 else NO_CONTEXT)
    tokens = x.numel() // x.shape[-1]
    log.add(layer, module.rules.explain(ctx, tokens, module.router.num_experts))
