"""Two tiny models with the decoder's interface: one reads the whole text before it answers, one recites a script."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class FakeConfig:
    vocab_size: int = 300
    max_seq_len: int = 64


@dataclass
class FakeCache:
    max_len: int
    length: int = 0
    count_B: Tensor | None = None
    state_BD: Tensor | None = None
    fed: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # (ids_BS, valid_BS) of every call


@dataclass(frozen=True)
class FakeOutput:
    logits: Tensor
    cache: FakeCache | None


class Fake(nn.Module):
    """What both share: a config, a cache that counts, and a record of the caches handed out."""

    def __init__(self, config: FakeConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.zeros(1))
        self.caches: list[FakeCache] = []

    def new_cache(self, batch: int, max_len: int) -> FakeCache:
        self.caches.append(FakeCache(max_len))
        return self.caches[-1]

    def forward(
        self,
        ids_BS: Tensor,
        *,
        valid_BS: Tensor | None = None,
        cache: FakeCache | None = None,
        last_only: bool = False,
    ) -> FakeOutput:
        assert not self.training
        valid_BS = torch.ones_like(ids_BS, dtype=torch.bool) if valid_BS is None else valid_BS
        held = cache if cache is not None else FakeCache(ids_BS.shape[1])
        held.length += ids_BS.shape[1]
        assert held.length <= min(held.max_len, self.config.max_seq_len)  # columns, padding included
        held.fed.append((ids_BS.clone(), valid_BS.clone()))
        if held.count_B is None:
            held.count_B = torch.zeros(len(ids_BS), dtype=torch.int64)
        logits_BSV = self.read(ids_BS, valid_BS, held)
        return FakeOutput(logits_BSV[:, -1:] if last_only else logits_BSV, cache)

    def read(self, ids_BS: Tensor, valid_BS: Tensor, held: FakeCache) -> Tensor:
        raise NotImplementedError


class Rolling(Fake):
    """logits = head(state), state = tanh(0.9 state + embedding): every earlier valid token matters, in order."""

    def __init__(self, config: FakeConfig | None = None, sharpness: float = 3.0) -> None:
        super().__init__(config or FakeConfig())
        generator = torch.Generator().manual_seed(3)
        self.embed = nn.Parameter(torch.randn(self.config.vocab_size, 8, generator=generator))
        self.head = nn.Parameter(torch.randn(8, self.config.vocab_size, generator=generator) * sharpness)

    def read(self, ids_BS: Tensor, valid_BS: Tensor, held: FakeCache) -> Tensor:
        if held.state_BD is None:
            held.state_BD = torch.zeros(len(ids_BS), 8)
        logits = []
        for ids_B, valid_B in zip(ids_BS.T, valid_BS.T, strict=True):
            stepped_BD = torch.tanh(0.9 * held.state_BD + self.embed[ids_B])
            held.state_BD = torch.where(valid_B[:, None], stepped_BD, held.state_BD)
            logits.append(held.state_BD @ self.head)
        return torch.stack(logits, 1)


class Script(Fake):
    """Row b says ``scripts[b]``, whatever was asked and chosen; past its end it repeats the last token."""

    def __init__(self, scripts: list[list[int]], config: FakeConfig | None = None) -> None:
        super().__init__(config or FakeConfig())
        self.scripts = scripts

    def read(self, ids_BS: Tensor, valid_BS: Tensor, held: FakeCache) -> Tensor:
        logits_BSV = torch.zeros(*ids_BS.shape, self.config.vocab_size)
        step = len(held.fed) - 1
        for row, script in enumerate(self.scripts):
            logits_BSV[row, -1, script[min(step, len(script) - 1)]] = 1e4
        return logits_BSV
