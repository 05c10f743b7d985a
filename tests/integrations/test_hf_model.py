"""A moesaic model under Hugging Face's interface: the same logits, the same text, the same losses, refusals in words."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache

from moesaic.data.packing import IGNORE, Batch
from moesaic.errors import ConfigError, MoesaicError
from moesaic.infer.sampling import SamplingConfig
from moesaic.infer.token_loop import generate_ids
from moesaic.integrations.hf_cache import MoesaicCache
from moesaic.integrations.hf_config import MoesaicConfig
from moesaic.integrations.hf_model import MoesaicForCausalLM
from moesaic.integrations.hf_output import MoesaicOutput
from moesaic.integrations.hook import install
from moesaic.models.config import DepthConfig, LatentConfig
from moesaic.train.step import train_step
from tests.integrations.folders import TEXTS, VOCAB, loud_model, saved_folder, sparse_config

install()

# Routers that look back among them: what they remember must follow the rows of beams.
MODELS: dict[str, dict[str, Any]] = {
    "topk": {},
    "bias that follows load": {"options": {"score": "sigmoid", "balance_bias": True}},
    "looks back over inputs": {"router": "conv"},
    "looks back by attention": {"router": "attention"},
    "segments": {"router": "segment"},
    "latent attention": {"latent": LatentConfig(kv_rank=8, nope_dim=4, rope_dim=2, value_dim=4), "num_kv_heads": None},
    "windows": {"sliding_window": (3, 0, 4), "tie_embeddings": False},
    "Mixture-of-Depths": {"depth": DepthConfig(0.5, router="mixture_of_depths", allow_leak=True)},
}
GREEDY = SamplingConfig(temperature=0)
every_model = pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)


def batch_of(model: Any, texts: list[str] = TEXTS) -> tuple[torch.Tensor, torch.Tensor, list[list[int]]]:
    """Left-padded ids, their mask, and the rows without padding."""
    rows = [model.tokenizer.encode(text).ids for text in texts]
    width = max(map(len, rows))
    ids = torch.tensor([[VOCAB - 1] * (width - len(row)) + row for row in rows])  # padding of any number
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask, rows


def random_labels(rows: int, length: int) -> torch.Tensor:
    return torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(5))


@every_model
def test_logits_and_losses_are_the_decoders(changes: dict[str, Any]) -> None:
    decoder = loud_model(sparse_config(**changes))
    model = MoesaicForCausalLM.of(decoder)
    ids, mask, rows = batch_of(decoder)
    with torch.no_grad():
        output = model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, IGNORE))
        assert isinstance(output, MoesaicOutput)
        losses = []
        for row, text in enumerate(rows):
            alone = decoder(torch.tensor([text])).logits
            torch.testing.assert_close(output.logits[row, -len(text) :], alone[0], rtol=1e-5, atol=1e-5)
            losses.append(torch.nn.functional.cross_entropy(alone[0, :-1], torch.tensor(text)[1:], reduction="none"))
    torch.testing.assert_close(output.loss, torch.cat(losses).mean(), rtol=1e-5, atol=1e-6)
    assert output.plans is not None
    assert list(output.plans) == [1, 2]
    assert output.balance_loss is None  # in evaluation nothing is added


@every_model
def test_text_is_moesaics_own_with_cache_and_without(changes: dict[str, Any]) -> None:
    decoder = loud_model(sparse_config(**changes))
    model = MoesaicForCausalLM.of(decoder)
    ids, mask, rows = batch_of(decoder)
    model.generation_config.eos_token_id = None
    ours = [list(new) for new in generate_ids(decoder, rows, max_new_tokens=20, sampling=GREEDY).ids]
    greedy = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 1}
    cached = model.generate(input_ids=ids, attention_mask=mask, **greedy)
    assert cached[:, ids.shape[1] :].tolist() == ours
    if "depth" not in changes:  # without a cache these blocks choose among all tokens again, by design
        assert torch.equal(model.generate(input_ids=ids, attention_mask=mask, use_cache=False, **greedy), cached)
    assert len({tuple(row) for row in ours}) > 1


@every_model
def test_beams_take_their_cache_along(changes: dict[str, Any]) -> None:
    if "depth" in changes:
        pytest.skip("without a cache these blocks choose among all tokens again")
    decoder = loud_model(sparse_config(**changes), seed=4)
    model = MoesaicForCausalLM.of(decoder)
    ids, mask, _ = batch_of(decoder)
    beams = {"max_new_tokens": 12, "num_beams": 4, "num_return_sequences": 3, "do_sample": False, "pad_token_id": 1}
    cached = model.generate(input_ids=ids, attention_mask=mask, **beams)
    assert torch.equal(cached, model.generate(input_ids=ids, attention_mask=mask, use_cache=False, **beams))


def test_beams_need_their_rows_reordered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the test above: with rows left where they were it must fail."""
    decoder = loud_model(seed=4)
    model = MoesaicForCausalLM.of(decoder)
    ids, mask, _ = batch_of(decoder)
    beams = {"max_new_tokens": 12, "num_beams": 4, "num_return_sequences": 3, "do_sample": False, "pad_token_id": 1}
    right = model.generate(input_ids=ids, attention_mask=mask, **beams)
    monkeypatch.setattr(MoesaicCache, "reorder_cache", lambda self, rows: None)
    assert not torch.equal(right, model.generate(input_ids=ids, attention_mask=mask, **beams))


