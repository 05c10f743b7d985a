"""A published layout, what was published of it, and what is forecast of the same: DeepSeek-V3 on 2,048 GPUs.

Sources: [1] DeepSeek-V3 Technical Report (arXiv 2412.19437), sections 3.1 to 3.3, 4.2 and table 2; [2] Insights into
DeepSeek-V3 (arXiv 2505.09343), tables 2 and 4, figure 7; [3] Memory Analysis on the Training Course of DeepSeek Models (arXiv
2502.07846), of other people, who count another layout.

Neither the bytes of memory of a GPU nor those it sends were published. Both are forecast, beside what bounds them.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from moesaic.cost.communication import nodes_reached
from moesaic.cost.flops import part_flops
from moesaic.cost.forecast import Forecast, Training
from moesaic.cost.layout import forecast
from moesaic.cost.precision import PRECISIONS
from moesaic.layout import ParallelConfig
from moesaic.models.presets import preset

WORLD = 2048
PER_NODE, NODES_PER_TOKEN = 8, 4
# 16-way PP, 64-way EP over 8 nodes, ZeRO-1 DP, no TP, 15,360 sequences of 4,096 [1]; exchanges of 4,096 tokens a GPU [2].
PARALLEL = ParallelConfig(pp=16, ep=64, ranks_per_node=PER_NODE)
_FP8 = 1 + Fraction(4, 128)  # one fp32 scale per 128 numbers
TRAINING = Training(
    batch_size=128,
    accumulate=120,
    seq_len=4096,
    recompute=True,
    precision=PRECISIONS["deepseek-v3"],
    sharded="optimizer",
    pipeline="dualpipe",
    dispatched=_FP8,
    combined=Fraction(2),
)
NETWORK, NODE = 50e9, 160e9  # bytes a second of InfiniBand and NVLink per GPU [1]
STEP_S, BUBBLE_S = 19.926, 2.06  # measured [2]
PEAK = 385e12 / 0.3894  # what its 385 TFLOPS and 38.94% are of: bf16 [2]


@dataclass(frozen=True)
class Figure:
    """One line: ``published`` as printed, with its source; "" where nothing is. ``forecast`` is ours, as text and number."""

    what: str
    published: str
    forecast: str
    value: float
    note: str = ""


def deepseek_v3() -> Forecast:
    """Its layout with its precision and schedule. Activations are recomputed as moesaic does, not as the report does."""
    return forecast(preset("deepseek-v3"), PARALLEL, WORLD, TRAINING)


def once_per_node_bytes(layers: float) -> float:
    """Bytes that a GPU sends to other nodes in a step for so many sparse layers: each token once to each node [1]."""
    model = preset("deepseek-v3")
    tokens = TRAINING.rows * TRAINING.seq_len / (WORLD // PARALLEL.pp)
    nodes = nodes_reached(256, 8, 64 // PER_NODE, NODES_PER_TOKEN)
    return 2 * tokens * layers * nodes * model.dim * float(_FP8 + 2)  # forward and backward


def other_layout() -> int:
    """Parameters of a rank with four sparse layers in the layout that [3] counts."""
    parallel = ParallelConfig(pp=16, tp=2, ep=8, etp=1)
    found = forecast(preset("deepseek-v3"), parallel, WORLD, Training(64), some=True)
    return next(group.parameters.total for group in found.groups if group.layers == (3, 4, 5, 6))


def figures(found: Forecast) -> list[Figure]:
    """What was published beside what is forecast."""
    model = preset("deepseek-v3")
    largest, rows = found.largest, TRAINING.rows
    parameters = [group.parameters.total for group in found.groups]
    mean = sum(group.parameters.total * len(group.ranks) for group in found.groups) / WORLD
    tokens = rows * TRAINING.seq_len
    flops = 3 * sum(part_flops(model, TRAINING.seq_len, 1).values())
    per_gpu = flops * tokens / WORLD
    layers = 58 / PARALLEL.pp
    across = once_per_node_bytes(layers)
    # Without the second forward that moesaic's recomputation has and theirs has not.
    flat = sum(group.traffic.exchange * len(group.ranks) for group in found.groups) / WORLD * 4 / 6
    other = other_layout()
    memory = largest.memory
    return [
        Figure("parameters", "671B [1]", f"{found.parameters.total / 1e9:.2f}B", found.parameters.total),
        Figure(
            "copies of parameters on a GPU",
            "2 (DualPipe) [1]",
            f"{min(parameters) / 1e9:.2f}B to {max(parameters) / 1e9:.2f}B, mean {mean / 1e9:.2f}B",
            mean,
            "of 2 stages in 16, embedding and head on the first and last rank",
        ),
        Figure(
            "memory of a GPU",
            "below 80 GB, without tensor parallelism [1]",
            f"{memory.total / 1e9:.1f} GB at most: state {memory.state / 1e9:.1f}, activations {memory.activations / 1e9:.1f}",
            memory.total,
            "bytes were not published; activations recomputed as moesaic does, micro-batches of one sequence [2]",
        ),
        Figure(
            "weights of a GPU at PP 16, TP 2, EP 8, in bf16",
            "11.64 GiB [3]",
            f"{2 * other / 2**30:.2f} GiB",
            2 * other,
            "of four sparse layers; there rotary queries and shared experts are not sliced",
        ),
        Figure("micro-batches kept at once", "PP + 1 = 17 [1]", "17", 17),
        Figure(
            "tokens of a step",
            "62.9M: 15,360 x 4,096 [1]; 272.80B a day x 19.926 s [2]",
            f"{tokens / 1e6:.1f}M",
            tokens,
        ),
        Figure(
            "training FLOPs of a token",
            "250 GFLOP [2]",
            f"{flops / 1e9:.1f} GFLOP",
            flops,
            "without multi-token prediction",
        ),
        Figure(
            "FLOP/s of a GPU in a step of 19.926 s",
            "385 TFLOP/s [2]",
            f"{per_gpu / STEP_S / 1e12:.0f} TFLOP/s",
            per_gpu / STEP_S,
        ),
        Figure(
            "all-to-all of a GPU and step, once per node",
            "",
            f"{across / 1e9:.0f} GB",
            across,
            "bytes were not published; FP8 to experts, bf16 back, at most 4 nodes [1]",
        ),
        Figure(
            "all-to-all of a GPU and step, row by row",
            "",
            f"{flat / 1e9:.0f} GB",
            flat,
            "as moesaic exchanges rows, in the same formats",
        ),
        Figure(
            "computing : all-to-all",
            "about 1 : 1 before overlap [1]",
            f"{per_gpu / PEAK:.1f} s : {across / NETWORK:.1f} s",
            (per_gpu / PEAK) / (across / NETWORK),
            "at the bf16 peak of 989 TFLOP/s and 50 GB/s of InfiniBand; FP8 products halve the first",
        ),
        Figure(
            "bubble of a step",
            f"{BUBBLE_S / STEP_S:.1%}: 2.06 of 19.926 s [2]",
            f"{found.bubble:.1%}",
            found.bubble,
            "the formula has equal stages and no overlap gained",
        ),
    ]
