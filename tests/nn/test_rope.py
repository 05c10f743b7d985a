"""Rotary scalings by hand, against Hugging Face's to the last bit, and through a decoder with and without a cache."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.models import LatentConfig
from moesaic.nn.rope import RopeScaling, rope_frequencies, rope_tables
from tests.models.tiny import lively, some_ids, tiny

YARN = {"kind": "yarn", "factor": 4.0, "original_max_seq_len": 628, "beta_fast": 10.0}
LLAMA3 = {"kind": "llama3", "factor": 8.0, "original_max_seq_len": 1000}


def frequencies(rope_dim: int, theta: float, length: int = 1, **scaling: Any) -> list[float]:
    rates = rope_frequencies(rope_dim, theta, RopeScaling(**scaling), torch.arange(length)[None])
    assert rates.dtype == torch.float32
    return [float(rate) for rate in rates.flatten()]


# ---- by hand -------------------------------------------------------------------------------------------------------------


def test_linear_divides_every_frequency() -> None:
    assert frequencies(4, 100.0, kind="linear", factor=4.0) == pytest.approx([0.25, 0.025], rel=1e-6)
    assert frequencies(4, 100.0, kind="linear", factor=1.0) == pytest.approx([1, 0.1], rel=1e-6)


def test_dynamic_grows_its_base_with_the_row() -> None:
    """100 (2 * 16 / 8 - 1)^(4 / 2) = 900, whose root is 30; up to the old context 100, whose root is 10."""
    scaling = {"kind": "dynamic", "factor": 2.0, "original_max_seq_len": 8}
    assert frequencies(4, 100.0, 16, **scaling) == pytest.approx([1, 1 / 30], rel=1e-6)
    for length in (1, 7, 8):
        assert frequencies(4, 100.0, length, **scaling) == pytest.approx([1, 0.1], rel=1e-6)
    assert frequencies(4, 100.0, 9, **scaling)[1] < 0.1


def test_dynamic_reads_every_row_as_if_it_were_alone() -> None:
    """Also where padding on the right has the position that a next token would have."""
    scaling = RopeScaling("dynamic", 2.0, 4)
    valid_BS = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0]]).bool()
    position_BS = valid_BS.long().cumsum(1) - valid_BS.long()
    together = rope_tables(position_BS, 8, 1e4, scaling, valid_BS)
    for row, valid_S in enumerate(valid_BS):
        alone = rope_tables(position_BS[row : row + 1, valid_S], 8, 1e4, scaling)
        for ours, theirs in zip(together, alone, strict=True):
            assert torch.equal(ours[row : row + 1, :, valid_S], theirs)
    assert not torch.equal(together[1][0, 0, 1], together[1][1, 0, 3])  # lengths 7 and 5: position 1 differs


def test_yarn_divides_what_did_not_turn_once_in_the_old_context() -> None:
    """Frequencies 1, .1, .01, .001 make 99.95, 9.995, .9995, .09995 turns over 628 positions, so 10 turns are at pair 0.9998
    and one at 1.9998: rounded outwards 0 and 2, so pair 1 is half divided by 4: .1 (1/2 + 1/8)."""
    assert frequencies(8, 1e4, **YARN) == pytest.approx([1, 0.0625, 0.0025, 0.00025], rel=1e-6)
    sharp = frequencies(8, 1e4, **YARN, truncate=False)
    first = math.log10(628 / (20 * math.pi))
    assert sharp == pytest.approx([1, 0.1 * (1 - 0.75 * (1 - first)), 0.0025, 0.00025], rel=1e-6)


def test_yarn_with_bounds_that_meet_steps() -> None:
    """Turns of 1 and a little more, both 7.5 decades down, are cut to pair 7: no width, and no division by zero."""
    near = {"kind": "yarn", "factor": 2.0, "original_max_seq_len": int(2 * math.pi * 10**7.5), "beta_fast": 1.0001}
    assert frequencies(8, 1e4, **near) == pytest.approx([1, 0.1, 0.01, 0.001])


def test_yarn_scales() -> None:
    log = math.log(4)
    assert RopeScaling(**YARN).table_scale == pytest.approx(1.138629436)  # type: ignore[arg-type]
    assert RopeScaling(**YARN).score_scale == 1.0  # type: ignore[arg-type]
    both = RopeScaling(**YARN, mscale=1.0, mscale_all_dim=0.5)  # type: ignore[arg-type]
    assert both.table_scale == pytest.approx((0.1 * log + 1) / (0.05 * log + 1))
    assert both.score_scale == pytest.approx(1.143433964)
    assert RopeScaling(**YARN, mscale=0.7, mscale_all_dim=0.7).table_scale == 1.0  # type: ignore[arg-type]  # DeepSeek
    assert RopeScaling(**YARN, mscale=0.7).table_scale == pytest.approx(0.1 * log + 1)  # type: ignore[arg-type]  # alone: unused
    given = RopeScaling(**YARN, attention_factor=0.8, mscale=1.0, mscale_all_dim=0.5)  # type: ignore[arg-type]
    assert given.table_scale == 0.8
    assert RopeScaling("yarn", 1.0, 64, mscale_all_dim=3.0).score_scale == 1.0
    assert RopeScaling("linear", 4.0).table_scale == 1.0
    position = torch.tensor([[0, 3]])
    plain, scaled = (
        rope_tables(position, 8, 1e4, RopeScaling(**YARN, attention_factor=f))  # type: ignore[arg-type]
        for f in (1.0, 0.8)
    )
    assert all(torch.equal(a * 0.8, b) for a, b in zip(plain, scaled, strict=True))


def test_llama3_by_wavelength() -> None:
    """1000 positions hold 159, 15.9, 1.5915 and .159 turns: above 4 stay, below 1 are divided by 8, between mixed."""
    share = (1000 / (200 * math.pi) - 1) / 3
    assert share == pytest.approx(0.197183, abs=1e-6)
    assert frequencies(8, 1e4, **LLAMA3) == pytest.approx([1, 0.1, 0.002975353, 0.000125], rel=1e-6)


# ---- against Hugging Face ------------------------------------------------------------------------------------------------

PUBLISHED: dict[str, dict[str, Any]] = {
    "linear": {"kind": "linear", "factor": 2.5},
    "linear, factor 1": {"kind": "linear", "factor": 1.0},
    "dynamic": {"kind": "dynamic", "factor": 4.0, "original_max_seq_len": 2048},
    "dynamic, factor 1": {"kind": "dynamic", "factor": 1.0, "original_max_seq_len": 2048},
    "yarn": {"kind": "yarn", "factor": 4.0, "original_max_seq_len": 4096},
    "yarn, factor 1": {"kind": "yarn", "factor": 1.0, "original_max_seq_len": 4096},
    "yarn of gpt-oss": {"kind": "yarn", "factor": 32.0, "original_max_seq_len": 4096, "truncate": False},
    "yarn of DeepSeek": {
        "kind": "yarn", "factor": 40.0, "original_max_seq_len": 4096, "mscale": 0.707, "mscale_all_dim": 0.707,
    },
    "yarn, two scales": {
        "kind": "yarn", "factor": 40.0, "original_max_seq_len": 4096, "mscale": 1.0, "mscale_all_dim": 0.5,
    },
    "yarn, one scale": {"kind": "yarn", "factor": 40.0, "original_max_seq_len": 4096, "mscale": 0.9},
    "yarn, given factor": {"kind": "yarn", "factor": 8.0, "original_max_seq_len": 4096, "attention_factor": 1.3},
    "yarn, betas": {"kind": "yarn", "factor": 8.0, "original_max_seq_len": 300, "beta_fast": 8.0, "beta_slow": 0.5},
    "llama3": {"kind": "llama3", "factor": 8.0, "original_max_seq_len": 8192},
    "llama3, bands": {
        "kind": "llama3", "factor": 32.0, "original_max_seq_len": 8192, "low_freq_factor": 2.0, "high_freq_factor": 9.0,
    },
}  # fmt: skip


def hugging_face(settings: dict[str, Any], rope_dim: int, theta: float) -> Any:
    """A configuration of theirs that says the same."""
    transformers = pytest.importorskip("transformers")
    theirs = {"rope_type": settings["kind"], "rope_theta": theta, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if settings["kind"] != "llama3":
        del theirs["low_freq_factor"], theirs["high_freq_factor"]
    theirs |= {key: value for key, value in settings.items() if key not in ("kind", "original_max_seq_len")}
    old = settings.get("original_max_seq_len", 2048)
    if settings["kind"] in ("yarn", "llama3"):
        theirs["original_max_position_embeddings"] = old
        old = int(old * settings["factor"])
    return transformers.LlamaConfig(
        hidden_size=2 * rope_dim, num_attention_heads=2, head_dim=rope_dim, max_position_embeddings=old,
        rope_parameters=theirs,
    )  # fmt: skip


@pytest.mark.parametrize(("rope_dim", "theta"), [(64, 1e4), (128, 1e6), (16, 150000.0)])
@pytest.mark.parametrize("name", PUBLISHED)
def test_frequencies_and_scales_are_those_of_hugging_face(name: str, rope_dim: int, theta: float) -> None:
    settings = PUBLISHED[name]
    config = hugging_face(settings, rope_dim, theta)
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = RopeScaling(**settings)
    for length in (1, 2048, 2049, 5000):
        seq_len = torch.tensor(length)
        want, scale = ROPE_INIT_FUNCTIONS[settings["kind"]](config, torch.device("cpu"), seq_len=seq_len)
        got = rope_frequencies(rope_dim, theta, scaling, torch.arange(length)[None])
        torch.testing.assert_close(got.flatten(), want, rtol=1e-6, atol=0)
        if settings["kind"] != "dynamic":  # a power of one base and of one per row may round differently
            assert torch.equal(got, want)
        assert scaling.table_scale == pytest.approx(scale, rel=1e-12)


@pytest.mark.parametrize("theta", [1e4, 1e6])
def test_plain_tables_are_those_of_hugging_face(theta: float) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = transformers.LlamaConfig(
        hidden_size=128, num_attention_heads=2, rope_parameters={"rope_type": "default", "rope_theta": theta}
    )
    position_BS = torch.tensor([[0, 1, 5, 100, 131_071]])
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), position_BS)
    ours = rope_tables(position_BS, 64, theta)
    assert torch.equal(ours[0][:, 0], cos)
    assert torch.equal(ours[1][:, 0, :, 32:], sin[..., 32:])


@pytest.mark.parametrize("mscale", [None, 0.707, 1.0])
@pytest.mark.parametrize("factor", [1.0, 40.0])
def test_score_scale_is_that_of_deepseek(mscale: float | None, factor: float) -> None:
    pytest.importorskip("transformers")
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import yarn_apply_mscale

    theirs = {"rope_type": "yarn", "factor": factor} | ({} if mscale is None else {"mscale_all_dim": mscale})
    ours = RopeScaling("yarn", factor, 4096, mscale_all_dim=mscale).score_scale
    assert 0.25 * ours == pytest.approx(yarn_apply_mscale(theirs, 0.25), rel=1e-12)


# ---- refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"kind": "linear", "factor": 0.5}, "rope_scaling.factor must be at least 1, not 0.5."),
        ({"kind": "linear", "factor": math.nan}, "rope_scaling.factor must be at least 1, not nan."),
        ({"kind": "linear", "factor": math.inf}, "rope_scaling.factor must be at least 1, not inf."),
        (
            {"kind": "dynamic", "factor": 2.0},
            'rope_scaling.kind="dynamic" needs original_max_seq_len, the context it was pre-trained with, at least 1, '
            "not None.",
        ),
        (
            {"kind": "yarn", "factor": 2.0, "original_max_seq_len": 0},
            'rope_scaling.kind="yarn" needs original_max_seq_len, the context it was pre-trained with, at least 1, not 0.',
        ),
        (
            {"kind": "yarn", "factor": 2.0, "original_max_seq_len": 64, "beta_fast": 1.0, "beta_slow": 2.0},
            "rope_scaling.beta_fast=1.0 must be above beta_slow=2.0, and both above 0.",
        ),
        (
            {"kind": "yarn", "factor": 2.0, "original_max_seq_len": 64, "attention_factor": 0.0},
            "rope_scaling.attention_factor must be above 0, not 0.0.",
        ),
        (
            {"kind": "llama3", "factor": 2.0, "original_max_seq_len": 64, "low_freq_factor": 4.0},
            "rope_scaling.high_freq_factor=4.0 must be above low_freq_factor=4.0, and both above 0.",
        ),
    ],
)
def test_refusals(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        RopeScaling(**settings)
    assert str(error.value) == said


def test_refusals_of_what_the_model_makes_impossible() -> None:
    position = torch.arange(9)[None]
    with pytest.raises(ConfigError, match='kind="dynamic" needs more than 2 dimensions to turn; use "linear" or wider'):
        rope_tables(position, 2, 1e4, RopeScaling("dynamic", 2.0, 4))
    with pytest.raises(ConfigError, match=r'kind="yarn" needs a rope_theta above 1, not 1\.0\.'):
        rope_tables(position, 8, 1.0, RopeScaling("yarn", 2.0, 4))


# ---- in a decoder --------------------------------------------------------------------------------------------------------

SCALINGS = {
    "linear": RopeScaling("linear", 3.0),
    "dynamic, within": RopeScaling("dynamic", 4.0, 16),
    "yarn": RopeScaling("yarn", 4.0, 8, beta_fast=4.0),
    "yarn, scales": RopeScaling("yarn", 4.0, 8, mscale=1.0, mscale_all_dim=0.5),
    "llama3": RopeScaling("llama3", 4.0, 8),
}
SHAPES: dict[str, dict[str, Any]] = {
    "grouped": {"head_dim": 8},
    "latent": {"num_kv_heads": None, "latent": LatentConfig(kv_rank=8, nope_dim=4, rope_dim=8, value_dim=6)},
}


def in_chunks(model: Any, ids: Tensor, sizes: tuple[int, ...]) -> Tensor:
    cache, parts, start = model.new_cache(len(ids), ids.shape[1]), [], 0
    with torch.no_grad():
        for size in sizes:
            parts.append(model(ids[:, start : start + size], cache=cache).logits)
            start += size
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("sizes", [(12,), (5, 1, 1, 5), (1,) * 12], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", SCALINGS)
def test_a_cache_changes_nothing_under_any_scaling(name: str, shape: str, sizes: tuple[int, ...]) -> None:
    model, ids = lively(tiny(rope_scaling=SCALINGS[name], **SHAPES[shape])), some_ids(2, 12)
    with torch.no_grad():
        whole = model(ids).logits
        plain = lively(tiny(**SHAPES[shape]))(ids).logits
    torch.testing.assert_close(in_chunks(model, ids, sizes), whole, rtol=1e-5, atol=1e-5)
    assert torch.allclose(plain, whole, atol=1e-4) == (name == "dynamic, within")  # the scaling does something


def test_beyond_the_old_context_dynamic_keys_keep_the_base_of_their_time() -> None:
    model = lively(tiny(rope_scaling=RopeScaling("dynamic", 4.0, 6), head_dim=8))
    ids = some_ids(1, 12)
    cache = model.new_cache(1, 12)
    with torch.no_grad():
        for i in range(12):
            model(ids[:, i : i + 1], cache=cache)
        for i in range(12):
            prefix = model.new_cache(1, 12)
            model(ids[:, : i + 1], cache=prefix)
            torch.testing.assert_close(cache.keys[0][:, :, i], prefix.keys[0][:, :, i], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(cache.keys[0][:, :, 3], prefix.keys[0][:, :, 3], atol=1e-3)  # of a prefix longer than 6
