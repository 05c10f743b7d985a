"""Counts beside what was published: within 1% but for the listed exceptions, and the digits of the field guide's table."""

from __future__ import annotations

import pytest

from moesaic.cost.architectures import COUNTED, counted
from moesaic.cost.count import ParameterCount, count_config
from moesaic.cost.published import NEAR, PUBLISHED, compare, figure, gives
from moesaic.cost.sizes import weight_bytes
from moesaic.errors import ConfigError
from moesaic.models.presets import PRESETS, preset

# Totals further than 1% from what was published: (least, most) difference.
EXCEPTIONS = {
    "switch-base-128": (0.055, 0.065),  # "7B": one digit
    "switch-large": (0.04, 0.045),
    "gshard-600b": (0.03, 0.032),  # the experts alone
    "glam-64b-64e": (-0.033, -0.031),  # "1.2T"
    "v-moe-l-16": (0.01, 0.015),  # "3.4B", head included
}
# What the table prints as recalculated, in 10^9: total, active.
TABLE = {
    "switch-base-128": ("7.42", "0.224"),
    "switch-base-64": ("3.79", None),
    "switch-large": ("27.1", None),
    "switch-xxl": ("394.5", None),
    "switch-c": ("1571.3", "1.73"),
    "gshard-600b": ("618", None),
    "st-moe-32b": ("268.7", None),
    "st-moe-l": ("4.09", None),
    "mixtral-8x7b": ("46.703", "12.880"),
    "mixtral-8x22b": ("140.63", "39.16"),
    "dbrx": ("131.6", "36.5"),
    "deepseek-moe-16b": ("16.38", "2.83"),
    "deepseek-v2": ("235.74", "21.38"),
    "deepseek-v2-lite": ("15.71", "2.66"),
    "deepseek-v3": ("671.03", "37.55"),
    "qwen1.5-moe-a2.7b": ("14.32", "2.69"),
    "qwen2-57b-a14b": ("57.41", "14.25"),
    "qwen3-30b-a3b": ("30.53", "3.35"),
    "qwen3-235b-a22b": ("235.09", "22.19"),
    "olmoe-1b-7b": ("6.92", "1.28"),
    "gpt-oss-120b": ("116.829", None),
    "gpt-oss-20b": ("20.915", None),
    "jamba-v0.1": ("51.57", "12.11"),
}
WITHOUT_INPUT = {
    "deepseek-v2": "20.85",
    "deepseek-v2-lite": "2.45",
    "deepseek-v3": "36.63",
    "gpt-oss-120b": "5.133",
    "gpt-oss-20b": "3.608",
}


def count(name: str) -> ParameterCount:
    return counted(name).counts if name in COUNTED else count_config(preset(name))


def rounds_to(number: int, printed: str) -> bool:
    digits = len(printed.partition(".")[2])
    return f"{number / 10**9:.{digits}f}" == printed


def test_everything_is_published() -> None:
    assert set(PUBLISHED) == {*PRESETS, *COUNTED}
    assert not {*PRESETS} & {*COUNTED}


@pytest.mark.parametrize("name", PUBLISHED)
def test_totals_are_within_one_percent_but_for_the_exceptions(name: str) -> None:
    total = compare(name, count(name))[0]
    if name in EXCEPTIONS:
        least, most = EXCEPTIONS[name]
        assert least < total.difference < most
        assert total.why
    else:
        assert abs(total.difference) <= NEAR == 0.01
        assert (total.agrees, total.why) == (True, "")


@pytest.mark.parametrize("name", [name for name, said in PUBLISHED.items() if said.active])
def test_active_ones_are_within_one_percent_or_print_the_same_digits(name: str) -> None:
    active = compare(name, count(name))[1]
    assert active.agrees
    assert abs(active.difference) <= 0.01 or active.why
    if name not in ("switch-base-128",):  # 0.2B: one digit
        assert abs(active.difference) < 0.022


@pytest.mark.parametrize("name", TABLE)
def test_the_table_to_its_digits(name: str) -> None:
    total, active = TABLE[name]
    assert rounds_to(count(name).total, total)
    assert active is None or rounds_to(count(name).active, active)
    if name in WITHOUT_INPUT:
        assert rounds_to(count(name).counting("out").active, WITHOUT_INPUT[name])


def test_glam_of_the_table_leaves_routers_and_norms_out() -> None:
    found = count("glam-64b-64e")
    rest = found.parts["router"] + found.parts["norm"]
    assert rounds_to(found.total - rest, "1161.7")
    assert rounds_to(found.active - rest, "96.59")
    assert found.counting("out") == ParameterCount(found.total, found.active, found.parts, found.active_parts)  # tied


def test_vision_models_and_their_heads() -> None:
    for name, body, head in (("v-moe-b-16", "0.964", 14), ("v-moe-l-16", "3.43", 19), ("v-moe-15b", "14.66", 26)):
        found = count(name)
        assert rounds_to(found.total - found.parts["head"], body), name
        assert round(found.parts["head"] / 1e6) == head
    limoe = count("limoe-h-14")
    assert rounds_to(limoe.total - limoe.parts["embedding"], "5.51")
    assert round(limoe.parts["embedding"] / 1e6) == 41
    assert rounds_to(limoe.active, "0.67")


def test_switch_c_by_hand() -> None:
    parts = count("switch-c").parts
    assert parts["experts"] == 30 * 2048 * 2 * 2080 * 6144
    assert (
        parts["attention"] == 15 * 4 * 2080 * 2048 + 15 * 8 * 2080 * 2048
    )  # decoder layers also attend to the encoder
    assert parts["router"] == 30 * 2080 * 2048
    assert parts["embedding"] == 32128 * 2080
    assert (parts["head"], parts["feed-forward"]) == (0, 0)  # every layer is sparse
    assert round(weight_bytes(count("switch-c"), "int4", scales=False) / 1e9) == 786


def test_switch_xxl_needs_128_experts() -> None:
    """Of its paper's table, with 64, 201 billion would come of it."""
    found = count("switch-xxl")
    assert rounds_to(found.total - found.parts["experts"] // 2, "201.3")


def test_a_jamba_layer_by_hand() -> None:
    d, inner, rank, state = 4096, 8192, 256, 16
    one = 2 * d * inner + 4 * inner + inner * (rank + 2 * state) + rank * inner + inner * state + inner * 2 + inner * d
    assert count("jamba-v0.1").parts["mamba"] == 28 * one
    assert count("jamba-v0.1").parts["experts"] == 16 * 16 * 3 * d * 14336


@pytest.mark.parametrize("name", COUNTED)
def test_what_is_counted_adds_up_and_says_what_is_missing(name: str) -> None:
    found = counted(name)
    assert found.counts.total == sum(found.counts.parts.values())
    assert found.counts.active == sum(found.counts.active_parts.values())
    assert found.counts.active_parts["experts"] * found.experts == found.counts.parts["experts"] * found.k
    assert found.missing
    assert (found.left_out != "") == (name == "gshard-600b")


def test_printed_numbers() -> None:
    assert figure("46.7B") == 46.7e9
    assert figure("979M") == 979_000_000
    assert figure("1.2T") == 1.2e12
    assert gives(2_451_400_000, "2.4B")  # cut off
    assert gives(12_879_925_248, "12.9B")  # rounded
    assert not gives(2_500_000_000, "2.4B")
    assert not gives(27_120_000_000, "26B")
    assert gives(7_415_216_640, "7B")


def test_names() -> None:
    assert compare("nothing", ParameterCount(1, 1)) == []
    with pytest.raises(ConfigError, match=r'as "switchc".*"switch-c"'):
        counted("switchc")
