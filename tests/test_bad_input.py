"""Bad input through the command line: one sentence with the value and the fix, exit status 2, nothing half-written."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.command import CONFIG, TRAIN, call, environment, make_project, one_sentence, run, tree

STEP = "run/checkpoints/step-00000006"
SAVES = ("train", "--data", "a.txt", "b.txt", "--config", "tiny.json", "--out")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with a finished run, and its model as a directory of its own."""
    folder = make_project(tmp_path_factory.mktemp("made"))
    done = run("train", *TRAIN, cwd=folder)
    assert done.status == 0, done.err
    shutil.copytree(folder / STEP, folder / "model")
    (folder / "empty.txt").write_text("")
    (folder / "blank.txt").write_text(" \n\n\t \n")
    (folder / "latin.txt").write_bytes(b"caf\xe9 au lait\n" * 50)
    (folder / "broken.jsonl").write_text('{"text": "hello there"}\n{"text": "x"\n')
    (folder / "number.jsonl").write_text('{"text": "hello there"}\n{"text": 5}\n')
    (folder / "nested.json").write_text(json.dumps(CONFIG | {"optim": {"learning_rate": 1}}))
    (folder / "nan.json").write_text(json.dumps(CONFIG | {"optim": {"lr": float("nan")}}))
    (folder / "dates.toml").write_text("steps = 2020-01-01\n")
    (folder / "bad.toml").write_text("steps = \n")
    (folder / "nothing").mkdir()
    (folder / "mixtral").mkdir()
    (folder / "mixtral" / "config.json").write_text('{"model_type": "mixtral", "num_experts_per_tok": 2}')
    return folder


