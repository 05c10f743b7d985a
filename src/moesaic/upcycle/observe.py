"""What feed-forward layers see and do on some text. Legend: T tokens, D model width, H hidden units, P input matrices."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from moesaic.models.decoder import Decoder
from moesaic.nn.mlp import Activation, apply_activation
from moesaic.upcycle.neurons import Neurons

MOST_TOKENS = 8192  # kept per layer: more would hardly move a cluster or a mean


@torch.no_grad()
def ffn_inputs(model: Decoder, ids_BS: Tensor, layers: Collection[int], most: int = MOST_TOKENS) -> dict[int, Tensor]:
    """Layer -> fp32 (T, D): what its feed-forward layer is given, of at most ``most`` tokens spread over the text.

    Row by row of ``ids_BS`` (int64), so that memory does not grow with the text. The model's mode is restored.
    """
    seen: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    keep_S = _spread(ids_BS.shape[1], max(1, -(-most // ids_BS.shape[0]))).to(ids_BS.device)

    def watch(layer: int) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
            rows_TD = args[0].detach().reshape(-1, args[0].shape[-1])
            seen[layer].append(rows_TD[keep_S[keep_S < len(rows_TD)]].float())

        return hook

    was_training = model.training
    handles = [model.blocks[layer].ffn.register_forward_pre_hook(watch(layer)) for layer in layers]  # type: ignore[union-attr, operator]
    try:
        model.eval()
        for row in range(ids_BS.shape[0]):
            model(ids_BS[row : row + 1], last_only=True)
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    return {layer: torch.cat(rows)[:most] for layer, rows in seen.items()}


def activations(ffn: Neurons, x_TD: Tensor, activation: Activation) -> Tensor:
    """fp32 (T, H): the hidden units' outputs on these inputs."""
    P, H, _ = ffn.w_in_PHD.shape
    z_TPH = torch.einsum("td,phd->tph", x_TD.float(), ffn.w_in_PHD.float())
    if ffn.b_in_PH is not None:
        z_TPH = z_TPH + ffn.b_in_PH.float()
    return apply_activation(z_TPH.reshape(len(x_TD), P * H), activation, P == 2)


def _spread(length: int, count: int) -> Tensor:
    """``count`` positions spread evenly over ``length`` (all of them if there are no more)."""
    if count >= length:
        return torch.arange(length)
    return torch.linspace(0, length - 1, count, dtype=torch.float64).round().long().unique()
