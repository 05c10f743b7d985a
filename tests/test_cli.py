"""The command line on a tiny run: every command with and without --json, help whose examples parse, pipes, escapes."""

from __future__ import annotations

import importlib
import json
import math
import re
import shlex
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import pytest

import moesaic
from moesaic import cli
from moesaic.config import apply_overrides, to_dict
from moesaic.settings import override
from moesaic.terminal import guarded, options, parse, visible
from moesaic.train.recipes import RECIPES
from tests.command import TRAIN, Done, call, make_project, run, start

generate_command = importlib.import_module("moesaic.commands.generate")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with a finished run and a finished comparison."""
    folder = make_project(tmp_path_factory.mktemp("made"))
    done = run("train", *TRAIN, "--json", cwd=folder)
    assert done.status == 0, done
    (folder / "train.json").write_text(done.out)
    return folder


@pytest.fixture(autouse=True)
def _there(made: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.chdir(made)
    monkeypatch.setenv("MOESAIC_CACHE", str(tmp_path_factory.getbasetemp() / "cli-cache"))


def json_of(done: Done) -> dict[str, object]:
    """Standard output as exactly one JSON document, strictly read."""
    assert done.status == 0, done

    def refuse(name: str) -> float:
        raise AssertionError(f"{name} is not JSON")

    value: dict[str, object] = json.loads(done.out, parse_constant=refuse)
    return value


# ---- what every command prints ---------------------------------------------------------------------------------------


def test_train(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = json.loads((made / "train.json").read_text())
    assert (result["reason"], result["step"], result["tokens"], result["folder"]) == ("done", 6, 6 * 2 * 32, "run")
    assert result["report"] == "run/report.html"
    assert (made / "run/report.html").exists()
    assert 4 < result["val_loss"] < math.log(320) + 0.5
    done = call(capsys, "train", *TRAIN[:-1], "again", "--steps", "2", "--seed", "3")
    assert done.status == 0
    assert re.search(
        r"^Done: 2 steps, 128 tokens at [\d,]+ tokens/s, validation loss \d\.\d{4} nats per token\.$", done.out, re.M
    )
    assert f"Report: {made / 'again/report.html'}" in done.out
    assert "step 2/2" in done.err
    config = json.loads((made / "again/config.json").read_text())
    assert (config["steps"], config["seed"], config["data"]["sources"]) == (2, 3, ["a.txt", "b.txt"])


def test_settings_come_from_recipe_then_file_then_flags_then_set(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (made / "run.toml").write_text(
        "steps = 3\neval_rows = 2\nsample_tokens = 0\ntensorboard = false\nbatch_size = 2\nseq_len = 16\n"
        '[data]\nsources = ["a.txt"]\n'
        "vocab_size = 290\n[model]\ndim = 16\nnum_layers = 1\nnum_heads = 2\nhidden = 8\n[model.moe]\nhidden = 8\n"
        '[model.moe.router]\nname = "switch"\n'
    )
    # Repeated, both places of --set count.
    args = ("--config", "run.toml", "--steps", "2", "--set", "model.moe.k=1", "--out", "layered", "--set", "seed=4")
    assert call(capsys, "train", *args).status == 0
    config = json.loads((made / "layered/config.json").read_text())
    assert (config["steps"], config["seed"], config["seq_len"]) == (2, 4, 16)
    assert (config["model"]["moe"]["router"]["name"], config["model"]["moe"]["k"]) == ("switch", 1)
    assert config["model"]["moe"]["num_experts"] == 16  # of the recipe
    assert config["model"]["vocab_size"] == 320  # fitted to the tokenizer, rounded up to 64
    assert config["data"]["sources"] == ["a.txt"]


def test_resume_goes_by_the_saved_settings(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys, "train", *TRAIN[:-1], "longer").status == 0
    done = call(capsys, "train", "--resume", "--out", "longer", "--steps", "8", "--json")
    assert json_of(done)["step"] == 8
    config = json.loads((made / "longer/config.json").read_text())
    assert (config["steps"], config["batch_size"], config["model"]["dim"]) == (8, 2, 16)
    # The same command line with --resume, as a script would repeat it: the saved settings stay below the given ones.
    done = call(capsys, "train", *TRAIN[:-1], "longer", "--resume", "--steps", "9")
    assert done.status == 0, done
    assert "Resuming longer at step 8." in done.out
    assert "Training a byte-level BPE" not in done.out  # the checkpoint holds the tokenizer
    assert "Changed from here on: steps from 8 to 9." in done.out


def test_resume_of_a_run_without_a_checkpoint_starts_over_with_its_settings(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(capsys, "train", *TRAIN[:-1], "killed", "--steps", "1").status == 0
    shutil.rmtree(made / "killed/checkpoints")
    done = call(capsys, "train", "--out", "killed", "--resume")
    assert done.status == 0, done
    assert "killed has no checkpoint yet, so the run starts from step 0." in done.out
    assert "Done: 1 steps, 64 tokens" in done.out
    assert json.loads((made / "killed/config.json").read_text())["steps"] == 1


def test_train_twins(capsys: pytest.CaptureFixture[str]) -> None:
    done = call(capsys, "train", *TRAIN[:-1], "twins", "--twin")
    assert done.status == 0, done
    for words in (
        "validation loss (nats/token)",
        "parameters used per token",
        "loss on a",
        "Report (open in a browser):",
    ):
        assert words in done.out
    result = json_of(call(capsys, "train", "--out", "twins", "--twin", "--resume", "--json"))
    runs = result["runs"]
    assert set(runs) == {"sparse", "dense"}  # type: ignore[call-overload]
    assert runs["sparse"]["by_domain"].keys() == {"a", "b"}  # type: ignore[index]
    assert call(capsys, "generate", "twins", "--max-new-tokens", "2").status == 0
    assert "dense" in call(capsys, "report", "twins").out or Path("twins/report.html").exists()


def test_eval(capsys: pytest.CaptureFixture[str]) -> None:
    done = call(capsys, "eval", "run")
    first = re.search(
        r"step-00000006: loss (\S+) nats per token, perplexity (\S+), over ([\d,]+) tokens$", done.out, re.M
    )
    assert first, done
    result = json_of(call(capsys, "eval", "run", "--json"))
    assert f"{result['loss']:.4f}" == first[1]
    assert math.isclose(math.exp(result["loss"]), result["ppl"])  # type: ignore[arg-type]
    assert f"{result['tokens']:,}" == first[3]
    # Given the same text outright, all of it is validation text.
    other = json_of(call(capsys, "eval", "run", "--data", "a.txt", "--rows", "5", "--seq-len", "16", "--json"))
    assert 4 * 16 < other["tokens"] <= 5 * 16  # type: ignore[operator]  # the last row of the text is not full
    assert list(other["by_domain"]) == ["a"]  # type: ignore[call-overload]


def test_generate(capsys: pytest.CaptureFixture[str]) -> None:
    args = ("generate", "run", "--max-new-tokens", "6", "--prompt", "the cat")
    done = call(capsys, *args)
    assert done.status == 0
    assert done.out.startswith("the cat")
    assert re.fullmatch(r"\[5 tokens at \d+ tokens/s, length\]\n", done.err)
    row = json_of(call(capsys, *args, "--json"))["results"][0]  # type: ignore[index]
    assert row.keys() == {"prompt", "text", "finish"}
    assert done.out == visible(f"the cat{row['text']}\n")
    both = call(capsys, *args, "the dog")
    assert both.out.startswith(f"--- the cat\nthe cat{visible(row['text'])}\n\n--- the dog\nthe dog")
    greedy = [call(capsys, *args, "--temperature", "0", "--seed", seed).out for seed in ("0", "1")]
    assert greedy[0] == greedy[1]
    stopped = json_of(call(capsys, *args, "--stop", row["text"][1], "--json"))["results"][0]  # type: ignore[index]
    assert (stopped["text"], stopped["finish"]) == (row["text"][0], "stop")
    assert call(capsys, "generate", "run", "--max-new-tokens", "2").status == 0  # without a prompt


def test_report(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys, "report", "run").out == f"{made / 'run/report.html'}\n"
    done = call(capsys, "report", "run", "--out", "page.html", "--json")
    assert json_of(done) == {"report": "page.html"}
    assert (made / "page.html").read_text().startswith("<!doctype html>")


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    done = call(capsys, "info", "run")
    model = moesaic.load("run")
    total = sum(p.numel() for p in model.parameters())
    assert done.out.startswith(f"{total:,} parameters, ")
    assert re.search(r'^router +\{"name": "topk"\}$', done.out, re.M)
    result = json_of(call(capsys, "info", "run", "--json"))
    assert result["total"] == total
    assert sum(part["total"] for part in result["parts"].values()) == total  # type: ignore[attr-defined]
    assert (result["experts"], result["experts_per_token"], result["sparse_layers"]) == (4, 2, [0, 1])
    held = result["checkpoint"]
    assert held["matches"] is True  # type: ignore[index]
    assert held["numbers"] == total  # type: ignore[index]
    of_weights = ("checkpoint", "weights", "cache")
    for file in ("run/config.json", "run/checkpoints/step-00000006/config.json"):
        found = json_of(call(capsys, "info", file, "--json"))
        assert found["checkpoint"] is None
        assert {k: v for k, v in found.items() if k not in of_weights} == {
            k: v for k, v in result.items() if k not in of_weights
        }


def test_info_of_other_kinds_of_experts(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "shared experts" not in call(capsys, "info", "run").out
    moe = {"num_experts": 2, "k": 4, "hidden": 8, "zero": 1, "copy": 1, "constant": 2, "shared": 1}
    (made / "kinds.json").write_text(
        json.dumps({"model": {"vocab_size": 64, "dim": 16, "num_heads": 2, "num_layers": 1, "hidden": 32, "moe": moe}})
    )
    out = call(capsys, "info", "kinds.json").out
    for name, value in (
        ("feed-forward experts", "2"),
        ("experts per token", "4, chosen among all, the 4 zero-computation experts included"),
        ("zero experts", "1"),
        ("copy experts", "1"),
        ("constant experts", "2"),
        ("shared experts", "1"),
    ):
        assert re.search(rf"^{name} +{value}$", out, re.M), out
    assert re.search(r"^[\d,]+ parameters, at most [\d,]+ of them used per token", out)
    result = json_of(call(capsys, "info", "kinds.json", "--json"))
    assert (result["constant_experts"], result["shared_experts"]) == (2, 1)


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    done = call(capsys, "doctor")
    assert done.status == 0
    assert moesaic.__version__ in done.out or "torch" in done.out
    assert "torch" in json.dumps(json_of(call(capsys, "doctor", "--json")))


# ---- help ------------------------------------------------------------------------------------------------------------


def examples(name: str) -> list[list[str]]:
    text = cli.inspect.getdoc(cli.COMMANDS[name]) or ""
    return [shlex.split(line)[1:] for line in re.findall(r"^\s+(moesaic .*)$", text.partition("Examples:")[2], re.M)]


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_example_parses(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert examples(name)
    for command, *args in examples(name):
        assert command == name
        call_bound = parse(cli.COMMANDS[name], name, args)
        assert call_bound.func is cli.COMMANDS[name]  # type: ignore[attr-defined]
        for item in call_bound.keywords.get("set_", ()):  # type: ignore[attr-defined]
            assert apply_overrides(to_dict(RECIPES["quickstart"]()), [item])
    done = call(capsys, name, "--help")
    assert done.status == 0
    assert f"usage: moesaic {name}" in done.out
    assert "Examples:" in done.out
    assert "default: None" not in " ".join(done.out.split())
    shown = " ".join(done.out.split())
    for option in options(cli.COMMANDS[name]):
        assert option in shown


def test_the_overrides_in_examples_are_settings() -> None:
    for name in ("quickstart", "train"):
        for args in examples(name):
            bound = parse(cli.COMMANDS[name], name, args[1:]).keywords  # type: ignore[attr-defined]
            override(to_dict(RECIPES["quickstart"]()), bound["set_"], steps=None, seed=None)


def test_the_front_door(capsys: pytest.CaptureFixture[str]) -> None:
    for args in (("--help",), ("-h",), ("help",)):
        done = call(capsys, *args)
        assert (done.status, done.out) == (0, cli.help_text() + "\n")
    done = call(capsys)
    assert (done.status, done.out) == (2, cli.help_text() + "\n")
    for args in (("--version",), ("-V",)):
        assert call(capsys, *args) == Done(0, f"moesaic {moesaic.__version__}\n", "")
    assert run("--version", cwd=Path.cwd()) == Done(0, f"moesaic {moesaic.__version__}\n", "")  # python -m moesaic


def test_repeated_options(capsys: pytest.CaptureFixture[str]) -> None:
    args = ["--set", "a=1", "b=2", "--json", "--data", "x", "--set=c=3", "--steps", "1", "--data", "y", "--steps", "2"]
    bound = parse(cli.train, "train", args).keywords  # type: ignore[attr-defined]
    assert bound["set_"] == ("a=1", "b=2", "c=3")
    assert bound["data"] == ("x", "y")
    assert (bound["steps"], bound["json"]) == (2, True)
    negative = parse(cli.generate, "generate", ["m", "--temperature", "-1", "--seed", "-5"]).keywords  # type: ignore[attr-defined]
    assert (negative["temperature"], negative["seed"]) == (-1, -5)


# ---- the terminal ----------------------------------------------------------------------------------------------------


def test_visible_keeps_text_and_drops_controls() -> None:
    kept = "plain\ttab\nline – ünïcödé 漢字 👩‍💻 \u00a0"
    assert visible(kept) == kept
    assert visible("a\x1b[31mb\x07\x9b\r\x00\x7f\udc80") == "a\ufffd[31mb" + "\ufffd" * 6


def test_escapes_a_model_writes_do_not_reach_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    written = "\x1b]0;owned\x07\x1b[2J"

    def writes_escapes(_model: object, prompts: list[str], *_: object, **more: object) -> tuple[list[str], object]:
        if callable(more["on_text"]):
            more["on_text"](0, written)
        return [written] * len(prompts), replace(generation, finish=generation.finish[: len(prompts)])

    _, generation = generate_command.generate_texts(moesaic.load("run"), ["a", "b"], max_new_tokens=2)
    monkeypatch.setattr(generate_command, "generate_texts", writes_escapes)
    for prompts in (["a"], ["a", "b"]):
        done = call(capsys, "generate", "run", "--prompt", *prompts)
        assert done.status == 0
        assert "]0;owned" in done.out
        assert "\x1b" not in done.out + done.err
    exact = json_of(call(capsys, "generate", "run", "--prompt", "a", "--json"))
    assert exact["results"][0]["text"] == written  # type: ignore[index]
    assert "\x1b" not in call(capsys, "generate", "run", "--prompt", "a", "--json").out  # JSON escapes it


def test_escapes_in_a_domain_name_do_not_reach_the_terminal(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [
        json.dumps({"text": "the cat sat on the mat again and again " * 20, "lang": "x\x1b[31m"}) for _ in range(9)
    ]
    (made / "named.jsonl").write_text("\n".join(lines))
    args = (
        "--data",
        "named.jsonl",
        "--config",
        "tiny.json",
        "--set",
        "data.label_field=lang",
        "--twin",
        "--out",
        "named",
    )
    done = call(capsys, "train", *args)
    assert done.status == 0, done
    assert "x\ufffd[31m" in done.out
    assert "\x1b" not in done.out + done.err


@pytest.mark.parametrize(
    "args",
    [
        ("info", "run"),
        pytest.param(("--help",), marks=pytest.mark.slow),
        pytest.param(("doctor",), marks=pytest.mark.slow),
    ],
)
def test_a_reader_that_goes_away(args: tuple[str, ...], made: Path) -> None:
    with start(*args, cwd=made) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        err = process.stderr.read()
        assert process.wait(60) in (141, 1)  # 1: rich, which prints doctor's answer, ends the process itself
    assert err == ""


def test_output_that_is_no_terminal_and_no_utf_8(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    done = run("generate", "run", "--prompt", "the — cat", "--max-new-tokens", "3", cwd=made)
    assert done.status == 0, done
    assert done.out.startswith("the ? cat")
    assert "\x1b" not in done.out + done.err


def test_failures_of_the_machine_are_sentences_and_ours_are_not(capsys: pytest.CaptureFixture[str]) -> None:
    def fails(error: BaseException) -> int:
        def command() -> int:
            raise error

        return guarded(command, json=True)

    assert fails(OSError(5, "Input/output error", "corpus.txt")) == 2
    assert capsys.readouterr() == (
        '{"error": "corpus.txt: Input/output error."}\n',
        "moesaic: corpus.txt: Input/output error.\n",
    )
    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")):
        assert fails(error) == 2
        assert "not enough memory; lower batch_size" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="a bug"):
        fails(RuntimeError("a bug"))
    done: list[int] = []
    thread = threading.Thread(target=lambda: done.append(guarded(lambda: 7)))  # no signals outside the main thread
    thread.start()
    thread.join()
    assert done == [7]
