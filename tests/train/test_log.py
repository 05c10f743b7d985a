"""metrics.jsonl survives kills, resumes and NaN; TensorBoard gets the promised tags; progress says the numbers."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moesaic.errors import DataError, MoesaicError
from moesaic.train.board import scalars
from moesaic.train.log import MetricsLog, Progress, duration, finite, read_metrics

RUN = {"kind": "run", "name": "sparse", "layers": [1, 3], "num_experts": [2, 2]}


def step(n: int, **more: Any) -> dict[str, Any]:
    return {
        "kind": "step",
        "step": n,
        "loss": 2.5,
        "lm_loss": 2.25,
        "lr": 0.5,
        "grad_norm": 1.5,
        "tokens_per_s": 1000.0,
        "losses": {"switch": 0.25},
        "load": [[6, 2], [4, 4]],
        "max_vio": [0.5, 0.0],
        "drop_rate": [0.125, 0.0],
        "dead": [0, 1],
        "entropy": [0.625, None],
        **more,
    }


def write(folder: Path, records: list[dict[str, Any]], resume_step: int | None = None) -> None:
    with MetricsLog(folder, resume_step, tensorboard=False) as log:
        for record in records:
            log.write(record)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    records = [
        RUN,
        step(1),
        {"kind": "sample", "step": 1, "prompt": "é\u2028\n", "text": "日本"},
        {"kind": "end", "step": 1},
    ]
    write(tmp_path / "run", records)
    assert read_metrics(tmp_path / "run" / "metrics.jsonl") == records
    assert read_metrics(tmp_path / "run") == records


def test_every_line_is_on_disk_before_the_next(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, tensorboard=False)
    for n in range(3):
        log.write(step(n))
        assert len(read_metrics(tmp_path)) == n + 1
    log.close()
    log.close()


def test_nan_and_infinity_become_null(tmp_path: Path) -> None:
    inf = float("inf")
    write(tmp_path, [step(1, loss=float("nan"), max_vio=[inf, -inf], by={"a": (float("nan"), 1)})])
    line = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in line
    assert "Infinity" not in line
    (record,) = read_metrics(tmp_path)
    assert (record["loss"], record["max_vio"], record["by"]) == (None, [None, None], {"a": [None, 1]})
    assert finite({"a": [1.0, "nan", True, None]}) == {"a": [1.0, "nan", True, None]}


def test_a_cut_last_line_is_forgiven_by_reader_and_resume(tmp_path: Path) -> None:
    write(tmp_path, [RUN, step(1), step(2)])
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    for cut in range(len(lines[-1])):  # every place a kill may cut, the newline alone missing included
        path.write_bytes(whole[: len(whole) - cut])
        assert [r.get("step") for r in read_metrics(path)] == ([None, 1, 2] if cut < 2 else [None, 1])
    path.write_bytes(whole[:-9])
    write(tmp_path, [step(2, loss=1.0), step(3)], resume_step=1)
    assert [(r.get("step"), r.get("loss")) for r in read_metrics(path)] == [(None, None), (1, 2.5), (2, 1.0), (3, 2.5)]


@pytest.mark.parametrize("broken", ["{not json\n", '{"kind": "step"\n', "[1]\n", '{"step": 1}\n', "\x00\x00\n"])
def test_a_broken_middle_line_names_file_and_line(tmp_path: Path, broken: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(RUN) + "\n" + broken + json.dumps(step(1)) + "\n")
    with pytest.raises(DataError, match=r"metrics\.jsonl:2: "):
        read_metrics(path)
    before = path.read_bytes()
    with pytest.raises(DataError, match=r"metrics\.jsonl:2: "):
        MetricsLog(tmp_path, 1, tensorboard=False)
    assert path.read_bytes() == before


def test_a_missing_file_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="There is no"):
        read_metrics(tmp_path / "nowhere" / "metrics.jsonl")
    with pytest.raises(DataError, match="There is no"):
        read_metrics(tmp_path)


def test_resume_leaves_what_an_unbroken_run_would(tmp_path: Path) -> None:
    records = [RUN, step(1), {"kind": "val", "step": 1, "loss": 2.0}, step(2), step(3), step(4)]
    write(tmp_path / "unbroken", records)
    write(tmp_path / "resumed", [*records[:5], {"kind": "end", "step": 3, "reason": "interrupted"}])
    write(tmp_path / "resumed", records[4:], resume_step=2)
    files = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("unbroken", "resumed")]
    assert files[0] == files[1]
    assert [p.name for p in (tmp_path / "resumed").iterdir()] == ["metrics.jsonl"]


def test_resume_without_a_file_starts_one_and_a_fresh_run_starts_anew(tmp_path: Path) -> None:
    write(tmp_path, [step(5)], resume_step=4)
    assert [r["step"] for r in read_metrics(tmp_path)] == [5]
    write(tmp_path, [step(1)])
    assert [r["step"] for r in read_metrics(tmp_path)] == [1]


def test_a_killed_process_leaves_its_lines(tmp_path: Path) -> None:
    code = (
        "import os, sys; from moesaic.train.log import MetricsLog\n"
        "log = MetricsLog(sys.argv[1], tensorboard=False)\n"
        "for n in range(3): log.write({'kind': 'step', 'step': n})\n"
        "os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert done.returncode != 0
    assert [r["step"] for r in read_metrics(tmp_path)] == [0, 1, 2]


def test_a_folder_that_cannot_be_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MoesaicError, match="Cannot write to .*file"):
        MetricsLog(tmp_path / "file" / "run", tensorboard=False)


def test_a_full_disk_is_a_sentence(tmp_path: Path) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("needs /dev/full")
    (tmp_path / "metrics.jsonl").symlink_to(full)
    log = MetricsLog(tmp_path, tensorboard=False)
    with pytest.raises(MoesaicError, match="disk is full"):
        log.write(step(1))
    with pytest.raises(MoesaicError, match="disk is full"):  # what the buffer still holds
        log.close()


def test_tags_of_a_step_and_a_validation() -> None:
    assert scalars(step(1), layers=[1, 3]) == {
        "loss/total": 2.5,
        "loss/lm": 2.25,
        "loss/switch": 0.25,
        "optim/lr": 0.5,
        "optim/grad_norm": 1.5,
        "speed/tokens_per_s": 1000.0,
        "balance/max_vio/layer_1": 0.5,
        "balance/max_vio/layer_3": 0.0,
        "balance/dead/layer_1": 0.0,
        "balance/dead/layer_3": 1.0,
        "balance/drop_rate/layer_1": 0.125,
        "balance/drop_rate/layer_3": 0.0,
        "balance/entropy/layer_1": 0.625,
    }
    val = {"kind": "val", "step": 1, "loss": 2.0, "by_domain": {"code": 1.5, "prose": float("nan")}}
    assert scalars(val) == {"val/loss": 2.0, "val/code": 1.5}
    assert scalars(RUN) == {}


def test_tensorboard_files_read_back(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with MetricsLog(tmp_path, histogram_every=2) as log:
        for record in [
            RUN,
            step(1),
            step(2),
            step(3, loss=9.0),
            {"kind": "val", "step": 2, "loss": 2.0, "by_domain": {}},
        ]:
            log.write(record)
    with MetricsLog(tmp_path, 2, histogram_every=2) as log:  # knows the layers from the file
        log.write(step(3, loss=1.0))
    events = accumulator.EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss/total")] == [(1, 2.5), (2, 2.5), (3, 1.0)]
    assert [e.step for e in events.Scalars("balance/max_vio/layer_3")] == [1, 2, 3]
    assert events.Scalars("val/loss")[0].value == 2.0
    (load,) = events.Histograms("load/layer_1")
    assert (load.step, load.histogram_value.num) == (2, 8)
    assert list(load.histogram_value.bucket) == [6, 2]
    assert list(load.histogram_value.bucket_limit) == [1, 2]


def test_without_tensorboard_one_line_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    said: list[str] = []
    with MetricsLog(tmp_path, say=said.append) as log:
        log.write(step(1))
    assert len(said) == 1
    assert "pip install" in said[0]
    assert len(read_metrics(tmp_path)) == 1
    assert not (tmp_path / "tb").exists()


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_plain_lines_come_by_the_clock_and_at_the_end() -> None:
    out, clock = io.StringIO(), Clock()
    with Progress(100, every_s=10, stream=out, clock=clock) as progress:
        for n in range(1, 101):
            clock.now = n * 0.5
            progress.update(step(n))
    lines = out.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["1/100", "21/100", "41/100", "61/100", "81/100", "100/100"]
    assert lines[1] == "step 21/100  loss 2.5000  1,000 tokens/s  40s left  MaxVio 0.50  1 dead  12.5% dropped"
    assert "left" not in lines[-1]
    assert "\x1b" not in out.getvalue()


def test_time_left_of_a_resumed_run_counts_its_own_steps() -> None:
    clock = Clock()
    progress = Progress(100, first_step=90, stream=io.StringIO(), clock=clock, label="dense")
    clock.now = 10.0
    assert progress.line({"step": 95, "loss": None}, clock.now) == "dense step 95/100  10s left"


def test_a_terminal_gets_one_live_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    out = Terminal()
    with Progress(3, stream=out) as progress:
        for n in (1, 2, 3):
            progress.update(step(n))
        progress.say("saved")
    text = out.getvalue()
    assert "step 1/3" in text
    assert "step 3/3" in text
    assert "saved" in text
    assert "\x1b[2K" in text  # lines are erased and redrawn, not piled up
    assert text.endswith("\x1b[?25h")  # the cursor is given back


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "0s"), (59.4, "59s"), (59.6, "1m00s"), (185, "3m05s"), (7620, "2h07m"), (86400 * 3 + 3600 * 4, "3d04h")],
)
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words
