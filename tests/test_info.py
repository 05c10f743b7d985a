"""``moesaic info``: every number it prints against one by hand, and what it reads of folders."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import moesaic as mo
from moesaic.config import to_dict
from moesaic.cost.architectures import COUNTED
from moesaic.models import ModelConfig, MoEConfig, RouterConfig, build_model
from moesaic.models.presets import PRESETS
from tests.command import Done, call, environment, one_sentence
from tests.convert.tiny_checkpoint import make_hf
from tests.models.tiny import tiny

SMALL = ModelConfig(
    vocab_size=50,
    dim=8,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    hidden=20,
    max_seq_len=64,
    sliding_window=(4, 0, 4),
    tie_embeddings=False,
    moe=MoEConfig(num_experts=4, k=2, hidden=12, dense_first=1),
)


@pytest.fixture(autouse=True)
def _there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def shown(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    done = call(capsys, "info", *args)
    assert (done.status, done.err) == (0, ""), done
    return done.out


def found(capsys: pytest.CaptureFixture[str], *args: str) -> dict[str, Any]:
    return json.loads(shown(capsys, *args, "--json"))  # type: ignore[no-any-return]


def row(text: str, name: str) -> list[str]:
    """The cells of a table's line."""
    line = next(line for line in text.splitlines() if re.match(rf" ?{re.escape(name)}(  |$)", line))
    return re.split(r"  +", line.strip())


def write_config(config: ModelConfig, name: str = "small.json") -> str:
    Path(name).write_text(json.dumps({"model": to_dict(config)}))
    return name


# ---- numbers by hand ----


def test_parts_and_flops_by_hand(capsys: pytest.CaptureFixture[str]) -> None:
    result = found(capsys, write_config(SMALL), "--context", "6")
    attention = 8 * 8 + 2 * 8 * 4 + 8 * 8
    expert = 3 * 8 * 12
    assert {part: number["total"] for part, number in result["parts"].items()} == {
        "embedding": 400,
        "head": 400,
        "norm": 7 * 8,
        "attention": 3 * attention,
        "feed-forward": 3 * 8 * 20,
        "router": 2 * 4 * 8,
        "experts": 2 * 4 * expert,
    }
    assert result["parts"]["experts"]["active"] == 2 * 2 * expert
    assert result["total"] - result["active"] == 2 * 2 * expert
    # Of 6 positions, 1 to 6 keys: 3.5 on average; with a window of 4, (1 + 2 + 3 + 4 + 4 + 4) / 6 = 3.
    scores = 4 * 4 * 2 * (3.0 + 3.5 + 3.0)
    forward = {
        "attention": 3 * 2 * attention + scores,
        "feed-forward": 2 * 3 * 8 * 20,
        "router": 2 * 2 * 8 * 4,
        "experts": 2 * 2 * 2 * expert,
        "head": 2 * 8 * 50,
    }
    assert result["flops"]["parts"] == pytest.approx(forward)
    total = sum(forward.values())
    assert result["flops"]["forward"] == pytest.approx(total)
    assert result["flops"]["training"] == pytest.approx(3 * total)
    assert result["flops"]["training_recomputed"] == pytest.approx(4 * total)
    one = 2 * 2 * 2 * 2  # keys and values, two heads of width 2, bf16
    assert result["cache"] == {
        "dtype": "bf16",
        "context": 6,
        "per_token": 3 * one,
        "needed": 14 * one,
        "held": 18 * one,
    }
    assert result["training_state"]["mixed"] == 16 * result["total"]
    assert result["weights"]["bf16"] == 2 * result["total"] + 2 * 64  # routers fp32


def test_conventions(capsys: pytest.CaptureFixture[str]) -> None:
    name = write_config(SMALL)
    both, out, none = (found(capsys, name, "--embeddings", how) for how in ("both", "out", "none"))
    assert both["total"] - out["total"] == both["active"] - out["active"] == 400
    assert both["total"] - none["total"] == both["active"] - none["active"] == 800
    assert out["parts"]["embedding"] == {"total": 0, "active": 0}
    assert both["weights"] == none["weights"]  # what memory must hold does not depend on it
    text = shown(capsys, name, "--embeddings", "out")
    assert text.startswith(f"{out['total']:,} parameters, {out['active']:,} of them used per token")
    assert "the output's alone is counted." in text
    assert "Embeddings are not counted." in shown(capsys, name, "--embeddings", "none")