def test_sampling_and_several_texts_per_prompt() -> None:
    decoder = loud_model()
    model = MoesaicForCausalLM.of(decoder)
    ids, mask, _ = batch_of(decoder)
    torch.manual_seed(1)
    drawn = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=6, do_sample=True, num_return_sequences=3)
    assert drawn.shape[0] == 3 * len(ids)
    assert len({tuple(row.tolist()) for row in drawn}) > len(ids)


def test_a_row_ends_at_the_end_of_text_as_in_moesaic() -> None:
    decoder = loud_model()
    model = MoesaicForCausalLM.of(decoder)
    ids, mask, rows = batch_of(decoder)
    free = generate_ids(decoder, rows, max_new_tokens=12, sampling=GREEDY)
    end = free.ids[0][5]
    ours = generate_ids(decoder, rows, max_new_tokens=12, sampling=GREEDY, eos_ids=[end])
    made = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=end, pad_token_id=1
    )[:, ids.shape[1] :]
    for row, new in enumerate(ours.ids):
        assert made[row, : len(new)].tolist() == list(new)
        assert ours.finish[row] == "length" or made[row, len(new)] == end


def test_a_cache_grows_and_goes_on() -> None:
    decoder = loud_model(sparse_config(max_seq_len=400))
    model = MoesaicForCausalLM.of(decoder)
    ids = random_labels(2, 300)
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False)
        assert whole.past_key_values is None
        cache, parts = None, []
        for start, end in ((0, 7), (7, 8), (8, 150), (150, 300)):
            part = model(input_ids=ids[:, start:end], past_key_values=cache, use_cache=True)
            cache = part.past_key_values
            assert isinstance(cache, MoesaicCache)
            assert cache.get_seq_length() == end
            parts.append(part.logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole.logits, rtol=1e-5, atol=1e-5)


def test_logits_to_keep() -> None:
    model = MoesaicForCausalLM.of(loud_model())
    ids = random_labels(2, 9)
    with torch.no_grad():
        full = model(input_ids=ids).logits
        for keep in (1, 3, torch.tensor([0, 4])):
            chosen = full[:, -keep:] if isinstance(keep, int) else full[:, keep]
            torch.testing.assert_close(model(input_ids=ids, logits_to_keep=keep).logits, chosen)
        assert isinstance(model(input_ids=ids, return_dict=False), tuple)


