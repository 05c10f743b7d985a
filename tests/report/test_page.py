"""The report page: well-formed, self-contained, deaf to hostile text, and equal to the numbers in the log."""

from __future__ import annotations

import base64
import hashlib
import html as html_module
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesaic.errors import DataError, MoesaicError
from moesaic.report import write_report
from moesaic.report.charts import band, tick_labels
from moesaic.report.heat import ALPHABET, cell_class, encode
from moesaic.report.text import duration
from tests.report.synthetic_runs import dense_records, sparse_records, write_comparison, write_run

VOID = {"meta", "input", "br", "hr", "img", "link", "path", "rect", "circle"}


class Page(HTMLParser):
    """Checks that tags balance; collects elements, attributes and text."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.scripts: list[str] = []
        self.feed(source)
        self.close()
        assert self.open == [], f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1:] == [tag], f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)
        elif self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))

    @property
    def data(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.scripts[0])
        return found

    def ids(self) -> set[str | None]:
        return {attrs.get("id") for _, attrs in self.tags}


def report(folder: Path) -> Page:
    return Page(write_report(folder).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_comparison(tmp_path_factory.mktemp("report") / "comparison", steps=300)


def test_whole_page_is_well_formed_and_has_every_section(comparison: Path) -> None:
    page = report(comparison)
    assert {"loss", "load", "routers", "experts", "domains", "samples", "config", "glossary"} <= page.ids()
    charts = [attrs for tag, attrs in page.tags if tag == "svg" and "chart" in (attrs.get("class") or "")]
    assert len(charts) >= 15
    assert all(attrs.get("role") == "img" and len(attrs.get("aria-label") or "") > 20 for attrs in charts)


def test_page_loads_nothing_and_allows_only_its_own_script(comparison: Path) -> None:
    source = write_report(comparison).read_text(encoding="utf-8")
    assert not re.search(r"https?://|//cdn|@import|url\((?!#)", source)
    page = Page(source)
    for tag, attrs in page.tags:
        assert tag not in ("link", "iframe", "object", "img")
        assert not any(name.startswith("on") or name == "src" for name in attrs)
        assert (attrs.get("href") or "#").startswith("#")
    digest = base64.b64encode(hashlib.sha256(page.scripts[1].encode()).digest()).decode()
    policy = next(attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv"))
    assert policy
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy


def test_numbers_equal_the_log(comparison: Path) -> None:
    page = report(comparison)
    last = {css: _last(comparison / css, "val") for css in ("sparse", "dense")}
    sparse, dense = last["sparse"]["loss"], last["dense"]["loss"]
    assert (
        f"validation loss {sparse:.3f} against {dense:.3f} after the same {300 * 8192 / 1e6:.3g}M tokens" in page.text
    )
    for css in last:
        for value in last[css]["by_domain"].values():
            assert f"{value:.3f}" in page.text
    step = _last(comparison / "sparse", "step")
    header = _last(comparison / "sparse", "run")
    assert "41.2M" in page.text
    assert "9.8M" in page.text
    assert header["params_active"] == 9_800_000
    lines = {line["n"]: line for line in page.data["charts"]["loss-tokens"]["lines"]}
    assert lines["sparse, validation"]["x"][-1] == step["tokens"]
    assert lines["sparse, validation"]["y"][-1] == pytest.approx(sparse, rel=1e-4)
    assert len(lines["dense, validation"]["y"]) == 10


def test_heat_map_cells_are_the_logged_load(tmp_path: Path) -> None:
    records = sparse_records(steps=1, layers=(4,), experts=(5,))
    records[1]["load"] = [[100, 200, 50, 0, 150]]  # fair share is 100
    page = report(write_run(tmp_path / "run", records))
    # one octave is 8 steps of the alphabet: g (fair), o (twice), Y (half), _ (no token); 150/100 is 4.68 -> 5 steps: l
    assert page.data["load"]["layers"] == [{"n": "4", "e": 5, "s": "goY_l"}]
    assert page.data["overview"] == ["goY_l"]
    assert "Unused experts 1 of 5" in page.text


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    evil = '</script><script>alert(1)</script><img src=x onerror="alert(2)">\'"&\x00\u202e\ud800'
    records = sparse_records(steps=20, domains=(evil, "prose"), layers=(0,), experts=(4,))
    records[0]["name"] = evil
    records[0]["config"][evil] = {evil: evil}
    records.insert(-1, {"kind": "sample", "step": 20, "prompt": evil, "text": evil + evil})
    write_run(tmp_path / "sparse", records)
    write_run(tmp_path / "dense", [{**r, "name": evil} if r["kind"] == "run" else r for r in dense_records(steps=20)])
    (tmp_path / "summary.json").write_text(json.dumps({"verdict": evil, "runs": {"sparse": {evil: evil}}}))
    for folder in (tmp_path, tmp_path / "sparse"):
        source = write_report(folder).read_text(encoding="utf-8")
        page = Page(source)
        assert len(page.scripts) == 2
        assert source.count("<script") == 2
        assert source.count("</script") == 2
        assert not any(tag == "img" for tag, _ in page.tags)
        assert "<script>alert(1)</script>" in page.text  # shown, as text
        assert page.data["domain"]["names"][0].startswith("</script>")
        assert "<" not in page.scripts[0]
        assert "\x00" not in source
        assert "\u202e" not in source


def test_verdict_admits_a_loss(tmp_path: Path) -> None:
    write_run(tmp_path / "sparse", sparse_records(steps=100, final=2.6))
    write_run(tmp_path / "dense", dense_records(steps=100, final=2.4))
    page = report(tmp_path)
    assert "The sparse model lost to its dense twin: validation loss" in page.text
    assert "The sparse model is ahead" not in page.text


@pytest.mark.parametrize("missing", ["val", "sample", "end"])
def test_missing_records(tmp_path: Path, missing: str) -> None:
    write_run(tmp_path / "sparse", [r for r in sparse_records(steps=60) if r["kind"] != missing])
    write_run(tmp_path / "dense", [r for r in dense_records(steps=60) if r["kind"] != missing])
    page = report(tmp_path)  # no summary.json either
    expected = {"val": "compares training loss", "sample": "is ahead", "end": "did not finish"}[missing]
    assert expected in page.text
    assert ("samples" in page.ids()) == (missing != "sample")
    assert ("domains" in page.ids()) == (missing != "val")


def test_dense_run_alone_has_no_load_sections(tmp_path: Path) -> None:
    page = report(write_run(tmp_path / "run", dense_records(steps=30)))
    assert not {"load", "routers", "experts", "layer"} & page.ids()
    assert "loss" in page.ids()
    assert "no dense twin" not in page.text


def test_single_step_and_header_only(tmp_path: Path) -> None:
    records = sparse_records(steps=1)
    page = report(write_run(tmp_path / "one", records))
    assert {"loss", "load", "routers"} <= page.ids()
    page = report(write_run(tmp_path / "none", records[:1]))
    assert "No step has been recorded yet." in page.text


def test_nulls_are_gaps(tmp_path: Path) -> None:
    records = sparse_records(steps=9, layers=(0, 1), experts=(4, 4))
    for record in records:
        if record["kind"] == "step" and record["step"] in (4, 5, 6):
            record.update(lm_loss=None, loss=None, time_s=None, load=[None, record["load"][1]], entropy=[None, 1.0])
        if record["kind"] == "val" and record["step"] == 9:
            record.update(loss=None, by_domain=dict.fromkeys(record["by_domain"]))
    page = report(write_run(tmp_path / "run", records))
    assert page.data["charts"]["entropy"]["lines"][0]["y"][3:6] == [None] * 3
    first_expert = page.data["load"]["layers"][0]["s"][:9]
    assert first_expert[3:6] == "..."
    assert "." not in first_expert[:3] + first_expert[6:]
    entropy = write_report(tmp_path / "run").read_text().split('data-chart="entropy"')[1].split("</svg>")[0]
    drawn = re.search(r'class="line layer" data-l="0"[^>]* d="([^"]+)"', entropy)
    assert drawn
    assert drawn[1].count("M") == 2


def test_layers_of_different_sizes_one_expert_one_domain(tmp_path: Path) -> None:
    name = "a very long domain name with spaces and no end in sight " * 4
    records = sparse_records(steps=12, layers=(0, 2, 5), experts=(1, 3, 8), domains=(name,))
    page = report(write_run(tmp_path / "run", records))
    assert [layer["e"] for layer in page.data["load"]["layers"]] == [1, 3, 8]
    assert [len(row) for row in page.data["overview"]] == [8, 8, 8]
    assert "Only one domain was validated" in page.text


def test_many_domains_are_grouped(tmp_path: Path) -> None:
    domains = tuple(f"domain {i}" for i in range(15))
    page = report(write_run(tmp_path / "run", sparse_records(steps=10, layers=(0,), experts=(3,), domains=domains)))
    assert page.data["domain"]["names"][-1] == "7 others"
    assert len(page.data["domain"]["names"]) == 9
    assert all(sum(column) == 1000 for column in zip(*page.data["domain"]["layers"][0]["p"], strict=True))


def test_killed_run(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", sparse_records(steps=10, end=None))
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b'{"kind":"step","step":11,"text":"caf\xc3')
    page = report(folder)
    assert "cut short" in page.text
    assert "still running, or killed" in page.text


def test_missing_folder_and_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="There is no folder .*nowhere"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(DataError, match="holds no metrics.jsonl"):
        write_report(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(DataError, match="holds no records yet"):
        write_report(tmp_path)


def test_broken_summary_is_a_sentence(tmp_path: Path) -> None:
    write_run(tmp_path / "dense", dense_records(steps=3))
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(DataError, match="summary.json is not readable JSON"):
        write_report(tmp_path)


def test_out_path_and_no_leftovers(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", dense_records(steps=3))
    out = write_report(folder, tmp_path / "deep" / "page.html")
    assert out == tmp_path / "deep" / "page.html"
    assert os.listdir(out.parent) == ["page.html"]
    assert write_report(folder) == folder / "report.html"
    (tmp_path / "file").write_text("")
    with pytest.raises(MoesaicError, match="Cannot write to"):
        write_report(folder, tmp_path / "file" / "page.html")


def test_huge_run_stays_small(tmp_path: Path) -> None:
    """64 layers x 128 experts, more steps than windows, noisy loads: the page is far below 2 MB."""
    experts = (128,) * 64
    records = sparse_records(steps=2, layers=tuple(range(64)), experts=experts)
    step, val = (next(r for r in records if r["kind"] == kind) for kind in ("step", "val"))
    folder = tmp_path / "run"
    folder.mkdir()
    with (folder / "metrics.jsonl").open("w") as file:
        file.write(json.dumps(records[0]) + "\n")
        for number in range(1, 131):
            step["load"] = [[(7 * i + 13 * e + number * (e % 5)) % 97 for e in range(128)] for i in range(64)]
            file.write(json.dumps(step | {"step": number, "tokens": number * 8192}) + "\n")
            if number % 10 == 0:
                file.write(json.dumps(val | {"step": number, "tokens": number * 8192}) + "\n")
    out = write_report(folder)
    assert out.stat().st_size < 1_600_000
    page = Page(out.read_text())
    assert len(page.data["load"]["x"]) <= 60
    assert page.data["load"]["x"][-1] == 130 * 8192
    assert "Each column adds up 4 logged steps" in page.text


def ticks_of(page: str, title: str) -> list[list[str]]:
    """The tick labels of each chart of this title: up, and across."""
    charts = re.findall(rf'<svg class="chart [^>]*aria-label="{title}[^>]*>.*?</svg>', page, re.DOTALL)
    assert charts
    return [
        [*re.findall(r'class="tick"[^>]*text-anchor="end">([^<]+)<', chart)]
        + [*re.findall(r'class="tick"[^>]*text-anchor="middle">([^<]+)<', chart)]
        for chart in charts
    ]


def test_ticks_of_a_narrow_range_can_be_told_apart(tmp_path: Path) -> None:
    records = sparse_records(steps=6, layers=(0,), experts=(4,), domains=("a", "b"))
    for record in records:
        if record["kind"] == "val":
            record["by_domain"] = {"a": 7.5312, "b": 7.5319}
        if record["kind"] == "step":
            record["margin"] = [3e-6 + 1e-7 * record["step"]]
    page = write_report(write_run(tmp_path / "run", records)).read_text()
    for ticks in ticks_of(page, "Validation loss by domain"):
        assert len(ticks) == len(set(ticks)) > 1
        assert all(7.531 <= float(tick) <= 7.532 for tick in ticks)
    # The margin panel fits what it shows: the highest tick is of the size of the data.
    box = re.search(r'data-box="([^"]+)"[^>]*data-chart="margin"', page)
    assert box
    assert float(box[1].split()[-1]) == pytest.approx(3.6e-6 * 1.1)
    assert report(tmp_path / "run").data["charts"]["margin"]["digits"] >= 7


def test_tick_labels() -> None:
    def form(tick: float) -> str:
        return f"{tick:.3g}"

    assert tick_labels([1.0, 2.5], form) == ["1", "2.5"]
    assert tick_labels([7.5312, 7.5314, 7.5316], form) == ["7.5312", "7.5314", "7.5316"]
    assert tick_labels([0.02, 0.04], duration) == ["0.02 s", "0.04 s"]
    assert tick_labels([0.0025, 0.005], lambda t: f"{t:.0f}") == ["0.0025", "0.0050"]
    assert tick_labels([5.0], form) == ["5"]


def test_unused_and_dead_experts_are_told_apart(tmp_path: Path) -> None:
    records = sparse_records(steps=6, layers=(0,), experts=(4,))
    records[0]["config"] = {**records[0]["config"], "dead_window": 7}
    text = report(write_run(tmp_path / "run", records)).text
    assert 'Got nothing in the 7 steps before each point; the tile "Unused experts" counts the last tenth' in text


def test_glossary_names_every_chart(comparison: Path) -> None:
    page = report(comparison)
    for term in (
        "MaxVio",
        "Router entropy",
        "Margin",
        "Dead experts",
        "Drop rate",
        "Effective experts",
        "Specialisation",
    ):
        assert page.text.count(term) >= 2


def _last(folder: Path, kind: str) -> dict[str, Any]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found: dict[str, Any] = [record for record in lines if record["kind"] == kind][-1]
    return found


def test_escape_round_trips_visible_text() -> None:
    from moesaic.report.text import escape

    assert html_module.unescape(escape("<b> & \"quotes\" 'too'")) == "<b> & \"quotes\" 'too'"


def test_long_run_is_thinned_but_keeps_its_extremes(tmp_path: Path) -> None:
    records = dense_records(steps=3000)
    spike = next(r for r in records if r.get("step") == 1501)
    spike["lm_loss"] = 4.875
    source = write_report(write_run(tmp_path / "run", records)).read_text()
    page = Page(source)
    assert "lowest and highest of about 15 steps at each point" in page.text
    losses = [r["lm_loss"] for r in records if r["kind"] == "step"]
    x, low, high = band(list(range(3000)), losses, 200)
    assert len(x) == len(low) == len(high) == 200
    assert x[100] == 1507
    assert high[100] == 4.875 == max(losses[1500:1515])
    assert low[100] == min(losses[1500:1515])
    assert len(page.data["charts"]["loss-tokens"]["lines"][0]["x"]) <= 300
    areas = re.findall(r'class="area dense" d="([^"]+)"', source)
    assert [d.count("L") for d in areas] == [399] * 4


def test_script_reads_the_cells_python_writes(comparison: Path) -> None:
    page = report(comparison)
    assert f'"{ALPHABET}"' in page.scripts[1]
    used = set("".join(layer["s"] for layer in page.data["load"]["layers"]))
    assert used <= set(ALPHABET)
    classes = [cell_class(encode(np.array([ratio]))) for ratio in (0.1, 0.5, 1.0, 2.0, 9.0, 0.0, np.nan)]
    assert classes == ["h0", "h3", "h6", "h9", "h12", "dead", None]
