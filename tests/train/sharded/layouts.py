"""A small logical state and ways to lie on ranks: uneven experts, halves of gated widths, FSDP's rows, replicas, stages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from moesaic.parallel.comm import Group
from moesaic.parallel.held import Held, keep, pick, rows, whole
from moesaic.parallel.watch import Watch
from moesaic.train.sharded.entries import Tensors

EXPERTS, DIM, WIDTH = 5, 6, 4  # E, D, H: nothing divides anything
ATTENTION, W_IN, W_OUT = "blocks.0.attention.q.weight", "blocks.1.ffn.experts.w_in", "blocks.1.ffn.experts.w_out"
Cut = Callable[[int, str, Held], Held | None]  # (rank, name, all of it) -> what the rank holds, None for nothing


def logical(seed: int = 0) -> dict[str, tuple[Tensor, bool]]:
    """Name -> (the tensor in one process, whether its first dimension is the experts)."""
    torch.manual_seed(seed)
    model = {
        "embedding.weight": (torch.randn(10, DIM), False),
        ATTENTION: (torch.randn(8, DIM).bfloat16(), False),
        "blocks.0.norm.weight": (torch.randn(DIM, dtype=torch.float64), False),
        W_IN: (torch.randn(EXPERTS, DIM, 2 * WIDTH), True),
        W_OUT: (torch.randn(EXPERTS, WIDTH, DIM).half(), True),
        "blocks.1.ffn.router.choice_bias_E": (torch.randn(EXPERTS), False),
        "blocks.1.ffn.router.alive_E": (torch.rand(EXPERTS) > 0.5, False),
        "blocks.1.ffn.router.steps": (torch.randint(0, 2**62, ()), False),
        "blocks.1.ffn.router.none_D": (torch.empty(0, DIM), False),
    }
    state = {
        f"optimizer/{key}/{name}": (torch.randn(x.shape), experts)
        for name, (x, experts) in model.items()
        if x.is_floating_point() and x.numel()
        for key in ("exp_avg", "exp_avg_sq")
    }
    steps = {f"optimizer/step/{name}": (torch.tensor(7.0 + seed), False) for name in (ATTENTION, W_IN)}
    return model | state | steps


def parameter(name: str) -> str:
    """The parameter that a moment belongs to."""
    return name.rpartition("/")[2]


def _same(rank: int, name: str, held: Held) -> Held:
    return held


def _experts(*orders: tuple[int, ...]) -> Cut:
    def cut(rank: int, name: str, held: Held) -> Held:
        return rows(held, orders[rank]) if held.kind == "experts" else held

    return cut


def _tensor_parallel(rank: int, name: str, held: Held, of: int = 2) -> Held:
    half = WIDTH // of
    spans = {
        W_IN: (2, [(rank * half, (rank + 1) * half), (WIDTH + rank * half, WIDTH + (rank + 1) * half)]),
        W_OUT: (1, [(rank * half, (rank + 1) * half)]),
        ATTENTION: (0, [(rank * 8 // of, (rank + 1) * 8 // of)]),
    }
    found = spans.get(parameter(name))
    return held if found is None or not held.shape else pick(held, *found, "tp")


def _rows_of_ranks(rank: int, name: str, held: Held, of: int = 2) -> Held:
    """As FSDP cuts: equal blocks of the first dimension, the last one shorter or empty; experts along their second."""
    if not held.shape:
        return held
    dim = 1 if held.kind == "experts" else 0
    block = -(-held.local[dim] // of)
    return keep(held, dim, min(rank * block, held.local[dim]), min((rank + 1) * block, held.local[dim]), "dp")


def _stages(rank: int, name: str, held: Held) -> Held | None:
    stage = 1 if parameter(name).startswith("blocks.1") else 0
    return held if rank == stage else None


def _ragged(rank: int, name: str, held: Held) -> Held:
    """Boxes that overlap without being equal: rank 0 has most rows, rank 1 all columns of the last."""
    if len(held.shape) != 2 or not held.shape[0]:
        return held
    return keep(held, 0, 0, held.shape[0] - 1, "dp") if rank == 0 else keep(held, 0, 2, held.shape[0], "dp")


def _four(first: Callable[..., Held], second: Callable[..., Held]) -> Cut:
    """A grid of 2 x 2 ranks: one cut along each direction."""

    def cut(rank: int, name: str, held: Held) -> Held:
        return second(rank % 2, name, first(rank // 2, name, held))

    return cut


_EP2 = _experts((0, 1, 2), (3, 4))

CUTS: dict[int, dict[str, Cut]] = {
    1: {"alone": _same, "alone, slots in another order": _experts((4, 2, 0, 1, 3, 2))},
    2: {
        "dp": _same,
        "ep uneven": _EP2,
        "ep uneven, scattered": _experts((4, 0), (2, 1, 3)),
        "replicas": _experts((0, 3, 1, 0), (2, 0, 4)),
        "tp": _tensor_parallel,
        "fsdp": _rows_of_ranks,
        "pp": _stages,
        "ragged": _ragged,
    },
    4: {
        "ep2 x tp2": _four(_EP2, _tensor_parallel),
        "fsdp2 x ep2": _four(_rows_of_ranks, _EP2),
        "ep4, one empty": _experts((0, 1), (2,), (), (3, 4)),
        "fsdp4": lambda rank, name, held: _rows_of_ranks(rank, name, held, 4),
        "replicas x tp2": _four(_experts((0, 3, 1, 0), (2, 0, 4)), _tensor_parallel),
    },
}


def held_by(cut: Cut, rank: int, seed: int | None = 0) -> Tensors:
    """What ``rank`` holds of ``logical(seed)``; None: the same room with nothing in it."""
    tensors = {}
    for name, (x, experts) in logical(seed or 0).items():
        held = cut(rank, name, whole(name, x.shape, "experts" if experts else "dense"))
        if held is None:
            continue
        local = torch.zeros(held.local, dtype=x.dtype)
        if seed is not None:
            for box in held.boxes:
                local[box.local_slices] = x[box.logical_slices]
        tensors[name] = (replace(held, name=parameter(name)), local)
    return tensors


def same(found: Tensors, wanted: Tensors) -> bool:
    """Whether two states of one rank are equal to the last bit."""
    return found.keys() == wanted.keys() and all(
        x.dtype == wanted[name][1].dtype and torch.equal(x, wanted[name][1]) for name, (_, x) in found.items()
    )


def everyone() -> Group:
    """All ranks of the process group; alone where there is none."""
    if not dist.is_initialized():
        return Group("all", (0,), 0, None, Watch())
    return Group("all", range(dist.get_world_size()), dist.get_rank(), dist.group.WORLD, Watch(dist.get_rank()))
