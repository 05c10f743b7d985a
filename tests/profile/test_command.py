"""``moesaic profile`` on tiny models: a table, one JSON document, a page, a picture, and a sentence for every mistake."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

import moesaic
from moesaic.models import build_model
from moesaic.profile import measure, run
from tests.command import call, make_project, one_sentence
from tests.models.tiny import sparse, tiny

QUICK = ("--batch", "2", "--seq", "16", "--prompt", "5", "--new-tokens", "3", "--rounds", "2", "--device", "cpu")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A project to stand in, and a machine that is measured at once."""
    make_project(tmp_path, dtype="fp32")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(measure, "matmul_gflops", lambda dtype, device: 10.0)
    monkeypatch.setattr(measure, "read_gb_per_s", lambda device: 5.0)


def profile_of(capsys: pytest.CaptureFixture[str], *args: str) -> dict[str, Any]:
    done = call(capsys, "profile", *args, *QUICK, "--json")
    assert done.status == 0, done
    value: dict[str, Any] = json.loads(done.out)
    return value


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_json(capsys: pytest.CaptureFixture[str], dtype: str) -> None:
    found = profile_of(capsys, "tiny.json", "--dtype", dtype)
    assert (found["name"], found["work"]["batch"], found["work"]["dtype"]) == ("tiny.json", 2, dtype)
    assert (found["gflops"], found["read_gb_per_s"]) == (10.0, 5.0)
    assert found["rows_per_token"] == [2.0, 2.0]
    for name in ("training", "prompt", "token"):
        for who in ("model", "twin"):
            side = found[name][who]
            assert sum(row["seconds"] for row in side["rows"]) == pytest.approx(side["traced"])
            assert side["least"] <= side["seconds"] <= side["most"]
            assert side["of_limit"] == pytest.approx(side["limit_seconds"] / side["seconds"])
        tax = found[name]["tax"]
        assert tax["least"] <= tax["ratio"] <= tax["most"]
        assert set(tax["by_layer"]) == {"0", "1"}
        assert tax["work"] == pytest.approx(1, abs=0.1)
    parts = {row["part"] for row in found["training"]["model"]["rows"]}
    assert {"attention", "router", "head", "loss", "clipping", "optimiser", "norm", "embedding", "other"} <= parts
    assert "feed-forward" in {row["part"] for row in found["training"]["twin"]["rows"]}
    assert "sampling" in {row["part"] for row in found["token"]["model"]["rows"]}
    assert found["training"]["model"]["limit_seconds"] == pytest.approx(found["training"]["model"]["work"] / 10e9)
    assert found["token"]["model"]["limit_seconds"] == pytest.approx(found["token"]["model"]["work"] / 5e9)
    assert len(found["reading"]) == 8


def test_table_and_progress(capsys: pytest.CaptureFixture[str]) -> None:
    done = call(capsys, "profile", "tiny.json", *QUICK)
    assert done.status == 0, done
    assert re.search(r"^ attention +[\d.]+ +[\d.]+ +[\d.]+ +\d+% +[█▏▎▍▌▋▊▉]* +[<\d.]+%", done.out, re.M)
    for words in ("this model", "dense twin", "sparsity tax of", "of the measured arithmetic", "The traced step took"):
        assert words in done.out
    assert "training: round 2 of 2\n" in done.err
    assert "decoding: round 2 of 2\n" in done.err
    assert "\x1b" not in done.out


def test_a_dense_model_has_no_twin(capsys: pytest.CaptureFixture[str]) -> None:
    moesaic.save(build_model(tiny(), seed=0), "dense")
    found = profile_of(capsys, "dense")
    assert found["training"]["twin"] is found["training"]["tax"] is found["token"]["tax"] is None
    assert found["reading"][0].endswith("tokens/s).")


