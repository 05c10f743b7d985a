"""Every number of a Hugging Face checkpoint, had back bit for bit from the GGUF file and its keys, as llama.cpp reads them.

Names and order of rows are those of llama.cpp's convert_hf_to_gguf.py and of the ``gguf`` package, written down again here.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesaic.convert.convert import convert
from moesaic.convert.gguf import Kind
from tests.convert.gguf.checkpoints import CASES, Case, stays_fp32, write

gguf = pytest.importorskip("gguf")

Arrays = dict[str, np.ndarray]


class File:
    """A GGUF file: ``general`` and the architecture's keys (without its name), types and numbers of its tensors."""

    def __init__(self, path: Path) -> None:
        reader = gguf.GGUFReader(path)
        self.keys: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
        self.arch: str = self.keys["general.architecture"]
        self.types: dict[str, str] = {t.name: t.tensor_type.name for t in reader.tensors}
        self.tensors: Arrays = {
            t.name: gguf.dequantize(t.data, t.tensor_type).reshape(tuple(reversed(t.shape.tolist())))
            for t in reader.tensors
        }

    def key(self, name: str) -> int:
        return int(self.keys[f"{self.arch}.{name}"])


def exported(case: Case, folder: Path, kind: Kind = "f32") -> tuple[File, Arrays]:
    """The file and the numbers of the checkpoint."""
    theirs = write(case, folder / "hf")
    convert(folder / "hf", folder / "m.gguf", gguf_type=kind)
    return File(folder / "m.gguf"), {name: tensor.numpy() for name, tensor in theirs.items()}


# ---- from GGUF to Hugging Face ----


def _halves(t: np.ndarray, heads: int) -> np.ndarray:
    """Rows (heads * R): neighbouring pairs become row r and row R / 2 + r, undoing convert_hf_to_gguf's ``permute``."""
    return t.reshape(heads, -1, 2, *t.shape[1:]).swapaxes(1, 2).reshape(t.shape)


def _late_halves(t: np.ndarray, heads: int, turned: int) -> np.ndarray:
    """The same in the last ``turned`` rows of each head."""
    rows = t.reshape(heads, -1, *t.shape[1:]).copy()
    for head in range(heads):
        rows[head, -turned:] = _halves(rows[head, -turned:], 1)
    return rows.reshape(t.shape)


_ATTENTION = {"attn_q": "q_proj", "attn_k": "k_proj", "attn_v": "v_proj", "attn_output": "o_proj"}
_LATENT = {
    "attn_q_a": "q_a_proj", "attn_q_a_norm": "q_a_layernorm", "attn_q_b": "q_b_proj",
    "attn_kv_a_mqa": "kv_a_proj_with_mqa", "attn_kv_a_norm": "kv_a_layernorm",
}  # fmt: skip
_MLP = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}


def _names(family: str, stacked: bool) -> dict[str, str]:
    """GGUF name in a block -> theirs, where the numbers are the same or turned: one tensor for one."""
    both = _ATTENTION | _LATENT if family.startswith("deepseek") else _ATTENTION
    names = {f"{ours}.{s}": f"self_attn.{theirs}.{s}" for ours, theirs in both.items() for s in ("weight", "bias")}
    if family.startswith(("qwen3", "olmoe")):
        names |= {f"attn_{n}_norm.weight": f"self_attn.{n}_norm.weight" for n in "qk"}
    after = "post_attention_norm" if family == "gpt_oss" else "ffn_norm"
    names |= {"attn_norm.weight": "input_layernorm.weight", f"{after}.weight": "post_attention_layernorm.weight"}
    names |= {f"ffn_{n}.{s}": f"mlp.{theirs}.{s}" for n, theirs in _MLP.items() for s in ("weight", "bias")}
    gate = {"gpt_oss": "mlp.router", "mixtral": "mlp.gate" if stacked else "block_sparse_moe.gate"}.get(
        family, "mlp.gate"
    )
    names |= {f"ffn_gate_inp.{s}": f"{gate}.{s}" for s in ("weight", "bias")}
    shared = "mlp.shared_expert" if family == "qwen2_moe" else "mlp.shared_experts"
    names |= {f"ffn_{n}_shexp.weight": f"{shared}.{theirs}.weight" for n, theirs in _MLP.items()}
    return names | {
        "ffn_gate_inp_shexp.weight": "mlp.shared_expert_gate.weight",
        "exp_probs_b.bias": "mlp.gate.e_score_correction_bias",
        "attn_sinks.weight": "self_attn.sinks",
    }


def _turns(file: File, halves: bool) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """GGUF name in a block -> how its rows come back in Hugging Face's order."""
    if file.arch == "llama":
        queries, keys = file.key("attention.head_count"), file.key("attention.head_count_kv")
        turns = {f"attn_q.{s}": lambda t: _halves(t, queries) for s in ("weight", "bias")}
        return turns | {f"attn_k.{s}": lambda t: _halves(t, keys) for s in ("weight", "bias")}
    if file.arch == "deepseek2" and halves:  # else a published checkpoint has neighbours too
        heads, turned = file.key("attention.head_count"), file.key("rope.dimension_count")
        rows = {f"attn_{n}.weight": lambda t: _late_halves(t, heads, turned) for n in ("q", "q_b")}
        return rows | {"attn_kv_a_mqa.weight": lambda t: _late_halves(t, 1, turned)}
    return {"ffn_gate_inp_shexp.weight": lambda t: t[None]}