@pytest.fixture
def work(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the project to work in. Whatever the test did, no half-written token store may be left in the cache."""
    folder = tmp_path / "work"
    shutil.copytree(made, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MOESAIC_CACHE", str(tmp_path / "cache"))
    yield folder
    assert [p for p in (tmp_path / "cache").glob("*") if "incomplete" in p.name] == []


def train(*args: str) -> tuple[str, ...]:
    return (*SAVES, "new", *args)


CASES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    # text
    "missing file": (("train", "--data", "c.txt"), ("c.txt", "no file or folder", 'Did you mean "')),
    "pattern without a match": (("train", "--data", "*.text"), ('"*.text" matches no file', "check")),
    "no text named": (("train",), ("no text", "--data books/")),
    "empty file": (("train", "--data", "empty.txt"), ("empty.txt holds no text", "give a source")),
    "only white space": (("train", "--data", "blank.txt"), ("blank.txt holds no text", "give a source")),
    "empty folder": (("train", "--data", "nothing"), ("nothing holds no text", "it is empty")),
    "not UTF-8": (("train", "--data", "latin.txt"), ("latin.txt", "UTF-8", "0xe9", "offset 3", "Convert")),
    "broken JSON line": (
        ("train", "--data", "broken.jsonl"),
        ("broken.jsonl:2", "column 13", 'on_error="skip"', "--set data.on_error=skip"),
    ),
    "text that is a number": (("train", "--data", "number.jsonl"), ("number.jsonl:2", '"text" is a number', "string")),
    "stdlib among files": (("train", "--data", "a.txt", "stdlib"), ('"stdlib" cannot be mixed', "alone")),
    # settings
    "unknown key": (train("--config", "nested.json"), ('"learning_rate" in optim', "Valid keys: lr,")),
    "unknown key of --set": (train("--set", "model.moe.num_expert=8"), ("model.moe", 'Did you mean "num_experts"?')),
    "unknown table": (train("--set", "modle.dim=8"), ('"modle" in the config', 'Did you mean "model"?')),
    "no override": (train("--set", "optim.lr"), ('"optim.lr"', "name=value")),
    "override inside a number": (train("--set", "steps.x=1"), ('"steps" is a single value', '"steps.x"')),
    "wrong type": (train("--set", "model.moe.k=two"), ("model.moe.k", "a whole number", '"two"')),
    "text for a list": (train("--set", "data.sources=a.txt"), ("data.sources", '["a.txt"]')),
    "table as a number": (train("--set", "data=3"), ("data must be a table", "3")),
    "more experts per token than experts": (train("--set", "model.moe.k=5"), ("model.moe.k=5", "between 1 and 4")),
    "k=1 renormalised": (train("--set", "model.moe.k=1"), ("k=1", "no gradient", 'normalize="none"')),
    "unknown router": (train("--set", "model.moe.router.name=topkk"), ('"topkk"', 'Did you mean "topk"?')),
    "unknown router option": (
        train("--set", "model.moe.router.options.scor=sigmoid"),
        ('"scor"', 'Did you mean "score"?'),
    ),
    "router option out of range": (
        train("--set", "model.moe.router.options.score=sigmoyd"),
        ("sigmoyd", 'Did you mean "sigmoid"?'),
    ),
    "unknown loss": (train("--set", "model.moe.losses.swich=1"), ('"swich"', 'Did you mean "switch"?')),
    "row beyond the context": (train("--set", "seq_len=65"), ("seq_len=65", "model.max_seq_len to at least 65")),
    "NaN in a file": (train("--config", "nan.json"), ("optim.lr", "finite", "nan")),
    "NaN in --set": (train("--set", "optim.lr=NaN"), ("optim.lr", "finite", "nan")),
    "NaN in a router option": (
        train("--set", "model.moe.router.options.scale=NaN"),
        ("model.moe.router.options.scale", "finite"),
    ),
    "infinite steps": (train("--set", "steps=1e999"), ("steps must be a whole number", "Infinity")),
    "date in TOML": (train("--config", "dates.toml"), ("steps must be a whole number", "2020-01-01")),
    "broken TOML": (train("--config", "bad.toml"), ("bad.toml is not valid TOML", "line 1")),
    "missing config file": (train("--config", "none.json"), ("none.json", "give the path")),
    "model too large for numbers": (train("--set", "model.dim=1000000000000"), ("lower its sizes",)),
    "model too large for memory": (train("--set", "model.moe.hidden=4000000000"), ("not enough memory", "lower")),
    "negative seed": (train("--seed", "-1"), ("seed", "-1", "from 0")),
    "huge seed": (train("--seed", "9" * 25), ("seed", "9" * 25)),
    "no steps": (train("--steps", "0"), ("steps must be at least 1", "0")),
    "vocabulary below bytes": (train("--set", "data.vocab_size=200"), ("260", "200")),
    "vocabulary of the model too small": (
        train("--set", "model.vocab_size=64"),
        ("model.vocab_size=64", "leave it out"),
    ),
    # the parser
    "unknown command": (("trian",), ('no command "trian"', 'Did you mean "train"?')),
    "unknown option": (("train", "--dta", "x"), ('"train" has no option --dta', 'Did you mean "--data"?')),
    "stray word": (("doctor", "now"), ('"doctor"', '"now"', "--help")),
    "word for a number": (("train", "--steps", "many"), ("--steps must be a whole number", '"many"')),
    "word for a real number": (("generate", "run", "--top-p", "most"), ("--top-p must be a number", '"most"')),
    "unknown recipe": (("train", "--recipe", "smal"), ("--recipe", "small, quickstart", 'Did you mean "small"?')),
    "missing value": (("train", "--out"), ("--out needs a value", "train --help")),
    "missing model": (("generate",), ('"generate" needs a MODEL', "run or comparison folder")),
    # folders
    "run exists": (("train", *TRAIN), ("run already holds a training run", "--resume", "another --out")),
    "out is a model": ((*SAVES, "model"), ("model is a model directory", "another --out")),
    "twins into a run": ((*SAVES, "run", "--resume", "--twin"), ("run holds a single run", "another --out")),
    "out below a file": ((*SAVES, "a.txt/run"), ("a.txt/run", "a.txt is no folder", "another --out")),
    "out in /proc": ((*SAVES, "/proc/run"), ("/proc/run", "another path")),
    "out with an endless name": ((*SAVES, "x" * 300), ("xxx", "name", "too long")),
    "report below a file": (("report", "run", "--out", "a.txt/r.html"), ("a.txt/r.html", "another path")),
    "report of nothing": (("report", "nothing"), ("nothing holds no metrics.jsonl", "give the folder")),
    "report of no folder": (("report", "gone"), ("no folder gone", "give the folder")),
    "resume of no run": (
        ("train", "--resume", "--out", "nothing"),
        ("no run in nothing to resume", "leave out --resume"),
    ),
    "resume with text of no run": (
        ("train", *TRAIN[:-1], "gone", "--resume"),
        ("no run in gone to resume", "leave out"),
    ),
    "resume of no comparison": (
        ("train", "--resume", "--twin", "--out", "nothing"),
        ("no run in nothing to resume", "leave out --resume"),
    ),
    "resume of a model": (
        ("train", "--resume", "--out", "model"),
        ("model is a model directory", "not a training run"),
    ),
    "quickstart resume of no run": (("quickstart", "--resume", "--out", "nothing"), ("no run in nothing", "leave out")),
    # resume
    "resume as another architecture": (
        ("train", "--resume", "--out", "run", "--set", "model.dim=32"),
        ("model.dim cannot change from 16 to 32", "start a new run"),
    ),
    "resume with other text": (
        ("train", "--resume", "--out", "run", "--data", "a.txt"),
        ("run was trained on other text than it is resumed with", "Restore them, or start a new run"),
    ),
    "resume with other losses": (
        ("train", "--resume", "--out", "run", "--set", 'model.moe.losses={"switch":0.5}'),
        ("model.moe.losses.switch cannot change from 0.01 to 0.5", "start a new run"),
    ),
    "resume with fewer steps": (
        ("train", "--resume", "--out", "run", "--steps", "2"),
        ("steps=2 is less than the 6 steps run has trained", "start a new run"),
    ),
    # models
    "model not there": (("generate", "gone"), ("nothing at gone", "give a model directory")),
    "model is a file": (("eval", "a.txt"), ("a.txt is a file", "give the model directory")),
    "folder without a model": (("info", "nothing"), ("nothing is no model directory", "config.json")),
    "Hugging Face folder to eval": (("eval", "mixtral"), ("mixtral/config.json lacks the key", "num_attention_heads")),
    "Hugging Face folder to generate": (
        ("generate", "mixtral"),
        ("mixtral/config.json lacks the key", "num_attention_heads"),
    ),
    "info of a text": (("info", "a.txt"), ("a.txt is not valid JSON",)),
    "model without text of its own": (("eval", "model"), ("model is not a training run", "--data")),
    "negative rows": (("eval", "run", "--rows", "-1"), ("--rows must be at least 0", "-1")),
    "no batch": (("eval", "run", "--batch-size", "0"), ("--batch-size must be at least 1", "0")),
    "no row length": (("eval", "run", "--seq-len", "0"), ("--seq-len must be at least 1", "0")),
    # writing
    "prompt too long": (("generate", "run", "--prompt", "the cat " * 60), ("context of 64", "at most 63 tokens")),
    "no prompt": (("generate", "run", "--prompt"), ("--prompt needs a text", '--prompt "Once upon"')),
    "prompt of half a character": (("generate", "run", "--prompt", "\udc80"), ("not Unicode", "character 0")),
    "negative temperature": (("generate", "run", "--temperature", "-1"), ("temperature", "-1", "0 (greedy) or more")),
    "temperature nan": (("generate", "run", "--temperature", "nan"), ("temperature", "finite", "nan")),
    "top-p 0": (("generate", "run", "--top-p", "0"), ("top_p", "above 0", "0.0")),
    "top-k -1": (("generate", "run", "--top-k", "-1"), ("top_k", "0 (keep all tokens) or more", "-1")),
    "no new tokens": (("generate", "run", "--max-new-tokens", "0"), ("max_new_tokens", "at least 1", "0")),
    "half an escape": (("generate", "run", "--stop", "a\\"), ("stop string", "a\\", "half an escape")),
    "empty stop string": (("generate", "run", "--stop", ""), ("stop string", "at least one character")),
}


@pytest.mark.parametrize("case", CASES)
def test_one_sentence_and_nothing_written(case: str, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args, words = CASES[case]
    before = tree(work)
    sentence = one_sentence(call(capsys, *args))
    assert [word for word in words if word not in sentence] == [], sentence
    assert tree(work) == before
    with_json = call(capsys, *args, "--json")
    assert json.loads(with_json.out) == {"error": sentence}
    assert one_sentence(with_json) == sentence
    assert tree(work) == before


def cut(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "weights cut": ("model.safetensors", cut, "bytes and was saved with"),
    "optimizer cut": ("training.safetensors", cut, "bytes and was saved with"),
    "weights flipped": ("model.safetensors", flip, "sha256 differs"),
    "tokenizer gone": ("tokenizer.json", Path.unlink, "is missing"),
    "manifest gone": ("manifest.json", Path.unlink, "no manifest.json"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint(damage: str, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Named outright it is refused; a run passes over it in words, and refuses when there is no other."""
    name, harm, words = DAMAGES[damage]
    harm(work / STEP / name)
    sentence = one_sentence(call(capsys, "generate", STEP))
    assert words in sentence
    assert STEP in sentence
    older = call(capsys, "generate", "run", "--max-new-tokens", "2")
    assert older.status == 0
    assert older.err.count("moesaic: warning: Passing over the damaged snapshot step-00000006: ") == 1
    harm(work / "run/checkpoints/step-00000003" / name)
    before = tree(work)
    resumed = call(capsys, "train", "--resume", "--out", "run")
    assert resumed.status == 2
    assert resumed.err.splitlines()[-1].startswith(
        "moesaic: Every checkpoint in run/checkpoints is damaged; restore one"
    )
    assert tree(work) == before  # and not started over


def test_resume_falls_back_one_checkpoint(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip(work / STEP / "model.safetensors")
    whole = steps(work)
    done = call(capsys, "train", "--resume", "--out", "run")
    assert done.status == 0
    assert "Resuming run at step 3." in done.out
    assert steps(work) == whole
    assert call(capsys, "generate", STEP, "--max-new-tokens", "2").status == 0


def steps(work: Path) -> list[tuple[int, float, float]]:
    lines = [json.loads(line) for line in (work / "run" / "metrics.jsonl").read_text().splitlines()]
    return [(r["step"], r["loss"], r["grad_norm"]) for r in lines if r["kind"] == "step"]


def test_pickle_is_never_opened(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bomb = b"cos\nsystem\n(S'touch exploded'\ntR."
    (work / "model" / "pytorch_model.bin").write_bytes(bomb)
    for command in ("generate", "info"):
        assert "pickle" in one_sentence(call(capsys, command, "model"))
    (work / "model" / "model.safetensors").write_bytes(bomb)
    (work / "model" / "pytorch_model.bin").unlink()
    assert "model.safetensors" in one_sentence(call(capsys, "generate", "model"))
    assert not (work / "exploded").exists()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("config.json", "{bad", "run/config.json"),
        ("config.json", "[]", "must be a table"),
        ("config.json", '{"stepz": 3}', 'Unknown key "stepz" in run/config.json: config. Did you mean "steps"?'),
        ("metrics.jsonl", '{"kind": "run"}\n{broken\n{"kind": "step", "step": 1}\n', "run/metrics.jsonl:2"),
    ],
)
def test_damaged_run_folder(
    name: str, content: str, words: str, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (work / "run" / name).write_text(content)
    before = tree(work)
    sentence = one_sentence(call(capsys, "train", "--resume", "--out", "run"))
    assert words in sentence
    assert tree(work) == before


def test_a_control_character_in_a_name_does_not_reach_the_terminal(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = call(capsys, "generate", "\x1b[31mred\nname")
    assert "\x1b" not in one_sentence(done)


# ---- the disk ------------------------------------------------------------------------------------------------------

LIMITED = """
import resource, sys
from moesaic.cli import main
limit = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
main(sys.argv[2:])
"""


def limited(limit: int, *args: str, cwd: Path) -> tuple[int, str]:
    """The command where no file may grow beyond ``limit`` bytes, which fails as a full disk does."""
    command = [sys.executable, "-c", LIMITED, str(limit), *args]
    done = subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=100, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stderr.splitlines()[-1]


@pytest.mark.skipif(sys.platform == "win32", reason="no file size limits there")
@pytest.mark.parametrize(
    ("limit", "what", "file"),
    [
        (60_000, "checkpoint: the optimizer", "new/checkpoints/step-00000003"),
        pytest.param(20_000, "checkpoint: the weights", "new/checkpoints/step-00000003", marks=pytest.mark.slow),
        (1_000, "the token store", "cache/tokens-"),
        pytest.param(100, "the config", "config.json", marks=pytest.mark.slow),
    ],
)
def test_full_disk(limit: int, what: str, file: str, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if "token" not in what:
        store_tokens(capsys)
    status, last = limited(limit, *train("--set", "sample_tokens=0"), cwd=work)
    assert status == 2
    assert last.startswith("moesaic: Cannot write to "), last
    assert file in last
    assert "choose another" in last
    left = [str(p.relative_to(work)) for p in work.rglob("*") if "incomplete" in p.name or ".writing" in p.name]
    assert left == []
    assert sorted(p.name for p in (work / "new").glob("checkpoints/*")) == []


def store_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    """So that the disk has room for the token store."""
    assert call(capsys, "eval", "run").status == 0


def test_full_disk_while_saving_keeps_the_previous_checkpoint(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = tree(work / "run" / "checkpoints")
    status, last = limited(60_000, "train", "--resume", "--out", "run", "--steps", "9", cwd=work)
    assert status == 2
    assert "Cannot write to " in last
    assert "run/checkpoints/step-00000009" in last
    assert tree(work / "run" / "checkpoints") == before
    assert call(capsys, "generate", "run", "--max-new-tokens", "2").status == 0
    assert call(capsys, "train", "--resume", "--out", "run", "--steps", "9").status == 0  # once there is room again
    assert [step for step, _, _ in steps(work)] == list(range(1, 10))


@pytest.mark.parametrize("tensorboard", ["true", pytest.param("false", marks=pytest.mark.slow)])
def test_full_disk_while_logging(tensorboard: str, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store_tokens(capsys)
    args = train("--set", "checkpoint_every=0", "steps=100", "eval_every=0", f"tensorboard={tensorboard}")
    status, last = limited(20_000, *args, cwd=work)
    assert status == 2
    assert last.startswith("moesaic: Cannot write to new/"), last
    lines = (work / "new" / "metrics.jsonl").read_bytes().splitlines()
    assert len(lines) > 5
    assert [json.loads(line)["kind"] for line in lines[:-1]] == ["run"] + ["step"] * (len(lines) - 2)


def test_full_disk_while_reporting_keeps_the_old_page(work: Path) -> None:
    before = tree(work)
    status, last = limited(10_000, "report", "run", cwd=work)
    assert status == 2
    assert last.startswith("moesaic: Cannot write to run/report.html: ")
    assert tree(work) == before


def test_a_disk_that_is_really_full(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file system of 200 kB: one checkpoint fits, the next does not."""
    (work / "small").mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", "small"], cwd=work, capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a file system needs more rights")
    try:
        done = call(capsys, *SAVES, "small/run", "--set", "checkpoint_every=1")
        sentence = one_sentence(done)
        assert re.match(r"Cannot write to \S*small/run/checkpoints/step-0000000\d: ", sentence), sentence
        assert "the disk is full; free some space or choose another folder" in sentence
        whole = [p for p in (work / "small/run/checkpoints").iterdir() if p.is_dir()]
        assert whole
        assert all(p.name.startswith("step-") for p in whole)
        assert call(capsys, "generate", "small/run", "--max-new-tokens", "2").status == 0
    finally:
        subprocess.run(["umount", "-l", "small"], cwd=work, check=True)
