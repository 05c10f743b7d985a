"""The whole-model benchmarks: one model under two roofs, every part of a step timed, quick runs that keep their promises."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from moesaic.models.config import ModelConfig, MoEConfig
from moesaic.models.twin import dense_twin

BENCH = Path(__file__).parents[2] / "bench"


def config(**changes: Any) -> ModelConfig:
    sizes = {"vocab_size": 120, "dim": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16}
    return ModelConfig(
        **{**sizes, "max_seq_len": 64, "moe": MoEConfig(num_experts=8, k=2, hidden=16), **changes}  # type: ignore[arg-type]
    )


# ---- the same model under two roofs --------------------------------------------------------------------------------


@pytest.mark.parametrize("tie", [True, False])
def test_hugging_face_computes_the_same_logits_and_gradients(bench: Any, tie: bool) -> None:
    pytest.importorskip("transformers")
    models = bench("hf_models")
    model = models.draw_decoder(config(tie_embeddings=tie, rope_theta=5e4), torch.float32)
    hf = models.hf_model(model)
    ids_BS = torch.randint(120, (2, 24), generator=torch.Generator().manual_seed(0))
    assert sum(p.numel() for p in hf.parameters()) == sum(p.numel() for p in model.parameters())
    for backend in ("eager", "batched_mm", "grouped_mm"):
        with models.backend_of(hf, backend):
            assert models.check_logits(model, hf, ids_BS)["max"] < 1e-5
    model(ids_BS).logits.square().mean().backward()
    hf(input_ids=ids_BS, use_cache=False).logits.square().mean().backward()
    theirs = dict(hf.named_parameters())
    for name, tensor in models._renamed(model):
        assert tensor.data_ptr() != theirs[name].data_ptr()  # a copy
    experts = model.blocks[1].ffn.experts
    theirs_in = hf.model.layers[1].mlp.experts.gate_up_proj.grad.transpose(1, 2)
    for mine, other in (
        (experts.w_in.grad, theirs_in),
        (model.embedding.weight.grad, hf.model.embed_tokens.weight.grad),
    ):
        assert float((mine - other).abs().max()) < 1e-5 * float(other.abs().max())


def test_another_model_is_noticed(bench: Any) -> None:
    pytest.importorskip("transformers")
    models, common = bench("hf_models"), bench("common")
    model = models.draw_decoder(config(), torch.float32)
    hf = models.hf_model(model)
    with torch.no_grad():
        hf.model.layers[0].mlp.experts.down_proj[3] *= 1.1
    with pytest.raises(common.BenchError, match="not the same"):
        models.check_logits(model, hf, torch.arange(60)[None])
    with pytest.raises(common.BenchError, match="qk_norm"):
        models.hf_model(models.draw_decoder(config(qk_norm="head"), torch.float32))
    moe = MoEConfig(num_experts=8, k=2, hidden=16, shared=1)
    with pytest.raises(common.BenchError, match="shared"):
        models.hf_model(models.draw_decoder(config(moe=moe), torch.float32))


def test_drawn_weights_have_the_spread_of_the_builders(bench: Any) -> None:
    from moesaic.models.build import build_model

    draw = bench("hf_models").draw_decoder
    shape = config(dim=64, moe=MoEConfig(num_experts=8, k=2, hidden=32))
    for one in (shape, dense_twin(shape)):
        drawn, built = draw(one, torch.float32), build_model(one, seed=0).state_dict()
        assert drawn.state_dict().keys() == built.keys()
        for name, tensor in drawn.state_dict().items():
            assert float(tensor.std() - built[name].std()) == pytest.approx(
                0, abs=0.25 * float(built[name].std()) + 1e-6
            )
        assert drawn.head.weight is drawn.embedding.weight
    half = draw(shape, torch.bfloat16)
    assert half.embedding.weight.dtype == torch.bfloat16
    assert half.moe_layers()[0].router.gate.weight.dtype == torch.float32


# ---- rounds --------------------------------------------------------------------------------------------------------


def test_rounds_take_turns_and_slow_ones_sit_out(bench: Any) -> None:
    rounds = bench("rounds")
    order: list[str] = []

    def contender(name: str) -> Any:
        return lambda turn: order.append(f"{name}{turn}") or {"step": 1.0 + turn}

    laps = rounds.in_rounds(
        {name: contender(name) for name in "ab"}, 3, say=lambda text: None, advance=lambda: order.append("|")
    )
    assert "".join(order) == "a0|b0|" + "a0|b0|" + "b1|a1|" + "a2|b2|"
    assert rounds.summary(laps, "step")["a"] == {"median": 2.0, "min": 1.0, "max": 3.0, "rounds": 3, "all": [1, 2, 3]}
    slow = rounds.in_rounds({"a": contender("a")}, 3, limit_s=0.0, say=lambda text: None, advance=lambda: None)
    assert slow["a"] == [{"step": 1.0}, None, None]
    assert rounds.times_faster(laps["a"], slow["a"], "step")["rounds"] == 1
    assert rounds.fastest({"hf x": {"median": 2.0}, "hf y": {"median": 1.0}, "z": {"median": 0.5}}, "hf ") == "hf y"


def test_verdicts(bench: Any) -> None:
    verdict = bench("rounds").verdict
    assert verdict(7, "step", 1.2, "<= 1.25")["met"]
    assert verdict(6, "decode", 2.4, ">= 2.50")["text"] == "  6  decode: 2.40  (goal >= 2.50)  NOT MET"
    assert verdict(6, "decode", None, ">= 2.50")["met"] is None
    assert verdict(6, "decode", 2.4, None)["text"] == "  6  decode: 2.40"


# ---- the benchmarks ------------------------------------------------------------------------------------------------


def test_decode(bench: Any, tmp_path: Path, run: Any) -> None:
    out = tmp_path / "decode.json"
    options = ("--quick", "--hf", "none", "--backends", "auto", "reference", "--out", str(out))
    text, result = run(bench("decode"), *options)
    assert "not measured here" in text
    assert json.loads(out.read_text()) == result
    assert [row["dtype"] for row in result["rows"]] == ["fp32", "bf16"]
    for row in result["rows"]:
        assert row["tokens_per_s"].keys() == row["prefill_tokens_per_s"].keys() == {"moesaic", "moesaic reference"}
        assert row["share_of_limit"]["moesaic"] > 0
        assert row["active_parameters"] < row["total_parameters"]
        assert row["token_seconds"]["moesaic"]["rounds"] == 2
    # 4 heads of 64, 2 for keys and values: two layers' projections in bf16
    assert result["rows"][1]["weight_bytes_by_part"]["attention"] == 2 * 64 * (256 + 128 + 128 + 256) * 2


def test_decode_with_hugging_face(bench: Any, run: Any) -> None:
    pytest.importorskip("transformers")
    text, result = run(bench("decode"), "--quick", "--dtypes", "fp32")
    row = result["rows"][0]
    names = {f"hf {backend} {way}" for backend in ("eager", "batched_mm", "grouped_mm") for way in ("generate", "loop")}
    assert row["times_faster"].keys() == row["same_text"].keys() == names
    assert all(same == {"equal": 12, "of": 12} for same in row["same_text"].values())  # 2 rounds of 6 new tokens
    assert row["best_hf"] in names
    assert row["logits"].keys() == {"eager", "batched_mm", "grouped_mm"}
    assert "fp32 prefill, times faster" in text


def test_a_text_that_is_not_the_same_is_refused(bench: Any) -> None:
    decode, models, common = bench("decode"), bench("hf_models"), bench("common")
    model = models.draw_decoder(config(), torch.float32)
    prompt = list(range(10))
    text = bench("greedy").moesaic_text(model, prompt, 4)[0]
    worst = int(model(torch.tensor([prompt + text[:2]])).logits[0, -1].argmin())
    texts = {"moesaic": {0: text}, "hf loop": {0: [*text[:2], worst, text[3]]}}
    assert decode._agreement(model, [prompt], texts, "hf loop", "bf16") == {"equal": 2, "of": 4}
    with pytest.raises(common.BenchError, match="from new token 3 on"):
        decode._agreement(model, [prompt], texts, "hf loop", "fp32")


def test_train_step(bench: Any, tmp_path: Path, run: Any) -> None:
    out = tmp_path / "train.json"
    text, result = run(bench("train_step"), "--quick", "--hf", "none", "--out", str(out))
    assert "training step over the dense twin's" in text
    assert json.loads(out.read_text()) == result
    for row in result["rows"]:
        assert row["seconds"].keys() == {"moesaic", "dense twin"}
        assert row["over_twin"].keys() == {"moesaic"}
        assert row["twin_parameters"] == pytest.approx(row["active_parameters"], rel=0.01)
        for name, split in row["split"].items():
            assert list(split) == ["forward", "loss", "backward", "clip", "optimiser", "rest"]
            assert all(seconds > 0 for seconds in split.values())
            assert sum(split.values()) == pytest.approx(row["seconds"][name]["median"], rel=0.5)


def test_train_step_with_hugging_face(bench: Any, run: Any) -> None:
    pytest.importorskip("transformers")
    options = ("--quick", "--dtypes", "bf16", "--hf", "eager", "grouped_mm")
    _, result = run(bench("train_step"), *options)
    row = result["rows"][0]
    theirs = {f"hf {backend} {how}" for backend in ("eager", "grouped_mm") for how in ("autocast", "bf16 weights")}
    assert row["times_faster"].keys() == {"dense twin", *theirs}
    assert row["best_hf"] in theirs
    assert row["logits"]["hf"]["max"] < 1e-4


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("decode", ("--new", "1"), "leaves nothing to time"),
        ("decode", ("--memory", "1", "--hf", "none"), "more than the 1 GiB of --memory"),
        ("decode", ("--k", "65"), "k=65"),
        ("train_step", ("--memory", "2"), "more than the 2 GiB of --memory"),
        ("train_step", ("--heads", "12", "5"), "num_kv_heads=5"),
    ],
)
def test_what_cannot_run_is_one_sentence(
    bench: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    options: tuple[str, ...],
    sentence: str,
) -> None:
    module, common = bench(name), bench("common")
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *options])
    with pytest.raises(SystemExit) as exit_:
        common.run_main(module.main)
    assert exit_.value.code == 2
    assert sentence in capsys.readouterr().err