def test_a_model_folder_keeps_its_weights(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model(sparse(), seed=5)
    moesaic.save(model, "model")
    seen = []
    plain = run.measure_decoding

    def watch(models: Any, *args: Any) -> Any:
        seen.append({name: p.clone() for name, p in models[run.MODEL].named_parameters()})
        return plain(models, *args)

    monkeypatch.setattr(run, "measure_decoding", watch)
    profile_of(capsys, "model", "--dtype", "fp32")
    assert all(torch.equal(p, seen[0][name]) for name, p in model.named_parameters())  # after training steps
    profile_of(capsys, "model", "--dtype", "fp32", "--set", "model.moe.num_experts=6")


def test_only_one_of_both(capsys: pytest.CaptureFixture[str]) -> None:
    train, decode = (profile_of(capsys, "tiny.json", "--only", what) for what in ("train", "decode"))
    assert (train["token"], train["prompt"], decode["training"]) == (None, None, None)
    assert train["training"] is not None
    assert decode["token"] is not None


def test_page_and_picture(capsys: pytest.CaptureFixture[str]) -> None:
    done = call(capsys, "profile", "tiny.json", *QUICK, "--page", "sub/p.html", "--plot", "p.svg")
    assert done.status == 0, done
    page = Path("sub/p.html").read_text()
    assert page.count('<svg class="chart stack wide"') == page.count('<svg class="chart stack narrow"') == 3
    assert not re.search(r"(src|href)=.(https?:)?//", page)
    for words in ("tiny.json", "dense twin", "sparsity tax", 'id="training"', 'id="token"', "How it was measured"):
        assert words in page
    picture = ElementTree.fromstring(Path("p.svg").read_text())
    assert picture.tag.endswith("svg")
    texts = [node.text for node in picture.iter() if node.tag.endswith("text")]
    assert texts.count("this model") == 3
    assert "tiny.json: where the time goes" in texts
    assert "Page (open in a browser)" in done.out


def test_activations_recomputed_and_micro_batches_of_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    make_project(Path(), dtype="fp32", recompute=True, accumulate=2)
    args = ("--rounds", "1", "--device", "cpu", "--only", "train", "--json")
    done = call(capsys, "profile", "tiny.json", *args)
    assert done.status == 0, done
    work = json.loads(done.out)["work"]
    assert (work["batch"], work["seq"], work["accumulate"]) == (2, 32, 2)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("nowhere",), "nowhere"),
        (("tiny.json", "--seq", "999"), "--seq=999 is longer than the model's context of 64"),
        (("tiny.json", "--prompt", "60", "--new-tokens", "9"), "do not fit in the model's context of 64"),
        (("tiny.json", "--rounds", "0"), "--rounds must be at least 1, not 0"),
        (("tiny.json", "--new-tokens", "1"), "--new-tokens must be at least 2, not 1"),
        (("tiny.json", "--set", "model.moe.k=9"), "k=9 is more than the 4 experts"),
        (("tiny.json", "--dtype", "fp64"), "--dtype must be one of"),
        ((), "CONFIG|MODEL"),
    ],
)
def test_mistakes(capsys: pytest.CaptureFixture[str], args: tuple[str, ...], words: str) -> None:
    assert words in one_sentence(call(capsys, "profile", *args, "--device", "cpu"))


def test_no_gpu_and_no_memory(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "moesaic doctor" in one_sentence(call(capsys, "profile", "tiny.json", "--device", "cuda"))
    monkeypatch.setattr(run, "memory", lambda: (10**9, 10**5))
    assert "use --only decode" in one_sentence(call(capsys, "profile", "tiny.json", *QUICK))
    assert call(capsys, "profile", "tiny.json", *QUICK, "--only", "decode").status == 0


def test_models_routed_by_task(capsys: pytest.CaptureFixture[str]) -> None:
    settings = ("model.moe.router.name=task", "model.moe.losses={}")
    assert profile_of(capsys, "tiny.json", "--set", *settings)["token"]["model"]["seconds"] > 0
