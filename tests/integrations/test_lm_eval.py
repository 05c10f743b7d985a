"""lm_eval on local tasks, offline: a model exported, a model directory through transformers and by moesaic score alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")
pytest.importorskip("transformers")
import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

import moesaic as mo
from moesaic.convert.companions import tokenizer_settings
from moesaic.errors import ConfigError
from moesaic.integrations.hook import install
from moesaic.integrations.lm_eval import MoesaicLM
from moesaic.models.config import MoEConfig
from tests.integrations.folders import VOCAB, loud_model, sparse_config
from tests.models.tiny import tiny

install()

QUESTIONS = [
    {"text": "a cat sat on", "choices": [" the mat", " the dog", " three"], "answer": 0},
    {"text": "the dog", "choices": [" ran", " sat", " saw another cat"], "answer": 0},
    {"text": "one two three", "choices": [" four", " seven six", " on"], "answer": 1},
    {"text": "another", "choices": [" cat", " mat", " two"], "answer": 2},
]
TASKS: dict[str, dict[str, Any]] = {
    "choose": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_target": "answer",
        "doc_to_choice": "choices",
        "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_norm")],
    },
    "roll": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        # Longer than the context, so that several windows are scored.
        "doc_to_target": "{{text}} and{{choices[0]}} then{{choices[1]}} on the mat and saw another cat " * 4,
        "metric_list": [
            {
                "metric": m,
                "aggregation": m if m == "bits_per_byte" else "weighted_perplexity",
                "higher_is_better": False,
            }
            for m in ("word_perplexity", "byte_perplexity", "bits_per_byte")
        ],
    },
    "write": {
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": ["e", "a c"], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> TaskManager:
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    for name, task in TASKS.items():
        data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "data.jsonl")}}}
        whole = {"task": name, **data, "test_split": "test", "num_fewshot": 0, "metadata": {"version": 1}, **task}
        (folder / f"{name}.yaml").write_text(json.dumps(whole))  # JSON is YAML
    return TaskManager(include_path=str(folder), include_defaults=False)


def scores(model: Any, tasks: TaskManager, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, **arguments: Any) -> Any:
    """(results, answers of every request) of all three tasks."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    found = lm_eval.simple_evaluate(
        model=model, tasks=list(TASKS), task_manager=tasks, bootstrap_iters=0, log_samples=True, **arguments
    )
    assert found is not None
    numbers = {
        (task, metric): value
        for task, metrics in found["results"].items()
        for metric, value in metrics.items()
        if isinstance(value, float)
    }
    answers = {task: [sample["filtered_resps"] for sample in found["samples"][task]] for task in TASKS}
    return numbers, answers


def equal(a: Any, b: Any) -> None:
    """Scores to the rounding of fp32 logits, choices and texts exactly."""
    assert a[0].keys() == b[0].keys()
    assert len(a[0]) >= 6
    for name, value in a[0].items():
        assert b[0][name] == pytest.approx(value, rel=2e-5), name
    assert a[1]["write"] == b[1]["write"]
    for task in ("choose", "roll"):
        for ours, theirs in zip(a[1][task], b[1][task], strict=True):
            for one, other in zip(ours, theirs, strict=True):
                assert (
                    one == pytest.approx(other, rel=2e-5) if not isinstance(one, tuple | list) else one[1] == other[1]
                )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of lm_eval's own dependencies
