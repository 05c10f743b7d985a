"""The trace on disk: bitwise there and back, atomic, and in words when a file is not one."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.utils import _pytree

from moesaic.errors import CheckpointError, ConfigError, MoesaicError
from moesaic.plan import (
    Gate,
    RoutingPlan,
    SoftPlan,
    TraceWriter,
    drop_over_capacity,
    from_rows,
    from_topk,
    load_trace,
    save_trace,
)


def _same(a: RoutingPlan | SoftPlan, b: RoutingPlan | SoftPlan) -> bool:
    ours, shape_a = _pytree.tree_flatten(a)
    theirs, shape_b = _pytree.tree_flatten(b)
    return shape_a == shape_b and all(
        x.dtype == y.dtype and torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
        for x, y in zip(ours, theirs, strict=True)
    )


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(
    seed=st.integers(0, 999),
    T=st.integers(0, 9),
    E=st.sampled_from([1, 3, 255, 256, 40_000]),
    k=st.integers(1, 3),
    kind=st.sampled_from(["topk", "rows", "soft"]),
    extras=st.booleans(),
)
def test_bitwise_round_trip(tmp_path: Path, seed: int, T: int, E: int, k: int, kind: str, extras: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    k = min(k, E)
    weight_TK = torch.randn(T, k, generator=generator)
    expert_TK = torch.randint(0, E + 1, (T, k), generator=generator)
    valid_T = torch.rand(T, generator=generator) > 0.5 if extras else None
    logits_TE = torch.randn(T, E if E < 1000 else 3, generator=generator)
    gate = Gate(logits_TE, logits_TE.softmax(1)) if extras else None
    plan: RoutingPlan | SoftPlan
    if kind == "topk":
        plan = from_topk(
            expert_TK, weight_TK, E, valid_T=valid_T, gate=gate, input_weight_TK=weight_TK if extras else None
        )
        plan = drop_over_capacity(plan, 1) if extras else plan
    elif kind == "rows":
        token_N = torch.randint(0, max(T, 1), (T * k,), generator=generator)
        plan = from_rows(token_N, expert_TK.flatten(), weight_TK.flatten(), T, E, valid_T=valid_T, gate=gate)
    else:
        plan = SoftPlan(logits_TE.softmax(0)[None], logits_TE.softmax(1)[None], logits_TE.shape[1], valid_T, gate)
    # Layers of one forward share valid_T and possibly more.
    save_trace(tmp_path / "t.safetensors", {3: plan, 11: plan}, {"step": 7, "text": "ä"}, keep_gate=True)
    plans, info = load_trace(tmp_path / "t.safetensors")
    assert info == {"step": 7, "text": "ä"}
    assert list(plans) == [3, 11]
    assert _same(plans[3], plan)
    assert _same(plans[11], plan)


def _plan() -> RoutingPlan:
    probs_TE = torch.randn(6, 4).softmax(1).requires_grad_()
    top = probs_TE.topk(2, dim=1)
    return from_topk(top.indices, top.values, 4, gate=Gate(probs_TE, probs_TE))


def test_scores_are_kept_on_request_only_and_ids_are_small(tmp_path: Path) -> None:
    save_trace(tmp_path / "t.safetensors", {0: _plan()})
    (plan,) = load_trace(tmp_path / "t.safetensors")[0].values()
    assert plan.gate is None
    tensors = load_file(tmp_path / "t.safetensors")
    assert set(tensors) == {"0/expert", "0/weight"}
    assert tensors["0/expert"].dtype == torch.uint8


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: b"",
        lambda raw: raw[:40],
        lambda raw: raw[:-5],
        lambda raw: b"hello" * 50,
        lambda raw: (2**60).to_bytes(8, "little") + raw[8:],
        lambda raw: raw.replace(b"moesaic-trace-1", b"moesaic-trace-9"),
        lambda raw: raw.replace(b'"0/weight"', b'"0/weighs"'),
        lambda raw: raw.replace(b'num_experts\\": 4', b'num_experts\\": 2'),
        lambda raw: raw.replace(b'num_tokens\\": 6', b'num_tokens\\": 5'),
        lambda raw: raw.replace(b'per_token\\"', b'per_tokes\\"'),
        lambda raw: raw.replace(b'{\\"plans\\"', b'[\\"plans\\"'),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, damage: Any) -> None:
    path = tmp_path / "t.safetensors"
    save_trace(path, {0: _plan()})
    raw = path.read_bytes()
    assert damage(raw) != raw
    path.write_bytes(damage(raw))
    with pytest.raises(CheckpointError) as error:
        load_trace(path)
    assert str(path) in str(error.value)


def test_foreign_and_missing_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="There is no routing trace"):
        load_trace(tmp_path / "none.safetensors")
    with pytest.raises(CheckpointError, match="There is no routing trace"):
        load_trace(tmp_path)
    save_file({"weight": torch.ones(3)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="not a routing trace"):
        load_trace(tmp_path / "model.safetensors")
    save_file({"weight": torch.ones(3)}, tmp_path / "half.safetensors", {"format": "moesaic-trace-1"})
    with pytest.raises(CheckpointError, match="damaged header"):
        load_trace(tmp_path / "half.safetensors")


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "t.safetensors"
    save_trace(path, {0: _plan()}, {"step": 1})
    before = path.read_bytes()

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(MoesaicError, match="disk is full"):
            save_trace(path, {0: _plan()}, {"step": 2})
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(MoesaicError, match="disk is full"):
            save_trace(path, {0: _plan()}, {"step": 2})
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["t.safetensors"]


def test_nobody_sees_half_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "t.safetensors"
    seen: list[bool] = []
    replace = os.replace

    def watch(source: Any, target: Any) -> None:
        seen.append(Path(target).exists())
        assert len(load_trace(source)[0]) == 1  # complete before it gets its name
        replace(source, target)

    monkeypatch.setattr(os, "replace", watch)
    save_trace(path, {0: _plan()})
    assert seen == [False]
    assert path.exists()


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(MoesaicError, match="Cannot write to"):
        save_trace(tmp_path / "run" / "t.safetensors", {0: _plan()})


def test_writer_keeps_every_nth_step(tmp_path: Path) -> None:
    writer = TraceWriter(tmp_path / "trace", every=3)
    assert [writer.add(step, {0: _plan()}, lr=0.5) for step in range(7)] == [
        True,
        False,
        False,
        True,
        False,
        False,
        True,
    ]
    assert sorted(p.name for p in (tmp_path / "trace").iterdir()) == [
        f"step-{step:08d}.safetensors" for step in (0, 3, 6)
    ]
    assert load_trace(tmp_path / "trace" / "step-00000003.safetensors")[1] == {"step": 3, "lr": 0.5}
    with pytest.raises(ConfigError, match="every=0"):
        TraceWriter(tmp_path, every=0)


def test_the_header_is_readable_without_this_package(tmp_path: Path) -> None:
    save_trace(tmp_path / "t.safetensors", {0: _plan()}, {"step": 1})
    raw = (tmp_path / "t.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    trace = json.loads(header["__metadata__"]["trace"])
    assert trace["plans"]["0"] == {"kind": "rows", "num_tokens": 6, "num_experts": 4, "per_token": 2}
