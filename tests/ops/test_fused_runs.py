"""Fused experts in company: threads, runs, compilation, recomputation, copies, several callers at once, forked children."""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moesaic.experts import MoE
from moesaic.ops import reference
from moesaic.ops.permute import group_rows
from tests.ops.experts_by_hand import Batch, call, run, some_batch
from tests.ops.kernels import BACKENDS, ISAS, KERNELS, needs_compiler, using

# The first test of an instruction set may have to compile it, on a machine that has other things to do.
pytestmark = pytest.mark.timeout(600)

DTYPES = [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)]


@pytest.fixture(params=BACKENDS, ids=lambda pair: pair[1] if pair[0] == "kernel" else pair[0])
def backend(request: Any) -> Iterator[str]:
    with using(request.param[1]):
        yield request.param[0]


@pytest.fixture(params=KERNELS)
def kernel(request: Any) -> Iterator[str]:
    with using(request.param[1]):
        yield request.param[0]


def _equal(got: list[Tensor | None], want: list[Tensor | None]) -> bool:
    return all(a is not None and b is not None and torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("dtypes", DTYPES)
def test_bits_do_not_depend_on_threads_or_run(kernel: str, dtypes: Any) -> None:
    """One expert with more rows than a chunk and a depth block, so that its tasks are cut, and an odd width."""
    counts = torch.tensor([1500, 40, 0, 700, 3])
    big = some_batch(torch.repeat_interleave(torch.arange(5), counts), 300, 5, 77, 45, *dtypes)
    few = some_batch(torch.tensor([0, 0, 4, 1, 1, 1, 3]), 4, 5, 200, 90, *dtypes)
    torch.set_num_threads(1)
    want, want_few = run(big, kernel), call(few, kernel)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for _ in range(3):
            assert _equal(run(big, kernel), want)
            assert torch.equal(call(few, kernel), want_few)


def test_grad_mode_changes_little(kernel: str) -> None:
    """With many rows it is the same path and the same bits; with few another one, checked against the loops elsewhere."""
    batch = some_batch(torch.arange(60) % 3, 20, 3, 37, 19)
    with torch.no_grad():
        bare_TD = call(batch, kernel)
    assert torch.equal(run(batch, kernel)[0], bare_TD)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtypes", DTYPES)
def test_under_compile(backend: str, dtypes: Any) -> None:
    batch = some_batch(torch.arange(40) % 3, 20, 4, 16, 12, *dtypes)
    want = run(batch, backend)
    compiled = torch.compile(lambda *leaves: call(batch, backend, *leaves), fullgraph=True, backend="aot_eager")
    leaves = [t.clone().requires_grad_() for t in batch.leaves]
    y_TD = compiled(*leaves)
    y_TD.backward(batch.dy_TD)
    assert _equal([y_TD.detach(), *(t.grad for t in leaves)], want)


def test_opaque_operators_keep_the_rules_of_torch(backend: str) -> None:
    """Shapes without data, autograd registration and no hidden mutation, by PyTorch's own checks."""
    batch = some_batch(torch.arange(12) % 3, 5, 4, 16, 12)
    order_N, _, counts_E = group_rows(batch.expert_N, 4)
    leaves = [t.requires_grad_() for t in batch.leaves]
    args = (*leaves, None, None, batch.token_N, order_N, counts_E, "silu", True, backend == "kernel")
    torch.library.opcheck(torch.ops.moesaic.experts_mlp.default, args)


def test_the_operator_with_biases_keeps_them_too() -> None:
    batch = some_batch(torch.arange(12) % 3, 5, 4, 16, 12, bias=True)
    order_N, _, counts_E = group_rows(batch.expert_N, 4)
    leaves = [t.requires_grad_() for t in batch.leaves]
    args = (*leaves, batch.token_N, order_N, counts_E, "clamped_swiglu", True, False)
    torch.library.opcheck(torch.ops.moesaic.experts_mlp.default, args)


def test_biases_under_compile() -> None:
    batch = some_batch(torch.arange(40) % 3, 20, 4, 16, 12, torch.bfloat16, torch.float32, "clamped_swiglu", bias=True)
    want = run(batch, "tiles")
    compiled = torch.compile(lambda *leaves: call(batch, "tiles", *leaves), fullgraph=True, backend="aot_eager")
    leaves = [t.clone().requires_grad_() for t in batch.leaves]
    y_TD = compiled(*leaves)
    y_TD.backward(batch.dy_TD)
    assert _equal([y_TD.detach(), *(t.grad for t in leaves)], want)


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_gives_the_same_bits(backend: str, reentrant: bool) -> None:
    batch = some_batch(torch.arange(30) % 3, 10, 3, 20, 12)
    leaves = [t.clone().requires_grad_() for t in batch.leaves]
    y_TD = checkpoint(lambda *inputs: call(batch, backend, *inputs), *leaves, use_reentrant=reentrant)
    assert isinstance(y_TD, Tensor)
    y_TD.backward(batch.dy_TD)
    assert _equal([y_TD.detach(), *(t.grad for t in leaves)], run(batch, backend))


def test_autocast_leaves_the_experts_alone(backend: str) -> None:
    batch = some_batch(torch.arange(30) % 3, 10, 3, 20, 12)
    want = run(batch, backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run(batch, backend)
    assert _equal(got, want)


def test_a_copied_layer_is_the_layer(backend: str) -> None:
    layer = MoE(16, 8, 4, 2, backend=backend)  # type: ignore[arg-type]
    x_TD = torch.randn(9, 16)
    y_TD = layer(x_TD)[0]
    y_TD.sum().backward()
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x_TD)[0], y_TD)
    fresh = MoE(16, 8, 4, 2, backend=backend)  # type: ignore[arg-type]
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x_TD)[0], y_TD)