def test_exported_and_native_models_score_alike(
    tasks: TaskManager, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = tiny(MoEConfig(num_experts=5, k=2, hidden=12), vocab_size=VOCAB, max_seq_len=40)
    model = loud_model(config)
    mo.save(model, tmp_path / "native")
    model.companions = tokenizer_settings(model.tokenizer)
    mo.save(model, tmp_path / "exported", format="hf")
    assert json.loads((tmp_path / "exported" / "config.json").read_text())["model_type"] != "moesaic"
    run = {"tasks": tasks, "monkeypatch": monkeypatch, "tmp_path": tmp_path}
    hf = {"batch_size": 3, "device": "cpu"}
    exported = scores("hf", model_args={"pretrained": str(tmp_path / "exported"), "dtype": "float32"}, **hf, **run)
    through = scores("hf", model_args={"pretrained": str(tmp_path / "native"), "dtype": "float32"}, **hf, **run)
    native = scores(MoesaicLM(tmp_path / "native", batch_size=3), **run)
    named = scores("moesaic", model_args=f"pretrained={tmp_path / 'exported'}", batch_size=2, **run)
    for other in (through, native, named):
        equal(exported, other)
    assert len(set(map(str, exported[1]["write"]))) > 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_router_no_family_has_scores_the_same_through_both_ways(
    tasks: TaskManager, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    mo.save(loud_model(sparse_config("attention", max_seq_len=40)), tmp_path / "native")
    run = {"tasks": tasks, "monkeypatch": monkeypatch, "tmp_path": tmp_path}
    through = scores("hf", model_args={"pretrained": str(tmp_path / "native")}, batch_size=4, device="cpu", **run)
    equal(through, scores(MoesaicLM(tmp_path / "native"), **run))


def request(kind: Any, *arguments: Any) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def test_likelihoods_by_hand() -> None:
    """Against a forward per pair: the continuation's log-probabilities after the context, summed."""
    import torch

    model = loud_model()
    lm = MoesaicLM(model, batch_size=2)
    pairs = [("a cat", " sat on"), ("", "the dog"), ("one ", "two three"), ("one two", " three four five")]
    found = lm.loglikelihood([request("loglikelihood", *pair) for pair in pairs])
    for (context, more), (score, greedy) in zip(pairs, found, strict=True):
        whole = model.tokenizer.encode(context + more).ids
        begin = len(model.tokenizer.encode(context.rstrip()).ids) if context else 0
        ids = torch.tensor([[lm.eot_token_id, *whole]]) if not context else torch.tensor([whole])
        first = begin if context else 1
        with torch.no_grad():
            log_probs = model(ids).logits[0, first - 1 : -1].log_softmax(-1)
        expected = log_probs.gather(1, ids[0, first:, None]).sum()
        assert score == pytest.approx(float(expected), rel=1e-5)
        assert greedy == bool((log_probs.argmax(-1) == ids[0, first:]).all())
    text = "a cat sat on the mat"
    (rolled,) = lm.loglikelihood_rolling([request("loglikelihood_rolling", text)])
    assert rolled == pytest.approx(lm.loglikelihood([request("loglikelihood", "", text)])[0][0], rel=1e-6)
    assert lm.loglikelihood_rolling([request("loglikelihood_rolling", "")]) == [0.0]


def test_texts_end_at_their_stops() -> None:
    model = loud_model()
    lm = MoesaicLM(model, batch_size=2)
    whole = [mo.generate(model, text, max_new_tokens=20, temperature=0) for text in ("a cat", "the dog")]
    free = {"until": [], "max_gen_toks": 20}
    requests = [request("generate_until", text, dict(free)) for text in ("a cat", "the dog")]
    assert lm.generate_until(requests) == whole
    stop = whole[0][3:5]
    (cut,) = lm.generate_until([request("generate_until", "a cat", {"until": [stop], "max_gen_toks": 20})])
    assert cut == whole[0].split(stop)[0]
    with pytest.raises(ConfigError, match="num_beams"):
        lm.generate_until([request("generate_until", "a", {"until": [], "max_gen_toks": 2, "num_beams": 2})])
    with pytest.raises(ConfigError, match="new tokens"):
        lm.generate_until([request("generate_until", "a", {"until": [], "max_gen_toks": 64})])


def test_a_model_without_tokenizer_is_refused() -> None:
    with pytest.raises(ConfigError, match="no tokenizer"):
        MoesaicLM(mo.build_model(tiny()))