def test_mixtral(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "mixtral-8x7b")
    assert text.startswith("46,702,792,704 parameters, 12,879,925,248 of them used per token (28%)\n")
    assert row(text, "experts") == ["experts", "45,097,156,608", "11,274,289,152", "22.5 G"]
    assert row(text, "weights, bf16")[:2] == ["weights, bf16", "93.4 GB"]
    assert row(text, "weights, int4")[1] == "24.5 GB"
    assert row(text, "cache, per token") == ["cache, per token", "131,072 B", "bf16"]  # 32 * 2 * 8 * 128 * 2
    assert row(text, "cache, 4,096 tokens") == ["cache, 4,096 tokens", "537 MB"]
    assert row(text, "training, bf16 + AdamW")[1] == "747 GB"  # 46.7e9 * 16
    assert row(text, "total") == ["total", "46.7B", "46.703B", "+0.0%"]
    assert row(text, "active") == ["active", "12.9B", "12.880B", "-0.2%"]
    assert re.search(r"^experts per token +2$", text, re.M)
    assert re.search(r"^sparse layers +0 to 31$", text, re.M)


def test_mixtral_flops_are_twice_the_active_weights_and_scores(capsys: pytest.CaptureFixture[str]) -> None:
    flops = found(capsys, "mixtral-8x7b", "--context", "2048")["flops"]
    active = 12_879_925_248 - 2 * 32000 * 4096 - 65 * 4096  # norms are no products
    by_hand = 2 * active + 2 * 32000 * 4096 + 32 * 4 * (2049 / 2) * 32 * 128
    assert flops["forward"] == pytest.approx(by_hand, rel=1e-12)


def test_deepseek_v3_with_latent_cache(capsys: pytest.CaptureFixture[str]) -> None:
    result = found(capsys, "deepseek-v3", "--embeddings", "out", "--context", "32768")
    assert result["cache"]["per_token"] == 61 * (512 + 64) * 2
    assert result["cache"]["needed"] == 32768 * 61 * (512 + 64) * 2
    assert round(result["active"] / 1e9, 2) == 36.63
    assert [(p["what"], p["published"], p["embeddings"], p["agrees"]) for p in result["published"]] == [
        ("total", "671B", "both", True),
        ("active", "37B", "out", True),
    ]
    # Training and prompts: keys and values are made for each of 128 heads, 192 + 128 wide.
    per_layer = 2 * 128 * (192 + 128) * (32769 / 2)
    assert result["flops"]["parts"]["attention"] == pytest.approx(2 * 11_413_547_008 - 2 * 61 * 2048 + 61 * per_layer)
    assert re.search(r"^sparse layers +3 to 60$", shown(capsys, "deepseek-v3"), re.M)


def test_gpt_oss_with_windows(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "gpt-oss-20b", "--dtype", "mxfp4")
    one = 2 * 8 * 64 * 2
    assert row(text, "cache, per token")[1] == f"{24 * one:,} B"
    assert row(text, "cache, 4,096 tokens") == [
        "cache, 4,096 tokens",
        f"{(12 * 4096 + 12 * 128) * one / 1e6:.0f} MB",
        "windowed layers cut to their window",
    ]
    assert row(text, "cache, as moesaic holds")[1] == f"{24 * 4096 * one / 1e6:.0f} MB"
    assert "weights, bf16" not in text
    assert re.search(r"^sliding window +128 tokens in 12 of 24 layers$", text, re.M)


def test_of_a_dense_preset_nothing_sparse_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "qwen3-0.6b")
    assert "of them used per token (100%)" in text
    assert "expert" not in text
    assert "routers" not in text
    assert row(text, "head") == ["head", "0", "0", "311 M"]  # tied, and still a product: 2 * 151936 * 1024


def test_what_is_counted_and_not_built(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "switch-c")
    assert text.startswith("1,571,308,970,400 parameters, ")
    assert "not yet built: it needs an encoder and cross attention." in text
    assert "FLOPs" not in text
    assert "cache" not in text
    assert row(text, "total") == ["total", "1571B", "1,571.309B", "+0.0%"]
    result = found(capsys, "switch-c")
    assert (result["built"], result["flops"], result["cache"], result["config"]) == (False, None, None, None)
    assert "Not counted: everything but the experts." in shown(capsys, "gshard-600b")


# ---- the list ----


def test_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys)
    assert text == shown(capsys, "--list")
    assert row(text, "deepseek-v3") == ["deepseek-v3", "671.026B", "36.626B", "671B / 37B", "61", "256+1", "8"]
    assert row(text, "switch-c")[-1] == "counted, not yet built"
    assert row(text, "llama-3-8b") == ["llama-3-8b", "8.030B", "8.030B", "8B", "32"]
    rows = found(capsys)["presets"]
    assert [r["name"] for r in rows] == [*PRESETS, *COUNTED]
    assert all(r["total"] >= r["active"] > 0 for r in rows)
    assert "leave out" in one_sentence(call(capsys, "info", "dbrx", "--list"))


# ---- folders ----


