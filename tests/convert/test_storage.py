"""Quantised storage: values worked by hand, against loops and transformers' own functions, and every refusal by name."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import moesaic as mo
from moesaic.checkpoint.lowbit import E2M1, from_block_fp8, from_mxfp4
from moesaic.checkpoint.shards import find_tensors
from moesaic.convert.convert import convert
from moesaic.convert.read import open_folder
from moesaic.convert.storage import stored_tensors
from moesaic.errors import CheckpointError, ConfigError, MoesaicError
from tests.convert.parity import LOGITS, load_hf, stored, tiny_hf
from tests.convert.test_parity_deepseek import LATENT
from tests.convert.test_parity_gpt_oss import SMALL

transformers = pytest.importorskip("transformers")
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [16, 8]}
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}


# ---- the two formats ----


def test_e2m1_by_its_bits() -> None:
    for bits, value in enumerate(E2M1):
        sign, exponent, mantissa = bits >> 3, (bits >> 1) & 3, bits & 1
        expected = (1 + mantissa / 2) * 2.0 ** (exponent - 1) if exponent else mantissa / 2
        assert value == (-expected if sign else expected)
        assert math.copysign(1, value) == (-1 if sign else 1)


def test_mxfp4_by_hand() -> None:
    """The low half of a byte comes first; 127 is a factor of one."""
    blocks = torch.zeros(2, 1, 16, dtype=torch.uint8)
    blocks[0, 0, :3] = torch.tensor([0x21, 0xF7, 0x8A])  # 0.5 1.0 | 6.0 -6.0 | -1.0 -0.0
    blocks[1, 0, 15] = 0x3F  # -6.0 1.5, the last two
    scales = torch.tensor([[127], [130]], dtype=torch.uint8)
    found = from_mxfp4(blocks, scales)
    assert found.shape == (2, 32)
    assert found.dtype == torch.bfloat16
    assert found[0, :6].tolist() == [0.5, 1.0, 6.0, -6.0, -1.0, -0.0]
    assert math.copysign(1, found[0, 5].item()) == -1
    assert found[1, 30:].tolist() == [-48.0, 12.0]
    assert found[0, 6:].eq(0).all()
    assert found[1, :30].eq(0).all()


def test_mxfp4_at_the_ends_of_the_scale() -> None:
    """Down to 2^-127 every number is exact in bf16, as a subnormal; at the top 6 * 2^127 is beyond it, 1.5 * 2^127 is not."""
    blocks = torch.full((1, 1, 16), 0x31, dtype=torch.uint8)  # 0.5, 1.5
    low = from_mxfp4(blocks, torch.zeros(1, 1, dtype=torch.uint8))
    assert low[0, :2].double().tolist() == [2.0**-128, 1.5 * 2.0**-127]
    high = from_mxfp4(blocks, torch.full((1, 1), 254, dtype=torch.uint8))
    assert high[0, :2].double().tolist() == [2.0**126, 1.5 * 2.0**127]
    beyond = from_mxfp4(torch.full((1, 1, 16), 0xF7, dtype=torch.uint8), torch.full((1, 1), 254, dtype=torch.uint8))
    assert beyond[0, :2].tolist() == [math.inf, -math.inf]


def test_mxfp4_as_transformers_has_it() -> None:
    """Bit for bit: every byte under every scale that is a number."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks = torch.arange(256, dtype=torch.uint8).view(16, 16).expand(255, 16, 16).contiguous()[None]
    scales = torch.arange(255, dtype=torch.uint8)[:, None].expand(255, 16).contiguous()[None]
    theirs = convert_moe_packed_tensors(blocks, scales)  # (1, columns, rows)
    ours = from_mxfp4(blocks[0], scales[0])
    assert torch.equal(ours.view(torch.int16), theirs[0].t().contiguous().view(torch.int16))
    thrice = from_mxfp4(blocks[0].repeat(3, 1, 1), scales[0].repeat(3, 1))  # more rows than are done at once
    assert torch.equal(thrice.view(torch.int16), ours.repeat(3, 1).view(torch.int16))
    wide = from_mxfp4(blocks[0], scales[0], torch.float32)
    assert torch.equal(wide.bfloat16().view(torch.int16), ours.view(torch.int16))


