"""What some routers need to know about the tokens besides their vectors. All optional; a router says what it lacks.

Legend: T tokens (B sequences of S), E experts.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.plan.lift import Part, lower_gate
from moesaic.plan.plan import Gate


@dataclass(frozen=True, eq=False)
class TokenContext:
    """Side inputs of a router, one entry per flattened token (T = B * S, sequence by sequence).

    Attributes:
        ids_T: int64 vocabulary ids.
        position_T: int64 position within the document (padding excluded); restarts where a new document begins.
        own_position_T: the same, where a layer has renumbered ``position_T`` for its router (``renumbered``): what rules read.
        sequence_T: int64 row of the batch each token belongs to.
        num_sequences: B; None where the caller did not say (then all tokens are one sequence).
        valid_T: bool, False on padding; None when every token is real.
        task_T: int64 task or domain ids; negative means unknown.
        mixture_TE: fp32 weights over tasks or domains (each row sums to 1), where one id is not known for sure.
        tenant_T: int64 tenant ids, for rules and for memories that must not be shared.
        metadata: further int64 (T,) facts by name, for rules.
        allowed_TE: bool, experts that rules permit; None permits all. ``choose`` applies it last.
        rule_bias_TE: fp32 added to logits by soft rules; None adds nothing.
        previous: the gate of the previous sparse layer in the same forward, for routers that read it; None in the first.
        state: what this layer's router remembers between the forwards of one generation (kept with the key/value cache, one
            dict per layer; routers that look back read and update it in place); None outside generation.
        generator: random numbers for noisy routers; None uses torch's global generator.
        stay_local: whether this batch's tokens keep to the experts of their own group (gating dropout); None lets each sparse
            layer draw for itself.
        part: which tokens of the batch these are, where only some of them reach the layer (Mixture-of-Depths); None is all.
            Plans leave the sparse layer in the batch's numbering.
        evidence: collects, during one call of a router, what losses want to know beyond scores (the sparse layer moves it to
            ``Gate.extra``): ``ruled`` puts the logits before rules there. None where nobody asked.
    """

    ids_T: Tensor | None = None
    position_T: Tensor | None = None
    own_position_T: Tensor | None = None
    sequence_T: Tensor | None = None
    num_sequences: int | None = None
    valid_T: Tensor | None = None
    task_T: Tensor | None = None
    mixture_TE: Tensor | None = None
    tenant_T: Tensor | None = None
    metadata: dict[str, Tensor] = field(default_factory=dict)
    allowed_TE: Tensor | None = None
    rule_bias_TE: Tensor | None = None
    previous: Gate | None = None
    state: dict[str, Tensor] | None = None
    generator: torch.Generator | None = None
    stay_local: bool | None = None
    part: Part | None = None
    evidence: dict[str, Tensor] | None = None

    def in_layer(self, previous: Gate | None, state: dict[str, Tensor] | None) -> TokenContext:
        """The same tokens on their way into one layer.

        ``dataclasses.replace`` would hand all the fields through the constructor again, for every layer of every token.
        """
        if torch.compiler.is_compiling():
            return replace(self, previous=previous, state=state)
        inside = object.__new__(TokenContext)
        inside.__dict__.update(self.__dict__, previous=previous, state=state)
        return inside

    def need(self, field: str, router: str) -> Tensor:
        """The named field, or ``ConfigError`` naming the router that misses it."""
        value = getattr(self, field)
        if value is None:
            raise ConfigError(f'Router "{router}" needs {field} of TokenContext, and the caller gave none.')
        tensor: Tensor = value
        return tensor

    def shape(self, num_tokens: int) -> tuple[int, int]:
        """(B, S) of ``num_tokens`` flattened tokens; (1, T) where the number of sequences is not known."""
        B = self.num_sequences or 1
        return B, num_tokens // B

    def positions(self, num_tokens: int, device: torch.device) -> Tensor:
        """int64 (B, S): ``position_T``, or 0, 1, ... in every sequence where the caller gave none."""
        B, S = self.shape(num_tokens)
        if self.position_T is None:
            return torch.arange(S, device=device).expand(B, S)
        return self.position_T.view(B, S)

    def renumbered(self, position_T: Tensor) -> TokenContext:
        """Other positions for the router (sub-tokens, a part of the tokens), while rules keep to those of the text."""
        own_T = self.position_T if self.own_position_T is None else self.own_position_T
        return replace(self, position_T=position_T, own_position_T=own_T)

    def documents(self, num_tokens: int, device: torch.device) -> Tensor:
        """int64 (B, S): how many documents have begun in the row, this token's included; 0 continues what an earlier forward
        of the same generation read.
        """
        begins_BS = self.positions(num_tokens, device) == 0
        if self.valid_T is not None:
            begins_BS = begins_BS & self.valid_T.view(
                begins_BS.shape
            )  # padding before the first token has position 0 too
        return begins_BS.long().cumsum(dim=1)

    def of(self, part: Part) -> TokenContext:
        """What is known of some of the tokens; fields of one entry per token are told by their names (``_T``, ``_TE``)."""
        picked: dict[str, Any] = {
            f.name: getattr(self, f.name)[part.place_T]
            for f in fields(self)
            if f.name.endswith(("_T", "_TE")) and getattr(self, f.name) is not None
        }
        picked["metadata"] = {name: fact_T[part.place_T] for name, fact_T in self.metadata.items()}
        picked["previous"] = None if self.previous is None else lower_gate(self.previous, part)
        return replace(self, **picked, part=part)


NO_CONTEXT = TokenContext()
