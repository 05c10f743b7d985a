"""Fused experts: every back end and instruction set against the dumb loops, outputs and all gradients, on hard loads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.ops.activations import ACTIVATIONS
from moesaic.ops.fused import Sources, as_they_are, experts_mlp
from moesaic.ops.permute import group_rows
from moesaic.ops.phases import listen
from tests.ops.experts_by_hand import Batch, assert_close, call, run, some_batch, truth
from tests.ops.kernels import BACKENDS, HAVE_COMPILER, every_back_end, id_of, using

# The first test of an instruction set may have to compile it, on a machine that has other things to do.
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(params=every_back_end(), ids=id_of)
def kind(request: Any) -> Iterator[tuple[str, torch.dtype, torch.dtype]]:
    """(back end, dtype of tokens, dtype of weights), with its instruction set in use."""
    backend, isa, dtype, w_dtype = request.param
    with using(isa):
        yield backend, dtype, w_dtype


@pytest.fixture(params=BACKENDS, ids=lambda pair: pair[1] if pair[0] == "kernel" else pair[0])
def backend(request: Any) -> Iterator[str]:
    with using(request.param[1]):
        yield request.param[0]


def check(kind: Any, expert_N: Any, T: int, E: int, D: int, H: int, **more: Any) -> list[Tensor | None]:
    """Output and gradients of random numbers under this load, checked, also without gradients."""
    backend, dtype, w_dtype = kind
    expert_N = torch.as_tensor(expert_N, dtype=torch.int64)
    batch = some_batch(expert_N, T, E, D, H, dtype, w_dtype, **more)
    got, want = run(batch, backend), truth(batch)
    assert_close(got, want, dtype)
    for ours, leaf in zip(got[1:], batch.leaves, strict=True):
        assert ours is not None
        assert ours.dtype == leaf.dtype
    with torch.no_grad():
        bare_TD = call(batch, backend)
    assert bare_TD.dtype == dtype
    assert_close([bare_TD], want[:1], dtype)
    for e in set(range(E)) - set(expert_N.tolist()):
        assert not any(t is None or t[e].any() for t in got[2:4]), "an expert without rows has a zero gradient"
    return got


def _load(rows: int, E: int) -> Tensor:
    return torch.randint(0, E, (rows,))


# ---- shapes, activations, loads ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(kind: Any, activation: str, gated: bool) -> None:
    check(kind, _load(40, 3), 20, 3, 24, 21, activation=activation, gated=gated)


@pytest.mark.parametrize(
    ("D", "H"),
    [(1, 1), (7, 33), (33, 7), (15, 17), (16, 16), (31, 64), (64, 31), (1, 40), (40, 1), (130, 65), (65, 131)],
)
def test_widths(kind: Any, D: int, H: int) -> None:
    for gated in (True, False):
        check(kind, _load(45, 3), 20, 3, D, H, gated=gated)


@pytest.mark.parametrize("rows", [1, 2, 5, 6, 7, 13, 14, 15, 28, 29, 255, 256, 257, 300])
def test_row_counts_of_one_expert(kind: Any, rows: int) -> None:
    check(kind, [0] * rows, max(rows // 2, 1), 1, 18, 10)


@pytest.mark.parametrize("count", range(1, 10))
def test_a_few_rows_and_one_more(kind: Any, count: int) -> None:
    """Up to FEW_ROWS rows of the busiest expert take a path of their own without gradients, more the other."""
    for D, H in ((37, 19), (64, 48)):
        check(kind, [0] * count + [2] * (count // 2) + [3] * count, 6, 4, D, H)


@pytest.mark.parametrize("rows", [1025, 2300])
def test_one_expert_has_nearly_all_rows(kind: Any, rows: int) -> None:
    """More than one depth block of the weights' gradient, and an odd last one."""
    dtype = kind[1]
    batch = some_batch(torch.tensor([1] * rows + [0]), 50, 3, 40, 24, *kind[1:])
    got = run(batch, kind[0])
    # Dense and in fp64: the loop over rows would take seconds.
    wide = some_batch(batch.expert_N, 1, 1, 1, 1, torch.float64)
    rounded = [batch.w_in.to(dtype).double(), batch.w_out.to(dtype).double()]
    wide.x_TD, wide.w_in, wide.w_out, wide.weight_N = batch.x_TD.double(), *rounded, batch.weight_N.double()
    wide.token_N, wide.dy_TD = batch.token_N, batch.dy_TD.double()
    assert_close(got, [t for t in run(wide, "tiles") if t is not None], dtype)


