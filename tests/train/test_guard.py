"""A step that is not finite stops before the update and says where it began."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.data.packing import Batch
from moesaic.errors import NonFiniteError
from moesaic.models import Decoder
from moesaic.train import loop
from moesaic.train.guard import check_finite
from moesaic.train.optim import OptimConfig, make_optimizer
from moesaic.train.snapshot import latest_snapshot
from moesaic.train.step import train_step
from tests.checkpoint.test_atomic import tree
from tests.models.tiny import lively, sparse
from tests.train.test_step import batch_of, rows_of
from tests.train.tiny_run import tiny_config, train


def refused(model: Decoder, batches: list[Batch] | None = None, clip: float = 1.0) -> str:
    """The message of a refused step; the weights are checked to be untouched."""
    optimizer = make_optimizer(model, OptimConfig(lr=0.1))
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(NonFiniteError) as caught:
        train_step(model, optimizer, batches or [batch_of(3)], lr=0.1, clip=clip, step=17)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.nan_to_num(nan=9.0), before[name].nan_to_num(nan=9.0)), name
    assert not optimizer.state
    assert str(caught.value).startswith("Step 17: ")
    assert "The weights were not updated; resume from the last checkpoint" in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["blocks.1.ffn.experts.w_out", "blocks.0.attention.wk.weight", "norm.weight"])
def test_a_broken_parameter_is_named(name: str, value: float) -> None:
    model = lively(sparse())
    with torch.no_grad():
        dict(model.named_parameters())[name].flatten()[3] = value
    message = refused(model)
    assert f"the parameter {name} already holds a non-finite value" in message
    assert "the loss is nan" in message or "the loss is inf" in message


def spoil(output: Any) -> Any:
    y = output[0] if isinstance(output, tuple) else output
    y = y.clone()
    y.view(-1)[5] = math.nan
    return (y, *output[1:]) if isinstance(output, tuple) else y


@pytest.mark.parametrize(
    "name", ["blocks.0.attention", "blocks.1.ffn", "blocks.1.norm2", "blocks.0.ffn.experts", "head"]
)
def test_the_layer_whose_output_went_wrong_first_is_named(name: str) -> None:
    model = lively(sparse())
    model.get_submodule(name).register_forward_hook(lambda _m, _a, output: spoil(output))
    assert f"the first non-finite value came out of {name}." in refused(model)
    assert len(model.head._forward_hooks) == (name == "head")  # its own hooks are gone again


@pytest.mark.parametrize("clip", [0.0, 1.0])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("name", "expected"),
    [("blocks.0", "blocks.0."), ("blocks.1", "blocks.1."), ("blocks.1.attention", "blocks.1.attention.")],
)
def test_a_gradient_that_alone_went_wrong_is_traced_to_the_deepest_layer_it_reached(
    name: str, expected: str, value: float, clip: float
) -> None:
    """Clipping by a NaN norm makes every gradient NaN; the guard must look before."""
    model = lively(sparse())
    model.get_submodule(name).register_forward_hook(lambda _m, _a, output: _bad_gradient(output, value))
    message = refused(model, clip=clip)
    assert "the gradient norm is" in message
    assert (
        f"outputs are finite, and the first non-finite gradient (from the head down) is that of {expected}" in message
    )


def _bad_gradient(output: Any, value: float) -> Any:
    y = output[0] if isinstance(output, tuple) else output
    if y.requires_grad:
        y.register_hook(lambda g: g + value)
    return output


def test_the_micro_batch_that_went_wrong_need_not_be_the_last() -> None:
    model = lively(sparse())
    whole = batch_of(4)
    poisoned = int(whole.ids_BS[0, 0])

    def spoil_one(_module: Any, args: tuple[Tensor, ...], output: Any) -> Any:
        return spoil(output) if bool((ids_seen[-1] == poisoned).any()) else output

    ids_seen: list[Tensor] = []
    model.register_forward_pre_hook(lambda _m, args: ids_seen.append(args[0]))
    model.blocks[1].attention.register_forward_hook(spoil_one)
    clean = rows_of(whole, 2, 4)
    clean.ids_BS[clean.ids_BS == poisoned] = (poisoned + 1) % 64
    assert "came out of blocks.1.attention." in refused(model, [rows_of(whole, 0, 2), clean])


def test_finite_numbers_pass_and_an_overflowing_sum_is_said_to_be_one() -> None:
    model = lively(sparse())
    check_finite(model, 1.0, 2.0, 1, lambda: pytest.fail("nothing to look for"))
    with pytest.raises(
        NonFiniteError, match="no layer's output or gradient is non-finite by itself, so a sum overflowed"
    ):
        check_finite(model, 1.0, math.inf, 1, lambda: None)


def test_a_run_that_fails_leaves_its_checkpoint_and_log_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    real: Callable[..., Any] = train_step
    checkpoints: list[dict[str, bytes]] = []

    def poisoned(model: Decoder, *args: Any, step: int, **more: Any) -> Any:
        if step == 17:
            checkpoints.append(tree(folder / "checkpoints"))
            with torch.no_grad():
                model.blocks[0].attention.wq.weight[0, 0] = math.nan
        return real(model, *args, step=step, **more)

    monkeypatch.setattr(loop, "train_step", poisoned)
    with pytest.raises(NonFiniteError, match="Step 17: the loss is nan; the parameter blocks.0.attention.wq.weight"):
        train(tiny_config(), folder)
    assert tree(folder / "checkpoints") == checkpoints[0]
    newest = latest_snapshot(folder)
    assert newest is not None
    assert newest.name == "step-00000014"
    monkeypatch.setattr(loop, "train_step", real)
    assert train(tiny_config(), folder, resume=True).reason == "done"
