"""A model of a few numbers with everything that matters to saving: stacked experts, an fp32 router, a buffer, a tie."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class TinyMoE:
    experts: int = 3
    k: int = 1


@dataclass(frozen=True)
class TinyConfig:
    dim: int = 4
    vocab_size: int = 7
    tied: bool = False
    num_layers: int = 1
    moe: TinyMoE = field(default_factory=TinyMoE)


class TinyRouter(nn.Module):
    """Stays fp32 under ``.to(dtype)``, as the toolkit's routers do."""

    def __init__(self, dim: int, experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(experts, dim))
        self.register_buffer("bias_E", torch.randn(experts))

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> TinyRouter:
        def keep(t: torch.Tensor) -> torch.Tensor:
            moved = fn(t)
            return moved if moved.dtype == t.dtype else t.to(moved.device)

        return super()._apply(keep, recurse)


class Tiny(nn.Module):
    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.router = TinyRouter(config.dim, config.moe.experts)
        self.up_EDH = nn.Parameter(torch.randn(config.moe.experts, config.dim, 2 * config.dim))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tied:
            self.head.weight = self.embed.weight

    def forward(self, ids_BS: torch.Tensor) -> torch.Tensor:
        x_BSD = self.embed(ids_BS)
        gate_BSE = (x_BSD.float() @ self.router.weight.T + self.router.bias_E).softmax(-1).to(x_BSD.dtype)
        y_BSD = torch.einsum("bse,bsd,edh->bsh", gate_BSE, x_BSD, self.up_EDH).unflatten(-1, (2, -1)).sum(-2)
        return self.head(torch.dropout(x_BSD + y_BSD, 0.1, self.training))


def build_tiny(config: TinyConfig, seed: int | None = None, device: str = "cpu") -> Tiny:
    if seed is not None:
        torch.manual_seed(seed)
    with torch.device(device):
        return Tiny(config)


def adamw(model: nn.Module) -> torch.optim.AdamW:
    """Two groups with different settings, as a real run has."""
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    groups: list[dict[str, Any]] = [{"params": decay, "weight_decay": 0.1}]
    if rest:
        groups.append({"params": rest, "weight_decay": 0.0})
    return torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))


def train_steps(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Steps whose data and dropout come from torch's global generator, so that restoring it matters."""
    model.train()
    for _ in range(steps):
        ids_BS = torch.randint(0, 7, (2, 5))
        loss = nn.functional.cross_entropy(model(ids_BS).float().flatten(0, 1), ids_BS.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def values(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Any]:
    """A deep copy of every tensor and setting, by name, to compare with ``same``."""
    found: dict[str, Any] = {name: t.detach().clone() for name, t in model.state_dict().items()}
    if optimizer is not None:
        names = {p: name for name, p in model.named_parameters()}
        for p, entry in optimizer.state.items():
            found |= {f"{names[p]}|{k}": copy.deepcopy(v) for k, v in entry.items()}
        for i, group in enumerate(optimizer.param_groups):
            found |= {f"group{i}|{k}": copy.deepcopy(v) for k, v in group.items() if k != "params"}
    return found


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Bitwise: same names, dtypes, shapes and bits (NaN equals itself)."""
    if a.keys() != b.keys():
        return False
    for key, x in a.items():
        y = b[key]
        if isinstance(x, torch.Tensor):
            if x.dtype != y.dtype or x.shape != y.shape or x.device != y.device:
                return False
            bits = (t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (x, y))
            if not torch.equal(*bits):
                return False
        elif type(x) is not type(y) or x != y:
            return False
    return True