def test_fp8_by_hand() -> None:
    """Blocks of 2 by 3 over 3 by 4: the last of each kind is smaller."""
    weight = torch.tensor([[1, 2, 3, 4], [1, 1, 1, 448], [-0.5, 0, 8, 0.015625]]).to(torch.float8_e4m3fn)
    scale = torch.tensor([[10.0, 100.0], [0.5, -2.0]])
    found = from_block_fp8(weight, scale, (2, 3), torch.float32)
    assert found.tolist() == [[10, 20, 30, 400], [10, 10, 10, 44800], [-0.25, 0, 4, -0.03125]]


@pytest.mark.parametrize("shape", [(5, 7), (16, 8), (17, 24), (3, 9, 20), (1, 1)])
def test_fp8_as_explicit_loops(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape).to(torch.float8_e4m3fn)
    *before, rows, columns = shape
    scale = torch.rand(*before, -(-rows // 4), -(-columns // 8)) + 0.1
    expected = torch.empty(shape)
    for r in range(rows):
        for c in range(columns):
            expected[..., r, c] = weight.float()[..., r, c] * scale[..., r // 4, c // 8]
    assert torch.equal(from_block_fp8(weight, scale, (4, 8), torch.float32), expected)
    assert torch.equal(from_block_fp8(weight, scale, (4, 8)), expected.bfloat16())


# ---- checkpoints ----


def _quantise_fp8(weight: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Round to E4M3 with one factor per block; as slow as it is plain."""
    rows, columns = weight.shape
    scale = torch.empty(-(-rows // block[0]), -(-columns // block[1]))
    out = torch.empty(rows, columns)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            place = slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1])
            scale[i, j] = weight[place].abs().max() / 448
            out[place] = weight[place] / scale[i, j]
    return out.to(torch.float8_e4m3fn), scale


def deepseek_fp8(folder: Path) -> Path:
    """A tiny DeepSeek-V3 as its publisher stores it: FP8 projections and experts, scales, the rest in bf16."""
    config = transformers.DeepseekV3Config(**LATENT | {"n_group": 2, "topk_group": 1, "first_k_dense_replace": 1})
    tiny_hf(config).to(torch.bfloat16).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for name in list(tensors):
        if name.endswith(("_proj.weight", "_with_mqa.weight")):
            tensors[name], tensors[f"{name}_scale_inv"] = _quantise_fp8(tensors[name].float(), (16, 8))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    edit_config(folder, quantization_config=FP8)
    return folder


def gpt_oss_mxfp4(folder: Path) -> Path:
    """A tiny gpt-oss as its publisher stores it: experts in MXFP4, the rest in bf16."""
    wide = {**SMALL, "hidden_size": 64, "intermediate_size": 32, "head_dim": 16}
    tiny_hf(transformers.GptOssConfig(**wide)).to(torch.bfloat16).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    draw = torch.Generator().manual_seed(3)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = tensors.pop(name).shape
        shape = (experts, rows, columns // 32, 16)
        tensors[f"{name}_blocks"] = torch.randint(0, 256, shape, dtype=torch.uint8, generator=draw)
        tensors[f"{name}_scales"] = torch.randint(121, 125, shape[:3], dtype=torch.uint8, generator=draw)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    edit_config(folder, quantization_config=MXFP4)
    return folder


def edit_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | values), "utf-8")


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _all_counted(folder: Path) -> None:
    coverage = open_folder(folder).coverage()
    assert coverage.complete
    assert coverage.tensors.total == len(stored(folder))  # scales and blocks one by one
    assert coverage.config_keys.total == len(json.loads((folder / "config.json").read_text("utf-8")))


def test_deepseek_fp8_checkpoint(tmp_path: Path) -> None:
    folder = deepseek_fp8(tmp_path / "fp8")
    _all_counted(folder)
    ids = torch.randint(4, 96, (2, 12), generator=torch.Generator().manual_seed(0))
    # What transformers makes of the numbers that are meant.
    plain = stored(folder)
    for name in [name for name in plain if plain[name].dtype == torch.float8_e4m3fn]:
        weight, scale = plain[name].float(), plain.pop(f"{name}_scale_inv")
        rows, columns = weight.shape
        factor = scale.repeat_interleave(16, 0)[:rows].repeat_interleave(8, 1)[:, :columns]
        plain[name] = weight * factor
    (tmp_path / "plain").mkdir()
    save_file(plain, tmp_path / "plain" / "model.safetensors", {"format": "pt"})
    (tmp_path / "plain" / "config.json").write_bytes((folder / "config.json").read_bytes())
    edit_config(tmp_path / "plain", quantization_config=None)
    wide = mo.load(folder, dtype=torch.float32)
    with torch.no_grad():
        assert (wide(ids).logits - load_hf(tmp_path / "plain")(ids).logits).abs().max() < LOGITS
    narrow = mo.load(folder)
    assert narrow.blocks[1].ffn.experts.w_in.dtype == torch.bfloat16
    for name, tensor in wide.state_dict().items():  # rounded once, from the product
        assert torch.equal(tensor.to(narrow.state_dict()[name].dtype), narrow.state_dict()[name]), name
    assert any(
        not torch.equal(tensor, narrow.state_dict()[name].float()) for name, tensor in wide.state_dict().items()
    ), "fp32 keeps what bf16 rounds away"
    mo.save(narrow, tmp_path / "back", format="hf")
    assert "quantization_config" not in json.loads((tmp_path / "back" / "config.json").read_text("utf-8"))
    with torch.no_grad():
        assert (mo.load(tmp_path / "back")(ids).logits == narrow(ids).logits).all()
    load_hf(tmp_path / "back")


def test_gpt_oss_mxfp4_checkpoint(tmp_path: Path) -> None:
    """As transformers reads the same folder; and what is exported is plain bf16 with the same numbers."""
    folder = gpt_oss_mxfp4(tmp_path / "mxfp4")
    _all_counted(folder)
    ids = torch.randint(4, 96, (2, 12), generator=torch.Generator().manual_seed(0))
    config = transformers.Mxfp4Config(dequantize=True)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.bfloat16, output_loading_info=True
    )
    assert not any(info.values()), info
    theirs = theirs.float().eval()
    ours = mo.load(folder, dtype=torch.float32)
    with torch.no_grad():
        expected = theirs(ids).logits
        assert expected.std() > 0.5
        assert (ours(ids).logits - expected).abs().max() < LOGITS
    mo.save(mo.load(folder), tmp_path / "back", format="hf")
    exported = stored(tmp_path / "back")
    memory = theirs.state_dict()
    assert exported["model.layers.0.mlp.experts.gate_up_proj"].dtype == torch.bfloat16
    assert exported.keys() == memory.keys()
    assert all(torch.equal(tensor.float(), memory[name]) for name, tensor in exported.items())
    load_hf(tmp_path / "back")


@pytest.mark.parametrize("make", [deepseek_fp8, gpt_oss_mxfp4])
def test_streamed_conversion_is_the_same(make: Callable[[Path], Path], tmp_path: Path) -> None:
    folder = make(tmp_path / "hf")
    convert(folder, tmp_path / "native")
    streamed, read = mo.load(tmp_path / "native"), mo.load(folder)
    for name, tensor in read.state_dict().items():
        other = streamed.state_dict()[name]
        assert tensor.dtype == other.dtype
        assert torch.equal(tensor, other), name


def test_the_largest_expert_is_all_that_is_unpacked_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moesaic.convert import storage

    folder = gpt_oss_mxfp4(tmp_path / "mxfp4")
    shapes = []

    def watched(blocks: Tensor, scales: Tensor) -> Tensor:
        shapes.append((blocks.shape, scales.shape))
        return from_mxfp4(blocks, scales)

    monkeypatch.setattr(storage, "from_mxfp4", watched)
    mo.load(folder)
    assert len(shapes) == 3 * 2 * 6
    assert set(shapes) == {((64, 2, 16), (64, 2)), ((64, 1, 16), (64, 1))}


# ---- refusals ----

_EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"
_BLOCKS = "model.layers.1.mlp.experts.down_proj_blocks"
_SCALES = "model.layers.1.mlp.experts.down_proj_scales"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(f"{_EXPERT}_scale_inv"), f'"{_EXPERT}" lacks its scale'),
        (lambda t: t.pop(_EXPERT), f'the scale "{_EXPERT}_scale_inv" belongs to no FP8 tensor'),
        (lambda t: t.update({_EXPERT: t[_EXPERT].bfloat16()}), "belongs to no FP8 tensor; was its tensor lost or already"),
        (lambda t: t.update({f"{_EXPERT}_scale_inv": torch.ones(1, 4)}), r"\[1, 4\]; blocks of \[16, 8\] .*\[2, 4\]"),
        (lambda t: t.update({f"{_EXPERT}_scale_inv": torch.ones(2, 4).half()}), "torch.float16"),
        (lambda t: t.update({_EXPERT: t[_EXPERT].float().to(torch.float8_e5m2)}), "float8_e5m2|belongs to no FP8"),
        (lambda t: t.update({"model.norm.weight": t["model.norm.weight"].to(torch.float8_e4m3fn)}), "lacks its scale"),
        (lambda t: t.update({"x_scale_inv": torch.ones(1, 1)}), '"x_scale_inv" belongs to no FP8 tensor'),
    ],
)  # fmt: skip
def test_fp8_tensors_that_do_not_fit(change: Any, words: str, tmp_path: Path) -> None:
    folder = deepseek_fp8(tmp_path / "fp8")
    edit_tensors(folder, change)
    with pytest.raises(CheckpointError, match=words):
        open_folder(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(_SCALES), f'the blocks "{_BLOCKS}" lack their scales'),
        (lambda t: t.pop(_BLOCKS), f'the scales "{_SCALES}" belong to no blocks'),
        (lambda t: t.update({_SCALES: t[_SCALES][:, :-1].contiguous()}), r"not torch.uint8 \[6, 64, 1\] as their blocks"),
        (lambda t: t.update({_SCALES: t[_SCALES].float()}), "torch.float32"),
        (lambda t: t.update({_BLOCKS: t[_BLOCKS][..., :8].contiguous()}), r"not torch.uint8 \[experts, rows, groups, 16\]"),
        (lambda t: t.update({_BLOCKS: t[_BLOCKS][:5].contiguous(), _SCALES: t[_SCALES][:5].contiguous()}), "wrong shape"),
        (lambda t: t.update({_BLOCKS[:-7]: torch.zeros(6, 32, 64)}), "quantised and plain"),
    ],
)  # fmt: skip
def test_mxfp4_tensors_that_do_not_fit(change: Any, words: str, tmp_path: Path) -> None:
    folder = gpt_oss_mxfp4(tmp_path / "mxfp4")
    edit_tensors(folder, change)
    with pytest.raises(CheckpointError, match=words):
        open_folder(folder)


def test_a_scale_that_is_no_number(tmp_path: Path) -> None:
    folder = gpt_oss_mxfp4(tmp_path / "mxfp4")
    edit_tensors(folder, lambda t: t[_SCALES][4, 7].fill_(255))
    with pytest.raises(CheckpointError, match=f'"{_SCALES}" of expert 4 hold 255, which is no number'):
        mo.load(folder)
    with pytest.raises(MoesaicError, match="of expert 4"):
        convert(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"quant_method": "gptq", "bits": 4}, '"gptq" are not read, only fp8 and mxfp4'),
        ({"quant_method": "awq"}, '"awq" are not read'),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, '"bitsandbytes" are not read'),
        ({"bits": 4}, "lacks the key quant_method"),
        ("fp8", "must be a table"),
        ({**FP8, "fmt": "e5m2"}, 'fmt="e5m2" is not supported'),
        ({**FP8, "activation_scheme": "static"}, 'activation_scheme="static"'),
        ({**FP8, "expert_dtype": "fp4"}, 'expert_dtype="fp4"'),
        ({**FP8, "weight_block_size": None}, "lacks the key weight_block_size"),
        ({**FP8, "weight_block_size": [128]}, "two numbers"),
        ({**FP8, "weight_block_size": [0, 128]}, "two numbers"),
        ({**FP8, "zero_point": True}, '"zero_point"'),
        ({**MXFP4, "group_size": 16}, '"group_size"'),
    ],
)
def test_settings_that_are_not_understood(values: Any, words: str, tmp_path: Path) -> None:
    folder = deepseek_fp8(tmp_path / "fp8")
    edit_config(folder, quantization_config=values)
    with pytest.raises(ConfigError, match=words):
        open_folder(folder)


def test_eight_bits_without_settings(tmp_path: Path) -> None:
    """Read as they are they would be a model of other numbers."""
    folder = deepseek_fp8(tmp_path / "fp8")
    edit_config(folder, quantization_config=None)
    with pytest.raises(CheckpointError, match="no scale says what its numbers stand for"):
        open_folder(folder)


def test_settings_of_a_method_that_nothing_uses(tmp_path: Path) -> None:
    """A checkpoint somebody dequantised and left the settings in: every tensor says for itself what it is."""
    save_file({"a": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    for settings in (FP8, MXFP4):
        found = stored_tensors(find_tensors(tmp_path, "model"), settings)
        assert found["a"].raw == ("a",)
        assert found["a"].load().eq(1).all()
