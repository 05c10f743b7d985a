"""What is in the file, read with the package's own reader, against tensors laid out by hand."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moesaic.checkpoint.native import save_model
from moesaic.convert.gguf import KINDS, Kind, export_gguf, export_gguf_folder, export_tensors
from moesaic.errors import CheckpointError
from moesaic.models.decoder import Decoder
from moesaic.nn.rope import RopeScaling
from tests.convert.gguf.families import FAMILIES, gpt_oss, llama, loud, mixtral, qwen3_moe
from tests.models.tiny import lively

gguf = pytest.importorskip("gguf")

# Largest error of a number, as a share of the largest in its block of 32 (of itself for F16 and BF16).
ERROR = {"F32": 0.0, "F16": 2**-11, "BF16": 2**-8, "Q8_0": 0.5 / 127 + 2**-10, "Q4_0": 1 / 8 + 2**-9, "MXFP4": 0.25}


def _read(path: Path) -> dict[str, tuple[str, np.ndarray]]:
    """Name -> type and numbers."""
    found = {}
    for tensor in gguf.GGUFReader(path).tensors:
        numbers = gguf.dequantize(tensor.data, tensor.tensor_type)
        found[tensor.name] = (tensor.tensor_type.name, numbers.reshape(tuple(reversed(tensor.shape.tolist()))))
    return found


def _keys(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def _model(family: str = "mixtral") -> Decoder:
    return loud(lively(FAMILIES[family]()))


# ---- what is in it ----


def _by_hand(model: Decoder) -> dict[str, torch.Tensor]:
    """Mixtral's tensors as llama.cpp names and lays them out, one number of a row at a time."""
    cfg, state = model.config, model.state_dict()
    made = {
        "token_embd.weight": state["embedding.weight"],
        "output.weight": state["head.weight"],
        "output_norm.weight": state["norm.weight"],
    }
    half = cfg.heads_dim // 2
    for i in range(cfg.num_layers):
        ours, theirs = f"blocks.{i}.", f"blk.{i}."
        made[theirs + "attn_norm.weight"] = state[ours + "norm1.weight"]
        made[theirs + "ffn_norm.weight"] = state[ours + "norm2.weight"]
        for name, heads in (("q", cfg.num_heads), ("k", cfg.kv_heads)):
            rows = state[f"{ours}attention.w{name}.weight"]
            order = [h * 2 * half + part * half + r for h in range(heads) for r in range(half) for part in (0, 1)]
            made[f"{theirs}attn_{name}.weight"] = rows[order]
        made[theirs + "attn_v.weight"] = state[ours + "attention.wv.weight"]
        made[theirs + "attn_output.weight"] = state[ours + "attention.wo.weight"]
        made[theirs + "ffn_gate_inp.weight"] = state[ours + "ffn.router.gate.weight"]
        for part in ("gate", "up", "down"):
            experts = [model.moe_layers()[i].experts.expert(e) for e in range(8)]  # type: ignore[union-attr, operator]
            stacked = torch.stack([expert["out" if part == "down" else part].T for expert in experts])
            made[f"{theirs}ffn_{part}_exps.weight"] = stacked
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_of_mixtral_is_there_within_the_error_of_its_type(kind: Kind, tmp_path: Path) -> None:
    model = _model()
    export_gguf(model, tmp_path / "m.gguf", kind=kind)
    read, expected = _read(tmp_path / "m.gguf"), _by_hand(model)
    assert read.keys() == expected.keys()
    for name, (type_, numbers) in read.items():
        want = expected[name].detach().numpy()
        assert numbers.shape == want.shape
        if "norm" in name or "gate_inp" in name:
            assert type_ == "F32"
        else:
            assert type_ == (kind.upper() if kind != "mxfp4" or "_exps" in name else "BF16")
        limit = np.abs(want)
        if type_ in ("Q8_0", "Q4_0", "MXFP4"):
            limit = limit.reshape(-1, 32).max(axis=1, keepdims=True).repeat(32, axis=1).reshape(want.shape)
        assert (np.abs(numbers - want) <= ERROR[type_] * limit + 1e-7 * (type_ != "F32")).all(), name


