"""The toolkit's own models through a model directory and a training checkpoint (each router: tests/models)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from moesaic.checkpoint.native import load_config, load_model, read_header, save_model
from moesaic.errors import MoesaicError
from moesaic.models.build import build_model
from moesaic.models.config import ModelConfig, MoEConfig, RouterConfig
from moesaic.train.snapshot import restore_snapshot, save_snapshot
from tests.checkpoint.standin import adamw, same, values

BIASED = RouterConfig("topk", {"balance_bias": True, "gate_bias": True})
CONFIGS = {
    name: ModelConfig(vocab_size=11, dim=8, num_layers=2, num_heads=2, hidden=16, max_seq_len=16, moe=moe, **other)
    for name, moe, other in [
        ("dense", None, {"tie_embeddings": False, "attention_bias": "all", "norm": "layernorm", "qk_norm": "head"}),
        (
            "uneven",
            MoEConfig(num_experts=(3, 5), k=(2, 3), hidden=(4, 6), shared=1, shared_gate=True, router=BIASED),
            {},
        ),
        ("special", MoEConfig(num_experts=3, hidden=4, dense_first=1, zero=1, copy=1, constant=1), {"gated": False}),
        ("topk", MoEConfig(4, 2, 4, losses={}), {}),
    ]
}
IDS_BS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])


@pytest.mark.parametrize("name", CONFIGS)
def test_a_round_trip_is_bitwise_and_leaves_the_random_state_alone(tmp_path: Path, name: str) -> None:
    model = build_model(CONFIGS[name], seed=3).eval()
    save_model(model, tmp_path / "m", max_shard_bytes=1500)
    assert load_config(tmp_path / "m") == CONFIGS[name]
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    again = load_model(tmp_path / "m")
    assert torch.equal(torch.rand(3), expected)
    assert same(values(model), values(again))
    assert torch.equal(model(IDS_BS).logits, again(IDS_BS).logits)
    assert len(list(again.parameters())) == len(list(model.parameters()))


@pytest.mark.parametrize("name", CONFIGS)
def test_bf16_on_loading_is_what_to_bf16_gives(tmp_path: Path, name: str) -> None:
    model = build_model(CONFIGS[name], seed=3).eval()
    save_model(model, tmp_path / "m")
    model = model.to(torch.bfloat16)
    assert same(values(load_model(tmp_path / "m", dtype=torch.bfloat16)), values(model))
    save_model(model, tmp_path / "half")
    assert same(values(load_model(tmp_path / "half")), values(model))
    routers = {n: info.dtype for n, info in read_header(tmp_path / "half").items() if ".router." in n}
    assert set(routers.values()) <= {torch.float32, torch.int64}
    assert bool(routers) or CONFIGS[name].moe is None or not list(model.blocks[-1].ffn.router.state_dict())


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("dim", 2**40, "impossible sizes"),
        ("vocab_size", 2**80, "impossible sizes"),
        ("num_layers", 10**12, "num_layers=1000000000000 is impossible"),
        ("num_layers", 9999, "too few for the 9999 layers"),
        ("moe.num_experts", 10**6, "wrong shape"),
        ("moe.k", 99, "k=99 is more than the 4 experts"),
        ("moe.k", -1, "at least 1, not -1"),
        ("moe.router.options", {"auto_map": "x.py"}, 'no option "auto_map"'),
        ("norm_eps", float("nan"), "finite number"),
    ],
)
def test_an_impossible_config_is_refused_before_memory_is_taken(
    tmp_path: Path, key: str, value: Any, message: str
) -> None:
    save_model(build_model(CONFIGS["topk"], seed=3), tmp_path / "m")
    data = json.loads((tmp_path / "m" / "config.json").read_text())
    *parents, last = f"model.{key}".split(".")
    table = data
    for parent in parents:
        table = table[parent]
    table[last] = value
    (tmp_path / "m" / "config.json").write_text(json.dumps(data))
    with pytest.raises(MoesaicError, match=message):
        load_model(tmp_path / "m", verify=False)


@pytest.mark.parametrize("name", ["dense", "uneven"])
def test_training_resumes_bitwise(tmp_path: Path, name: str) -> None:
    def started(seed: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        model = build_model(CONFIGS[name], seed=seed)
        return model, adamw(model)

    def steps(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for _ in range(3):
            ids_BS = torch.randint(0, 11, (2, 6))
            loss = torch.nn.functional.cross_entropy(model(ids_BS).logits.flatten(0, 1), ids_BS.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    model, optimizer = started(1)
    steps(model, optimizer)
    folder = save_snapshot(tmp_path, 3, model, optimizer, {})
    steps(model, optimizer)
    expected = values(model, optimizer)
    model, optimizer = started(2)
    restore_snapshot(folder, model, optimizer)
    steps(model, optimizer)
    assert same(values(model, optimizer), expected)
