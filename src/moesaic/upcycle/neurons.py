"""A feed-forward layer seen as its hidden units, the pieces that experts are made of.

A unit is one row of every input matrix, one column of the output matrix, and its bias; the layer's output is the sum over units
(plus the output bias). So units may be copied, dealt out and put together again at will.

Legend: H hidden units, D model width, P input matrices (2 gated: gate and up; else 1), E experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moesaic.experts.stacked import StackedExperts
from moesaic.nn.mlp import MLP
from moesaic.ops.pages import prefer_huge


@dataclass(frozen=True, eq=False)
class Neurons:
    """H hidden units.

    Attributes:
        w_in_PHD, w_out_HD: weights into and out of each unit.
        b_in_PH, b_out_D: biases; both or neither.
    """

    w_in_PHD: Tensor
    w_out_HD: Tensor
    b_in_PH: Tensor | None = None
    b_out_D: Tensor | None = None

    @property
    def count(self) -> int:
        """H."""
        return self.w_out_HD.shape[0]

    def pick(self, unit_H: Tensor) -> Neurons:
        """Some of the units, by number; the output bias stays whole."""
        b_in_PH = None if self.b_in_PH is None else self.b_in_PH[:, unit_H]
        return Neurons(self.w_in_PHD[:, unit_H], self.w_out_HD[unit_H], b_in_PH, self.b_out_D)

    def scaled(self, out: float, bias: float) -> Neurons:
        """The same with the output weights times ``out`` and the output bias times ``bias``: exact for every activation."""
        b_out_D = None if self.b_out_D is None else self.b_out_D * bias
        return Neurons(self.w_in_PHD, self.w_out_HD * out, self.b_in_PH, b_out_D)


def of_mlp(mlp: MLP) -> Neurons:
    """The units of a dense layer; views of its parameters, without gradient."""
    w_in, w_out = mlp.w_in.weight.detach(), mlp.w_out.weight.detach()
    H = w_out.shape[1]
    b_in, b_out = mlp.w_in.bias, mlp.w_out.bias
    return Neurons(
        w_in.view(-1, H, w_in.shape[1]),
        w_out.T,
        None if b_in is None else b_in.detach().view(-1, H),
        None if b_out is None else b_out.detach(),
    )


def of_expert(experts: StackedExperts, index: int) -> Neurons:
    """The units of one expert of a stack; views, without gradient."""
    parts = 2 if experts.gated else 1
    w_in_DPH = experts.w_in.detach()[index].view(experts.dim, parts, experts.hidden)
    b_in, b_out = experts.b_in, experts.b_out
    return Neurons(
        w_in_DPH.permute(1, 2, 0),
        experts.w_out.detach()[index],
        None if b_in is None else b_in.detach()[index].view(parts, experts.hidden),
        None if b_out is None else b_out.detach()[index],
    )


def join(parts: Sequence[Neurons]) -> Neurons:
    """One layer of all units; output biases add up."""
    first = parts[0]
    b_in_PH = None if first.b_in_PH is None else torch.cat([p.b_in_PH for p in parts if p.b_in_PH is not None], dim=1)
    biases = [p.b_out_D for p in parts if p.b_out_D is not None]
    return Neurons(
        torch.cat([p.w_in_PHD for p in parts], dim=1),
        torch.cat([p.w_out_HD for p in parts]),
        b_in_PH,
        torch.stack(biases).sum(dim=0) if biases else None,
    )


def mean(parts: Iterable[tuple[Neurons, float]]) -> Neurons:
    """The weighted mean, unit by unit, summed in fp64, in the dtype of the parts; what is equal in all comes back bit for bit.

    Parts of weight 0 are not looked at; not all may be.
    """
    first: dict[str, Tensor] = {}
    apart: dict[str, Tensor] = {}  # the weighted sum of distances from the first: exactly 0 where all are equal
    weights = 0.0
    for neurons, weight in parts:
        if not weight:
            continue
        weights += weight
        for name in ("w_in_PHD", "w_out_HD", "b_in_PH", "b_out_D"):
            value = getattr(neurons, name)
            if value is None:
                continue
            if name in first:
                apart[name] += (value.double() - first[name].double()) * weight
            else:
                first[name], apart[name] = value, torch.zeros_like(value, dtype=torch.float64)
    return Neurons(**{name: (value.double() + apart[name] / weights).to(value.dtype) for name, value in first.items()})


def mlp_tensors(neurons: Neurons) -> dict[str, Tensor]:
    """The parameters of a dense layer of these units, by their names there; copies."""
    P, H, D = neurons.w_in_PHD.shape
    tensors = {
        "w_in.weight": neurons.w_in_PHD.reshape(P * H, D).clone(),
        "w_out.weight": neurons.w_out_HD.T.contiguous().clone(),
    }
    if neurons.b_in_PH is not None and neurons.b_out_D is not None:
        tensors |= {"w_in.bias": neurons.b_in_PH.reshape(P * H).clone(), "w_out.bias": neurons.b_out_D.clone()}
    return tensors


def stack(experts: Iterable[Neurons], E: int) -> dict[str, Tensor]:
    """The parameters of ``StackedExperts`` of E experts, filled one at a time: never more than one expert beside them."""
    tensors: dict[str, Tensor] = {}
    for e, neurons in enumerate(experts):
        P, H, D = neurons.w_in_PHD.shape
        one = {"w_in": neurons.w_in_PHD.permute(2, 0, 1).reshape(D, P * H), "w_out": neurons.w_out_HD}
        if neurons.b_in_PH is not None and neurons.b_out_D is not None:
            one |= {"b_in": neurons.b_in_PH.reshape(P * H), "b_out": neurons.b_out_D}
        for name, value in one.items():
            if name not in tensors:
                tensors[name] = prefer_huge(value.new_empty(E, *value.shape))
            tensors[name][e] = value
    return tensors