def test_more_rows_than_a_wave_holds(kind: Any) -> None:
    """Several waves of experts, empty ones between them, chunks of one expert on several tasks."""
    counts = [900, 0, 700, 600, 1, 0, 1500, 300]
    expert_N = torch.repeat_interleave(torch.arange(8), torch.tensor(counts))[torch.randperm(4001)]
    batch = some_batch(expert_N, 200, 8, 17, 9, *kind[1:])
    dtype = kind[1]
    want = some_batch(expert_N, 1, 8, 1, 1, torch.float64)
    rounded = [batch.w_in.to(dtype).double(), batch.w_out.to(dtype).double()]
    want.x_TD, want.w_in, want.w_out, want.weight_N = batch.x_TD.double(), *rounded, batch.weight_N.double()
    want.token_N, want.dy_TD = batch.token_N, batch.dy_TD.double()
    assert_close(run(batch, kind[0]), [t for t in run(want, "tiles") if t is not None], dtype)


def test_every_expert_by_every_token(kind: Any) -> None:
    token_N = torch.arange(6).repeat_interleave(4)
    check(kind, list(range(4)) * 6, 6, 4, 20, 12, token_N=token_N)


def test_more_experts_than_rows(kind: Any) -> None:
    check(kind, [90, 3, 3], 2, 100, 20, 12)


def test_rows_that_go_nowhere(kind: Any) -> None:
    got = check(kind, [3, 0, 3, 2, 3, 0] * 5, 12, 3, 20, 12)
    weight_N = got[4]
    assert weight_N is not None
    assert not weight_N.view(5, 6)[:, [0, 2, 4]].any()
    check(kind, [3] * 8, 4, 3, 20, 12)


def test_one_token_many_times_to_one_expert(kind: Any) -> None:
    check(kind, [1] * 20 + [0], 3, 2, 20, 12, token_N=torch.tensor([2] * 20 + [0]))


@pytest.mark.parametrize(("rows", "tokens"), [(0, 5), (0, 0)])
def test_no_rows(kind: Any, rows: int, tokens: int) -> None:
    got = check(kind, [], tokens, 3, 20, 12)
    assert not any(t is None or t.any() for t in got)


@pytest.mark.parametrize("repeats", [1, 4])
def test_tokens_that_no_row_reads_may_hold_anything(kind: Any, repeats: int) -> None:
    backend, dtype, w_dtype = kind
    expert_N = torch.tensor([0, 2, 1, 0, 2] * repeats)
    batch = some_batch(expert_N, 6, 2, 20, 12, dtype, w_dtype, token_N=torch.tensor([0, 1, 2, 3, 4] * repeats))
    want = truth(batch)  # expert 2 is nowhere: tokens 1 and 4 are unread, and so is 5
    batch.x_TD[[1, 4, 5]] = torch.nan
    batch.dy_TD[[1, 4, 5]] = torch.inf
    assert_close(run(batch, backend), want, dtype)
    with torch.no_grad():
        assert_close([call(batch, backend)], want[:1], dtype)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_with_its_token(kind: Any, bad: float) -> None:
    backend, dtype, w_dtype = kind
    for repeats in (1, 5):
        expert_N, token_N = torch.tensor([0, 1] * 6 * repeats), torch.arange(12).repeat(repeats) // 2
        batch = some_batch(expert_N, 6, 2, 20, 12, dtype, w_dtype, token_N=token_N)
        batch.x_TD[3, 2] = bad
        for keep in (True, False):
            with torch.set_grad_enabled(keep):
                y_TD = call(batch, backend, *(t.requires_grad_(keep) for t in batch.leaves))
            assert y_TD[3].isnan().any() or y_TD[3].isinf().any()
            assert y_TD[[0, 1, 2, 4, 5]].isfinite().all()


# ---- biases and gates: tiles alone --------------------------------------------------------------------------------------

