"""Every expert's matrices as linear layers of their own, ``experts.{e}.{gate,up,out}``, sharing memory with the stack.

>>> expert_views(model)             # now PEFT, quantisers and hooks find blocks.1.ffn.experts.5.gate, an nn.Linear
>>> stack_experts(model)            # back; what was trained or merged meanwhile is in the stack

Experts are one stacked parameter (E, D, 2H) for speed; tools that work on linear layers see nothing of them there, and some
report success all the same. The views compute the same function one expert after the other, which costs speed and, on a GPU, a
host synchronisation per layer. The state dict keeps the stack's names, so a model saves and loads the same with views as
without. Legend: N rows, E experts, D model width, H expert width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.errors import ConfigError
from moesaic.experts.layer import MoE
from moesaic.experts.special import WithSpecialExperts
from moesaic.experts.stacked import StackedExperts
from moesaic.nn.linear import Linear
from moesaic.nn.mlp import apply_activation

_STACKS = ("w_in", "w_out", "b_in", "b_out")


def expert_views(model: nn.Module) -> int:
    """Replace the stacked experts of every sparse layer by views, in place; returns the number of experts that have them.

    Parameters become one per matrix: make the optimizer afterwards. Raises ``ConfigError`` for a model without such experts.
    """
    for holder, name, stacked in list(_holders(model)):
        if isinstance(stacked, StackedExperts):
            setattr(holder, name, ExpertViews(stacked))
    count = sum(len(views) for _, _, views in _holders(model) if isinstance(views, ExpertViews))
    if not count:
        raise ConfigError(
            "This model has no stacked feed-forward experts, so there is nothing to view expert by expert."
        )
    return count


def stack_experts(model: nn.Module) -> None:
    """The inverse of ``expert_views``. Raises ``ConfigError`` where adapters still sit on the views."""
    for holder, name, views in list(_holders(model)):
        if isinstance(views, ExpertViews):
            setattr(holder, name, views.to_stack())


def _holders(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """(module, attribute, experts) of every place that holds stacked experts or their views."""
    for module in model.modules():
        if isinstance(module, MoE) and not isinstance(module.experts, WithSpecialExperts):
            yield module, "experts", module.experts
        elif isinstance(module, WithSpecialExperts):
            yield module, "stacked", module.stacked


class ExpertViews(nn.ModuleList):
    """Feed-forward experts under the contract of ``experts/stacked.py``, each a ``ModuleDict`` of linear layers."""

    def __init__(self, stacked: StackedExperts) -> None:
        super().__init__()
        self.num_experts, self.dim, self.hidden = stacked.num_experts, stacked.dim, stacked.hidden
        self.activation, self.gated, self.dropout = stacked.activation, stacked.gated, stacked.dropout
        self.__dict__["_kept"] = stacked  # out of the registry: its parameters are seen through the views alone
        for expert in range(stacked.num_experts):
            views = {name: view for name, view in stacked.expert(expert).items() if not name.endswith("_bias")}
            trains = stacked.w_in.requires_grad
            self.append(nn.ModuleDict({name: _linear(view, stacked, name, trains) for name, view in views.items()}))
        self._point_at_stack()
        self.train(stacked.training)
        self.register_state_dict_post_hook(_with_stack_names)
        self.register_load_state_dict_pre_hook(_from_stack_names)

    def forward(self, x: Tensor, counts_E: Tensor, sources: None = None) -> Tensor:
        """Rows grouped by expert, (N, D) to (N, D). An expert without rows computes on none, so its gradient is zero."""
        counts = counts_E.tolist()
        rows = x[: sum(counts)].split(counts)
        done = [self.compute_one(expert, rows_ND) for expert, rows_ND in enumerate(rows)]
        y_ND = torch.cat(done)
        return F.pad(y_ND, (0, 0, 0, len(x) - len(y_ND)))

    def fuses(self, x: Tensor) -> bool:
        """Never: adapters know rows alone."""
        return False

    def compute_one(self, index: int, x_ND: Tensor) -> Tensor:
        """One expert on rows (N, D)."""
        linears: Any = self[index]
        hidden = torch.cat([linears[name](x_ND) for name in (("gate", "up") if self.gated else ("in",))], dim=-1)
        hidden = apply_activation(hidden, self.activation, self.gated)
        if self.dropout and self.training:
            hidden = F.dropout(hidden, self.dropout)
        y_ND: Tensor = linears["out"](hidden)
        return y_ND

    def reset_parameters(self, scale: float = 1.0, out_scale: float = 1.0) -> None:
        """As the stack does."""
        self._collect()
        self._kept.reset_parameters(scale, out_scale)

    def expert(self, index: int) -> dict[str, Tensor]:
        """Named views of one expert's matrices, as ``StackedExperts.expert``."""
        return self._collect().expert(index)

    def to_stack(self) -> StackedExperts:
        """The stack, with what the views hold. Raises ``ConfigError`` where one of them was replaced by an adapter."""
        for expert, name, module in self._linears():
            if type(module) is not Linear:
                raise ConfigError(
                    f'Expert {expert} has an adapter on "{name}"; merge or unload it first (peft_model.merge_and_unload()).'
                )
        stacked = self._collect()
        stacked.train(self.training)
        trains = any(parameter.requires_grad for parameter in self.parameters())
        stacked.requires_grad_(trains)
        return stacked

    @property
    def _kept(self) -> StackedExperts:
        kept: StackedExperts = self.__dict__["_kept"]
        return kept

    def _linears(self) -> Iterator[tuple[int, str, nn.Module]]:
        for expert, linears in enumerate(self):
            assert isinstance(linears, nn.ModuleDict)
            for name, module in linears.items():
                yield expert, name, module

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(parameter of a view, its part of the stack), both (out, in) or (out,)."""
        for expert, name, module in self._linears():
            linear: Any = getattr(module, "base_layer", module)  # PEFT's layers keep ours there
            parts = self._kept.expert(expert)
            yield linear.weight, parts[name].T
            if linear.bias is not None:
                yield linear.bias, parts[f"{name}_bias"]

    def _point_at_stack(self) -> None:
        with torch.no_grad():
            for parameter, part in self._pairs():
                parameter.data = part.detach()

    def _collect(self) -> StackedExperts:
        """The stack, after copying what no longer shares its memory into it (a tool may have put other tensors there)."""
        with torch.no_grad():
            for parameter, part in self._pairs():
                if parameter.data_ptr() != part.data_ptr() or parameter.stride() != part.stride():
                    part.copy_(parameter)
                    parameter.data = part.detach()
        return self._kept

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ExpertViews:
        """Casts and moves: of the stack, which the views then show. Adapters move as the modules they are."""
        self._collect()
        super()._apply(fn, recurse)
        self._kept._apply(fn, recurse)
        self._point_at_stack()
        return self


def _linear(view_io: Tensor, stacked: StackedExperts, name: str, trains: bool) -> Linear:
    width_in, width_out = view_io.shape
    linear = Linear(width_in, width_out, bias=stacked.b_in is not None, device="meta", dtype=view_io.dtype)
    # Made on the meta device, so that no memory is taken; pointed at the stack right after.
    linear.weight = nn.Parameter(view_io.detach().T, requires_grad=trains)
    if linear.bias is not None:
        linear.bias = nn.Parameter(view_io.new_empty(view_io.shape[1]).detach(), requires_grad=trains)
    return linear


def _with_stack_names(views: Any, state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
    """State dict: the stack's tensors instead of each expert's; an adapter's keep their names."""
    stacked = views._collect()
    for expert, name, module in views._linears():
        base = f"{prefix}{expert}.{name}." + ("base_layer." if hasattr(module, "base_layer") else "")
        state.pop(f"{base}weight", None)
        state.pop(f"{base}bias", None)
    for name in _STACKS:
        if getattr(stacked, name) is not None:
            state[f"{prefix}{name}"] = getattr(stacked, name).detach()


def _from_stack_names(views: Any, state: dict[str, Tensor], prefix: str, *rest: Any) -> None:
    """Loading: each expert's part of a stack's tensors."""
    stacked, given = views._kept, {name: state.pop(f"{prefix}{name}") for name in _STACKS if f"{prefix}{name}" in state}
    for name, tensor in given.items():
        if tensor.shape != getattr(stacked, name).shape:
            rest[-1].append(f"{prefix}{name} is {list(tensor.shape)}, not {list(getattr(stacked, name).shape)}")
            return
    for expert, name, module in views._linears():
        base = f"{prefix}{expert}.{name}." + ("base_layer." if hasattr(module, "base_layer") else "")
        side, at = ("out", 0) if name == "out" else ("in", 1 if name == "up" else 0)
        parts = 1 if name == "out" or not views.gated else 2
        if f"w_{side}" in given:
            state[f"{base}weight"] = given[f"w_{side}"][expert].chunk(parts, dim=-1)[at].T
        if f"b_{side}" in given:
            state[f"{base}bias"] = given[f"b_{side}"][expert].chunk(parts, dim=-1)[at]
