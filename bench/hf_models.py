"""A Hugging Face model with the same weights as a moesaic decoder, and quick random weights for both.

The family is Mixtral, whose architecture is that of ``moesaic.Decoder`` with the settings used here: RMSNorm before attention
and before the experts, rotary positions over half-split heads, grouped queries, no biases, no norm on queries and keys, SwiGLU
experts, softmax over all experts, top k, weights divided by their sum. Only layouts differ: moesaic's ``w_in`` is (E, D, 2H)
with gate before up and ``w_out`` (E, H, D); Hugging Face's ``gate_up_proj`` is (E, 2H, D), ``down_proj`` (E, D, H).
In bf16 Hugging Face's router and rotary tables are bf16, moesaic's fp32; so texts agree in fp32 and drift apart in bf16.

Legend: B batch, S positions, V vocabulary, D model width, H expert width, E experts.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from common import DTYPES, BenchError, positive
from peers import HF_BACKENDS
from torch import Tensor, nn

from moesaic.cost.count import count_parameters
from moesaic.models.build import build_model
from moesaic.models.config import ModelConfig, MoEConfig
from moesaic.models.decoder import Decoder
from moesaic.ops.grouped import BACKENDS
from moesaic.ops.pages import prefer_huge

RELATIVE = 1e-4  # largest difference of fp32 logits, relative to the largest logit


def model_arguments(
    parser: argparse.ArgumentParser, *, dim: int, hidden: int, experts: int, heads: tuple[int, int]
) -> None:
    """Options of benchmarks of whole models, with these defaults; ``model_of`` reads the sizes."""
    parser.add_argument("--layers", type=positive, default=12)
    parser.add_argument("--dim", type=positive, default=dim)
    parser.add_argument("--hidden", type=positive, default=hidden, help="width of one expert")
    parser.add_argument("--experts", type=positive, default=experts)
    parser.add_argument("--k", type=positive, default=8)
    parser.add_argument("--heads", type=positive, nargs=2, default=heads, metavar=("Q", "KV"), help="each 64 wide")
    parser.add_argument("--vocab", type=positive, default=32000)
    parser.add_argument("--dtypes", choices=tuple(DTYPES), nargs="+", default=list(DTYPES), help="of activations")
    parser.add_argument("--backends", choices=BACKENDS, nargs="+", default=["auto"], help="of moesaic's experts")
    parser.add_argument("--hf", choices=("none", *HF_BACKENDS), nargs="+", default=list(HF_BACKENDS))
    parser.add_argument("--memory", type=float, default=16.0, metavar="GIB", help="refuse models that need more")
    parser.add_argument(
        "--limit", type=float, default=300.0, metavar="S", help="longest time for one contender's rounds"
    )


def model_of(args: argparse.Namespace, max_seq_len: int) -> ModelConfig:
    """The model asked for: heads of 64, a tied head, the balancing losses that ``moesaic train`` has by default."""
    return ModelConfig(
        vocab_size=args.vocab,
        dim=args.dim,
        num_layers=args.layers,
        num_heads=args.heads[0],
        num_kv_heads=args.heads[1],
        head_dim=64,
        max_seq_len=max_seq_len,
        moe=MoEConfig(num_experts=args.experts, k=args.k, hidden=args.hidden),
    )


def draw_decoder(config: ModelConfig, dtype: torch.dtype, seed: int = 0) -> Decoder:
    """A decoder in ``dtype`` (routers fp32) with normal weights of the spread that ``build_model`` gives, in evaluation mode.

    ``build_model`` draws each expert from its own seed and cuts the tails off, which for 10^9 weights takes minutes.
    """
    model = build_model(config, device="meta")
    model.to(dtype)
    generator = torch.Generator().manual_seed(seed)
    out = (2 * config.num_layers) ** -0.5
    drawn: dict[str, Tensor] = {}
    for name, shaped in model.state_dict().items():
        if config.tie_embeddings and name == "head.weight":
            drawn[name] = drawn["embedding.weight"]
            continue
        tensor = prefer_huge(torch.empty(shaped.shape, dtype=shaped.dtype))  # as building and loading do
        if shaped.dim() == 1:
            tensor.fill_(1.0)  # gains of norms
        elif name.endswith(("embedding.weight", "gate.weight")):
            tensor.normal_(std=0.02, generator=generator)
        else:
            stacked = name.endswith((".w_in", ".w_out"))  # (E, in, out); linear layers are (out, in)
            std = shaped.shape[1] ** -0.5 * (out if name.endswith((".w_out", "wo.weight", "w_out.weight")) else 1.0)
            assert stacked or shaped.dim() == 2
            tensor.normal_(std=std, generator=generator)
        drawn[name] = tensor
    model.load_state_dict(drawn, assign=True)
    if config.tie_embeddings:
        model.head.weight = model.embedding.weight  # one Parameter again, not two over one memory
    return model.requires_grad_().eval()


def hf_model(model: Decoder, backend: str = "grouped_mm", dtype: torch.dtype | None = None) -> Any:
    """``transformers.MixtralForCausalLM`` with copies of the decoder's weights, in its dtype or another, in evaluation mode.

    Raises ``BenchError`` for a decoder that is not of this architecture.
    """
    from transformers import MixtralConfig, MixtralForCausalLM

    config, moe = model.config, model.config.moe
    if moe is None or _differs(config):
        raise BenchError(
            f"Hugging Face's Mixtral cannot be this decoder, because of its {', '.join(_differs(config))}."
        )
    dtype = dtype or model.embedding.weight.dtype
    sizes: dict[str, Any] = {
        "num_local_experts": moe.num_experts,
        "num_experts_per_tok": moe.k,
        "intermediate_size": moe.hidden,
    }
    hf_config = MixtralConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.dim,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.kv_heads,
        head_dim=config.heads_dim,
        max_position_embeddings=config.max_seq_len,
        rms_norm_eps=config.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        tie_word_embeddings=config.tie_embeddings,
        router_aux_loss_coef=moe.losses.get("switch", 0.0),
        bos_token_id=None,
        eos_token_id=None,
        **sizes,
    )
    hf_config._attn_implementation = "sdpa"
    with torch.device("meta"):
        made = MixtralForCausalLM(hf_config)
    made.load_state_dict({name: _copy(tensor, dtype) for name, tensor in _renamed(model)}, assign=True, strict=False)
    if config.tie_embeddings:
        made.lm_head.weight = made.model.embed_tokens.weight
    # The rotary frequencies are no parameters: they are made by the module, here off the meta device.
    made.model.rotary_emb = type(made.model.rotary_emb)(hf_config)
    left = [name for name, tensor in (*made.named_parameters(), *made.named_buffers()) if tensor.is_meta]
    if left:
        raise BenchError(f"transformers' Mixtral has weights this benchmark does not fill: {', '.join(left[:3])}.")
    made.set_experts_implementation(backend)
    made.generation_config.pad_token_id = 0
    made.requires_grad_().train(False)
    return made


def _differs(config: ModelConfig) -> list[str]:
    """Settings that make a decoder another architecture than Mixtral's."""
    free = {
        "vocab_size",
        "dim",
        "num_layers",
        "num_heads",
        "num_kv_heads",
        "head_dim",
        "hidden",
        "norm_eps",
        "rope_theta",
    }
    free |= {"max_seq_len", "tie_embeddings", "init_scale", "moe"}
    found = _changed(config, ModelConfig(config.vocab_size), free)
    if not isinstance(config.moe, MoEConfig):
        return [*found, "moe"]
    return found + _changed(
        config.moe, MoEConfig(), {"num_experts", "k", "hidden", "losses", "loss_options", "backend"}
    )


