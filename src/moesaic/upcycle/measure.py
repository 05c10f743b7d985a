"""How far two models are apart on the same tokens: what upcycling did to the function, measured.

Legend: B rows, S positions, V vocabulary.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moesaic.errors import CheckpointError, ConfigError
from moesaic.models.decoder import Decoder

SAME = 1e-5
"""Largest difference of logits up to which two models count as the same function, in units of the largest logit if that is
above 1: fp32 sums of other orders differ by a few roundings of the numbers they add up."""


@dataclass(frozen=True)
class Difference:
    """Two models on the same tokens.

    Attributes:
        max_abs: largest difference of two logits. largest: the first's largest logit by magnitude.
        kl: mean over positions of KL(first || second), nats.
        first_loss, second_loss: mean loss of the next token, nats. tokens: positions compared.
    """

    max_abs: float
    largest: float
    kl: float
    first_loss: float
    second_loss: float
    tokens: int

    @property
    def loss(self) -> float:
        """Loss of the second minus loss of the first."""
        return self.second_loss - self.first_loss

    @property
    def same(self) -> bool:
        """Whether no logit differs by more than ``SAME``, see there."""
        return self.max_abs <= SAME * max(1.0, self.largest)

    def record(self) -> dict[str, float | int | bool]:
        """Plain JSON data."""
        return {**asdict(self), "loss_difference": self.loss, "same": self.same}

    def __str__(self) -> str:
        verdict = "the same function" if self.same else "another function"
        return (
            f"{verdict}: over {self.tokens:,} tokens logits differ by at most {self.max_abs:.1e} (the largest is "
            f"{self.largest:.1f}), KL {self.kl:.1e} nats, loss {self.first_loss:.4f} -> {self.second_loss:.4f}"
        )


@torch.no_grad()
def difference(
    first: Decoder, second: Decoder, ids_BS: Tensor, names: tuple[str, str] = ("The first model", "The second model")
) -> Difference:
    """Compare two models of one vocabulary, row by row, in evaluation mode and with activations of at least fp32; both are left
    as they were. Models routed by task get task 0.

    Args:
        names: what errors call the models.

    Raises ``ConfigError`` for models of different vocabularies or rows of less than two tokens, ``CheckpointError`` for a model
    whose logits are not finite numbers: no distance can be told.
    """
    if first.config.vocab_size != second.config.vocab_size:
        raise ConfigError(
            f"The models have vocabularies of {first.config.vocab_size} and {second.config.vocab_size} tokens, so their logits "
            "cannot be compared."
        )
    if ids_BS.numel() == 0 or ids_BS.shape[1] < 2:
        raise ConfigError("Comparing models needs rows of at least two tokens; give more text.")
    modes, kinds = (first.training, second.training), (first.compute_dtype, second.compute_dtype)
    most, largest, kl, losses = 0.0, 0.0, 0.0, [0.0, 0.0]
    try:
        for model in (first, second):
            model.eval()
            if (
                model.embedding.weight.dtype.itemsize < 4
            ):  # weights as they are, activations in fp32: rounding says nothing
                model.compute_dtype = torch.float32
        for row in range(ids_BS.shape[0]):
            ids_1S = ids_BS[row : row + 1].to(first.embedding.weight.device)
            task_1S = torch.zeros_like(ids_1S)
            logits = []
            for model, name in zip((first, second), names, strict=True):
                z_SV = _wide(model(ids_1S, task_BS=task_1S).logits[0])
                if not z_SV.isfinite().all():
                    raise CheckpointError(_not_numbers(model, name))
                logits.append(z_SV)
            most = max(most, float((logits[0] - logits[1]).abs().max()))
            largest = max(largest, float(logits[0].abs().max()))
            log_p, log_q = (z_SV.log_softmax(dim=-1) for z_SV in logits)
            kl += float(F.kl_div(log_q, log_p, reduction="sum", log_target=True))
            for i, log_SV in enumerate((log_p, log_q)):
                losses[i] += float(F.nll_loss(log_SV[:-1], ids_1S[0, 1:], reduction="sum"))
    finally:
        for model, mode, kind in zip((first, second), modes, kinds, strict=True):
            model.train(mode)
            model.compute_dtype = kind
    targets = ids_BS.shape[0] * (ids_BS.shape[1] - 1)
    return Difference(
        most, largest, max(kl, 0.0) / ids_BS.numel(), losses[0] / targets, losses[1] / targets, ids_BS.numel()
    )


def random_ids(model: Decoder, rows: int = 2, length: int = 128, seed: int = 0) -> Tensor:
    """int64 (rows, length) random tokens of its vocabulary, for where there is no text; cut to its context."""
    length = min(length, model.config.max_seq_len)
    return torch.randint(model.config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))


def _not_numbers(model: Decoder, name: str) -> str:
    held = next((key for key, tensor in model.state_dict().items() if not tensor.isfinite().all()), None)
    if held is None:
        return f"{name} gives logits that are not finite numbers although its weights are; they have grown too large."
    return (
        f"{name} gives logits that are not finite numbers: {held} holds NaN or infinity; take an undamaged checkpoint."
    )


def _wide(logits_SV: Tensor) -> Tensor:
    return logits_SV.to(torch.promote_types(logits_SV.dtype, torch.float32))
