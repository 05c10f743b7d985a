"""Tensor parallelism applied from outside: a model's modules keep a slice of their heads and widths, and become regions.

>>> slice_model(model, world["tp"], world["etp"], held)       # after experts were placed; before FSDP
>>> recompute_activations(model)
>>> slice_dispatch(model, world["tp"], world["etp"])          # last of all that wraps dispatchers

| module | cut by outputs | cut by inputs | whole on every rank |
|---|---|---|---|
| attention | heads of ``wq``, ``wk``, ``wv``, ``sinks``, norms over projections | ``wo`` | ``wo.bias``, norms per head |
| latent attention | heads of ``wq`` or ``wq_b``, and of ``wkv_b`` | ``wo`` | ``wq_a``, ``wkv_a``, their norms; biases |
| feed-forward, shared | hidden units of ``w_in``, gate and up alike | ``w_out`` | ``w_out.bias``, output gate |
| experts (over etp) | hidden units of ``w_in`` and ``b_in`` | ``w_out`` | ``b_out``; zero, copy and constant experts |

Embedding, norms, routers, head and the projections of multi-head layers stay whole and are computed by all ranks alike. Where
etp is 1, experts stay whole too and the rows of a plan are shared out. Every parameter that is whole has the whole gradient on
every rank (``regions.py``), so the ranks of a group stay equal bit for bit as long as they see the same batch and the same
random numbers.

Legend: D model width, E experts, H hidden width, R head width, C width of latents, P ranks of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn

from moesaic.errors import ConfigError
from moesaic.experts.layer import MoE
from moesaic.experts.neurons import NeuronExperts
from moesaic.experts.special import SharedExperts, WithSpecialExperts
from moesaic.experts.stacked import StackedExperts
from moesaic.layout import Axis
from moesaic.models.decoder import Decoder
from moesaic.nn.attention import Attention
from moesaic.nn.cache import KVCache
from moesaic.nn.latent import LatentAttention
from moesaic.nn.linear import Linear
from moesaic.nn.mlp import MLP
from moesaic.ops.pages import prefer_huge
from moesaic.parallel.comm import Group
from moesaic.parallel.held import Held, pick
from moesaic.parallel.regions import (
    NormOverSlices,
    SlicedDispatch,
    SplitRowsDispatch,
    Substituted,
    SubstitutedAlways,
    enter,
    enter_input,
    enter_output,
    leave_output,
    make_region,
    once,
)


def slice_model(model: Decoder, tp: Group, etp: Group | None, held: dict[str, Held]) -> None:
    """Keep this rank's slices of a model that every rank of the groups holds alike; ``held`` follows. In place.

    Args:
        tp: cuts attention, dense and shared feed-forward layers. etp: cuts experts; None or one rank leaves them whole.
        held: by the names of ``model.named_parameters()``.

    Dispatchers are left to ``slice_dispatch``. Raises ``ConfigError``, before anything is changed, for what cannot be sliced.
    """
    _check(model, tp, etp)
    slicer = _Slicer(tp, etp if etp is not None and etp.size > 1 else None, held)
    slicer.walk(model, "")
    if tp.size > 1 and model.config.latent is None:
        model.new_cache = partial(_new_cache, model, model.config.kv_heads // tp.size)  # type: ignore[method-assign]


def slice_dispatch(model: nn.Module, tp: Group, etp: Group | None) -> None:
    """Put what shares out the execution of plans around the dispatchers that are set. In place."""
    for layer in (module for module in model.modules() if isinstance(module, MoE)):
        if etp is not None and etp.size > 1:
            layer.dispatcher = SlicedDispatch(layer.dispatcher, etp)
        elif tp.size > 1:
            layer.dispatcher = SplitRowsDispatch(layer.dispatcher, tp)


def _check(model: nn.Module, tp: Group, etp: Group | None) -> None:
    slices = 1 if etp is None else etp.size
    for module in model.modules():
        if isinstance(module, Attention | LatentAttention):
            _divides(tp.size, "parallel.tp", module.num_heads, "attention heads")
            if isinstance(module, Attention):
                _divides(tp.size, "parallel.tp", module.num_kv_heads, "key/value heads")
        elif isinstance(module, MLP):
            _divides(tp.size, "parallel.tp", module.w_out.in_features, "hidden units of a feed-forward layer")
        elif isinstance(module, NeuronExperts) and slices > 1:
            raise ConfigError(
                f'parallel.etp={slices} slices the width of experts, and those of expert_kind="neuron" have one hidden unit; '
                "set parallel.etp=1, which leaves experts whole and shares out their rows."
            )
        elif isinstance(module, StackedExperts):
            _divides(slices, "parallel.etp", module.hidden, "hidden units of an expert")
            if module.dropout and max(slices, tp.size) > 1:
                raise ConfigError(
                    f"model.moe.expert_dropout={module.dropout} would drop other units than one process does where "
                    f"parallel.tp={tp.size} ranks share an expert's work; set expert_dropout=0 or tp=1."
                )


def _divides(ranks: int, axis: str, size: int, what: str) -> None:
    if size % ranks:
        raise ConfigError(
            f"{axis}={ranks} slices cannot be equal: there are {size} {what}; choose a divisor of {size}."
        )


def _new_cache(model: Decoder, kv_heads: int, batch: int, max_len: int) -> KVCache:
    """``Decoder.new_cache`` for the key/value heads that are here."""
    config, weight = model.config, model.embedding.weight
    dtype = model.compute_dtype or weight.dtype
    return KVCache(config.num_layers, batch, max_len, kv_heads, config.heads_dim, dtype, weight.device)


class _Slicer:
    """One walk over a model. ``etp``: None leaves experts whole."""

    def __init__(self, tp: Group, etp: Group | None, held: dict[str, Held]) -> None:
        self.tp, self.etp, self.held = tp, etp, held

    def walk(self, module: nn.Module, name: str) -> None:
        """Slice ``module`` or, where it is none of those that are cut, what is in it."""
        slices: dict[type[nn.Module], Callable[..., None]] = {
            Attention: self.attention,
            LatentAttention: self.latent,
            SharedExperts: self.shared,
            MLP: self.dense,
            StackedExperts: self.experts,
            WithSpecialExperts: self.special,
        }
        for kind, cut in slices.items():
            if isinstance(module, kind):
                cut(module, name)
                return
        for child_name, child in module.named_children():
            self.walk(child, f"{name}.{child_name}" if name else child_name)

    def attention(self, module: Attention, name: str) -> None:
        """By heads; those of a group stay together."""
        tp, R = self.tp, module.head_dim
        if tp.size == 1:
            return
        query, key = _span(module.num_heads * R, tp), _span(module.num_kv_heads * R, tp)
        for part, span in (("wq", query), ("wk", key), ("wv", key)):
            self.columns(getattr(module, part), f"{name}.{part}", [span])
        self.rows(module.wo, f"{name}.wo", query)
        if module.sinks is not None:
            self.cut(module, name, "sinks", 0, [_span(module.num_heads, tp)], "tp")
        for part, heads, span in (("q_norm", module.num_heads, query), ("k_norm", module.num_kv_heads, key)):
            norm = getattr(module, part)
            if norm is None:
                continue
            if module.norm_per_head:
                self.enters(norm, "norm over heads", "weight")
            else:
                self.cut(norm, f"{name}.{part}", "weight", 0, [span], "tp")
                norm.forward = NormOverSlices(norm, heads * R, tp, "norm over slices of heads")
        module.num_heads //= tp.size
        module.num_kv_heads //= tp.size
        make_region(module, tp, "slices of attention")

    def latent(self, module: LatentAttention, name: str) -> None:
        """By heads. Latents are made outside the region, so that the weights that make them have the whole gradient."""
        tp, what = self.tp, "slices of attention"
        if tp.size == 1:
            return
        per_head = {"wkv_b": module.nope_dim + module.value_dim}
        per_head["wq" if module.q_rank is None else "wq_b"] = module.nope_dim + module.rope_dim
        for part, width in per_head.items():
            self.columns(getattr(module, part), f"{name}.{part}", [_span(module.num_heads * width, tp)])
        self.rows(module.wo, f"{name}.wo", _span(module.num_heads * module.value_dim, tp))
        module.num_heads //= tp.size
        enter_input(module.wq if module.q_rank is None else module.wq_b, tp, what)
        enter_output(module.kv_norm, tp, what)
        enter_output(
            module.wkv_a, tp, what, start=module.kv_rank
        )  # the rotary key; the latent before its norm stays out
        leave_output(module, tp, what)

    def dense(self, module: MLP, name: str, region: nn.Module | None = None) -> None:
        """By hidden units; ``region``: the module around it that is the region."""
        if self.tp.size == 1:
            return
        H = module.w_out.in_features
        self.columns(module.w_in, f"{name}.w_in", _hidden(H, module.gated, self.tp))
        self.rows(module.w_out, f"{name}.w_out", _span(H, self.tp))
        make_region(
            region or module,
            self.tp,
            "slices of a feed-forward layer" if region is None else "slices of shared experts",
        )

    def shared(self, module: SharedExperts, name: str) -> None:
        """The output gate, a scalar per token, multiplies every slice: all inside, so that the sum is the last thing done."""
        self.dense(module.mlp, f"{name}.mlp", module)
        if module.output_gate is not None:
            self.enters(module.output_gate, "output gate", "weight")

    def experts(self, module: StackedExperts, name: str) -> None:
        """By hidden units, each expert alike."""
        if self.etp is None:
            return
        own, sides = _span(module.hidden, self.etp), _hidden(module.hidden, module.gated, self.etp)
        self.cut(module, name, "w_in", 2, sides, "etp")
        self.cut(module, name, "w_out", 1, [own], "etp")
        for weight in (module.w_in, module.w_out):
            prefer_huge(weight.data, written=not weight.is_meta)
        if module.b_in is not None:
            self.cut(module, name, "b_in", 1, sides, "etp")
            module.forward = Substituted(module, b_out=partial(once, group=self.etp))  # type: ignore[method-assign]
        module.hidden //= self.etp.size

    def special(self, module: WithSpecialExperts, name: str) -> None:
        """Zero, copy and constant experts are computed by the first rank of etp; where rows are shared out, by every rank.

        Constants are dense parameters, whose gradients nobody sums over these ranks later: they enter.
        """
        self.walk(module.stacked, f"{name}.stacked")
        group = self.etp or self.tp
        if module.constant and group.size > 1:
            change = {
                part: partial(enter, group=group, what="constant experts") for part in ("constant_v", "constant_mix")
            }
            module.forward = SubstitutedAlways(module, **change)  # type: ignore[method-assign]
        if self.etp is not None and self.etp.index > 0:
            module.zero, module.copy, module.constant = module.zero + module.copy + module.constant, 0, 0

    def columns(self, linear: Linear, name: str, spans: Sequence[tuple[int, int]]) -> None:
        """Cut the outputs of a linear layer."""
        self.cut(linear, name, "weight", 0, spans, "tp")
        if linear.bias is not None:
            self.cut(linear, name, "bias", 0, spans, "tp")
        linear.out_features = linear.weight.shape[0]

    def rows(self, linear: Linear, name: str, span: tuple[int, int]) -> None:
        """Cut the inputs of a linear layer, whose bias is then added once."""
        self.cut(linear, name, "weight", 1, [span], "tp")
        linear.in_features = linear.weight.shape[1]
        if linear.bias is not None:
            linear.forward = Substituted(linear, bias=partial(once, group=self.tp))  # type: ignore[method-assign]

    def enters(self, module: nn.Module, what: str, part: str) -> None:
        """Let a parameter that all slices use whole enter."""
        if self.tp.size > 1:
            change = {part: partial(enter, group=self.tp, what=what)}
            module.forward = Substituted(module, **change)  # type: ignore[method-assign]

    def cut(
        self, module: nn.Module, name: str, part: str, dim: int, spans: Sequence[tuple[int, int]], axis: Axis
    ) -> None:
        """Keep spans of a parameter along ``dim``, in memory of their own."""
        parameter = module.get_parameter(part)
        kept = torch.cat([parameter.detach().narrow(dim, start, stop - start) for start, stop in spans], dim)
        setattr(module, part, nn.Parameter(kept.contiguous(), requires_grad=parameter.requires_grad))
        self.held[f"{name}.{part}"] = pick(self.held[f"{name}.{part}"], dim, spans, axis)


def _span(size: int, group: Group) -> tuple[int, int]:
    """This rank's consecutive part of ``size``."""
    part = size // group.size
    return group.index * part, (group.index + 1) * part


def _hidden(size: int, gated: bool, group: Group) -> list[tuple[int, int]]:
    """This rank's hidden units in a matrix of ``size`` of them, gate and up side by side where there are both."""
    start, stop = _span(size, group)
    return [(start, stop), (size + start, size + stop)] if gated else [(start, stop)]