_TILES = [case for case in every_back_end() if case[0] == "tiles"]


@pytest.mark.parametrize("case", _TILES, ids=id_of)
@pytest.mark.parametrize(("activation", "gated"), [("silu", True), ("relu", False), ("clamped_swiglu", True)])
@pytest.mark.parametrize("load", [[0, 1, 2, 2, 0, 4, 4, 4], [4] * 8, [3, 3, 1], [0] * 70 + [2]], ids=str)
def test_biases(case: Any, activation: str, gated: bool, load: list[int]) -> None:
    """Experts 1 to 3 empty at times, 4 is nowhere: such rows stay zero although no bias is."""
    backend, _, dtype, w_dtype = case
    got = check((backend, dtype, w_dtype), load, 6, 4, 20, 12, activation=activation, gated=gated, bias=True)
    for e in set(range(4)) - set(load):
        assert not any(t is None or t[e].any() for t in got[5:])
    if load == [4] * 8:
        assert got[0] is not None
        assert not got[0].any()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_clamped_swiglu_on_both_sides_of_its_limits(dtype: torch.dtype, bias: bool) -> None:
    """In bf16 a number rounded across the limit has another gradient, rightly."""
    batch = some_batch(_load(40, 3), 20, 3, 24, 21, dtype, None, "clamped_swiglu", bias=bias)
    batch.x_TD = batch.x_TD * 8
    pre = batch.x_TD[batch.token_N] @ batch.w_in[0]
    assert (pre > 7).any()
    assert (pre < -7).any()
    assert_close(run(batch, "tiles"), truth(batch), dtype)


@pytest.mark.parametrize("needs", [tuple(n == m for m in range(6)) for n in range(6)])
def test_biases_get_gradients_only_where_needed(needs: tuple[bool, ...]) -> None:
    batch = some_batch(_load(30, 3), 10, 3, 20, 12, bias=True)
    every, some = run(batch, None), run(batch, None, needs)
    for need, ours, theirs in zip((True, *needs), some, every, strict=True):
        assert (ours is not None) == need
        if ours is not None and theirs is not None:
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("bias", [False, True])
def test_tiles_cast_wide_weights_to_the_same_numbers(bias: bool) -> None:
    """Without gradients only those of experts that have rows; with gradients all at once."""
    batch = some_batch(torch.tensor([0, 2, 2, 5]), 3, 6, 20, 12, torch.bfloat16, torch.float32, bias=bias)
    with torch.no_grad():
        few = call(batch, "tiles")
    assert torch.equal(run(batch, "tiles")[0], few)  # type: ignore[arg-type]


def test_a_bias_sums_more_rows_than_bf16_counts() -> None:
    """Every row adds 1: a bf16 sum would stop at 256."""
    batch = some_batch(torch.zeros(3000, dtype=torch.int64), 3000, 1, 4, 2, torch.bfloat16, torch.float32, bias=True)
    batch.token_N, batch.weight_N, batch.dy_TD = torch.arange(3000), torch.ones(3000), torch.ones_like(batch.dy_TD)
    db_out = run(batch, "tiles")[6]
    assert db_out is not None
    assert (db_out == 3000).all()


def test_biases_that_do_not_fit_are_refused() -> None:
    batch = some_batch(_load(30, 3), 10, 3, 20, 12, bias=True)
    assert batch.b_in is not None
    assert batch.b_out is not None
    leaves = batch.leaves[:4]
    for b_in, b_out in (
        (None, batch.b_out),
        (batch.b_in, None),
        (batch.b_in[:2], batch.b_out),
        (batch.b_out, batch.b_in),
    ):
        with pytest.raises(ValueError, match="experts need biases"):
            call(batch, "tiles", *leaves, b_in, b_out)  # type: ignore[arg-type]
    for changed in (batch, some_batch(_load(30, 3), 10, 3, 20, 12, activation="clamped_swiglu")):
        if HAVE_COMPILER:
            with pytest.raises(ConfigError, match='knows neither biases nor "clamped_swiglu"; use backend="auto"'):
                call(changed, "kernel")


