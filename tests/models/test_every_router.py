"""Every router inside a decoder: its facts hold for texts, caches, padding and packing, and it saves and loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.checkpoint.native import load_model, save_model
from moesaic.models import Decoder, Output
from tests.models.tiny import lively, some_ids, tiny
from tests.routing.cases import CASES, Case, differs

CLOSE = {"rtol": 1e-5, "atol": 3e-5}  # logits of about 1; products of other shapes round otherwise, most so with AMX
FAIR = [
    case for case in CASES if (facts := case.build().facts).causal_in_evaluation and facts.batch_invariant_in_evaluation
]
every_router = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
every_fair_router = pytest.mark.parametrize("case", FAIR, ids=lambda case: case.id)


def model_of(case: Case) -> Decoder:
    return lively(tiny(case.config()))


def run(model: Decoder, ids_BS: Tensor, **more: Any) -> Output:
    with torch.no_grad():
        output: Output = model(ids_BS, task_BS=torch.zeros_like(ids_BS), **more)
    return output


@every_fair_router
def test_later_tokens_and_other_rows_change_nothing(case: Case) -> None:
    model, ids = model_of(case), some_ids(3, 10)
    full = run(model, ids)
    for length in (1, 4, 9):
        torch.testing.assert_close(full.logits[1, :length], run(model, ids[1:2, :length]).logits[0], **CLOSE)


@every_fair_router
@pytest.mark.parametrize("chunks", [(5, 1, 1, 1, 1, 1), (1, 4, 5), (10,)], ids=str)
def test_a_cache_changes_nothing(case: Case, chunks: tuple[int, ...]) -> None:
    model, ids = model_of(case), some_ids(2, 10)
    whole, cache, start = run(model, ids), model.new_cache(2, 10), 0
    for size in chunks:
        part = run(model, ids[:, start : start + size], cache=cache)
        torch.testing.assert_close(part.logits, whole.logits[:, start : start + size], **CLOSE)
        start += size


@every_fair_router
def test_a_left_padded_batch_decodes_as_each_text_alone(case: Case) -> None:
    model, ids = model_of(case), some_ids(2, 9)
    alone = [run(model, ids[:1]), run(model, ids[1:, :6])]
    padded = ids.clone()
    padded[1] = torch.cat([torch.zeros(3, dtype=torch.int64), ids[1, :6]])
    valid = torch.ones(2, 9, dtype=torch.bool)
    valid[1, :3] = False
    cache = model.new_cache(2, 9)
    parts = [
        run(model, padded[:, places], valid_BS=valid[:, places], cache=cache).logits
        for places in (slice(0, 5), slice(5, 6), slice(6, 8), slice(8, 9))
    ]
    logits = torch.cat(parts, dim=1)
    torch.testing.assert_close(logits[0], alone[0].logits[0], **CLOSE)
    torch.testing.assert_close(logits[1, 3:], alone[1].logits[0], **CLOSE)


@every_fair_router
def test_a_document_reads_the_same_packed_or_alone(case: Case) -> None:
    model, ids = model_of(case), some_ids(2, 12)
    packed = run(model, ids, document_BS=torch.tensor([[0] * 5 + [1] * 7] * 2))
    for places in (slice(0, 5), slice(5, 12)):
        torch.testing.assert_close(packed.logits[:, places], run(model, ids[:, places]).logits, **CLOSE)


@every_router
def test_saving_and_loading_is_bitwise(case: Case, tmp_path: Path) -> None:
    model, ids = model_of(case), some_ids(2, 8)
    save_model(model, tmp_path / "m")
    again = load_model(tmp_path / "m").eval()
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    a, b = run(model, ids), run(again, ids)
    assert torch.equal(a.logits, b.logits)
    assert not any(differs(a.plans[layer], b.plans[layer], 0.0).any() for layer in a.plans)