def _changed(config: Any, plain: Any, free: set[str]) -> list[str]:
    return [f.name for f in fields(config) if f.name not in free and getattr(config, f.name) != getattr(plain, f.name)]


def _renamed(model: Decoder) -> Iterator[tuple[str, Tensor]]:
    """Hugging Face's names with the decoder's tensors in its layout (transposed views where it transposes)."""
    yield "model.embed_tokens.weight", model.embedding.weight
    yield "model.norm.weight", model.norm.weight  # type: ignore[misc]
    if not model.config.tie_embeddings:
        yield "lm_head.weight", model.head.weight
    names = {
        "norm1.weight": "input_layernorm.weight",
        "norm2.weight": "post_attention_layernorm.weight",
        "attention.wq.weight": "self_attn.q_proj.weight",
        "attention.wk.weight": "self_attn.k_proj.weight",
        "attention.wv.weight": "self_attn.v_proj.weight",
        "attention.wo.weight": "self_attn.o_proj.weight",
        "ffn.router.gate.weight": "mlp.gate.weight",
        "ffn.experts.w_in": "mlp.experts.gate_up_proj",
        "ffn.experts.w_out": "mlp.experts.down_proj",
    }
    for layer, block in enumerate(model.blocks):
        for name, tensor in block.named_parameters():
            yield f"model.layers.{layer}.{names[name]}", tensor.transpose(1, 2) if tensor.dim() == 3 else tensor


