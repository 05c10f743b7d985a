"""What a decoder is told of a packed batch besides its ids."""

from __future__ import annotations

from torch import Tensor

from moesaic.data.packing import Batch


def side_inputs(batch: Batch) -> dict[str, Tensor | None]:
    """By the names of ``Decoder.forward``; masks that would say nothing are None, which keeps attention on its fast path."""
    return {
        "valid_BS": None if bool(batch.valid_BS.all()) else batch.valid_BS,
        "document_BS": batch.document_BS if bool((batch.document_BS[:, :1] != batch.document_BS).any()) else None,
        "task_BS": batch.label_BS,
    }