def _experts(block: Arrays, family: str, stacked: bool) -> Arrays:
    """The stacks of one block, taken out of ``block``, in the form that the checkpoint has."""
    gate, up, down = (block.pop(f"ffn_{name}_exps.weight") for name in _MLP)
    if family == "gpt_oss":
        mixed = [np.stack(pair, axis=-1).reshape(len(gate), *pair[0].shape[1:-1], -1) for pair in (
            (gate.swapaxes(1, 2), up.swapaxes(1, 2)), (block.pop("ffn_gate_exps.bias"), block.pop("ffn_up_exps.bias"))
        )]  # fmt: skip
        both = {"gate_up_proj": mixed[0], "gate_up_proj_bias": mixed[1]}
        return {f"mlp.experts.{n}": t for n, t in both.items()} | {
            "mlp.experts.down_proj": down.swapaxes(1, 2), "mlp.experts.down_proj_bias": block.pop("ffn_down_exps.bias")
        }  # fmt: skip
    if stacked:
        return {"mlp.experts.gate_up_proj": np.concatenate([gate, up], axis=1), "mlp.experts.down_proj": down}
    at, names = ("block_sparse_moe", ("w1", "w3", "w2")) if family == "mixtral" else ("mlp", tuple(_MLP.values()))
    return {
        f"{at}.experts.{e}.{name}.weight": stack[e]
        for name, stack in zip(names, (gate, up, down), strict=True)
        for e in range(len(stack))
    }


def had_back(file: File, family: str, stacked: bool, halves: bool) -> Arrays:
    """All tensors of the checkpoint by its own names; every GGUF tensor is used once."""
    whole = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    whole |= {"output.weight": "lm_head.weight"}
    found, names, turns = {}, _names(family, stacked), _turns(file, halves)
    blocks: list[Arrays] = [{} for _ in range(file.key("block_count"))]
    for name, numbers in file.tensors.items():
        if name.startswith("blk."):
            _, i, rest = name.split(".", 2)
            blocks[int(i)][rest] = numbers
        else:
            found[whole[name]] = numbers
    for i, block in enumerate(blocks):
        rows = _experts(block, family, stacked) if "ffn_gate_exps.weight" in block else {}
        if "attn_k_b.weight" in block:  # (heads, rank, nope) and (heads, value, rank)
            parts = [block.pop("attn_k_b.weight").swapaxes(1, 2), block.pop("attn_v_b.weight")]
            joined = np.concatenate(parts, axis=1)
            rows["self_attn.kv_b_proj.weight"] = joined.reshape(-1, joined.shape[-1])
        rows |= {names[name]: turns.get(name, lambda t: t)(numbers) for name, numbers in block.items()}
        found |= {f"model.layers.{i}.{name}": numbers for name, numbers in rows.items()}
    return found


@pytest.mark.parametrize("kind", ["f32", "bf16"])
@pytest.mark.parametrize("name", CASES)
def test_every_number_comes_back_to_the_bit(name: str, kind: Kind, tmp_path: Path) -> None:
    """BF16 too, since the checkpoint's matrices hold nothing finer, and the rest must be F32."""
    case = CASES[name]
    file, theirs = exported(case, tmp_path, kind)
    if case.config["tie_word_embeddings"] and "output.weight" in file.tensors:
        theirs["lm_head.weight"] = theirs["model.embed_tokens.weight"]
    file.tensors.pop("rope_freqs.weight", None)  # test_metadata.py
    halves = case.config.get("rope_interleave") is False
    back = had_back(file, case.config["model_type"], name.endswith("stacked"), halves)
    assert back.keys() == theirs.keys()
    for tensor, numbers in theirs.items():
        assert back[tensor].shape == numbers.shape, tensor
        assert back[tensor].tobytes() == numbers.tobytes(), tensor


# ---- names and types ----


def _merged(name: str) -> list[str]:
    """What convert_hf_to_gguf.py makes of a checkpoint's name before it asks the package."""
    name = re.sub(r"model\.(layers\.\d+\.)block_sparse_moe\.experts\.\d+", r"\1feed_forward.experts", name)
    name = re.sub(r"mlp\.experts\.\d+", "mlp.experts", name)
    name = re.sub(r"(experts\.\w+_proj)$", r"\1.weight", name)
    name = re.sub(r"(experts\.\w+_proj|e_score_correction)_bias$", r"\1.bias", name)
    name = re.sub(r"sinks$", "sinks.weight", name)
    parts = {"gate_up_proj": ("gate_proj", "up_proj"), "kv_b_proj": ("k_b_proj", "v_b_proj")}
    for joined, apart in parts.items():
        if joined in name:
            return [name.replace(joined, part) for part in apart]
    return [name]


@pytest.mark.parametrize("name", CASES)
def test_names_are_those_the_package_gives_and_types_those_of_llama_cpp(name: str, tmp_path: Path) -> None:
    file, theirs = exported(CASES[name], tmp_path, "bf16")
    (arch,) = [arch for arch, text in gguf.MODEL_ARCH_NAMES.items() if text == file.arch]
    table = gguf.get_tensor_name_map(arch, file.key("block_count"))
    expected = {}
    for tensor in theirs:
        for merged in _merged(tensor):
            found = table.get_name(merged, (".weight", ".bias"))
            assert found is not None, merged
            expected[found] = "F32" if stays_fp32(tensor) else "BF16"
    if name == "qwen2_moe, tied":  # a graph that wants a head of its own
        expected["output.weight"] = "BF16"
    if name.startswith("llama 3"):
        expected["rope_freqs.weight"] = "F32"
    assert file.types == expected
