"""``moesaic upcycle`` and ``moesaic densify``: what is measured is what is printed, what cannot be is one sentence."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import moesaic as mo
from moesaic.commands import upcycle as commands
from moesaic.tokenizer import encode, train_bpe
from moesaic.upcycle import DensifyConfig, Difference, UpcycleConfig, assemble, densify, difference, random_ids, upcycle
from tests.command import Done, call, make_project, one_sentence
from tests.models.tiny import lively, sparse
from tests.upcycle.dense import dense

COPY = ("--experts", "4", "--k", "2")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts a.txt, b.txt and short.txt, and models that read them: dense l0, l1, l2, a sparse one, and l0 of another family."""
    folder = make_project(tmp_path_factory.mktemp("upcycle"))
    (folder / "short.txt").write_text("the cat sat on the mat")
    tokenizer = train_bpe([(folder / "a.txt").read_text()], 300)
    models = {f"l{seed}": dense(seed=seed, vocab_size=300) for seed in range(3)}
    models["sparse"] = lively(sparse())
    for name, model in models.items():
        model.tokenizer = tokenizer if name != "sparse" else None
        mo.save(model, folder / name)
    mo.save(models["l0"], folder / "hf", format="hf")
    return folder


@pytest.fixture(autouse=True)
def _here(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The tokens that models are compared on."""
    seen: list[Tensor] = []

    def watched(first: Any, second: Any, ids_BS: Tensor, names: tuple[str, str]) -> Difference:
        seen.append(ids_BS)
        return difference(first, second, ids_BS, names)

    monkeypatch.setattr(commands, "difference", watched)
    return seen


def done(capsys: pytest.CaptureFixture[str], *args: str) -> Done:
    """A command that goes well."""
    ended = call(capsys, *args)
    assert ended.status == 0, ended
    return ended


def facts(capsys: pytest.CaptureFixture[str], *args: str) -> dict[str, Any]:
    """The one JSON object of a command that goes well."""
    return json.loads(done(capsys, *args, "--json").out)


def same_weights(first: Any, second: Any) -> bool:
    """Bit for bit, under the same names."""
    one, two = first.state_dict(), second.state_dict()
    return one.keys() == two.keys() and all(torch.equal(tensor, two[name]) for name, tensor in one.items())


# ---- what is printed ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "same"), [("copy", True), ("granular", True), ("noise", False), ("drop", False), ("split", False)]
)
def test_upcycle_prints_and_records_the_difference_at_step_0(
    method: Any, same: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "m")
    said = done(capsys, "upcycle", "l0", "--out", out, *COPY, "--method", method, "--seed", "3").out
    first, made = mo.load("l0"), mo.load(out)
    assert same_weights(made, upcycle(first, UpcycleConfig(method, experts=4, seed=3)))
    gap = difference(first, made, random_ids(first))
    assert gap.same is same
    assert f"Against l0, on random tokens: {gap}." in said.splitlines()
    assert ("the same function" in said, "another function" in said) == (same, not same)
    assert said.splitlines()[0].endswith("of them used per token, 2 of 2 layers sparse.")

    record = facts(capsys, "upcycle", "l0", "--out", out + "2", *COPY, "--method", method, "--seed", "3")
    assert record["step0"] == {"l0": gap.record()}
    assert (record["step0"]["l0"]["same"], record["on"], record["method"]) == (same, "random", method)
    assert (record["experts"], record["experts_per_token"], record["sparse_layers"]) == (4, 2, [0, 1])
    assert record["params_total"] == sum(p.numel() for p in made.parameters())


@pytest.mark.parametrize(
    ("method", "by_load", "shards"), [("average", False, 2), ("average", True, 1), ("most-used", False, 1)]
)
def test_densify_prints_and_records_the_difference(
    method: str,
    by_load: bool,
    shards: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    shown: list[Tensor],
) -> None:
    moe, out = str(tmp_path / "moe"), str(tmp_path / "m")
    done(capsys, "upcycle", "l0", "--out", moe, *COPY, "--method", "noise", "--noise", "0.5")
    words = ["densify", moe, "--method", method, "--shards", str(shards), *(["--by-load"] if by_load else [])]
    text = ["--text", "a.txt"] if by_load or method == "most-used" else []
    said = done(capsys, *words, *text, "--out", out).out
    first, made = mo.load(moe), mo.load(out)
    ids = shown[-1]
    config = DensifyConfig("average" if method == "average" else "most_used", by_load, shards)
    assert same_weights(made, densify(first, config, ids if text else None))
    gap = difference(first, made, ids)
    on = "text" if text else "random tokens"
    assert f"Against {moe}, on {on}: {gap}." in said.splitlines()
    assert "another function" in said
    assert "parameters" in said.splitlines()[0]
    assert said.splitlines()[0].endswith("of them used per token, dense.")

    record = facts(capsys, *words, *text, "--out", out + "2")
    assert record["step0"] == {moe: gap.record()}
    assert (record["on"], record["method"], record["experts"]) == ("text" if text else "random", method, None)


def test_what_was_copied_comes_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    moe, out = str(tmp_path / "moe"), str(tmp_path / "m")
    done(capsys, "upcycle", "l0", "--out", moe, "--experts", "3")
    record = facts(capsys, "densify", moe, "--out", out)
    assert record["step0"][moe]["same"] is True
    assert same_weights(mo.load("l0"), mo.load(out))


def test_text_is_what_models_are_compared_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], shown: list[Tensor]
) -> None:
    words = ("upcycle", "l0", *COPY, "--method", "drop", "--text", "a.txt", "--rows", "5")
    record = facts(capsys, *words, "--out", str(tmp_path / "m"))
    assert record["on"] == "text"
    assert record["step0"]["l0"]["tokens"] == shown[0].numel() == 5 * 64
    tokenizer = mo.load("l0").tokenizer
    whole = " ".join(Path("a.txt").read_text().split())
    for row in shown[0]:  # no padding, and nothing that the text does not say
        said = " ".join(tokenizer.decode(row.tolist(), skip_special_tokens=False).replace("<|endoftext|>", " ").split())
        assert said in whole
    assert "Against l0, on text: another function" in done(capsys, *words, "--out", str(tmp_path / "n")).out


def test_a_preserving_method_whose_router_does_not_keep_the_function_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--set", "router.options.normalize=none", "router_std=1.0")
    said = done(capsys, "upcycle", "l0", "--out", str(tmp_path / "m"), *COPY, *options).out
    assert "another function" in said
    assert "The function is kept where a router's weights add up to the same for every token" in said
    said = done(capsys, "upcycle", "l0", "--out", str(tmp_path / "n"), *COPY, *options[:2]).out
    assert "the same function" in said
    assert "The function is kept where" not in said


@pytest.mark.parametrize("prompts", [False, True])
def test_btx_measures_every_model(
    prompts: bool,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    shown: list[Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of texts of other lengths, too: all rows are cut to the shortest."""
    text = ["--router-init", "prompts", "--text", "a.txt", "b.txt", "short.txt"] if prompts else []
    out, given = tmp_path / "m", []

    def watched(models: Any, config: UpcycleConfig, texts: list[Tensor]) -> Any:
        given.extend(texts)
        return assemble(models, config, texts)

    monkeypatch.setattr(commands, "assemble", watched)
    record = facts(capsys, "upcycle", "l0", "l1", "l2", "--method", "btx", *text, "--out", str(out))
    models, made = [mo.load(f"l{e}") for e in range(3)], mo.load(out)
    assert (record["experts"], record["on"]) == (3, "text" if prompts else "random")
    ids = shown[0] if prompts else random_ids(models[0])
    assert record["step0"] == {f"l{e}": difference(models[e], made, ids).record() for e in range(3)}
    assert not any(gap["same"] for gap in record["step0"].values())
    if prompts:
        tokenizer = models[0].tokenizer
        short = encode(tokenizer, Path("short.txt").read_text())
        assert ids.shape[1] in (len(short), len(short) + 1)  # the end of the document is one
        assert ids[-1, : len(short)].tolist() == short
        a, b = ("".join(Path(name).read_text().split()) for name in ("a.txt", "b.txt"))
        said = ["".join(tokenizer.decode(row.tolist()).split()) for row in ids[:-1]]
        half = len(said) // 2
        assert half > 1
        assert all(row in a for row in said[:half])
        assert all(row in b for row in said[half:])
        texts = [ids_BS.shape for ids_BS in given]  # routers see the texts whole
        assert texts == [(half, 64), (half, 64), (1, ids.shape[1])]
        assert torch.equal(ids, torch.cat([ids_BS[:, : ids.shape[1]] for ids_BS in given]))
        assert same_weights(made, assemble(models, UpcycleConfig("btx", router_init="prompts"), given))
    else:
        assert same_weights(made, assemble(models, UpcycleConfig("btx")))


# ---- what cannot be ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["copy", "granular", "split", "btx"])
@pytest.mark.parametrize("text", [(), ("--text", "a.txt")], ids=["random", "text"])
def test_a_dense_model_whose_logits_are_no_numbers_is_refused(
    method: str, text: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = mo.load("l0")
    model.norm.weight.data.fill_(torch.nan)
    bad, out = tmp_path / "ln", tmp_path / "un"
    mo.save(model, bad)
    sources = [str(bad)] if method != "btx" else ["l1", str(bad)]
    ended = call(capsys, "upcycle", *sources, "--out", str(out), "--k", "2", "--method", method, *text, "--json")
    sentence = one_sentence(ended)
    name = "The model made" if method == "btx" else str(bad)  # the mean of l1 and NaN, which comes first
    assert sentence == (
        f"{name} gives logits that are not finite numbers: norm.weight holds NaN or infinity; take an undamaged checkpoint."
    )
    assert json.loads(ended.out) == {"error": sentence}
    assert not out.exists()


def test_a_sparse_model_with_a_damaged_expert_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = mo.load("sparse")
    model.moe_layers()[1].experts.w_out.data[2] = torch.inf
    mo.save(model, tmp_path / "bad")
    sentence = one_sentence(call(capsys, "densify", str(tmp_path / "bad"), "--out", str(tmp_path / "m")))
    assert "logits that are not finite numbers: blocks.1.ffn." in sentence
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    "words",
    [
        ("upcycle", "l0", "--out", "l0/sub"),
        ("upcycle", "hf", "--out", "hf/deep/sub"),
        ("upcycle", "l0", "l1", "--method", "btx", "--out", "l0/sub"),
        ("upcycle", "l0", "l1", "--method", "btx", "--out", "l1/sub"),
        ("upcycle", "l0", "--out", "l1/../l0/sub"),
        ("upcycle", "l0", "--out", "link/sub"),
        ("upcycle", "link", "--out", "l0/sub"),
        ("densify", "sparse", "--out", "sparse/sub"),
        ("densify", "sparse", "--out", "./sparse/a/../sub"),
    ],
    ids=" ".join,
)
def test_nothing_is_written_into_a_source(
    words: tuple[str, ...], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if not (place / "link").exists():
        (place / "link").symlink_to(place / "l0")
    before = sorted(place.rglob("*"))
    sentence = one_sentence(call(capsys, *words))
    assert re.fullmatch(r"The target \S+ and the source \S+ lie in each other; choose another --out\.", sentence)
    assert f"The target {Path(words[-1])} and" in sentence
    assert sorted(place.rglob("*")) == before


def test_a_run_may_hold_what_is_made_of_it_but_not_its_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As with convert, the folder of the model is meant, not that of the run."""
    step = tmp_path / "run" / "sparse"
    mo.save(mo.load("sparse"), step)
    run = str(tmp_path / "run")
    assert "lie in each other" in one_sentence(call(capsys, "densify", run, "--out", str(step / "m")))
    done(capsys, "densify", run, "--out", str(tmp_path / "run" / "m"))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--seed", "-1"), "seed must be from 0 to 2**63 - 1, not -1."),
        (("--seed", str(2**63)), f"seed must be from 0 to 2**63 - 1, not {2**63}."),
        (("--shards", "0"), "shards must be at least 1, not 0."),
        (("--shared", "-2"), "shared must be at least 0, not -2."),
        (("--set", "router_std=-1.0"), "router_std must be a number of at least 0, not -1.0."),
        (("--set", "split_scale=0.0"), "split_scale must be a number above 0, not 0.0."),
        (("--drop", "1.5"), "drop is a share of the hidden units, from 0 to 1, not 1.5."),
        (("--rows", "0"), "--rows must be at least 1, not 0."),
        (("l1",), '2 models were given, and method="copy" takes one; btx takes several.'),
        (("--method", "split", "--split-by", "activations"), "name some with --text"),
        (("--router", "sigmoid_topk"), "sigmoid_topk"),
    ],
    ids=str,
)
def test_the_sentence_names_the_value_that_is_wrong_alone(
    words: tuple[str, ...], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "m"
    said = one_sentence(call(capsys, "upcycle", "l0", *words, "--out", str(out)))
    assert said == sentence if sentence.endswith(".") else sentence in said
    assert not out.exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("sparse", "--shards", "0"), "shards must be at least 1, not 0."),
        (("sparse", "--shards", "3"), "shards=3 does not divide the 4 experts of layer 0; choose another."),
        (("sparse", "--rows", "0"), "--rows must be at least 1, not 0."),
        (("sparse", "--by-load"), "Which experts are used is seen on text; name some with --text."),
        (("sparse", "--method", "most-used"), "Which experts are used is seen on text; name some with --text."),
        (
            ("sparse", "--text", "a.txt"),
            "The model has no tokenizer, so it cannot read text; add tokenizer.json to its folder.",
        ),
        (("l0",), "This model is dense already; there are no experts to put together."),
        (("nowhere",), "There is nothing at nowhere; give a model directory or the folder of a training run."),
    ],
    ids=str,
)
def test_what_densify_cannot_do_is_one_sentence(
    words: tuple[str, ...], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert one_sentence(call(capsys, "densify", *words, "--out", str(tmp_path / "m"))) == sentence
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("words", [("upcycle", "l0"), ("densify", "sparse")], ids=" ".join)
def test_what_is_there_already_is_not_overwritten(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    before = Path("l1/config.json").read_bytes()
    assert one_sentence(call(capsys, *words, "--out", "l1")) == "l1 exists already; choose another --out, or remove it."
    assert Path("l1/config.json").read_bytes() == before