# ---- several callers -----------------------------------------------------------------------------------------------------


def _sizes(n: int) -> Batch:
    torch.manual_seed(n)
    return some_batch(torch.randint(0, 3, (40 + 300 * n,)), 30, 3, 20 + 13 * n, 12 + 7 * n)


@pytest.mark.parametrize("threads", [1, 2])
def test_python_threads_at_once(kernel: str, threads: int) -> None:
    """Buffers belong to threads: callers of different sizes must not meet in one."""
    torch.set_num_threads(threads)
    batches = [_sizes(n) for n in range(3)]
    wants = [run(batch, kernel) for batch in batches]
    wrong: list[int] = []

    def work(n: int) -> None:
        torch.set_num_threads(threads)
        for _ in range(15):
            if not _equal(run(batches[n], kernel), wants[n]):
                wrong.append(n)

    workers = [threading.Thread(target=work, args=(n,)) for n in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads memory from /proc")
def test_buffers_end_with_their_thread(kernel: str) -> None:
    batch = some_batch(torch.arange(600) % 2, 50, 2, 64, 32)

    def pages() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1])

    def once() -> None:
        worker = threading.Thread(target=run, args=(batch, kernel))
        worker.start()
        worker.join()

    for _ in range(3):
        once()
    before = pages()
    for _ in range(20):
        once()
    # A thread's buffers are some 10 MiB: kept, they would be 200.
    assert (pages() - before) * os.sysconf("SC_PAGE_SIZE") < 60 << 20


def _child(batch: Batch, want: list[Tensor | None], kernel: str) -> int:
    torch.set_num_threads(1)
    return 0 if _equal(run(batch, kernel), want) else 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("threads", [1, 2])
def test_a_forked_child_on_one_thread(kernel: str, threads: int) -> None:
    """As a data worker does: the parent has used threads, the child must stay with one (the pool did not survive)."""
    batch = _sizes(1)
    torch.set_num_threads(1)
    want = run(batch, kernel)
    torch.set_num_threads(threads)
    assert _equal(run(batch, kernel), want)
    child = os.fork()
    if not child:
        os._exit(_child(batch, want, kernel))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# ---- grouping ------------------------------------------------------------------------------------------------------------


@needs_compiler
@given(st.integers(1, 9).flatmap(lambda E: st.tuples(st.just(E), st.lists(st.integers(0, E), max_size=40))))
def test_grouping_is_the_specification(case: tuple[int, list[int]]) -> None:
    E, ids = case
    expert_N = torch.tensor(ids, dtype=torch.int64)
    want = reference.group_rows(expert_N, E)
    for isa in ("off", ISAS[0], ISAS[-1]):
        with using(isa):
            for dtype in (torch.int64, torch.int32):
                got = group_rows(expert_N.to(dtype), E)
                assert got.order_N.tolist() == want[0].tolist()
                assert got.counts_E.tolist() == want[1].tolist()
                assert got.inverse_N[got.order_N].tolist() == list(range(len(ids)))
                assert {t.dtype for t in got} == {torch.int64}
            strided_N = torch.stack([expert_N, expert_N], dim=1)[:, 0]
            assert torch.equal(group_rows(strided_N, E).order_N, got.order_N)


@pytest.mark.parametrize(("ids", "said"), [([0, 4, 1], "0 to 4"), ([-1, 2], "-1 to 2"), ([2**40], str(2**40))])
def test_grouping_refuses_experts_that_are_not_there(kernel: str, ids: list[int], said: str) -> None:
    with pytest.raises(ValueError, match=f"experts in 0 to 3; got .*{said}"):
        group_rows(torch.tensor(ids), 3)