def test_packed_documents_by_positions() -> None:
    decoder = loud_model()
    model = MoesaicForCausalLM.of(decoder)
    ids = random_labels(1, 9)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    with torch.no_grad():
        packed = model(input_ids=ids, position_ids=positions).logits
        torch.testing.assert_close(packed[:, :4], model(input_ids=ids[:, :4]).logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(packed[:, 4:], model(input_ids=ids[:, 4:]).logits, rtol=1e-5, atol=1e-5)
        with pytest.raises(ConfigError, match="count the tokens of a document"):
            model(input_ids=ids, position_ids=positions + 1)


def test_tasks_reach_routers_that_use_them() -> None:
    decoder = loud_model(sparse_config("task", {"num_tasks": 3}))
    model = MoesaicForCausalLM.of(decoder)
    ids = random_labels(2, 6)
    with torch.no_grad():
        told = model(input_ids=ids, task_ids=torch.tensor([0, 2]), use_cache=False).logits
        direct = decoder(ids, task_BS=torch.tensor([[0], [2]]).expand(2, 6)).logits
    assert torch.equal(told, direct)
    made = model.generate(
        input_ids=ids, task_ids=torch.tensor([0, 2]), max_new_tokens=4, do_sample=False, pad_token_id=1
    )
    ours = generate_ids(decoder, ids.tolist(), max_new_tokens=4, sampling=GREEDY, task=[0, 2])
    assert made[:, 6:].tolist() == [list(new) for new in ours.ids]


def test_training_has_the_gradients_of_moesaics_own_step() -> None:
    """One forward and backward against ``train_step`` on the same batch: loss with balancing losses, and every gradient."""
    config = sparse_config(losses={"switch": 0.05, "z": 0.01})
    ours, theirs = loud_model(config), MoesaicForCausalLM.of(loud_model(config)).train()
    ids = random_labels(3, 11)
    targets = torch.cat([ids[:, 1:], torch.full((3, 1), IGNORE)], dim=1)
    nothing = torch.zeros_like(ids)
    kept: dict[str, torch.Tensor] = {}

    class Keep(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            kept.update({name: p.grad.clone() for name, p in ours.named_parameters() if p.grad is not None})

    batch = Batch(ids, targets, torch.ones_like(ids, dtype=torch.bool), nothing, nothing)
    reading, _ = train_step(ours, Keep(ours.parameters(), lr=0.0), [batch], lr=0.0, clip=0.0, step=1)
    output = theirs(input_ids=ids, labels=ids)
    output.loss.backward()
    assert float(output.loss.detach()) == pytest.approx(reading.loss, rel=1e-6)
    assert float(output.lm_loss) == pytest.approx(reading.lm_loss, rel=1e-6)
    assert float(output.balance_loss) > 0.01
    for name, parameter in theirs.model.named_parameters():
        torch.testing.assert_close(parameter.grad, kept[name], rtol=1e-5, atol=1e-7)
    assert float(theirs(input_ids=ids, labels=ids, balance=False).loss.detach()) == pytest.approx(
        reading.lm_loss, rel=1e-6
    )
    theirs.balance = False
    assert theirs(input_ids=ids, labels=ids).balance_loss is None


def test_gradients_over_several_batches_are_those_of_one() -> None:
    """With ``num_items_in_batch`` the batches of a step sum to the mean over its targets, and balancing to a mean."""
    model = MoesaicForCausalLM.of(loud_model()).train()
    ids = random_labels(3, 8)
    labels = ids.clone()
    labels[0, 3:] = IGNORE
    items = (labels[:, 1:] != IGNORE).sum()
    parts = [model(input_ids=ids[r : r + 1], labels=labels[r : r + 1], num_items_in_batch=items) for r in range(3)]
    whole = model(input_ids=ids, labels=labels)
    assert float(sum(p.lm_loss for p in parts)) == pytest.approx(float(whole.lm_loss), rel=1e-5)
    shares = [float((labels[r, 1:] != IGNORE).sum() / items) for r in range(3)]
    for part, share in zip(parts, shares, strict=True):
        assert float((part.loss - part.lm_loss).detach()) == pytest.approx(share * float(part.balance_loss), rel=1e-3)


def test_recomputation_gives_the_same_gradients() -> None:
    plain, saving = (MoesaicForCausalLM.of(loud_model()).train() for _ in range(2))
    saving.activation_checkpointing_enable()
    assert saving.is_activation_checkpointing
    assert not plain.is_activation_checkpointing
    ids = random_labels(2, 8)
    for model in (plain, saving):
        model(input_ids=ids, labels=ids).loss.backward()
    for a, b in zip(plain.parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=1e-7)
    before = saving(input_ids=ids, labels=ids).loss
    saving.activation_checkpointing_disable()
    assert not saving.is_activation_checkpointing
    assert "forward" not in vars(saving.model.blocks[0].attention)
    assert torch.equal(before, saving(input_ids=ids, labels=ids).loss)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"inputs_embeds": torch.zeros(1, 2, 16)}, "not embeddings"),
        ({"input_ids": torch.ones(1, 2, dtype=torch.int64), "attention_mask": torch.ones(1, 1, 2, 2)}, "mask is"),
        ({"input_ids": torch.ones(1, 2, dtype=torch.int64), "attention_mask": torch.ones(1, 3)}, "mask is"),
        ({"input_ids": torch.ones(1, 2, dtype=torch.int64), "output_hidden_states": True}, "forward hook"),
        ({"input_ids": torch.ones(1, 2, dtype=torch.int64), "past_key_values": DynamicCache()}, "MoesaicCache"),
        ({"input_ids": torch.ones(1, 2, dtype=torch.int64), "pixel_values": torch.ones(1)}, "pixel_values"),
        ({"input_ids": torch.ones(1, 2, dtype=torch.int64), "task_ids": torch.ones(3)}, "task_ids"),
        ({"input_ids": torch.full((1, 2), VOCAB)}, "vocabulary"),
    ],
)
def test_what_a_decoder_cannot_do_is_refused(arguments: dict[str, Any], words: str) -> None:
    model = MoesaicForCausalLM.of(loud_model())
    with pytest.raises(MoesaicError, match=words):
        model(**arguments)