def _copy(tensor: Tensor, dtype: torch.dtype) -> nn.Parameter:
    """A contiguous copy: the weights of two models must not share memory, or caches would help both. Both get large pages."""
    return nn.Parameter(prefer_huge(torch.empty(tensor.shape, dtype=dtype)).copy_(tensor.detach()))


@torch.inference_mode()
def check_logits(model: Decoder, hf: Any, ids_BS: Tensor) -> dict[str, float]:
    """Largest and median difference of a position's logits, relative to the largest logit of all.

    Raises ``BenchError`` where both are fp32 and the largest is above ``RELATIVE``: the models would not be the same. In bf16 a
    position whose experts flip differs a lot; the median tells whether the models are the same.
    """
    ours_BSV = model(ids_BS).logits.float()
    theirs_BSV = hf(input_ids=ids_BS, use_cache=False).logits.float()
    error_BS = (ours_BSV - theirs_BSV).abs().amax(-1) / ours_BSV.abs().max()
    found = {"max": float(error_BS.max()), "median": float(error_BS.median())}
    if {model.embedding.weight.dtype, hf.dtype} == {torch.float32} and not found["max"] <= RELATIVE:
        raise BenchError(
            f"Hugging Face's logits differ from moesaic's by {found['max']:.1e} of the largest, more than {RELATIVE:.0e}: the "
            "two models are not the same, so their times are not compared."
        )
    return found


@contextmanager
def backend_of(hf: Any, backend: str) -> Iterator[None]:
    """The model with another of its expert back ends inside."""
    before = hf.config._experts_implementation
    hf.set_experts_implementation(backend)
    try:
        yield
    finally:
        hf.set_experts_implementation(before)


def parameters(config: ModelConfig) -> int:
    """How many parameters a model of this shape has."""
    return count_parameters(build_model(config, device="meta")).total


def check_memory(args: argparse.Namespace, needed: Mapping[str, int]) -> None:
    """Refuse what would not fit into ``--memory``; ``needed`` is bytes by dtype."""
    for dtype, amount in needed.items():
        if amount > args.memory * 2**30:
            raise BenchError(
                f"The models alone take {amount / 2**30:.1f} GiB in {dtype}, more than the {args.memory:g} GiB of --memory; "
                "make them smaller, leave out --hf (none), or allow more."
            )


def sizes_of(model: Decoder) -> dict[str, int]:
    """Total and active parameters, by moesaic's own counter."""
    counts = count_parameters(model)
    return {"total_parameters": counts.total, "active_parameters": counts.active}


def our_name(backend: str) -> str:
    """The contender's name of moesaic's model with a back end of its experts."""
    return "moesaic" if backend == "auto" else f"moesaic {backend}"


def set_backend(model: Decoder, backend: str) -> None:
    """Have every sparse layer compute its experts by this back end."""
    for layer in model.moe_layers().values():
        layer.experts.backend = backend  # type: ignore[assignment]
