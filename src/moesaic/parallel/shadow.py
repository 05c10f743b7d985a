"""Shadow experts (FasterMoE, He et al. 2022; fieldguide 4.8): the busiest experts are on every rank for one step.

    after a step    decide()      which experts of which layer, by the rows this step sent them
    before a step   fetch()       their weights go from home to the ranks without a slot of theirs
    in the step                   rows of theirs stay where they are, computed by the shadows
    after backward  give_back()   gradients are summed at home; the shadows are gone

FasterMoE decides in each forward by its own rows. Here the last step's rows decide: routing moves slowly, the micro-batches of
a step and the recomputation in the backward cannot disagree, weights travel once per step for all micro-batches, and no forward
waits for a decision. Shadows change where rows are computed, never what comes out.

The rule (``plan.predict.shadows``) sets rows spared, four times their bytes, against weights there and gradients back. With
recomputation rows are spared six times; it is left at four.

Legend: T tokens, N rows, E experts, D width, Q shadows on this rank, R ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moesaic.errors import CheckpointError, ConfigError
from moesaic.experts.dispatch import Experts, dispatch_local
from moesaic.experts.layer import MoE
from moesaic.experts.neurons import NeuronExperts
from moesaic.experts.stacked import StackedExperts
from moesaic.parallel.comm import Group
from moesaic.parallel.dispatch import ExchangeDispatch
from moesaic.parallel.experts import stack_of
from moesaic.parallel.gradients import local
from moesaic.parallel.regions import Substituted, once
from moesaic.parallel.world import World
from moesaic.plan.placement import Placement
from moesaic.plan.plan import RoutingPlan, SoftPlan
from moesaic.plan.predict import shadows

Homes = dict[int, tuple[list[int], list[int]]]  # of a layer by rank: experts that have a shadow, their slots there


class ShadowDispatch:
    """An exchange, and beside it the shadows on this rank. Recomputation goes around it; it decides nothing.

    Attributes:
        stack: the shadows of this step, None without any.
    """

    overlaps = True  # takes ``beside``

    def __init__(self, inner: ExchangeDispatch) -> None:
        self.inner = inner
        self.stack: nn.Module | None = None
        self._num_shadows, self._shadow_E = 0, torch.empty(0)

    def hold(self, stack: nn.Module, experts: Sequence[int], num_experts: int) -> None:
        """Let ``stack`` compute ``experts``, in its order, of ``num_experts`` in all, special ones included."""
        device = next(stack.parameters()).device
        self.stack, self._num_shadows = stack, len(experts)
        self._shadow_E = torch.full((num_experts + 1,), len(experts), device=device)
        self._shadow_E[list(experts)] = torch.arange(len(experts), device=device)

    def __call__(
        self,
        x_TD: Tensor,
        plan: RoutingPlan | SoftPlan,
        experts: Experts,
        beside: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """(T, D) to (T, D), as ``inner`` does. Shadows are computed while the other rows travel."""
        stack = self.stack
        if stack is None or isinstance(plan, SoftPlan):  # soft plans load all experts alike
            return self.inner(x_TD, plan, experts, beside)
        here, away = self._split(plan)
        self.inner.computed += int(here.counts_E.sum())

        def both(x_TD: Tensor) -> Tensor:
            y_TD = dispatch_local(x_TD, here, stack)
            other_TD: Tensor | None = None if beside is None else beside(x_TD)
            return y_TD if other_TD is None else y_TD + other_TD

        return self.inner(x_TD, away, experts, both)

    def _split(self, plan: RoutingPlan) -> tuple[RoutingPlan, RoutingPlan]:
        """What the shadows execute, as experts 0 to Q - 1, and what the exchange does."""
        Q = self._num_shadows
        shadow_N = self._shadow_E[plan.expert_N]
        mine_N, bare = shadow_N < Q, replace(plan, gate=None, allowed_TE=None)
        here_N, away_N = torch.where(mine_N, plan.weight_N, 0.0), torch.where(mine_N, 0.0, plan.weight_N)
        here = replace(bare, expert_N=shadow_N, choice_N=shadow_N, num_experts=Q, weight_N=here_N)
        away = replace(bare, expert_N=torch.where(mine_N, plan.num_experts, plan.expert_N), weight_N=away_N)
        return here, away


class Shadows:
    """The shadows of all sparse layers of this process. All ranks of a stage call its methods together.

    Args:
        layers: the sparse layers that are here, by index; their dispatchers are ``ShadowDispatch``, wrapped or not.
        placements: of these layers; read when needed, so that experts may move between steps.

    Attributes:
        chosen: experts with shadows in the next step, by layer.
    """

    def __init__(self, layers: Mapping[int, MoE], placements: Mapping[int, Placement], world: World) -> None:
        self.layers, self.placements, self.world = layers, placements, world
        self.chosen: dict[int, tuple[int, ...]] = {}
        self._dispatch = {layer: _dispatch_of(moe) for layer, moe in layers.items()}
        self._rows_E: dict[int, Tensor] = {}
        self._fetched: list[tuple[int, Homes]] = []
        self._width = 0  # bytes of a number of a row
        for layer, moe in layers.items():
            moe.register_forward_hook(partial(self._note, layer))

    # ---- which ---------------------------------------------------------------------------------------------------

    def _note(self, layer: int, moe: nn.Module, _args: Any, output: tuple[Tensor, RoutingPlan | SoftPlan]) -> None:
        """Count the rows of a training forward, which recomputation does not repeat."""
        y, plan = output
        if not moe.training or not torch.is_grad_enabled() or isinstance(plan, SoftPlan):
            return
        own_part = getattr(moe.dispatcher, "own_part", None)  # slices may share the rows out
        mine: RoutingPlan = plan if own_part is None else own_part(plan)
        rows_E = mine.counts_E[: self.placements[layer].num_experts]
        self._width = y.element_size()
        self._rows_E[layer] = self._rows_E[layer] + rows_E if layer in self._rows_E else rows_E

    def decide(self) -> dict[int, tuple[int, ...]]:
        """Choose shadows for the next step by the rows counted since the last call, the same on all ranks with a layer."""
        counted, self._rows_E = self._rows_E, {}
        self.chosen = {}
        if not counted:
            return self.chosen
        layers = sorted(counted)
        ep, copies = self.world["ep"], self.world["edp"]
        rows = torch.cat([counted[layer] for layer in layers])
        copies.all_reduce(rows, what="rows for shadows")
        rows_RX = torch.stack(ep.all_gather(rows, what="rows for shadows")).cpu() / copies.size
        sizes = [self.placements[layer].num_experts for layer in layers]
        for layer, rows_RE in zip(layers, rows_RX.split(sizes, dim=1), strict=True):
            stack = stack_of(self.layers[layer])
            self.choose(
                layer,
                shadows(
                    rows_RE,
                    self.placements[layer],
                    dim=stack.dim,
                    element_bytes=self._width,
                    expert_bytes=expert_bytes(stack),
                ),
            )
        return self.chosen

    def choose(self, layer: int, experts: Sequence[int]) -> None:
        """Let these experts of ``layer`` have shadows in the next step. Raises ``ConfigError`` for one there is not."""
        E = self.placements[layer].num_experts
        for expert in experts:
            if not 0 <= expert < E:
                raise ConfigError(f"Layer {layer} has experts 0 to {E - 1}, so expert {expert} can have no shadow.")
        self.chosen.pop(layer, None)
        if experts:
            self.chosen[layer] = tuple(dict.fromkeys(experts))

    def load(self, chosen: Mapping[str, Any]) -> None:
        """Go on with the ``chosen`` of a checkpoint, JSON data. Raises ``CheckpointError`` for anything else."""
        for layer, experts in chosen.items():
            if not layer.isdecimal() or not isinstance(experts, list) or any(type(e) is not int for e in experts):
                raise CheckpointError(f"Shadows are lists of experts by layer, not {layer!r:.40}: {experts!r:.80}.")
            if int(layer) in self.layers:
                self.choose(int(layer), experts)

    # ---- there and back ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def fetch(self) -> None:
        """Before the first forward of a step: put the chosen experts' weights where they have no slot."""
        ep = self.world["ep"]
        self._fetched = self._homes()
        for layer, homes in self._fetched:
            stack, found = stack_of(self.layers[layer]), {}
            for name, parameter in stack.named_parameters():
                part, whole = local(parameter), []
                for home, (experts, slots) in homes.items():
                    rows = part[slots] if ep.index == home else part.new_empty(len(experts), *part.shape[1:])
                    ep.broadcast(rows, home, what="shadow weights")
                    whole.append(rows[self._absent(layer, experts)])
                rows_Q = torch.cat(whole)
                if isinstance(parameter, DTensor):
                    rows_Q = torch.cat(self.world["edp"].all_gather(rows_Q, what="shadow weights of all shards"), dim=1)
                found[name] = nn.Parameter(rows_Q, requires_grad=parameter.requires_grad)
            wanted = [e for experts, _ in homes.values() for e in experts if not self._is_here(layer, e)]
            if wanted:
                twin = _like(stack, found, self.world["etp"])
                self._dispatch[layer].hold(twin, wanted, self.layers[layer].router.num_experts)

    @torch.no_grad()
    def give_back(self) -> None:
        """After the last backward of a step, before gradients are summed: add those of all shadows at home, and drop them."""
        ep, edp = self.world["ep"], self.world["edp"]
        fetched, self._fetched = self._fetched, []
        for layer, homes in fetched:
            dispatch, stack = self._dispatch[layer], stack_of(self.layers[layer])
            for name, parameter in stack.named_parameters():
                if not parameter.requires_grad:
                    continue
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                mine = None if dispatch.stack is None else dispatch.stack.get_parameter(name)
                grad_Q = None if mine is None else mine.grad if mine.grad is not None else torch.zeros_like(mine)
                if grad_Q is not None and isinstance(parameter, DTensor):
                    edp.all_reduce(grad_Q, what="shadow gradients of all shards")
                    grad_Q = grad_Q.chunk(edp.size, dim=1)[edp.index]
                part, first = local(parameter.grad), 0
                for home, (experts, slots) in homes.items():
                    rows, here = part.new_zeros(len(experts), *part.shape[1:]), self._absent(layer, experts)
                    if here and grad_Q is not None:
                        rows[here] = grad_Q[first : first + len(here)]
                        first += len(here)
                    ep.reduce(rows, home, what="shadow gradients")
                    if ep.index == home:
                        part[slots] += rows
            dispatch.stack = None

    def _homes(self) -> list[tuple[int, Homes]]:
        """Per layer with shadows, per rank: the experts whose first slot is there, and these slots, counted within it."""
        found = []
        for layer, chosen in sorted(self.chosen.items()):
            placement, homes = self.placements[layer], Homes()
            for expert in sorted(chosen):
                slot = placement.slots_of_expert[expert][0]
                home = placement.home(slot)
                experts, slots = homes.setdefault(home, ([], []))
                experts.append(expert)
                slots.append(slot - placement.first_slots[home])
            found.append((layer, dict(sorted(homes.items()))))
        return found

    def _is_here(self, layer: int, expert: int) -> bool:
        return expert in self.placements[layer].slots[self.world["ep"].index]

    def _absent(self, layer: int, experts: Sequence[int]) -> list[int]:
        """Places in ``experts`` of those without a slot on this rank."""
        return [i for i, expert in enumerate(experts) if not self._is_here(layer, expert)]


