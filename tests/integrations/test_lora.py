"""LoRA on every expert: it learns, everything else is frozen, it saves, loads and merges, and what is covered is counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft")
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model

import moesaic as mo
from moesaic.errors import ConfigError, MoesaicError
from moesaic.integrations.expert_views import expert_views, stack_experts
from moesaic.integrations.hf_model import MoesaicForCausalLM
from moesaic.integrations.hook import install
from moesaic.integrations.lora import add_lora, coverage, load_lora, merge_lora
from tests.integrations.folders import VOCAB, loud_model, saved_folder, sparse_config

install()


def ids_of(rows: int = 3, length: int = 10) -> torch.Tensor:
    return torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(2))


def trained(peft_model: Any, steps: int = 6, lr: float = 3e-2) -> list[float]:
    """Loss of each step."""
    optimizer = torch.optim.AdamW([p for p in peft_model.parameters() if p.requires_grad], lr=lr)
    peft_model.train()
    losses = []
    for _ in range(steps):
        output = peft_model(input_ids=ids_of(), labels=ids_of())
        losses.append(float(output.lm_loss))
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    peft_model.eval()
    return losses


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=ids_of()).logits
    return logits


@pytest.mark.parametrize("changes", [{}, {"zero": 1, "copy": 1}, {"gated": False, "activation": "gelu"}], ids=str)
def test_adapters_on_all_experts_learn_save_load_and_merge(changes: dict[str, Any], tmp_path: Path) -> None:
    base, folder = saved_folder(tmp_path / "m", sparse_config(**changes))
    hf = MoesaicForCausalLM.from_pretrained(folder)
    frozen = {name: tensor.clone() for name, tensor in hf.model.state_dict().items()}
    untouched = logits_of(hf)
    peft_model = add_lora(hf, rank=4)
    torch.testing.assert_close(logits_of(peft_model), untouched, rtol=1e-5, atol=1e-5)  # B starts at zero
    report = coverage(peft_model)
    assert report.complete
    assert (report.experts, report.adapted_experts, report.layers) == (10, 10, 2)
    losses = trained(peft_model)
    assert losses[-1] < losses[0] - 0.1
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in hf.model.state_dict().items() if name in frozen)
    adapted = logits_of(peft_model)
    assert (adapted - untouched).abs().max() > 0.1

    peft_model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits_of(load_lora(MoesaicForCausalLM.from_pretrained(folder), tmp_path / "adapter")), adapted)
    auto = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", expert_views=True)
    assert torch.equal(logits_of(auto), adapted)
    assert coverage(auto).complete

    merged = merge_lora(peft_model)
    torch.testing.assert_close(logits_of(merged), adapted, rtol=1e-4, atol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    loaded = mo.load(tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids_of()).logits, adapted, rtol=1e-4, atol=1e-5)
    assert list(loaded.state_dict()) == list(base.state_dict())


def test_only_adapters_get_gradients_and_all_of_them_do() -> None:
    """One token: 3 of 5 experts of each layer see none, and their adapters still have gradients, of zero."""
    peft_model = add_lora(loud_model(), rank=2).train()
    one = torch.tensor([[3, 4]])
    peft_model(input_ids=one, labels=one, balance=False).loss.backward()
    for name, parameter in peft_model.named_parameters():
        assert parameter.requires_grad == ("lora_" in name), name
        assert (parameter.grad is not None) == ("lora_" in name), name
    idle = [e for e in range(5) if not _grad(peft_model, f"blocks.2.ffn.experts.{e}.out.lora_B")]
    assert 1 <= len(idle) <= 3


def _grad(model: Any, part: str) -> bool:
    return any(bool(p.grad.any()) for name, p in model.named_parameters() if part in name and p.grad is not None)


def test_shares_in_words_and_gaps_by_name() -> None:
    peft_model = add_lora(loud_model(), rank=2)
    # 2 layers x 5 experts x 3 matrices of 16 x 12; two factors of rank 2 on each.
    assert str(coverage(peft_model)) == (
        "Adapters sit on 10 of 10 (100%) experts in 2 sparse layers: 30 of 30 (100%) matrices, 5,760 of 5,760 (100%) "
        f"expert parameters; {30 * 2 * (16 + 12):,} parameters train."
    )
    some = add_lora(loud_model(), rank=2, target_modules=r".*\.experts\.[0-3]\.(gate|up|out)|.*\.experts\.4\.out")
    report = coverage(some)
    assert (report.adapted_experts, report.adapted_matrices) == (8, 26)
    assert not report.complete
    assert report.missing[0].endswith("blocks.1.ffn.experts.4.gate")
    assert "8 of 10 (80.0%) experts" in str(report)
    assert "and 1 more" in str(report)
    assert coverage(loud_model()).adapted_experts == 0


def test_peft_by_itself_says_nothing_of_experts_it_left_out() -> None:
    """Why coverage is counted: without views PEFT finds the attention alone and is content."""
    blind = get_peft_model(MoesaicForCausalLM.of(loud_model()), LoraConfig(r=2, target_modules="all-linear"))
    assert coverage(blind).adapted_experts == 0
    with pytest.raises(ConfigError, match="Adapters sit on 0 of 10"):
        _needs_all(blind)


def _needs_all(model: Any) -> None:
    if not coverage(model).complete:
        raise ConfigError(str(coverage(model)))


def test_whole_stacks_as_target_parameters_count_as_well() -> None:
    config = LoraConfig(r=2, target_modules=[], target_parameters=["experts.w_in", "experts.w_out"])
    peft_model = get_peft_model(MoesaicForCausalLM.of(loud_model()), config)
    assert coverage(peft_model).complete
    before = logits_of(peft_model)
    losses = trained(peft_model)
    assert losses[-1] < losses[0] - 0.1
    adapted = logits_of(peft_model)
    assert (adapted - before).abs().max() > 0.1
    torch.testing.assert_close(logits_of(peft_model.merge_and_unload()), adapted, rtol=1e-4, atol=1e-5)


def test_more_than_experts() -> None:
    peft_model = add_lora(loud_model(), rank=2, alpha=2, attention=True, shared=True, dense=True)
    names = {
        name.split(".lora_A")[0].split("model.model.model.")[1]
        for name, _ in peft_model.named_parameters()
        if "lora_A" in name
    }
    assert {"blocks.0.attention.wq", "blocks.0.ffn.w_in", "blocks.1.ffn.shared.mlp.w_out"} <= names
    assert trained(peft_model)[-1] < 6


def test_generation_with_adapters() -> None:
    peft_model = add_lora(loud_model(), rank=2)
    trained(peft_model)
    made = peft_model.generate(
        input_ids=ids_of(2, 4), max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=1
    )
    again = peft_model.generate(
        input_ids=ids_of(2, 4), max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=1, use_cache=False
    )
    assert made.shape == (2, 10)
    assert torch.equal(made, again)


def test_refusals(tmp_path: Path) -> None:
    model = loud_model()
    with pytest.raises(ConfigError, match="at least 1"):
        add_lora(model, rank=0)
    with pytest.raises(ConfigError, match="nothing to adapt"):
        add_lora(model, experts=False)
    peft_model = add_lora(model, rank=2)
    with pytest.raises(ConfigError, match="adapter"):
        stack_experts(peft_model)
    with pytest.raises(ConfigError, match="merge its adapters"):
        peft_model.base_model.model.save_pretrained(tmp_path / "never")
    assert not (tmp_path / "never").exists()
    peft_model.save_pretrained(tmp_path / "adapter")
    other = loud_model(sparse_config(num_experts=6))
    with pytest.raises(MoesaicError, match="does not fit"):
        load_lora(other, tmp_path / "adapter")
    with pytest.raises(MoesaicError, match="does not fit"):
        load_lora(loud_model(sparse_config(hidden=8)), tmp_path / "adapter")


def test_views_that_are_there_already_are_used() -> None:
    hf = MoesaicForCausalLM.of(loud_model())
    expert_views(hf)
    assert coverage(add_lora(hf, rank=1)).complete
