"""Every router with the options worth testing: one line here brings it into all the suites of the contract."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from moesaic.models.config import MoEConfig, RouterConfig
from moesaic.plan import Gate, RoutingPlan, SoftPlan
from moesaic.routing import Router, TokenContext, build_router
from moesaic.routing.memory import MemoryRouter

DIM = 16
VOCAB = 32


@dataclass(frozen=True)
class Case:
    """A router as the suites build it.

    Attributes:
        sharp: standard deviation given to every trained matrix of the router before a test, so that choices differ.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    experts: int = 8
    k: int = 2
    special: int = 0
    sharp: float = 0.7

    @property
    def id(self) -> str:
        """Shown by pytest."""
        words = [f"{key}={value}" for key, value in self.options.items()]
        return "-".join([self.name, f"k{self.k}", *words])

    def config(self, **changes: Any) -> MoEConfig:
        """Sparse layers with this router, for a model."""
        router = RouterConfig(self.name, self.options, allow_leak=True)
        moe = {"num_experts": self.experts - self.special, "k": self.k, "hidden": 8, "zero": self.special}
        return MoEConfig(**(moe | {"losses": {}, "router": router} | changes))

    def build(self, dtype: torch.dtype = torch.float64, training: bool = True) -> Router:
        """The router, in training mode, with sharp weights, random selection biases and a memory of random entries."""
        router = build_router(self.name, DIM, self.experts, self.k, self.options, self.special).to(dtype)
        with torch.no_grad():
            for tensor in router.parameters():
                if tensor.dim() > 1:
                    tensor.normal_(std=self.sharp)
        if getattr(router, "choice_bias_E", None) is not None:
            router.get_buffer("choice_bias_E").normal_(std=0.3)
        if isinstance(router, MemoryRouter):
            tenant_T = torch.arange(40) % router.tenants
            router.remember(torch.randn(40, DIM), torch.randn(40, self.experts).mul(3).softmax(dim=1), tenant_T)
        return router.train(training)