# ---- autograd ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("needs", [tuple(n == m for m in range(4)) for n in range(4)] + [(False, True, False, True)])
def test_gradients_only_where_needed(kind: Any, needs: tuple[bool, ...]) -> None:
    batch = some_batch(_load(30, 3), 10, 3, 20, 12, *kind[1:])
    every, some = run(batch, kind[0]), run(batch, kind[0], needs)
    for need, ours, theirs in zip((True, *needs), some, every, strict=True):
        assert (ours is not None) == need
        if ours is not None and theirs is not None:
            assert torch.equal(ours, theirs)


def test_a_second_backward_and_added_gradients(backend: str) -> None:
    batch = some_batch(_load(30, 3), 10, 3, 20, 12)
    leaves = [t.requires_grad_() for t in batch.leaves]
    y_TD = call(batch, backend, *leaves)
    first = torch.autograd.grad(y_TD, leaves, batch.dy_TD, retain_graph=True)
    again = torch.autograd.grad(y_TD, leaves, batch.dy_TD)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y_TD, leaves, batch.dy_TD)


def test_weights_changed_between_forward_and_backward_are_noticed(backend: str) -> None:
    batch = some_batch(_load(30, 3), 10, 3, 20, 12)
    leaves = [t.requires_grad_() for t in batch.leaves]
    y_TD = call(batch, backend, *leaves)
    with torch.no_grad():
        batch.w_out.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y_TD.sum().backward()


def test_layouts_do_not_matter(backend: str) -> None:
    batch = some_batch(_load(30, 3), 10, 3, 20, 12)
    want = run(batch, backend)
    strided = Batch(**vars(batch))
    strided.x_TD = batch.x_TD.T.contiguous().T
    strided.w_in, strided.w_out = (w.mT.contiguous().mT for w in (batch.w_in, batch.w_out))
    strided.weight_N = torch.stack([batch.weight_N, batch.weight_N], dim=1)[:, 0]
    strided.token_N = torch.stack([batch.token_N, batch.token_N], dim=1)[:, 0]
    strided.dy_TD = batch.dy_TD.T.contiguous().T
    leaves = [t.requires_grad_() for t in strided.leaves]
    y_TD = call(strided, backend, *leaves)
    found = [y_TD.detach(), *torch.autograd.grad(y_TD, leaves, strided.dy_TD)]
    assert all(ours is not None and torch.equal(ours, theirs) for ours, theirs in zip(want, found, strict=True))
    # An offset into a larger tensor is aligned to one float only.
    for name in ("x_TD", "w_in", "w_out"):
        flat = getattr(batch, name).flatten()
        setattr(strided, name, torch.cat([flat.new_zeros(1), flat])[1:].view(getattr(batch, name).shape))
    for ours, theirs in zip(run(strided, backend), want, strict=True):
        assert ours is not None
        assert theirs is not None
        assert torch.equal(ours, theirs)


def test_expanded_gradients(backend: str) -> None:
    batch = some_batch(_load(30, 3), 10, 3, 20, 12)
    leaves = [t.requires_grad_() for t in batch.leaves]
    found = torch.autograd.grad(call(batch, backend, *leaves).sum(), leaves)
    batch.dy_TD = torch.ones(10, 20)
    assert all(torch.equal(a, b) for a, b in zip(found, run(batch, backend)[1:], strict=True) if b is not None)


def test_gradients_by_finite_differences() -> None:
    for activation, gated in (("silu", True), ("gelu", False), ("gelu_tanh", True), ("clamped_swiglu", True)):
        bias = activation in ("gelu", "clamped_swiglu")
        batch = some_batch(
            torch.tensor([0, 2, 1, 0, 3, 0]), 4, 3, 5, 3, torch.float64, None, activation, gated, bias=bias
        )
        leaves = [t.requires_grad_() for t in batch.leaves]
        assert torch.autograd.gradcheck(lambda *leaves, b=batch: call(b, "tiles", *leaves), leaves)