def test_the_vocabulary_stays(tmp_path: Path) -> None:
    model = MoesaicForCausalLM.of(loud_model())
    assert model.resize_token_embeddings(VOCAB) is model.get_input_embeddings()
    with pytest.raises(ConfigError, match=f"vocabulary of {VOCAB}.*{VOCAB + 3}"):
        model.resize_token_embeddings(VOCAB + 3)


def test_tied_and_untied_heads() -> None:
    for tied in (True, False):
        model = MoesaicForCausalLM.of(loud_model(sparse_config(tie_embeddings=tied)))
        model.tie_weights()
        assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) is tied
        assert copy.deepcopy(model)(input_ids=random_labels(1, 3)).logits.shape == (1, 3, VOCAB)


def test_a_model_from_a_config_alone() -> None:
    config = MoesaicConfig(model=sparse_config(tie_embeddings=False))
    assert (config.vocab_size, config.num_hidden_layers, config.num_key_value_heads) == (VOCAB, 3, 2)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    assert isinstance(model, MoesaicForCausalLM)
    assert model.dtype == torch.bfloat16
    routers = [p.dtype for name, p in model.named_parameters() if "router" in name]
    assert routers
    assert set(routers) == {torch.float32}
    with pytest.raises(ConfigError, match='Did you mean "dim"'):
        MoesaicConfig(model={"vocab_size": 5, "dims": 3})
    with pytest.raises(MoesaicError, match="version 7"):
        MoesaicConfig(version=7)
    with pytest.raises(ConfigError, match="has no model"):
        MoesaicForCausalLM(MoesaicConfig())
    with pytest.raises(AttributeError):
        config.vocab_size = 3


def test_the_tokenizer_of_a_folder(tmp_path: Path) -> None:
    model, folder = saved_folder(tmp_path / "m")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.padding_side) == ("<|endoftext|>", "<|pad|>", "left")
    for text in TEXTS:
        assert tokenizer(text).input_ids == model.tokenizer.encode(text).ids
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    tokenizer.padding_side = "right"
    tokenizer.save_pretrained(tmp_path / "t")
    (tmp_path / "t" / "config.json").write_bytes((folder / "config.json").read_bytes())
    again = AutoTokenizer.from_pretrained(tmp_path / "t")
    assert again.chat_template == tokenizer.chat_template
    assert again.apply_chat_template([{"role": "user", "content": "on"}], tokenize=False) == "<user>on"
    assert (again.padding_side, again.pad_token) == ("right", "<|pad|>")
    assert AutoConfig.from_pretrained(folder).shape == model.config
