"""Which routers may decide about parts of a batch apart, as data-parallel processes make them.

Parts are whole sequences. A router whose ``facts.batch_invariant`` holds in training routes them as one process would route
the batch; balancing losses, the routers' own and capacity are made whole by ``plan/peers.py``. These routers look at the whole
micro-batch, so parts would be routed otherwise, and differently for every number of them:

| router | what is shared by all sequences | confined by |
|---|---|---|
| base, sinkhorn | one balanced assignment | - |
| expert_choice | experts compare tokens: group "batch", "position" | group="sequence" |
| product_keys | mean and variance of queries: query_norm "batch" | query_norm="layer" |

Noise is drawn by each process for its own tokens (``facts.noisy``), so with it a run repeats, but equals that of another number
of processes in distribution only. So it does with capacity priority "random".
"""

from __future__ import annotations

from moesaic.errors import ConfigError
from moesaic.routing.gate import Router

CONFINED = {"expert_choice": 'group="sequence"', "product_keys": 'query_norm="layer"'}
QUIET = {"switch": "jitter=0", "gshard": 'second="all"', "budget": "sample=false"}


def check_spread(router: Router, name: str, parts: int) -> str | None:
    """A sentence for the user where ``parts`` processes equal one in distribution only; None where they equal it.

    Args:
        name: of the router in ``ROUTERS``.

    Raises ``ConfigError`` for a router that looks at sequences which other processes hold.
    """
    if parts == 1:
        return None
    facts = router.facts
    if not facts.batch_invariant:
        confined = CONFINED.get(name)
        remedy = f"set its option {confined}" if confined else "no option confines it, so choose another router"
        raise ConfigError(
            f'Router "{name}" looks at the other sequences of a batch, and {parts} data-parallel ranks hold them apart, so it '
            f"would route otherwise than in one process; {remedy}, or use one data-parallel rank."
        )
    if facts.noisy:
        quiet = f", or set its option {QUIET[name]}" if name in QUIET else ""
        return (
            f'router "{name}" draws random numbers, and {parts} data-parallel ranks draw other ones than one process would: '
            f"the run equals one on another number of ranks in distribution only. That is usual{quiet}."
        )
    return None