def test_weight_dtypes_other_than_fp32(backend: str) -> None:
    """A plan may weigh rows in fp64 beside fp32 tokens, or in bf16: the kernels read floats all the same."""
    batch = some_batch(_load(30, 3), 10, 3, 20, 12)
    batch.weight_N = batch.weight_N.bfloat16().float()
    want = call(batch, backend)
    for dtype in (torch.float64, torch.bfloat16):
        batch.weight_N = batch.weight_N.to(dtype)
        assert torch.equal(call(batch, backend), want)
    batch.weight_N = batch.weight_N.double().requires_grad_()
    call(batch, backend).sum().backward()
    assert batch.weight_N.grad is not None
    assert batch.weight_N.grad.dtype == torch.float64
    batch.weight_N = batch.weight_N.detach()
    batch.token_N = batch.token_N.to(torch.int32)
    assert torch.equal(call(batch, backend), want)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_the_default_dtype_does_not_matter(backend: str, default: torch.dtype) -> None:
    batch = some_batch(_load(30, 3), 10, 3, 20, 12, torch.bfloat16)
    want = run(batch, backend)
    torch.set_default_dtype(default)
    got = run(batch, backend)
    assert all(a is not None and b is not None and torch.equal(a, b) for a, b in zip(got, want, strict=True))


# ---- refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", ["x_TD", "w_in", "w_out", "weight_N", "token_N", "counts", "gated", "flat"])
def test_shapes_that_do_not_fit_are_refused(backend: str, wrong: str) -> None:
    """In words: C would read past the end."""
    batch = some_batch(_load(30, 3), 10, 3, 20, 12)
    order_N, _, counts_E = group_rows(batch.expert_N, 3)
    if wrong in ("x_TD", "w_in", "w_out"):
        setattr(batch, wrong, getattr(batch, wrong)[..., :-1])
    elif wrong in ("weight_N", "token_N"):
        setattr(batch, wrong, getattr(batch, wrong)[:-1])
    x_TD = batch.x_TD.flatten() if wrong == "flat" else batch.x_TD
    counts_E = counts_E[:2] if wrong == "counts" else counts_E
    sources = Sources(batch.token_N, batch.weight_N, order_N)
    with pytest.raises(ValueError, match="experts need x"):
        experts_mlp(x_TD, batch.w_in, batch.w_out, counts_E, sources, gated=wrong != "gated", backend=backend)  # type: ignore[arg-type]


@pytest.mark.parametrize("rows", [6, 60])
@pytest.mark.parametrize(
    "wrong", ["token too high", "token below 0", "place too high", "place below 0", "counts", "negative"]
)
def test_rows_that_point_outside_are_refused(backend: str, wrong: str, rows: int) -> None:
    batch = some_batch(torch.arange(rows) % 3, 10, 3, 20, 12)
    order_N, _, counts_E = group_rows(batch.expert_N, 3)
    place, outside = {"token too high": (batch.token_N, 10), "token below 0": (batch.token_N, -1)}.get(
        wrong, (order_N, rows if wrong == "place too high" else -1)
    )
    if wrong == "counts":
        counts_E[2] += 1
    elif wrong == "negative":
        counts_E[:2] += torch.tensor([-rows, rows])
    else:
        place[rows // 2] = outside
    if backend == "tiles" and wrong in ("place below 0", "counts", "negative"):
        pytest.skip("PyTorch's indexing counts from the end, or stops early")
    with pytest.raises((ValueError, IndexError)):
        experts_mlp(batch.x_TD, batch.w_in, batch.w_out, counts_E, Sources(batch.token_N, batch.weight_N, order_N),
                    backend=backend)  # type: ignore[arg-type]  # fmt: skip


def test_rows_grouped_already(backend: str) -> None:
    batch = some_batch(torch.tensor([0, 0, 1, 3, 3, 3]), 6, 4, 20, 12, token_N=torch.arange(6))
    batch.weight_N = torch.ones(6)
    counts_E = torch.tensor([2, 1, 0, 3])
    y_TD = experts_mlp(batch.x_TD, batch.w_in, batch.w_out, counts_E, as_they_are(batch.x_TD), backend=backend)  # type: ignore[arg-type]
    assert torch.equal(y_TD, call(batch, backend))


def test_phases_are_reported(backend: str) -> None:
    batch = some_batch(_load(300, 3), 100, 3, 40, 32)
    with listen() as seconds:
        run(batch, backend)
    assert {"gather", "products", "activation", "combine"} <= seconds.keys()
    assert min(seconds.values()) >= 0
    assert sum(seconds.values()) > 0