# One line per router and per option that changes what it does.
CASES = [
    Case("topk", {"normalize": "none"}),
    Case("topk", {"normalize": "none"}, k=1),
    Case("topk", {"normalize": "chosen"}),
    Case("topk", {"normalize": "softmax_chosen", "gate_bias": True}),
    Case("topk", {"score": "sigmoid", "balance_bias": True, "scale": 2.5}),
    Case("topk", {"score": "sigmoid", "balance_bias": True, "groups": 4, "groups_kept": 2, "group_score": "top2_sum"}),
    Case("topk", {"score": "sqrt_softplus"}),
    Case("topk", {"score": "sigmoid", "balance_bias": True, "bias_rule": "quantile"}),
    Case("topk", {"balance_bias": True, "bias_rule": "pid", "ffn_rows": 1.5}, special=2),
    Case("switch", {"jitter": 0.3}, k=1),
    Case("switch", {"jitter": 0.0}, k=1),
    Case("gshard", {"second": "stochastic"}),
    Case("gshard", {"second": "threshold_stochastic"}),
    Case("gshard", {"second": "gumbel"}),
    Case("gshard", {"second": "all"}),
    Case("gshard", {"second": "threshold", "threshold": 0.45}),
    Case("noisy_topk", {"variant": "shazeer"}),
    Case("noisy_topk", {"variant": "vmoe"}, k=1),
    Case("low_rank", {"rank": 4}),
    Case("low_rank", {"rank": 2, "normalize": "none"}, k=1),
    Case("cosine"),
    Case("cosine", {"projection": 6, "perturb": 0.5, "normalize": "none"}, k=1),
    Case("top_p", {"threshold": 0.6}),
    Case("top_p", {"k_max": 3}),
    Case("top_any", {"threshold": 0.2}),
    Case("top_any", {"fallback": "always", "k_max": 3}),
    Case("budget", k=3),
    Case("budget", {"k_max": 5, "target": 2.5, "sample": True}),
    Case("null_experts", k=3, special=3),
    Case("moepp", special=3),
    Case("moepp", {"normalize": "chosen", "tau": 0.4}, special=2),
    Case("random"),
    Case("random", {"seed": 1}, k=3),
    Case("round_robin"),
    Case("round_robin", k=3),
    Case("hash", {"vocab_size": 64}, k=1),
    Case("hash", {"vocab_size": 64, "kind": "balanced"}),
    Case("hash", {"vocab_size": 64, "kind": "bigram"}),
    Case("hash", {"vocab_size": 64, "kind": "previous"}, k=1),
    Case("hash", {"vocab_size": 64, "kind": "clustered", "even": True}),
    Case("hash", {"vocab_size": 64, "kind": "dispersed"}, k=1),
    Case("hash", {"vocab_size": 64, "kind": "future"}),
    Case("task"),
    Case("task", {"num_tasks": 5, "normalize": "none", "unknown": "fallback", "fallback": [6]}, k=1),
    Case("sentence", {"pool": "mean"}),
    Case("sentence", {"pool": "prefix"}),
    Case("sentence", {"pool": "prefix", "normalize": "none"}, k=1),
    Case("demix", k=1),
    Case("demix"),
    Case("constant", experts=4, k=4),
    Case("conv", {"width": 3}),
    Case("conv", {"width": 2, "normalize": "none"}, k=1),
    Case("attention", {"head_dim": 4}),
    Case("attention", {"head_dim": 4, "combine": "concat", "normalize": "none"}, k=1),
    Case("recurrent", {"hidden": 8}),
    Case("recurrent", {"hidden": 8, "normalize": "none"}, k=1),
    Case("segment", {"segment_len": 4}),
    Case("segment", {"segment_len": 3, "coupling": 0.4, "normalize": "none"}),
    Case("segment", {"segment_len": 4, "pool": "first", "coupling": 0.4}),
    Case("segment", {"segment_len": 4, "pool": "mean", "coupling": 0.4}),
    Case("straight_through"),
    Case("straight_through", k=1),
    Case("gumbel"),
    Case("gumbel", {"hard": False}, k=1),
    Case("reinforce", {"baseline": "ema"}),
    Case("reinforce", {"baseline": "learned"}, k=1),
    Case("sparsemixer", {"jitter": 0.3}, k=1),
    Case("sparsemixer_v2", {"jitter": 0.3}),
    Case("sparsemixer_v2", {"jitter": 0.3, "scale_forward": False}, k=1),
    Case("relu"),
    Case("relu", {"balance": False}),
    Case("soft_moe", {"tokens": 12}),
    Case("soft_moe", {"slots_per_expert": 2}),
    Case("dense_soft", experts=4, k=4),
    Case("prototype"),
    Case("hierarchical", {"groups": 4, "k_groups": 2}),
    Case("hierarchical", {"groups": 2, "normalize": "level"}, k=4),
    Case("hierarchical", {"groups": 4, "normalize": "none"}, k=1),
    Case("hierarchical", {"groups": 4, "joint_scores": True}),
    Case("hierarchical", {"groups": 2, "normalize": "level", "joint_scores": True}, k=4),
    Case("hierarchical", {"groups": 2, "normalize": "none", "joint_scores": True}, k=1),
    Case("tree", k=1),
    Case("tree", {"branch": 4}, k=1, experts=16),
    Case("tree", {"train": "hard"}, k=1),
    Case("tree", {"train": "hard", "branch": 4}, k=1, experts=16),
    Case("product_keys", {"key_dim": 8}, experts=16),
    Case("product_keys", {"heads": 2, "key_dim": 8, "shared_keys": False}, k=6, experts=16),
    Case("product_keys", {"heads": 2, "key_dim": 8, "query_norm": "batch"}, k=4, experts=16),
    Case("product_keys", {"key_dim": 8, "query_norm": "none"}, experts=16),
    Case("memory", {"threshold": -1.0}),
    Case("memory", {"capacity": 16, "tenants": 2, "neighbors": 3, "threshold": 0.2, "beta": 2.0}, k=1),
    Case("base", k=1),
    Case("base", {"solver": "auction"}, k=1),
    Case("sinkhorn", k=1),
    Case("sinkhorn"),
    Case("sinkhorn", {"temperature": 0.3}),
    Case("expert_choice"),
    Case("expert_choice", {"inference": "topc"}),
    Case("expert_choice", {"group": "sequence"}),
    Case("expert_choice", {"group": "sequence", "inference": "topc"}),
    Case("expert_choice", {"group": "position"}, experts=4, k=1),
    Case("expert_choice", {"group": "position", "inference": "topc"}, experts=4, k=1),
    Case("expert_choice", {"max_experts": 3}),
    Case("expert_choice", {"max_experts": 2, "group": "sequence", "inference": "topc"}, k=1),
]