def test_latent_attention_by_hand(tmp_path: Path) -> None:
    model = _model("deepseek_v3")
    export_gguf(model, tmp_path / "m.gguf", kind="f32")
    read, state = _read(tmp_path / "m.gguf"), model.state_dict()
    latent = model.config.latent
    assert latent is not None
    N, P, W, C = latent.nope_dim, latent.rope_dim, latent.value_dim, latent.kv_rank
    kv_b = state["blocks.1.attention.wkv_b.weight"]
    for head in range(4):
        rows = kv_b[head * (N + W) : (head + 1) * (N + W)]
        assert np.array_equal(read["blk.1.attn_k_b.weight"][1][head], rows[:N].T)
        assert np.array_equal(read["blk.1.attn_v_b.weight"][1][head], rows[N:])
    pairs = [x for r in range(P // 2) for x in (r, r + P // 2)]
    kv_a = state["blocks.1.attention.wkv_a.weight"]
    assert np.array_equal(read["blk.1.attn_kv_a_mqa.weight"][1], torch.cat([kv_a[:C], kv_a[C:][pairs]]))
    query = state["blocks.1.attention.wq_b.weight"].view(4, N + P, -1)
    expected = torch.cat([query[:, :N], query[:, N:][:, pairs]], dim=1).flatten(0, 1)
    assert np.array_equal(read["blk.1.attn_q_b.weight"][1], expected)
    assert np.array_equal(read["blk.1.exp_probs_b.bias"][1], state["blocks.1.ffn.router.choice_bias_E"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_report_counts_every_number_and_byte(family: str, kind: Kind, tmp_path: Path) -> None:
    model, path = _model(family), tmp_path / "m.gguf"
    report = export_gguf(model, path, kind=kind)
    tensors = gguf.GGUFReader(path).tensors
    own = [t for t in tensors if t.name not in report.added]
    unique = {id(p): p for p in [*model.parameters(), *(b for n, b in model.named_buffers() if "choice_bias" in n)]}
    assert report.parameters == sum(p.numel() for p in unique.values()) == sum(int(t.n_elements) for t in own)
    assert report.sources == len(unique)
    for name, share in report.by_type.items():
        held = [t for t in tensors if t.tensor_type.name == name]
        assert share.tensors == len(held) > 0
        assert share.parameters == sum(int(t.n_elements) for t in held)
        assert share.bytes == sum(int(t.n_bytes) for t in held)
    assert sum(share.tensors for share in report.by_type.values()) == len(tensors)
    assert report.file_bytes == path.stat().st_size
    assert f"{report.parameters:,} of {report.parameters:,} parameters" in report.text()
    assert report.to_dict()["by_type"]["F32"]["tensors"] == report.by_type["F32"].tensors


def test_router_numbers_of_a_bf16_model_stay_fp32_to_the_bit(tmp_path: Path) -> None:
    model = _model("deepseek_v3").to(torch.bfloat16)
    gate, bias = (model.state_dict()[f"blocks.2.ffn.router.{n}"] for n in ("gate.weight", "choice_bias_E"))
    assert gate.dtype == bias.dtype == torch.float32
    assert not torch.equal(gate, gate.bfloat16().float())
    assert not torch.equal(bias, bias.bfloat16().float())
    export_gguf(model, tmp_path / "m.gguf", kind="q4_0")
    read = _read(tmp_path / "m.gguf")
    assert read["blk.2.ffn_gate_inp.weight"][1].tobytes() == gate.numpy().tobytes()
    assert read["blk.2.exp_probs_b.bias"][1].tobytes() == bias.numpy().tobytes()


def test_biases_and_sinks_of_gpt_oss_are_fp32_in_every_type(tmp_path: Path) -> None:
    model = _model("gpt_oss")
    export_gguf(model, tmp_path / "m.gguf", kind="q4_0")
    read, state = _read(tmp_path / "m.gguf"), model.state_dict()
    for name in ("attn_q.bias", "attn_output.bias", "attn_sinks.weight", "ffn_gate_inp.bias", "ffn_up_exps.bias"):
        assert read[f"blk.0.{name}"][0] == "F32"
    assert np.array_equal(read["blk.0.ffn_up_exps.bias"][1], state["blocks.0.ffn.experts.b_in"][:, 32:])
    assert np.array_equal(read["blk.0.ffn_gate_exps.bias"][1], state["blocks.0.ffn.experts.b_in"][:, :32])


def test_rows_that_are_no_whole_blocks_are_named(tmp_path: Path) -> None:
    model = loud(lively(mixtral(dim=48, head_dim=16)))
    report = export_gguf(model, tmp_path / "m.gguf", kind="q8_0")
    kinds = {name: type_ for name, (type_, _) in _read(tmp_path / "m.gguf").items()}
    assert set(report.fallbacks) == {name for name, type_ in kinds.items() if type_ == "F16"}
    assert {"token_embd.weight", "blk.1.ffn_up_exps.weight"} < set(report.fallbacks)
    assert kinds["blk.1.ffn_down_exps.weight"] == "Q8_0"  # rows of 32
    assert "rows being no multiple of 32: token_embd.weight" in report.text()


def test_metadata_of_deepseek_v3(tmp_path: Path) -> None:
    export_gguf(_model("deepseek_v3"), tmp_path / "v3.gguf", kind="bf16")
    keys = _keys(tmp_path / "v3.gguf")
    expected = {
        "general.architecture": "deepseek2",
        "general.name": "v3",
        "general.file_type": 32,
        "tokenizer.ggml.model": "none",
        **{f"deepseek2.{name}": value for name, value in {
            "context_length": 128, "vocab_size": 96, "embedding_length": 64, "block_count": 3, "feed_forward_length": 96,
            "attention.head_count": 4, "attention.head_count_kv": 1, "attention.key_length": 48,
            "attention.value_length": 32, "attention.key_length_mla": 48, "attention.value_length_mla": 32,
            "attention.kv_lora_rank": 32, "attention.q_lora_rank": 64, "rope.dimension_count": 16, "rope.freq_base": 1e4,
            "expert_count": 8, "expert_used_count": 2, "expert_feed_forward_length": 32, "expert_shared_count": 2,
            "leading_dense_block_count": 1, "expert_weights_scale": 2.5, "expert_weights_norm": True,
            "expert_gating_func": 2, "expert_group_count": 4, "expert_group_used_count": 2,
        }.items()},
    }  # fmt: skip
    assert {key: keys.get(key) for key in expected} == expected
    assert keys["deepseek2.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)


def test_whole_numbers_where_fractions_are_meant_are_written_as_such(tmp_path: Path) -> None:
    """A config from JSON may say 2 for 2.0; llama.cpp refuses a file whose key has another type."""
    scaling = RopeScaling("yarn", 4, 32, beta_fast=16, attention_factor=2)
    export_gguf(lively(llama(rope_theta=10000, rope_scaling=scaling)), tmp_path / "m.gguf")
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    for key in ("rope.freq_base", "rope.scaling.attn_factor"):
        assert fields[f"llama.{key}"].types == [gguf.GGUFValueType.FLOAT32]


def test_windows_of_gpt_oss(tmp_path: Path) -> None:
    model = lively(gpt_oss(num_layers=3, sliding_window=(0, 6, 0)))
    export_gguf(model, tmp_path / "m.gguf")
    keys = _keys(tmp_path / "m.gguf")
    assert keys["gpt-oss.attention.sliding_window"] == 6
    assert keys["gpt-oss.attention.sliding_window_pattern"] == [False, True, False]


def test_a_tied_head_is_written_twice_only_where_it_must_be(tmp_path: Path) -> None:
    report = export_gguf(lively(qwen3_moe(tie_embeddings=True)), tmp_path / "a.gguf", kind="f32")
    assert report.added == ()
    assert "output.weight" not in _read(tmp_path / "a.gguf")
    report = export_gguf(lively(FAMILIES["olmoe"](tie_embeddings=True)), tmp_path / "b.gguf", kind="f32")
    assert report.added == ("output.weight",)
    read = _read(tmp_path / "b.gguf")
    assert np.array_equal(read["output.weight"][1], read["token_embd.weight"][1])


# ---- from a folder ----


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_gives_the_same_bytes(family: str, tmp_path: Path) -> None:
    model = _model(family)
    save_model(model, tmp_path / "model", max_shard_bytes=20_000)
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    (tmp_path / "a").mkdir()
    export_gguf(model, tmp_path / "a" / "m.gguf", kind="q8_0")
    report = export_gguf_folder(tmp_path / "model", tmp_path / "m.gguf", kind="q8_0")
    assert (tmp_path / "m.gguf").read_bytes() == (tmp_path / "a" / "m.gguf").read_bytes()
    assert report.sources == len(set(model.state_dict()) - ({"head.weight"} if model.config.tie_embeddings else set()))


def test_one_tensor_at_a_time_is_in_memory(tmp_path: Path) -> None:
    model = _model("deepseek_v2")
    state = model.state_dict()
    alive: list[weakref.ref[torch.Tensor]] = []
    order = []

    def read(name: str) -> torch.Tensor:
        assert not any(ref() is not None for ref in alive)
        tensor = state[name].clone()
        alive.append(weakref.ref(tensor))
        order.append(name)
        return tensor

    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    export_tensors(model.config, shapes, read, tmp_path / "m.gguf", "f32")
    assert sorted(order) == sorted(state)  # each once


def test_a_damaged_folder_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    save_model(_model(), tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="damaged"):
        export_gguf_folder(tmp_path / "model", tmp_path / "m.gguf")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]