def test_a_folder_of_ours(capsys: pytest.CaptureFixture[str]) -> None:
    moe = MoEConfig(num_experts=4, k=2, hidden=12, router=RouterConfig("topk", {"balance_bias": True}), losses={})
    mo.save(build_model(tiny(moe), seed=0).to(torch.bfloat16), "ours")
    held = found(capsys, "ours")["checkpoint"]
    tensors = load_file("ours/model.safetensors")
    assert held["matches"] is True
    assert held["numbers"] == held["expected"] == sum(t.numel() for t in tensors.values())
    assert held["bytes"] == sum(t.nbytes for t in tensors.values())
    routers = sum(t.numel() for name, t in tensors.items() if ".router." in name)
    assert held["dtypes"]["fp32"] == {"tensors": 4, "elements": routers, "bytes": 4 * routers}
    assert next(iter(held["dtypes"])) == "bf16"
    text = shown(capsys, "ours")
    assert row(text, "weights, as stored")[2] == "bf16, fp32"
    assert "weights, int4" not in text
    assert "as many as the config asks for." in text
    assert row(text, "cache, per token")[2] == "bf16"


def test_an_fp32_folder_has_an_fp32_cache(capsys: pytest.CaptureFixture[str]) -> None:
    mo.save(build_model(SMALL, seed=0), "wide")
    assert found(capsys, "wide")["cache"]["per_token"] == 3 * 2 * 2 * 2 * 4
    assert found(capsys, "wide", "--dtype", "bf16")["cache"]["per_token"] == 3 * 2 * 2 * 2 * 2
    assert list(found(capsys, "wide", "--dtype", "int4")["weights"]) == ["int4"]


def test_weights_of_another_config(capsys: pytest.CaptureFixture[str]) -> None:
    mo.save(build_model(SMALL, seed=0), "model")
    tensors = load_file("model/model.safetensors")
    lost = tensors.pop("blocks.1.ffn.experts.w_out")
    save_file(tensors, "model/model.safetensors")
    done = call(capsys, "info", "model", "--json")
    held = json.loads(done.out)["checkpoint"]
    assert (held["matches"], held["expected"] - held["numbers"]) == (False, lost.numel())
    done = call(capsys, "info", "model")
    assert f"! {lost.numel():,} numbers too few: this config is not that of these weights." in done.out
    assert (done.status, "do not hold what their config asks for" in done.err) == (2, True)


def renamed(tensors: dict[str, torch.Tensor], old: str, new: str) -> None:
    tensors[new] = tensors.pop(old)


def test_as_many_numbers_are_not_enough(capsys: pytest.CaptureFixture[str]) -> None:
    """Names and shapes count, in folders of ours and in a family's."""
    folders = {"ours": "blocks.1.ffn.experts.w_out", "hf": "model.layers.1.block_sparse_moe.experts.2.w2.weight"}
    mo.save(build_model(SMALL, seed=0), "ours")
    make_hf(Path("hf"))
    for folder, name in folders.items():
        path = f"{folder}/model.safetensors"
        whole = load_file(path)
        assert found(capsys, folder)["checkpoint"]["matches"] is True

        tensors = dict(whole)
        renamed(tensors, name, "zzz")
        save_file(tensors, path)
        done = call(capsys, "info", folder, "--json")
        held = json.loads(done.out)["checkpoint"]
        assert (done.status, held["matches"], held["numbers"]) == (2, False, held["expected"])
        assert (held["missing"], held["unexpected"], held["wrong"]) == ([name], ["zzz"], [])
        text = call(capsys, "info", folder).out
        assert f'! 1 tensors that the config asks for are not there: "{name}".' in text
        assert '! 1 tensors are there that the config has no place for: "zzz".' in text
        assert "as many as the config asks for." in text

        save_file(whole | {name: whole[name].transpose(-1, -2).contiguous()}, path)
        done = call(capsys, "info", folder, "--json")
        held = json.loads(done.out)["checkpoint"]
        assert (done.status, held["missing"], held["unexpected"], held["wrong"]) == (2, [], [], [name])

        save_file(whole, path)
        save_file({"x": torch.zeros(2)}, f"{folder}/model-00003-of-00007.safetensors")
        done = call(capsys, "info", folder)
        assert done.status == 2
        assert (
            '! 1 files are named like parts of this model and are of another save; move them away: "model-00003'
            in done.out
        )


def test_a_tied_head_that_is_stored_all_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    make_hf(Path("hf"), tie_embeddings=True)
    tensors = load_file("hf/model.safetensors")
    head = torch.zeros_like(tensors["model.embed_tokens.weight"])
    save_file(tensors | {"lm_head.weight": head}, "hf/model.safetensors")
    held = found(capsys, "hf")["checkpoint"]
    assert (held["matches"], held["repeated"]) == (True, ["lm_head.weight"])
    assert "whether both are equal, which moesaic convert checks" in shown(capsys, "hf")
    save_file(tensors | {"lm_head.weight": head[:1]}, "hf/model.safetensors")
    done = call(capsys, "info", "hf", "--json")
    assert (done.status, json.loads(done.out)["checkpoint"]["wrong"]) == (2, ["lm_head.weight"])


