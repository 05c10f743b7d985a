"""Every key of every family's config with values nobody means: read, or refused in a sentence, never anything else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from moesaic.commands.info import info
from moesaic.convert.convert import convert, plan_conversion
from moesaic.convert.families import FAMILIES
from moesaic.convert.keys import CARRIED, Keys
from moesaic.convert.read import open_folder
from moesaic.convert.write import write_hf
from moesaic.errors import ConfigError, MoesaicError
from moesaic.models.build import build_model
from tests.command import call
from tests.convert.configs import CONFIGS
from tests.convert.tiny_checkpoint import edit_config, make_hf
from tests.convert.variants import TINY

HUGE = 10**400
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [16, 8]}
VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2**50, 2**53, HUGE, -HUGE, 0.0, 1.5, -1e308, 1e308, float("inf"), float("nan"), "",
    "x\n\ud800", [], [[]], [HUGE], {}, {"x": [float("nan")]},
]  # fmt: skip
_LATENT = TINY | {
    "q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "num_key_value_heads": 4,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "first_k_dense_replace": 1, "n_group": 2,
    "topk_group": 1,
}  # fmt: skip
del _LATENT["head_dim"]
BASES: dict[str, dict[str, Any]] = {
    **{family: variants["plain"] for family, variants in CONFIGS.items()},
    "deepseek_v2": _LATENT | {"topk_method": "group_limited_greedy"},
    "deepseek_v3": _LATENT | {"num_nextn_predict_layers": 1},
    "gpt_oss": TINY | {"num_local_experts": 4, "num_experts_per_tok": 2},
}
ROPE = {
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {
        "factor": 2.0, "original_max_position_embeddings": 64, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": True,
        "mscale": 1.0, "mscale_all_dim": 1.0, "attention_factor": 1.0,
    },
    "llama3": {
        "factor": 2.0, "original_max_position_embeddings": 64, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    },
}  # fmt: skip


class Noted(Keys):
    """Remembers every key that is asked for."""

    asked: set[str]

    def __init__(self, data: dict[str, Any], where: str) -> None:
        super().__init__(data, where)
        self.asked = set()

    def get(self, name: str, *default: Any) -> Any:
        self.asked.add(name)
        return super().get(name, *default)

    def fixed(self, name: str, *values: Any) -> None:
        self.asked.add(name)
        super().fixed(name, *values)

    def carry(self, *names: str) -> None:
        self.asked.update(names)
        super().carry(*names)


def folder_of(family: str, folder: Path) -> Path:
    """A folder of the family, and its config alone again before each change."""
    keys = Keys(BASES[family], family)
    write_hf(build_model(FAMILIES[family].read(keys), seed=0), folder)
    shutil.copy(folder / "config.json", folder.parent / "whole.json")
    return folder


def try_values(folder: Path, capsys: pytest.CaptureFixture[str], changes: list[dict[str, Any]]) -> int:
    """Changes to the config that are read; all others are refused in one sentence."""
    whole, read = json.loads((folder.parent / "whole.json").read_text()), 0
    for change in changes:
        (folder / "config.json").write_text(json.dumps(whole | change))
        try:
            info(str(folder), json=True)
            for to in ("moesaic", "hf"):
                plan_conversion(folder, folder.parent / "out", to=to)  # type: ignore[arg-type]
            read += 1
        except MoesaicError as error:
            assert "\n" not in str(error).strip(), change  # noqa: PT017 - either outcome is right
        except Exception as error:
            raise AssertionError(f"{change}: {error!r}") from error
    capsys.readouterr()
    return read


def some(changes: list[Any], every: bool) -> list[Any]:
    """All of them, or one in eight, which over the keys comes to every value."""
    return changes if every else changes[::8]


quickly_and_all = pytest.mark.parametrize(
    "every", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["some", "all"]
)


@quickly_and_all
@pytest.mark.parametrize("family", BASES)
def test_any_value_of_any_key_is_read_or_refused(
    family: str, every: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = folder_of(family, tmp_path / "hf")
    found = Noted(json.loads((folder / "config.json").read_text()), family)
    FAMILIES[family].read(found)
    asked = sorted(found.asked - {"rope_parameters"} | {"architectures", "model_type", "quantization_config", "dtype"})
    assert {"vocab_size", "hidden_size", "rms_norm_eps", "rope_scaling"} <= set(asked)
    read = try_values(folder, capsys, some([{key: value} for key in asked for value in VALUES], every))
    assert read > 5


@quickly_and_all
@pytest.mark.parametrize("family", ["llama", "deepseek_v3"])
@pytest.mark.parametrize("kind", ROPE)
def test_any_value_of_any_setting_of_rope(
    family: str, kind: str, every: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = folder_of(family, tmp_path / "hf")
    table = {"rope_type": kind, **ROPE[kind]}
    changes = [{"rope_scaling": table | {key: value}} for key in (*table, "type") for value in VALUES]
    less = [{"rope_scaling": {k: v for k, v in table.items() if k != key}} for key in table]
    few = {k: v for k, v in table.items() if k != "factor"}
    without = [{"rope_scaling": few | {"original_max_position_embeddings": value}} for value in VALUES]
    assert try_values(folder, capsys, [{"rope_scaling": table}]) == 1
    try_values(folder, capsys, some(changes + less + without, every))


@quickly_and_all
def test_any_value_of_what_only_travels(every: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = folder_of("llama", tmp_path / "hf")
    deep: Any = []
    for _ in range(300):
        deep = [deep]
    assert try_values(folder, capsys, [{"id2label": {"0": {"a": [1, None]}}}]) == 1
    values = [float("nan"), HUGE, "x\n\ud800", {"x": [float("inf")]}, deep]
    try_values(folder, capsys, some([{key: value} for key in sorted(CARRIED) for value in values], every))


@quickly_and_all
def test_any_value_of_quantisation(every: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = folder_of("deepseek_v3", tmp_path / "hf")
    assert try_values(folder, capsys, [{"quantization_config": FP8}]) == 1
    changes = [{"quantization_config": FP8 | {key: value}} for key in (*FP8, "modules_to_convert") for value in VALUES]
    try_values(folder, capsys, some(changes, every))


@quickly_and_all
def test_any_value_of_a_folder_of_ours(every: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its config, where it came from included, may be anyone's as well."""
    folder = tmp_path / "ours"
    convert(make_hf(tmp_path / "hf"), folder)
    whole = json.loads((folder / "config.json").read_text())
    (tmp_path / "whole.json").write_text(json.dumps(whole))
    assert try_values(folder, capsys, []) == 0
    changes = [{key: value} for key in whole for value in VALUES]
    changes += [{"model": whole["model"] | {key: value}} for key in whole["model"] for value in VALUES]
    moe = whole["model"]["moe"]
    changes += [{"model": whole["model"] | {"moe": moe | {key: value}}} for key in moe for value in VALUES]
    changes += [{"source": whole["source"] | {key: value}} for key in ("family", "config", "x") for value in VALUES]
    try_values(folder, capsys, some(changes, every))


