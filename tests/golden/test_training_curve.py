"""Short seeded training runs whose losses are stored: a refactoring shows identical numbers.

Where torch's version, its CPU capability and the processor are those that ``curve.json`` names, every figure must be equal to
the last digit. Elsewhere, where other instruction sets sum in another order, within 1e-3 relative.

To store new curves, after a change that is meant to move them (say in its commit why they moved):

    PYTHONPATH=src python -m tests.golden.test_training_curve
"""

from __future__ import annotations

import hashlib
import json
import platform
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moesaic.models.config import RouterConfig
from moesaic.train.log import read_metrics
from tests.train.tiny_run import tiny_config, tiny_corpus, train

STORED = Path(__file__).with_name("curve.json")
ELSEWHERE = 1e-3  # relative; from no vector instructions to AVX-512 these curves move by less than 2e-5
_SPARSE = tiny_config(steps=20, eval_every=0, checkpoint_every=0, sample_tokens=0)
_BIASED = RouterConfig("topk", {"score": "sigmoid", "balance_bias": True, "bias_rate": 0.02})
CONFIGS = {
    "dense": replace(_SPARSE, model=replace(_SPARSE.model, moe=None)),
    "topk": _SPARSE,
    "biased, shared, two micro-batches": replace(
        tiny_config({"qk_norm": "head", "tie_embeddings": False}, {"router": _BIASED, "shared": 1}),
        **{name: getattr(_SPARSE, name) for name in ("steps", "eval_every", "checkpoint_every", "sample_tokens")},
        accumulate=2,
    ),
    "noise": replace(
        _SPARSE, model=tiny_config(moe={"router": RouterConfig("noisy_topk"), "losses": {"load": 0.1}}).model
    ),
}


def machine() -> dict[str, str]:
    """What the last digits depend on."""
    name, features = platform.processor() or platform.machine(), ""
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
        facts = {key.strip(): value.strip() for key, value in lines.items()}
        name = facts.get("model name", name)
        features = hashlib.sha256(f"{facts.get('flags')} {facts.get('cache size')}".encode()).hexdigest()[:16]
    capability = torch.backends.cpu.get_cpu_capability()
    return {"torch": torch.__version__, "capability": capability, "processor": name, "features": features}


def tokens() -> str:
    """sha256 of the training tokens: another release of the tokenizer library could cut the text otherwise."""
    view = tiny_corpus().train
    return hashlib.sha256(b"".join(view.document(d).tobytes() for d in range(view.num_documents))).hexdigest()


def curve(name: str, folder: Path) -> dict[str, list[float]]:
    """Per step: language-model loss, total loss, gradient norm; and the validation loss at the end."""
    torch.set_num_threads(1)
    train(CONFIGS[name], folder)
    records = read_metrics(folder)
    found = {key: [r[key] for r in records if r["kind"] == "step"] for key in ("lm_loss", "loss", "grad_norm")}
    return found | {"val": [r["loss"] for r in records if r["kind"] == "val"]}


def stored() -> dict[str, Any]:
    data: dict[str, Any] = json.loads(STORED.read_text(encoding="utf-8"))
    return data


@pytest.mark.parametrize("name", CONFIGS)
def test_the_curve_is_the_stored_one(name: str, tmp_path: Path) -> None:
    assert tokens() == stored()["tokens"], "the text became other tokens, so no curve can be compared"
    wanted, found = stored()["curves"][name], curve(name, tmp_path / "run")
    assert len(wanted["loss"]) == 20
    assert wanted["lm_loss"][-1] < wanted["lm_loss"][0] - 0.2
    if machine() == stored()["machine"]:
        assert found == wanted
    for key, values in wanted.items():
        assert found[key] == pytest.approx(values, rel=ELSEWHERE), key


def test_every_stored_curve_is_checked() -> None:
    assert set(stored()["curves"]) == set(CONFIGS)


def main() -> None:
    """Write the curves of this machine."""
    with tempfile.TemporaryDirectory() as folder:
        curves = {name: curve(name, Path(folder) / str(i)) for i, name in enumerate(CONFIGS)}
    text = json.dumps({"machine": machine(), "tokens": tokens(), "curves": curves}, indent=1)
    STORED.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
