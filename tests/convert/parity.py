"""Parity with transformers: one function that a family's tiny random models must pass, variant by variant.

>>> assert_parity(MixtralConfig(**TINY), tmp_path)   # logits, gradients, greedy text, both layouts, shards, dtypes, round trips
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import moesaic as mo
from moesaic.convert.families import FAMILIES
from moesaic.convert.family import Layout
from moesaic.convert.meaning import meaning
from moesaic.convert.pieces import Entry, fill
from moesaic.convert.read import config_of, open_folder
from moesaic.convert.write import write_hf
from moesaic.infer.generate import generate_ids
from moesaic.infer.sampling import SamplingConfig
from moesaic.models.decoder import Decoder
from moesaic.plan.plan import RoutingPlan

transformers = pytest.importorskip("transformers")
transformers.utils.logging.disable_progress_bar()
# Its warnings about tiny configurations (a token id outside the vocabulary) say nothing here.
logging.getLogger("transformers").setLevel(logging.ERROR)

LOGITS = GRADIENTS = 1e-5
# Ids below this are left to padding and the like: transformers' embedding gives the padding token no gradient, ours does.
FIRST_ID = 4
# What a low-precision forward may differ in the mean over the logits' spread. Not in the maximum: transformers rounds router
# logits to the model's dtype where ours stay fp32, so that a near-tie may send a token elsewhere.
LOW_PRECISION = {torch.bfloat16: 0.10, torch.float16: 0.02}


@dataclass(frozen=True)
class Measured:
    """Largest differences from transformers: of logits, and of gradients over the largest entry of their tensor."""

    logits: float
    padded: float | None
    gradients: float
    worst_gradient: str
    parameters: int
    experts_used: float
    bfloat16: float
    float16: float

    def __str__(self) -> str:
        padded = "   -   " if self.padded is None else f"{self.padded:.1e}"
        return (
            f"logits {self.logits:.1e}  padded {padded}  gradients {self.gradients:.1e} of {self.parameters} tensors  "
            f"bf16 {self.bfloat16:.1e}  fp16 {self.float16:.1e}  experts used {self.experts_used:.0%}"
        )


def tiny_hf(config: Any, seed: int = 0) -> Any:
    """A random transformers model whose routing is far from uniform, and in which every norm, bias and sink matters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():
            for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
                _draw(name, tensor, config.hidden_size, config.tie_word_embeddings)
    model.generation_config = transformers.GenerationConfig()  # no token ends a text early
    return model


def _draw(name: str, tensor: Tensor, dim: int, tied: bool) -> None:
    if "inv_freq" in name or not tensor.numel():
        return
    if "norm" in name and tensor.dim() == 1:
        tensor.normal_(1.0, 0.3)
    elif "correction_bias" in name:
        tensor.normal_(0.0, 0.1)
    elif "bias" in name or "sinks" in name:
        tensor.normal_(0.0, 0.5)
    elif "embed_tokens" in name:  # a tied one makes the logits as well
        tensor.normal_(0.0, 1.2 * dim**-0.5 if tied else 1.0)
    elif name.endswith(("mlp.gate.weight", "router.weight")):
        tensor.normal_(0.0, 2.0 * dim**-0.5)
    else:
        tensor.normal_(0.0, 1.2 * tensor.shape[-1] ** -0.5)


def assert_parity(
    config: Any,
    folder: Path,
    *,
    length: int = 24,
    prompts: tuple[int, int] = (9, 6),
    new_tokens: int = 50,
    seed: int = 0,
) -> Measured:
    """A random model of ``config`` is the same model here, and comes back as it was.

    Args:
        folder: to write to; empty.
        length: of the two texts whose logits and gradients are compared.
        prompts: lengths of two prompts, continued side by side (a dynamic rope: one after the other, because transformers
            turns all rows by the longest).
    """
    hf = tiny_hf(config, seed)
    hf.save_pretrained(folder / "hf")
    model = mo.load(folder / "hf")
    ids_BS = _ids(config.vocab_size, 2, length, seed)
    dynamic = _is_dynamic(config)
    logits, used = _same_logits(folder / "hf", model, ids_BS)
    padded = None if dynamic and length > config.max_position_embeddings else _same_padded(folder / "hf", model, ids_BS)
    _same_text(folder / "hf", model, prompts, new_tokens, one_by_one=dynamic)
    if dynamic:  # from within the old context past it, above; and from beyond it
        _same_text(folder / "hf", model, (config.max_position_embeddings + 3,) * 2, 10, one_by_one=True)
    gradients, worst, count = _same_gradients(folder / "hf", model, ids_BS)
    _all_covered(folder / "hf", model)
    _comes_back(folder, model, ids_BS)
    _other_layout(folder, hf, model, ids_BS)
    _shards(folder, hf, model)
    _old_keys(folder, model)
    low = {dtype: _low_precision(folder, config, dtype, ids_BS, seed) for dtype in LOW_PRECISION}
    return Measured(logits, padded, gradients, worst, count, used, low[torch.bfloat16], low[torch.float16])