def expert_bytes(stack: nn.Module) -> int:
    """Of one expert's weights, as this rank computes with them."""
    return sum(p.shape[1:].numel() * p.element_size() for p in stack.parameters())


def _dispatch_of(moe: MoE) -> ShadowDispatch:
    dispatcher: Any = moe.dispatcher
    while not isinstance(dispatcher, ShadowDispatch):
        dispatcher = dispatcher.inner
    return dispatcher


def _like(stack: StackedExperts | NeuronExperts, tensors: Mapping[str, nn.Parameter], etp: Group) -> nn.Module:
    """Experts that compute as ``stack`` does, with other weights."""
    count = next(iter(tensors.values())).shape[0]
    twin: StackedExperts | NeuronExperts
    with torch.device("meta"):
        if isinstance(stack, NeuronExperts):
            twin = NeuronExperts(count, stack.dim, stack.activation)
        else:
            twin = StackedExperts(
                count,
                stack.dim,
                stack.hidden,
                stack.activation,
                stack.gated,
                stack.backend,
                stack.dropout,
                stack.b_in is not None,
            )
    for name, tensor in tensors.items():
        setattr(twin, name, tensor)
    if isinstance(twin, StackedExperts) and twin.b_out is not None and etp.size > 1:  # as ``tensor.py`` does
        twin.forward = Substituted(twin, b_out=partial(once, group=etp))  # type: ignore[method-assign]
    return twin.train(stack.training)