@dataclass
class Input:
    """One batch for a router: (B, S) sequences, flattened, and every side input there is."""

    x_BSD: Tensor
    ids_BS: Tensor
    task_BS: Tensor
    tenant_BS: Tensor
    position_BS: Tensor
    valid_BS: Tensor | None = None
    seed: int = 0

    def context(self, **changes: Any) -> TokenContext:
        """All side inputs, and fresh equal noise."""
        B, S = self.ids_BS.shape
        ctx = TokenContext(
            ids_T=self.ids_BS.flatten(),
            position_T=self.position_BS.flatten(),
            sequence_T=torch.arange(B).repeat_interleave(S),
            num_sequences=B,
            valid_T=None if self.valid_BS is None else self.valid_BS.flatten(),
            task_T=self.task_BS.flatten(),
            tenant_T=self.tenant_BS.flatten(),
            generator=torch.Generator().manual_seed(self.seed),
        )
        return replace(ctx, **changes)

    def route(self, router: Router, **changes: Any) -> RoutingPlan | SoftPlan:
        """The router's plan for this batch, in a layer whose predecessor scored each token by its first E numbers."""
        x_TD = self.x_BSD.flatten(0, 1)
        logits_TE = 0.3 * x_TD[:, : router.num_experts].to(torch.promote_types(x_TD.dtype, torch.float32))
        previous = Gate(logits_TE, logits_TE.softmax(dim=1))
        return router(x_TD, self.context(**{"previous": previous, **changes}))

    def part(self, rows: slice, places: slice) -> Input:
        """Some rows and places of the batch, positions kept."""
        valid_BS = None if self.valid_BS is None else self.valid_BS[rows, places]
        fields = (self.x_BSD, self.ids_BS, self.task_BS, self.tenant_BS, self.position_BS)
        return Input(*(tensor[rows, places] for tensor in fields), valid_BS, self.seed)


def some_input(B: int = 2, S: int = 12, *, seed: int = 0, tasks: int = 8, dtype: torch.dtype = torch.float64) -> Input:
    """Random vectors with a common direction (so that loads are skewed), ids, tasks (some unknown) and tenants per sequence."""
    rng = torch.Generator().manual_seed(seed)
    x_BSD = torch.randn(B, S, DIM, generator=rng, dtype=dtype) + torch.randn(DIM, generator=rng, dtype=dtype)
    ids_BS = torch.randint(VOCAB, (B, S), generator=rng)
    task_BS = torch.randint(-1, tasks, (B, 1), generator=rng).expand(B, S).clone()  # -1: unknown
    tenant_BS = torch.arange(B)[:, None].expand(B, S).clone()
    return Input(x_BSD, ids_BS, task_BS, tenant_BS, torch.arange(S).expand(B, S).clone(), seed=seed)


def changed(batch: Input, row: int, place: int, seed: int) -> Input:
    """The batch with another token at one place: its vector and its id."""
    rng = torch.Generator().manual_seed(seed)
    x_BSD, ids_BS = batch.x_BSD.clone(), batch.ids_BS.clone()
    x_BSD[row, place] = 3 * torch.randn(DIM, generator=rng, dtype=x_BSD.dtype)
    ids_BS[row, place] = (ids_BS[row, place] + 1 + torch.randint(VOCAB - 1, (), generator=rng)) % VOCAB
    return replace(batch, x_BSD=x_BSD, ids_BS=ids_BS)


def decision(plan: RoutingPlan | SoftPlan) -> Tensor:
    """(T, ...) all that a plan says about each token: rows per expert and weight per expert (or its slots' weights)."""
    if isinstance(plan, SoftPlan):
        return torch.cat([plan.dispatch_GTS, plan.combine_GTS], dim=2).flatten(0, 1).detach()
    T, E = plan.num_tokens, plan.num_experts
    rows_TE, weights_TE = (torch.zeros(T, E + 1, dtype=torch.float64) for _ in range(2))
    at = (plan.token_N, plan.expert_N)
    rows_TE.index_put_(at, torch.ones(plan.num_rows, dtype=torch.float64), accumulate=True)
    weights_TE.index_put_(at, plan.weight_N.detach().double(), accumulate=True)
    return torch.cat([rows_TE[:, :E], weights_TE[:, :E]], dim=1)


def differs(a: RoutingPlan | SoftPlan, b: RoutingPlan | SoftPlan, tolerance: float = 1e-9) -> Tensor:
    """bool (T,): tokens that two plans treat differently."""
    return (decision(a) - decision(b)).abs().amax(dim=1) > tolerance


def rows_of(plan: RoutingPlan) -> Tensor:
    """int64 (T,): experts the router chose for each token."""
    chosen_N = plan.choice_N < plan.num_experts
    return torch.zeros(plan.num_tokens, dtype=torch.int64).index_add(0, plan.token_N, chosen_N.long())