def _ids(vocab: int, rows: int, length: int, seed: int) -> Tensor:
    return torch.randint(FIRST_ID, vocab, (rows, length), generator=torch.Generator().manual_seed(seed + 1))


def _is_dynamic(config: Any) -> bool:
    return (config.rope_parameters or {}).get("rope_type") == "dynamic"


def load_hf(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """By transformers, which must find every tensor and nothing else. Fresh: a dynamic rope remembers the longest input."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not any(info.values()), info
    model.generation_config = transformers.GenerationConfig()
    return model.eval()


def _same_logits(folder: Path, model: Decoder, ids_BS: Tensor) -> tuple[float, float]:
    with torch.no_grad():
        theirs_BSV = load_hf(folder)(ids_BS).logits
        out = model(ids_BS)
    difference = (out.logits - theirs_BSV).abs().max().item()
    assert difference < LOGITS
    assert theirs_BSV.std() > 0.5, "too quiet to show anything"
    counts = [plan.counts_E for plan in out.plans.values() if isinstance(plan, RoutingPlan)]
    used = torch.cat([c > 0 for c in counts]).float().mean().item() if counts else 1.0
    for layer, plan in out.plans.items():  # of equal scores all weights would be equal
        if isinstance(plan, RoutingPlan) and plan.num_experts > 1:
            assert plan.weight_N.std() > 0.1 * plan.weight_N.mean(), f"routing of layer {layer} is near uniform"
    return difference, used


def _same_padded(folder: Path, model: Decoder, ids_BS: Tensor) -> float:
    """With padding on the left of the second row. Its own logits are nobody's business."""
    valid_BS = torch.ones_like(ids_BS, dtype=torch.bool)
    valid_BS[1, : ids_BS.shape[1] // 3] = False
    position_BS = (valid_BS.long().cumsum(1) - 1).clamp(min=0)
    padded_BS = ids_BS.where(valid_BS, torch.zeros_like(ids_BS))
    with torch.no_grad():
        theirs = load_hf(folder)(padded_BS, attention_mask=valid_BS.long(), position_ids=position_BS).logits[valid_BS]
        ours = model(padded_BS, valid_BS=valid_BS).logits[valid_BS]
    difference = (ours - theirs).abs().max().item()
    assert difference < LOGITS
    return difference


def _same_text(folder: Path, model: Decoder, prompts: tuple[int, int], new_tokens: int, one_by_one: bool) -> None:
    """The same greedy continuation, both with a cache."""
    rows = [_ids(model.config.vocab_size, 1, n, n)[0].tolist() for n in prompts]
    greedy = SamplingConfig(temperature=0.0)
    for batch in [[row] for row in rows] if one_by_one else [rows]:
        longest = max(map(len, batch))
        ids = torch.tensor([[0] * (longest - len(row)) + row for row in batch])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in batch])
        theirs = load_hf(folder).generate(
            ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0, use_cache=True
        )
        ours = generate_ids(model, batch, max_new_tokens=new_tokens, sampling=greedy)
        assert [list(row) for row in ours.ids] == theirs[:, longest:].tolist()
        assert all(len(row) == new_tokens for row in ours.ids)


def _loss(logits_BSV: Tensor, ids_BS: Tensor) -> Tensor:
    return F.cross_entropy(logits_BSV[:, :-1].flatten(0, 1), ids_BS[:, 1:].flatten())


def _in_memory(model: Decoder, names: set[str]) -> list[Entry]:
    """The table of the layout that transformers has in memory."""
    assert model.source is not None
    family = FAMILIES[model.source["family"]]
    tables = [family.table(model.config, layout, model.source["config"]) for layout in family.layouts]
    return max(tables, key=lambda table: sum(piece.theirs in names for entry in table for piece in entry.pieces))


