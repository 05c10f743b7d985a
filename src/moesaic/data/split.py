"""A view of some documents of a token store, and the seeded split of one view into training and validation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from moesaic.errors import ConfigError, DataError

Ints = npt.NDArray[np.int64]

_CUT_MIN = 32  # a document with fewer tokens is not worth cutting in two


@dataclass(frozen=True)
class TokenView:
    """Some documents of a store: document d is ``tokens[start_D[d]:end_D[d]]``, of domain ``labels[label_D[d]]``."""

    tokens: npt.NDArray[Any]
    start_D: Ints
    end_D: Ints
    label_D: Ints
    labels: tuple[str, ...]

    @property
    def num_documents(self) -> int:
        """D."""
        return len(self.start_D)

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents together, end-of-text tokens included."""
        return int((self.end_D - self.start_D).sum())

    def sample(self) -> TokenView:
        """Text to make tables from: all of it (a ``TokenStream`` gives its beginning)."""
        return self

    def document(self, index: int) -> npt.NDArray[Any]:
        """The ids of one document, the end-of-text token last."""
        return self.tokens[self.start_D[index] : self.end_D[index]]


class HasView(Protocol):
    """A ``TokenCache``, or anything else with a view."""

    @property
    def view(self) -> TokenView:
        """All documents."""


def split(store: TokenView | HasView, val_fraction: float, seed: int) -> tuple[TokenView, TokenView]:
    """Training and validation documents: about ``val_fraction`` of each domain's tokens, chosen by ``seed`` alone.

    A domain with two documents or more has at least one in each part. A domain that is one long document is cut, and
    its end is for validation; one short document is for training. Raises DataError if nothing is left to validate on.
    """
    if not 0 < val_fraction < 1:
        raise ConfigError(f"val_fraction is {val_fraction}, but it must lie between 0 and 1, such as 0.05.")
    view = store if isinstance(store, TokenView) else store.view
    size_D = view.end_D - view.start_D
    held_D = np.zeros(view.num_documents, dtype=bool)
    cut_D = view.end_D.copy()  # where a document's validation part begins
    for label in range(len(view.labels)):
        members = np.flatnonzero(view.label_D == label)
        target = float(size_D[members].sum()) * val_fraction
        if len(members) == 1 and size_D[members[0]] >= _CUT_MIN:
            cut_D[members[0]] -= min(max(2, round(target)), int(size_D[members[0]]) - 2)
        if len(members) < 2:
            continue
        taken = 0
        for member in np.random.default_rng([seed, label]).permutation(members):
            size = int(size_D[member])
            if taken + size / 2 <= target:
                held_D[member] = True
                taken += size
        if not held_D[members].any():  # every document is larger than the share: the smallest is nearest to it
            held_D[members[np.argmin(size_D[members])]] = True
        if held_D[members].all():
            held_D[members[np.argmax(size_D[members])]] = False
    parts = []
    for start_D, end_D in (
        (view.start_D, np.where(held_D, view.start_D, cut_D)),
        (np.where(held_D, view.start_D, cut_D), view.end_D),
    ):
        keep = end_D > start_D
        parts.append(TokenView(view.tokens, start_D[keep], end_D[keep], view.label_D[keep], view.labels))
    if not parts[1].num_documents:
        raise DataError(
            f"The corpus is too small to hold back validation text: {view.num_tokens} tokens, {view.num_documents} documents "
            "and not two in any domain; add text, or cut long files with document=paragraphs."
        )
    return parts[0], parts[1]