CASES: dict[str, tuple[dict[str, Any], str]] = {
    "rope type a list": ({"rope_parameters": {"rope_type": ["yarn"]}}, r'rope_type must be a text, not \["yarn"\]'),
    "rope type a table": ({"rope_scaling": {"type": {}}}, "type must be a text, not {}"),
    "old context of 0": (
        {"rope_scaling": {"rope_type": "yarn", "original_max_position_embeddings": 0}},
        r"at least 1, not 0 \(original_max_position_embeddings\)",
    ),
    "stretched past counting": (
        {"rope_scaling": {"rope_type": "dynamic", "factor": 1e308}, "max_position_embeddings": 2**50},
        r"stretches 1125899906842624 tokens by factor=1e\+308, which is impossible",
    ),
    "stretched far": ({"rope_scaling": {"rope_type": "dynamic", "factor": 1e300}}, "impossible"),
    "eps past floats": ({"rms_norm_eps": HUGE}, "rms_norm_eps must be a number, not 1000"),
    "factor past floats": ({"rope_scaling": {"rope_type": "linear", "factor": HUGE}}, "factor must be a number"),
    "method a list": (
        {"quantization_config": {"quant_method": ["fp8"]}},
        r'quant_method must be a text, not \["fp8"\]',
    ),
    "a word for a list": ({"architectures": "MixtralForCausalLM"}, r'must be a list, such as \["MixtralForCausalLM"\]'),
    "NaN that travels": ({"initializer_range": float("nan")}, "initializer_range=NaN is no value of JSON"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_wrong_is_said(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes, words = CASES[case]
    folder = make_hf(tmp_path / "hf")
    edit_config(folder, **changes)
    with pytest.raises(MoesaicError, match=words):
        open_folder(folder)
    for done in (call(capsys, "convert", str(folder), str(tmp_path / "out")), call(capsys, "info", str(folder))):
        assert (done.status, done.out, done.err.count("\n")) == (2, "", 1)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ({"family": ["mixtral"]}, r'family must be a text, not \["mixtral"\]'),
        ({"config": [1]}, r"config must be a table of settings, not \[1\]"),
        ({"config": {"zzz": 1}}, r'source.config .*: the key "zzz" \(1\) is unknown'),
        ({"config": {"sliding_window": 5, "layer_types": ["sliding_attention"] * 2}}, "layer_types"),
        ({"config": {"attention_dropout": float("inf")}}, None),
        ({"config": {"initializer_range": float("inf")}}, "initializer_range=Infinity"),
    ],
    ids=["family", "config", "key", "another model", "written anyway", "no JSON"],
)
def test_what_a_folder_of_ours_says_it_came_from(
    source: dict[str, Any], words: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert(make_hf(tmp_path / "hf"), tmp_path / "ours")
    path = tmp_path / "ours" / "config.json"
    data = json.loads(path.read_text())
    path.write_text(json.dumps(data | {"source": data["source"] | source}))
    if words is None:
        convert(tmp_path / "ours", tmp_path / "back", to="hf", verify=False)
        assert open_folder(tmp_path / "back").config.vocab_size == 40
        return
    with pytest.raises(ConfigError, match=words):
        convert(tmp_path / "ours", tmp_path / "back", to="hf", verify=False)
    done = call(capsys, "convert", str(tmp_path / "ours"), str(tmp_path / "back"), "--to", "hf", "--no-verify")
    assert (done.status, done.err.count("\n")) == (2, 1)
    assert not (tmp_path / "back").exists()


def test_a_note_of_transformers_to_itself_is_passed_over(tmp_path: Path) -> None:
    folder = make_hf(tmp_path / "hf")
    edit_config(folder, _attn_implementation_autoset=True)
    report = convert(folder, tmp_path / "again", to="hf")
    assert report.coverage.complete
    assert any("_attn_implementation_autoset" in note for note in report.coverage.notes)
    assert "_attn_implementation_autoset" not in json.loads((tmp_path / "again" / "config.json").read_text())