def _same_gradients(folder: Path, model: Decoder, ids_BS: Tensor) -> tuple[float, str, int]:
    """Of the cross-entropy, for every parameter of both, through the family's own table."""
    hf = load_hf(folder)
    _loss(hf(ids_BS).logits, ids_BS).backward()
    theirs = {name: p.grad for name, p in hf.named_parameters()}
    assert all(grad is not None for grad in theirs.values())
    model.train()
    _loss(model(ids_BS).logits, ids_BS).backward()
    model.eval()
    ours = {name: p.grad for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = None
    entries = {entry.ours: entry for entry in _in_memory(model, set(theirs)) if entry.ours in ours}
    assert entries.keys() == ours.keys()
    pieces = [piece.theirs for entry in entries.values() for piece in entry.pieces]
    assert sorted(pieces) == sorted(theirs)
    # The weight of an only expert is 1 whatever its gate says.
    moes = model.moe_layers()
    idle = {f"blocks.{i}.ffn.router.gate.weight" for i, layer in moes.items() if layer.router.num_experts == 1}
    found = {}
    for name, grad in ours.items():
        assert grad is not None, name
        expected = torch.full_like(grad, torch.nan)
        for piece in entries[name].pieces:
            fill(expected, piece, theirs[piece.theirs])  # type: ignore[arg-type]
        scale = expected.abs().max()
        if name in idle:
            assert max(scale, grad.abs().max()) < 1e-6, name
            continue
        assert scale > 0, f"{name} has no gradient"
        found[name] = ((grad - expected).abs().max() / scale).item()
    worst = max(found, key=found.__getitem__)
    assert found[worst] < GRADIENTS, worst
    return found[worst], worst, len(ours)


def _all_covered(folder: Path, model: Decoder) -> None:
    coverage = open_folder(folder).coverage()
    assert coverage.complete
    there = stored(folder)
    assert coverage.tensors.total == len(there)
    assert coverage.parameters.total == sum(t.numel() for t in there.values())
    assert coverage.bytes.total == sum(t.nbytes for t in there.values())
    assert coverage.experts.total == sum(layer.router.num_experts for layer in model.moe_layers().values())
    assert coverage.config_keys.total == len(read_config(folder))


def stored(folder: Path) -> dict[str, Tensor]:
    """Every tensor in the safetensors files of a folder."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            names = list(file.keys())
            assert not found.keys() & set(names)
            found |= {name: file.get_tensor(name) for name in names}
    return found


def read_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text("utf-8"))  # type: ignore[no-any-return]


def same_tensors(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Names, shapes, dtypes and bits."""
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert tensor.shape == other[name].shape, name
        assert torch.equal(tensor.view(torch.uint8), other[name].view(torch.uint8)), name


def same_model(one: Decoder, other: Decoder) -> None:
    """Configs of one meaning and bitwise equal tensors."""
    assert meaning(one.config) == meaning(other.config)
    same_tensors(dict(one.state_dict()), dict(other.state_dict()))


def same_in_transformers(one: Path, other: Path, ids_BS: Tensor) -> None:
    """Two folders are the same model there: class, every parameter and buffer bitwise, logits but for where memory lies."""
    first, second = load_hf(one), load_hf(other)
    assert type(first) is type(second)
    for kind in ("named_parameters", "named_buffers"):
        same_tensors(*({n: t.detach() for n, t in getattr(model, kind)()} for model in (first, second)))
    with torch.no_grad():
        assert (first(ids_BS).logits - second(ids_BS).logits).abs().max() < LOGITS


# Keys that transformers reads by way of others (``layer_types``), or of which two spellings mean the same.
_RESPELLED = {"max_window_layers", "decoder_sparse_step", "mlp_only_layers", "_name_or_path", "architectures"}
# Published keys that transformers leaves out when it saves; ours are written out, since others ask for them.
_LEFT_OUT = {"seq_aux", "aux_loss_alpha", "scoring_func", "topk_method"}
_ROPE_DEFAULTS = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True}


def _comes_back(folder: Path, model: Decoder, ids_BS: Tensor) -> None:
    """To transformers and back: the same tensors under the same names, the same config, the same logits."""
    mo.save(model, folder / "back", format="hf")
    same_tensors(stored(folder / "hf"), stored(folder / "back"))
    same_model(model, mo.load(folder / "back"))
    same_in_transformers(folder / "hf", folder / "back", ids_BS)
    configs = [transformers.AutoConfig.from_pretrained(path).to_dict() for path in (folder / "hf", folder / "back")]
    for config in configs:
        for key in _RESPELLED:
            config.pop(key, None)
        if config.get("head_dim") is None:
            config["head_dim"] = config["hidden_size"] // config["num_attention_heads"]
        # null is what an absent option of a rope scaling means
        config["rope_parameters"] = {k: v for k, v in config["rope_parameters"].items() if v is not None}
        if config["rope_parameters"]["rope_type"] == "yarn":
            config["rope_parameters"] = _ROPE_DEFAULTS | config["rope_parameters"]
    for key in _LEFT_OUT - configs[0].keys():
        configs[1].pop(key, None)
    assert configs[0] == configs[1]
    native = folder / "native"
    mo.save(model, native)
    same_model(model, mo.load(native))
    mo.save(mo.load(native), folder / "again", format="hf")
    same_tensors(stored(folder / "hf"), stored(folder / "again"))
    assert read_config(folder / "back") == read_config(folder / "again")


