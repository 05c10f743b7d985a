"""The layer benchmarks run, say what they promise in their JSON, and refuse to time layers that compute different things."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

BENCH = Path(__file__).parents[2] / "bench"
CPU = torch.device("cpu")


def peers_for(bench: Any, dtype: torch.dtype, load: str = "balanced", tokens: int = 40) -> tuple[Any, ...]:
    common, loads, peers = bench("common"), bench("loads"), bench("peers")
    shape = common.Shape(32, 16, 8, 2)
    weights = peers.draw_weights(shape, dtype, CPU)
    rng = torch.Generator().manual_seed(1)
    choice_TK = loads.draw_choice(load, tokens, shape.E, shape.k, rng)
    x_TD = loads.draw_input(weights.router_ED, choice_TK, rng).to(dtype)
    grad_TD = torch.randn(tokens, shape.D, generator=rng).to(dtype)
    return shape, weights, x_TD, grad_TD, choice_TK


# ---- the benchmarks ------------------------------------------------------------------------------------------------


def test_layer_tax(bench: Any, tmp_path: Path, run: Any) -> None:
    out = tmp_path / "tax.json"
    text, result = run(bench("layer_tax"), "--quick", "--hf", "none", "--out", str(out))
    assert "Targets" in text
    assert json.loads(out.read_text()) == result
    assert len(result["rows"]) == 2 * 2 * 2 * 2 * 2  # shapes, dtypes, tokens, loads, modes
    for row in result["rows"]:
        assert {"seconds", "tax", "tax_fastest_dense", "tflop_per_s", "skew", "errors", "left_out"} <= row.keys()
        assert (
            row["seconds"]["moesaic"]["min"] <= row["seconds"]["moesaic"]["median"] <= row["seconds"]["moesaic"]["max"]
        )
        assert row["errors"].keys() == {"moesaic"}
        assert ("split" in row) == (row["mode"] == "fw+bw" and row["tokens"] > 16)
    split = next(row["split"] for row in result["rows"] if "split" in row)
    assert {"total", "router", "rest"} <= split.keys()
    assert {target["target"] for target in result["targets"]} == {1, 2, 3, 4}


def test_layer_tax_with_hugging_face(bench: Any, run: Any) -> None:
    pytest.importorskip("transformers")
    options = ("--quick", "--dtypes", "fp32", "--loads", "zipf", "--modes", "fw+bw")
    _, result = run(bench("layer_tax"), *options)
    for row in result["rows"]:
        assert row["best_hf"] in row["times_faster_than"]
        assert row["times_faster_than"].keys() == {"hf eager", "hf batched_mm", "hf grouped_mm"}
        assert row["errors"].keys() == {"moesaic", "hf eager", "hf batched_mm", "hf grouped_mm"}
        assert row["skew"] > 1.2


def test_scaling(bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, run: Any) -> None:
    scaling, plot = bench("scaling"), tmp_path / "plot.svg"
    peak = {"parameters": 1000, "gradients": 1000, "peak": 5000}
    monkeypatch.setattr(scaling, "peak_of", lambda spec: peak)
    text, result = run(scaling, "--quick", "--hf", "none", "--plot", str(plot))
    assert "E 4 to 8: time" in text
    assert [(row["contender"], row["E"], row["dtype"]) for row in result["rows"]] == [
        (name, E, dtype) for dtype in ("fp32", "bf16") for name, E in (("moesaic", 4), ("moesaic", 8), ("dense", None))
    ]
    assert all(row["besides_gradients"] == 4000 and row["seconds"]["median"] > 0 for row in result["rows"])
    assert plot.read_text().startswith("<svg")


def test_memory_of_a_process(bench: Any) -> None:
    memory = bench("memory")
    T, D, H, E, k = 2048, 256, 128, 8, 2
    spec = memory.Spec("moesaic", D, H, E, k, "fp32", T, 1)
    found = memory.peak_of(spec)
    parameters = 4 * (3 * D * H * E + D * E)
    assert found["parameters"] == found["gradients"] == parameters
    assert memory.least_besides(spec) == 4 * (2 * T * D + T * k * 2 * H) + 4 * T * E
    # Nobody is below output, hidden and gradients; a factor above them is what the benchmark is there to tell.
    assert memory.least_besides(spec) * 0.5 < found["peak"] - parameters < memory.least_besides(spec) * 20


def test_memory_table(bench: Any, monkeypatch: pytest.MonkeyPatch, run: Any) -> None:
    memory = bench("memory")
    monkeypatch.setattr(memory, "peak_of", lambda spec: {"parameters": 100, "gradients": 100, "peak": 10**6})
    text, result = run(memory, "--quick", "--hf", "none")
    assert "besides" in text
    assert {row["contender"] for row in result["rows"]} == {"dense", "dense (moesaic)", "moesaic"}
    for row in result["rows"]:
        assert row["over"] == row["peak"] - row["minimum"]
        assert row["ratio"] == row["besides_gradients"] / row["minimum_besides_gradients"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--shapes", "8,8,2,4"), "k at most E"),
        (("--shapes", "8,8"), "four whole numbers"),
        (("--rounds", "0"), "whole number above 0"),
        (("--quick", "--out", "/nowhere/x.json"), "cannot be written"),
    ],
)
def test_bad_input_is_a_sentence(
    bench: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    sentence: str,
) -> None:
    common, tax = bench("common"), bench("layer_tax")
    monkeypatch.setattr(sys, "argv", ["layer_tax.py", *options])
    with pytest.raises(SystemExit) as stop:
        common.run_main(tax.main)
    assert stop.value.code == 2
    assert sentence in capsys.readouterr().err


def test_command_line() -> None:
    """As a user starts it: its own process, a sentence instead of a traceback."""
    command = [sys.executable, str(BENCH / "scaling.py"), "--k", "9", "--experts", "8"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 2
    assert done.stderr.strip() == "scaling.py: --k 9 experts per token do not fit into 8 experts."


# ---- the check -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("load", ["balanced", "zipf"])
def test_agreement_passes_the_same_layer(bench: Any, dtype: torch.dtype, load: str) -> None:
    agreement, peers = bench("agreement"), bench("peers")
    shape, weights, x_TD, grad_TD, _ = peers_for(bench, dtype, load)
    truth = agreement.reference(x_TD, weights, shape.k, grad_TD)
    errors = agreement.check("ours", peers.moesaic_peer(shape, weights), x_TD, truth, grad_TD)
    assert errors.keys() == {"output", "x", "router", "w_in", "w_out"}


def test_agreement_of_hugging_face(bench: Any) -> None:
    pytest.importorskip("transformers")
    agreement, peers = bench("agreement"), bench("peers")
    shape, weights, x_TD, grad_TD, _ = peers_for(bench, torch.float32)
    truth = agreement.reference(x_TD, weights, shape.k, grad_TD)
    for name, peer in peers.hf_peers(shape, weights).items():
        agreement.check(name, peer, x_TD, truth, grad_TD)


@pytest.mark.parametrize("what", ["gate and up swapped", "one expert", "router", "k"])
def test_agreement_fails_when_layers_differ(bench: Any, what: str) -> None:
    common, agreement, peers = bench("common"), bench("agreement"), bench("peers")
    shape, weights, x_TD, grad_TD, choice_TK = peers_for(bench, torch.float32)
    truth = agreement.reference(x_TD, weights, shape.k, grad_TD)
    w_in, router_ED = weights.w_in.clone(), weights.router_ED.clone()
    if what == "gate and up swapped":
        w_in = w_in.roll(shape.H, dims=2)
    elif what == "one expert":
        w_in[int(choice_TK[0, 0])] *= 1.01
    elif what == "router":
        router_ED = router_ED.roll(1, dims=0)
    else:
        shape = common.Shape(shape.D, shape.H, shape.E, 3)
    other = peers.moesaic_peer(shape, peers.Weights(router_ED, w_in, weights.w_out))
    with pytest.raises(common.BenchError, match="does not compute the same layer"):
        agreement.check("other", other, x_TD, truth, grad_TD)


@pytest.mark.parametrize("name", ["x", "router", "w_in", "w_out"])
def test_agreement_fails_on_a_wrong_gradient_alone(bench: Any, name: str) -> None:
    common, agreement, peers = bench("common"), bench("agreement"), bench("peers")
    shape, weights, x_TD, grad_TD, _ = peers_for(bench, torch.float32)
    truth = agreement.reference(x_TD, weights, shape.k, grad_TD)
    peer = peers.moesaic_peer(shape, weights)
    if name == "x":
        wrong = peers.Peer(peer.module, lambda x: peer.forward(x * 2 - x.detach()), peer.gradients)
    else:
        wrong = peers.Peer(peer.module, peer.forward, lambda: {**peer.gradients(), name: None})
    with pytest.raises(common.BenchError, match=f"gradient of {name}"):
        agreement.check("wrong", wrong, x_TD, truth, grad_TD)


# ---- the parts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("E", "k"), [(8, 2), (16, 4), (6, 4)])
def test_loads_are_reached_by_a_real_router(bench: Any, E: int, k: int) -> None:
    loads = bench("loads")
    rng = torch.Generator().manual_seed(0)
    router_ED = loads.draw_router(E, 32, rng)
    for load in loads.LOADS:
        choice_TK = loads.draw_choice(load, 96, E, k, rng)
        assert all(len(set(row)) == k for row in choice_TK.tolist())
        x_TD = loads.draw_input(router_ED, choice_TK, rng).bfloat16()
        top_TK = (x_TD.float() @ router_ED.T).topk(k, dim=-1).indices
        assert torch.equal(top_TK.sort(dim=-1).values, choice_TK.sort(dim=-1).values)
        skew = loads.skew(choice_TK.flatten().bincount(minlength=E))
        assert skew == 1.0 if load == "balanced" else skew > 1.2


def test_turns_are_interleaved_and_slow_contenders_sit_out(bench: Any) -> None:
    common = bench("common")
    log: list[str] = []

    class Fake:
        def __init__(self, name: str) -> None:
            self.name = name

        def prepare(self) -> None:
            pass

        def run(self) -> None:
            log.append(self.name)

        def rest(self) -> None:
            pass

    class FakeClock:
        def seconds(self, call: Any) -> float:
            call()
            return {"a": 0.1, "b": 0.2, "slow": 30.0}[log[-1]]

    contenders = {name: Fake(name) for name in ("a", "b", "slow")}
    found = common.interleave(contenders, 3, FakeClock(), block_s=0.05, limit_s=60.0, warm_calls=1)
    assert log == ["a", "b", "slow", "a", "b", "slow", "b", "slow", "a", "a", "b"]
    assert found == {"a": [0.1] * 3, "b": [0.2] * 3, "slow": [30.0, 30.0, None]}
    assert common.ratio(found["slow"], found["a"])["rounds"] == 2
    assert common.ratio(found["b"], found["a"])["median"] == pytest.approx(2.0)


def test_ticks_frame_the_data(bench: Any) -> None:
    loglog = bench("loglog")
    assert loglog.ticks(3.0, 400.0) == [2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0]
    for low, high in ((0.7, 0.9), (1.0, 1.0), (12.0, 5000.0)):
        found = loglog.ticks(low, high)
        assert found[0] <= low <= high <= found[-1]
        assert len(found) > 1