def test_no_tensor_is_read(capsys: pytest.CaptureFixture[str]) -> None:
    mo.save(build_model(SMALL, seed=0), "model")
    path = Path("model/model.safetensors")
    content = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    content[header:] = b"\xff" * (len(content) - header)  # NaN
    path.write_bytes(content)
    assert found(capsys, "model")["checkpoint"]["matches"] is True


def test_hugging_face_folders(capsys: pytest.CaptureFixture[str]) -> None:
    transformers = pytest.importorskip("transformers")
    from tests.convert.parity import tiny_hf
    from tests.convert.variants import TINY

    hf = tiny_hf(transformers.MixtralConfig(**TINY | {"num_local_experts": 4, "num_experts_per_tok": 2}))
    hf.save_pretrained("mixtral")
    result = found(capsys, "mixtral")
    assert result["total"] == sum(p.numel() for p in hf.parameters()) == result["checkpoint"]["numbers"]
    assert result["checkpoint"]["matches"] is True
    assert found(capsys, "mixtral/config.json") == result
    Path("mixtral/model.safetensors").unlink()
    assert found(capsys, "mixtral")["checkpoint"] is None
    Path("mixtral/pytorch_model.bin").write_bytes(b"")
    assert "pickle" in one_sentence(call(capsys, "info", "mixtral"))


def test_quantised_and_further_layers(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    from tests.convert.test_aside import further, with_further_layer
    from tests.convert.test_storage import deepseek_fp8, gpt_oss_mxfp4

    for make, name, kind in ((deepseek_fp8, "fp8", "fp8"), (gpt_oss_mxfp4, "mxfp4", "uint8")):
        held = found(capsys, str(make(Path(name))))["checkpoint"]
        assert held["matches"] is True
        assert kind in held["dtypes"]
        assert held["bytes"] == sum(t.nbytes for t in load_file(f"{name}/model.safetensors").values())
    folder = with_further_layer(Path("mtp"))
    aside = sum(load_file(folder / "model.safetensors")[name].numel() for name in further(folder))
    held = found(capsys, "mtp")["checkpoint"]
    assert (held["matches"], held["aside"]) == (True, aside)
    assert f"Kept aside, no part of the model: {aside:,} numbers." in shown(capsys, "mtp")
    mo.save(mo.load(folder), "ours")
    held = found(capsys, "ours")["checkpoint"]
    assert (held["matches"], held["aside"]) == (True, aside)


# ---- mistakes ----


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("deepsek-v3",), ('no preset, folder or config file "deepsek-v3"', 'Did you mean "deepseek-v3"?')),
        (("switch-d",), ('Did you mean "switch-c"?',)),
        (("dbrx", "--context", "0"), ("--context must be at least 1",)),
        (("dbrx", "--context", "40000"), ("--context 40000 is longer than the 32768 tokens",)),
        (("dbrx", "--embeddings", "all"), ("--embeddings", "both")),
        (("dbrx", "--dtype", "int3"), ("--dtype", "int4")),
    ],
)
def test_mistakes(args: tuple[str, ...], words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    sentence = one_sentence(call(capsys, "info", *args))
    for word in words:
        assert word in sentence


def test_a_path_that_is_there_comes_before_a_preset(capsys: pytest.CaptureFixture[str]) -> None:
    Path("dbrx").mkdir()
    done: Done = call(capsys, "info", "dbrx")
    assert "dbrx is no model directory" in one_sentence(done)


def test_too_few_tensors_for_the_layers(capsys: pytest.CaptureFixture[str]) -> None:
    mo.save(build_model(SMALL, seed=0), "model")
    path = Path("model/config.json")
    data = json.loads(path.read_text())
    data["model"] |= {"num_layers": 9000, "sliding_window": None}
    path.write_text(json.dumps(data))
    assert "too few for the 9000 layers" in one_sentence(call(capsys, "info", "model"))


# ---- no memory ----


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kB here alone")
def test_the_largest_preset_takes_no_memory() -> None:
    """A process that prints it peaks no higher than one that prints help, give or take 50 MB."""

    def peak(*args: str) -> int:
        script = (
            "import sys, resource, contextlib, io\nfrom moesaic.cli import main\n"
            "with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):\n    main(sys.argv[1:])\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        )
        done = subprocess.run(
            [sys.executable, "-c", script, *args], capture_output=True, text=True, env=environment(), check=True
        )
        return int(done.stdout)

    assert peak("info", "deepseek-v3") - peak("--help") < 50_000