def _other_layout(folder: Path, hf: nn.Module, model: Decoder, ids_BS: Tensor) -> None:
    """The names transformers has in memory (experts stacked), read and written; it loads what was written."""
    assert model.source is not None
    tied = set(getattr(hf, "_tied_weights_keys", None) or ()) if model.config.tie_embeddings else set()
    memory = {name: tensor.contiguous() for name, tensor in hf.state_dict().items() if name not in tied}
    (folder / "memory").mkdir()
    save_file(memory, folder / "memory" / "model.safetensors", {"format": "pt"})
    (folder / "memory" / "config.json").write_bytes((folder / "hf" / "config.json").read_bytes())
    same_model(model, mo.load(folder / "memory"))
    assert open_folder(folder / "memory").coverage().complete
    family = FAMILIES[model.source["family"]]
    written: dict[Layout, dict[str, Tensor]] = {}
    for layout in family.layouts:
        path = folder / f"as_{layout}"
        write_hf(model, path, layout=layout)
        written[layout] = stored(path)
        same_model(model, mo.load(path))
        same_in_transformers(folder / "hf", path, ids_BS)
    same_tensors(memory, written.get("stacked", written[family.layouts[0]]))


def _shards(folder: Path, hf: Any, model: Decoder) -> None:
    largest = max(p.nbytes for p in hf.parameters())
    hf.save_pretrained(folder / "shards", max_shard_size=largest + 1)
    assert len(list((folder / "shards").glob("*.safetensors"))) > 1
    same_model(model, mo.load(folder / "shards"))
    write_hf(model, folder / "our_shards", max_shard_bytes=largest + 1)
    assert len(list((folder / "our_shards").glob("*.safetensors"))) > 1
    same_tensors(stored(folder / "hf"), stored(folder / "our_shards"))
    load_hf(folder / "our_shards")


def _old_keys(folder: Path, model: Decoder) -> None:
    """``rope_theta`` and ``rope_scaling`` with ``type``, as transformers 4 wrote them, and ``torch_dtype``."""
    old = read_config(folder / "hf")
    rope = dict(old.pop("rope_parameters"))
    old["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    for spelled in ("type", "rope_type"):
        old["rope_scaling"] = None if kind == "default" else {spelled: kind, **rope}
        old["torch_dtype"] = old.pop("dtype", "float32")
        path = folder / f"old_{spelled}"
        path.mkdir()
        (path / "config.json").write_text(json.dumps(old), "utf-8")
        assert config_of(path) == model.config


def _low_precision(folder: Path, config: Any, dtype: torch.dtype, ids_BS: Tensor, seed: int) -> float:
    """A checkpoint in half precision: read without loss, exactly the same function in fp32, nearly the same in its own."""
    name = str(dtype).removeprefix("torch.")
    low = tiny_hf(config, seed).to(dtype)
    low.save_pretrained(folder / name)
    wide = mo.load(folder / name, dtype=torch.float32)
    with torch.no_grad():
        theirs_BSV = load_hf(folder / name, torch.float32)(ids_BS).logits
        # Other weights than above: transformers is 6.5e-6 from fp64 in one of them, and machines round differently.
        assert (wide(ids_BS).logits - theirs_BSV).abs().max() < 2 * LOGITS
        model = mo.load(folder / name)
        assert model.embedding.weight.dtype == dtype
        difference_BSV = (model(ids_BS).logits.float() - load_hf(folder / name, dtype)(ids_BS).logits.float()).abs()
    same_tensors(dict(wide.state_dict()), {n: t.float() for n, t in model.state_dict().items()})
    write_hf(model, folder / f"{name}_back")
    there, back = stored(folder / name), stored(folder / f"{name}_back")
    same_tensors({n: t.float() for n, t in there.items()}, {n: t.float() for n, t in back.items()})
    widened = {n for n in there if back[n].dtype != there[n].dtype}
    assert all(back[n].dtype == torch.float32 and ("gate" in n or "router" in n) for n in widened), widened
    spread = (difference_BSV.mean() / theirs_BSV.std()).item()
    assert spread < LOW_PRECISION[dtype]
    return spread
