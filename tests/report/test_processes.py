"""What the processes of a run did: read from the log, drawn, and said in words. Values worked by hand."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moesaic.config import to_dict
from moesaic.errors import MoesaicError
from moesaic.layout import ParallelConfig
from moesaic.report import write_report
from moesaic.report.findings import even_bytes, findings
from moesaic.report.processes import MOST_MARKS
from moesaic.report.ranks import RankSums, read_ranks
from moesaic.report.runs import Run, read_run
from moesaic.train import ranks as logged
from tests.report.synthetic_runs import Record, dense_records, entry, over_processes, sparse_records, write_run
from tests.report.test_page import Page, report
from tests.train.tiny_run import tiny_config


def by_hand() -> list[Record]:
    """Two steps of two processes and layers 1 and 4, of four experts each."""
    records = over_processes(sparse_records(steps=2, layers=(1, 4), experts=(4, 4)), 2)
    first, second = (r for r in records if r["kind"] == "step")
    first["ranks"] = [entry({"1": 30, "4": 20}, 1.0, 0.2, 0.1), entry({"1": 10, "4": 20}, 1.0, 0.4, 0.3)]
    second["ranks"] = [entry({"1": 10, "4": 24}, 2.0, 0.5, 0.2), entry({"1": 30, "4": 16}, 2.0, 0.1, 0.2)]
    for record in (first, second):
        record["load"] = [[20, 20, 20, 20], [30, 10, 20, 20]]
    return records


def sums(records: list[Record], layers: tuple[int, ...] = (1, 4)) -> RankSums:
    """Of all steps."""
    found: RankSums | None = None
    for record in records:
        if record["kind"] == "step":
            one = read_ranks(record, layers)
            assert one is not None
            found = one if found is None else found.merged(one)
    assert found is not None
    return found


def test_sums_by_hand() -> None:
    found = sums(by_hand())
    assert found.num_steps == found.row_steps == 2
    assert found.rows_RL.tolist() == [[40, 44], [40, 36]]
    # Layer 1: 30 and 30 are waited for, the mean is 20 and 20, though over both steps the processes did the same.
    assert found.imbalance_L.tolist() == [60 / 40, 44 / 40]
    assert found.imbalance == pytest.approx(104 / 80)
    assert found.time_shares == pytest.approx(((0.3 + 0.3) / 3, (0.2 + 0.2) / 3))
    assert found.all_to_all_bytes == ((40_000 + 40_000) / 2, (50_000 + 46_000) / 2)


def test_page_shows_what_was_logged(tmp_path: Path) -> None:
    records = by_hand()
    for record in records:
        if record["kind"] == "step":
            record["ranks"][0]["rows"]["1"], record["ranks"][1]["rows"]["1"] = 30, 10
    page = report(write_run(tmp_path / "run", records))
    assert "processes" in page.ids()
    assert "2 processes: dp 2, ep 2. Every layer waits for its busiest process." in page.text
    # The last tenth of two steps is the second.
    assert page.data["ranks"] == {"layers": ["1", "4"], "rows": [[30, 10], [24, 16]], "mean": [20, 20]}
    lines = {name: page.data["charts"][name]["lines"] for name in ("busiest", "collectives", "sent")}
    assert [(line["n"], line["y"]) for line in lines["busiest"]] == [("layer 1", [1.5, 1.5]), ("layer 4", [1, 1.2])]
    assert [(line["n"], line["y"]) for line in lines["collectives"]] == [
        ("all-to-all", [30, 15]),
        ("other collectives", [20, 10]),
    ]
    assert [(line["n"], line["y"]) for line in lines["sent"]] == [("mean", [40, 40]), ("most", [50, 46])]
    assert page.data["charts"]["sent"]["unit"] == " kB"
    source = (tmp_path / "run" / "report.html").read_text()
    chart = source.split('data-chart="ranks"')[1].split("</svg>")[0]
    # 30 of a mean of 20 is 1.5: 4.68 of 8 steps to twice as much, so the second of three shades.
    assert re.findall(r'<path class="(h\d+)" d="M(\d) (\d)', chart) == [
        ("h3", "1", "0"),
        ("h5", "1", "1"),
        ("h7", "0", "1"),
        ("h8", "0", "0"),
    ]


def test_words(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", by_hand()))
    final = run.final_ranks()
    assert final is not None
    told = findings(run, final, even=20_000.0)
    assert told[0] == (
        "In the last step the busiest process of a step computed 1.50× the mean rows in layer 1; all layers together, steps "
        "waited for 1.35× the rows of an even spread. Over all these steps rank 1 had most in that layer, 1.50× the mean."
    )
    assert told[1].startswith("--set parallel.rebalance_every=100 moves experts")
    assert told[2] == (
        "All-to-alls took 15% of a step's time, other collectives 10%; waiting for slower processes is in both."
    )
    assert told[3] == (
        "A process sent 40 kB of rows to others per step, 2.00× what an even load sends; whoever sent most, 46 kB."
    )
    assert len(told) == 4  # experts are even, so moving them is enough


def words_of(records: list[Record], folder: Path) -> list[str]:
    run = read_run(write_run(folder, records))
    final = run.final_ranks()
    assert final is not None
    return findings(run, final, None)


def test_one_expert_that_is_too_much_for_any_process_is_told(tmp_path: Path) -> None:
    records = by_hand()
    for record in records:
        if record["kind"] == "step":
            record["load"] = [[60, 10, 5, 5], [20, 20, 20, 20]]
    told = " ".join(words_of(records, tmp_path / "one"))
    assert "busiest expert of layer 1 alone has 1.50× the mean rows of a process" in told  # 60 of 80 on 2
    assert "parallel.replicas=2" in told
    records[0]["config"]["parallel"] = {"ep": 2, "replicas": 2, "rebalance_every": 7}
    told = " ".join(words_of(records, tmp_path / "two"))
    assert "alone" not in told
    assert "parallel.rebalance_every=7 did not keep up" in told


def test_even_rows_get_no_advice(tmp_path: Path) -> None:
    records = by_hand()
    for record in records:
        if record["kind"] == "step":
            record["ranks"] = [entry({"1": 21, "4": 20}, 1.0, 0.3, 0.1), entry({"1": 19, "4": 20}, 1.0, 0.3, 0.1)]
    told = words_of(records, tmp_path / "run")
    assert told[0].startswith("Rows were spread evenly over the processes in the last step")
    assert "1.02× the mean, and 1.05× in layer 1" in told[0]
    assert "--set" not in " ".join(told)
    assert "30% of a step's time" in told[1]
    assert "parallel.chunks=2" in told[1]


def test_moves_and_shadows_are_told_and_marked(tmp_path: Path) -> None:
    records = over_processes(sparse_records(steps=20, layers=(0, 2), experts=(8, 8)), 4, every=8)
    records[-2 if records[-1]["kind"] == "end" else -1]["kind"] = "sample"
    for record in records:
        if record["kind"] == "step":
            record["shadows"] = {"0": [3], "2": [1, 5]}
    told = " ".join(words_of(records, tmp_path / "run"))
    assert "moved after 2 steps, into 8 slots in all" in told  # 2 steps of 2 layers, 2 slots each
    assert "20% fewer rows" in told
    assert "On average 3.0 experts had shadows" in told
    source = write_report(tmp_path / "run").read_text()
    marks = re.findall(r'class="line moved" d="([^"]+)"', source)
    assert [d.count("M") for d in marks] == [2, 2, 2]
    assert "experts moved</span>" in source


def test_very_many_moves_are_counted_not_drawn(tmp_path: Path) -> None:
    records = over_processes(sparse_records(steps=MOST_MARKS + 1, layers=(0,), experts=(4,)), 2, every=1)
    page = report(write_run(tmp_path / "run", records))
    assert f"Experts moved before {MOST_MARKS + 1} of the {MOST_MARKS + 1} points." in page.text
    assert "line moved" not in (tmp_path / "run" / "report.html").read_text().split("</style>")[1]


def in_sum(records: list[Record], layers: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> list[Record]:
    """The same run, logged as one of very many processes is."""
    monkeypatch.setattr(logged, "MOST_SEPARATE", 0)
    found = []
    for record in records:
        if record["kind"] == "step":
            names = (*logged.SECONDS, *logged.BYTES)
            rows = [
                [*(one[name] for name in names), *(one["rows"].get(str(layer), logged.NOT_HERE) for layer in layers)]
                for one in record["ranks"]
            ]
            record = record | {"ranks": logged.to_entries(torch.tensor(rows, dtype=torch.float64), layers)}
        found.append(record)
    return found


def test_a_log_of_very_many_processes_says_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = over_processes(sparse_records(steps=6, layers=(0, 3), experts=(8, 8)), 4)
    short = in_sum(records, (0, 3), monkeypatch)
    mine, theirs = sums(records, (0, 3)), sums(short, (0, 3))
    assert theirs.over
    assert not mine.over
    for name in ("mean_L", "most_L", "mean_F", "most_F"):
        assert np.allclose(getattr(mine, name), getattr(theirs, name), rtol=1e-6), name
    page = report(write_run(tmp_path / "run", short))
    assert "ranks" not in page.data
    assert "the most of 4 processes, not which is which" in page.text
    assert page.data["charts"]["busiest"] == report(write_run(tmp_path / "one", records)).data["charts"]["busiest"]
    assert re.search(r"computed \d\.\d\d× the mean rows in layer \d", page.text)
    assert "had most in that layer" not in page.text


def test_layers_of_other_stages_are_empty_cells(tmp_path: Path) -> None:
    records = by_hand()
    for record in records:
        if record["kind"] == "step":
            both = record["ranks"]
            record["ranks"] = [
                one | {"rows": {layer: n for layer, n in one["rows"].items() if layer == mine}}
                for mine in ("1", "4")
                for one in both
            ]
    page = report(write_run(tmp_path / "run", records))
    assert page.data["ranks"]["rows"] == [[10, 30, None, None], [None, None, 24, 16]]
    assert page.data["ranks"]["mean"] == [20, 20]
    assert [line["y"] for line in page.data["charts"]["busiest"]["lines"]] == [[1.5, 1.5], [1, 1.2]]
    assert "Empty cells are layers of other pipeline stages." in page.text


def test_another_number_of_processes_after_a_stop(tmp_path: Path) -> None:
    records = by_hand()
    second = next(r for r in records if r.get("step") == 2)
    second["ranks"] = [entry({"1": n, "4": 10}, 1.0, 0.1, 0.1) for n in (10, 10, 20)]
    found = sums(records)
    assert found.num_steps == 2
    assert found.row_steps == 1
    assert found.rows_RL.tolist() == [[10, 10], [10, 10], [20, 10]]
    assert found.most_L.tolist() == [30 + 20, 20 + 10]
    assert "Mean of the last step." in report(write_run(tmp_path / "run", records)).text


def test_dense_processes_have_times_alone(tmp_path: Path) -> None:
    records = dense_records(steps=5)
    records[0] |= {"processes": 2, "layout": "2 processes: dp 2"}
    for record in records:
        if record["kind"] == "step":
            record["ranks"] = [entry({}, 0.5, 0.0, 0.2)] * 2
    page = report(write_run(tmp_path / "run", records))
    assert "Collectives took 40% of a step's time" in page.text
    assert {"collectives"} == {"ranks", "busiest", "collectives", "sent"} & page.data["charts"].keys()
    assert "waits for its busiest" not in page.text


def test_one_process_has_no_section(tmp_path: Path) -> None:
    page = report(write_run(tmp_path / "run", sparse_records(steps=5)))
    assert "processes" not in page.ids()
    assert "All-to-all" not in page.text
    assert "All-to-all" in report(write_run(tmp_path / "two", by_hand())).text  # in the glossary


def test_nulls_are_gaps(tmp_path: Path) -> None:
    records = by_hand()
    first = next(r for r in records if r["kind"] == "step")
    first["ranks"][0].update(step_s=None, all_to_all_bytes=None, rows={"1": None, "4": 20})
    first["ranks"][1]["rows"]["1"] = None
    page = report(write_run(tmp_path / "run", records))
    assert [line["y"] for line in page.data["charts"]["busiest"]["lines"]] == [[None, 1.5], [1, 1.2]]
    assert page.data["charts"]["collectives"]["lines"][0]["y"] == [None, 15]


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        ([{"rows": {"7": 1}}], "layer 7, which the run has not"),
        ([{"over": "mean", "rows": {}}], r"over \['mean'\], not"),
        ([{"rows": {"1": "many"}}], "could not convert"),
        ([3], "not a record"),
        ([{}], "missing 'rows'"),
    ],
)
def test_broken_figures_name_the_line(tmp_path: Path, ranks: list[Any], words: str) -> None:
    records = by_hand()
    next(r for r in records if r["kind"] == "step")["ranks"] = ranks
    with pytest.raises(MoesaicError, match=words) as caught:
        read_run(write_run(tmp_path / "run", records))
    assert "metrics.jsonl:2" in str(caught.value)


def test_bytes_of_an_even_load() -> None:
    """Fieldguide 4.2: 4 T k d b (P - 1) / P per layer; 6 where activations are recomputed."""
    config = tiny_config(
        batch_size=4, parallel=ParallelConfig(ep=2)
    )  # 2 layers, k 2, d 16, fp32, 4 rows of 24 on 2 processes
    run = Run(Path("run"), config=to_dict(config), processes=2)
    assert even_bytes(run) == 2 * (4 * (2 * 24) * 2 * 16 * 4) / 2
    run.config["recompute"] = True
    assert even_bytes(run) == 2 * (6 * (2 * 24) * 2 * 16 * 4) / 2
    run.config["parallel"]["exchange"] = "hierarchical"
    assert even_bytes(run) is None  # only torchrun knew the nodes
    assert even_bytes(Run(Path("run"), config={"parallel": {"ep": 2}, "model": {"dim": 256}}, processes=2)) is None
    assert even_bytes(Run(Path("run"), config={"parallel": {"unknown": 2}}, processes=2)) is None
    assert even_bytes(Run(Path("run"), config=to_dict(tiny_config()), processes=2)) is None  # nothing travels


@pytest.mark.slow
def test_a_long_run_of_many_processes_stays_small(tmp_path: Path) -> None:
    """10,000 steps of 64 processes: a log of 90 MB, a page far below one."""
    records = over_processes(sparse_records(steps=50, layers=(0, 1), experts=(64, 64)), 64, every=10)
    steps = [
        json.dumps({k: v for k, v in r.items() if k not in ("step", "tokens")})[1:]
        for r in records
        if r["kind"] == "step"
    ]
    folder = tmp_path / "run"
    folder.mkdir()
    with (folder / "metrics.jsonl").open("w") as file:
        file.write(json.dumps(records[0]) + "\n")
        for n in range(1, 10_001):
            file.write(f'{{"step":{n},"tokens":{n * 8192},{steps[n % 50]}\n')
    out = write_report(folder)
    assert out.stat().st_size < 400_000
    page = Page(out.read_text())
    assert [len(row) for row in page.data["ranks"]["rows"]] == [64, 64]
    assert len(page.data["charts"]["busiest"]["lines"][0]["x"]) <= 120
    assert "In the last 1,0" in page.text
