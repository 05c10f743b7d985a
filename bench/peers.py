"""The contenders: moesaic's layer, Hugging Face's sparse block with the same weights, dense twins, on CUDA what else imports.

Before any is timed, ``agreement.py`` holds its output and gradients against one more implementation.

Every layer routes alike: softmax over all experts, top k, weights divided by their sum. In bf16 Hugging Face routes in bf16,
moesaic always in fp32. Layouts of stacked weights: moesaic ``w_in`` (E, D, 2H) with gate before up, ``w_out`` (E, H, D);
Hugging Face ``gate_up_proj`` (E, 2H, D), ``down_proj`` (E, D, H).

Legend: T tokens, D model width, H expert width, E experts, K experts per token.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from common import Contender, Shape
from loads import draw_router
from torch import Tensor, nn

from moesaic import MoE
from moesaic.nn.mlp import MLP

HF_BACKENDS = ("eager", "batched_mm", "grouped_mm")


@dataclass(frozen=True)
class Weights:
    """One sparse layer's weights in moesaic's layout; the router's are fp32."""

    router_ED: Tensor
    w_in: Tensor
    w_out: Tensor

    def rolled(self, by: int) -> Weights:
        """The same experts in another order, in memory of their own: another layer, as far as caches can tell."""
        return Weights(self.router_ED.clone(), self.w_in.roll(by, 0), self.w_out.roll(by, 0))


@dataclass(frozen=True)
class Peer:
    """A contender: a module, how to call it on (T, D), and its gradients by name in moesaic's layout (none for dense twins)."""

    module: nn.Module
    forward: Callable[[Tensor], Tensor]
    gradients: Callable[[], dict[str, Tensor | None]] = dict

    def clear(self) -> None:
        """Drop the gradients of all parameters."""
        for parameter in self.module.parameters():
            parameter.grad = None


class Turns(Contender):
    """A contender that goes through its layers and inputs, one pair per call; forward alone where ``grad_TD`` is None."""

    def __init__(self, peers: Sequence[Peer], inputs: Sequence[Tensor], grad_TD: Tensor | None) -> None:
        self.peers, self.grad_TD, self.call = peers, grad_TD, 0
        self.peer = peers[0]
        self.inputs = [x_TD.detach().requires_grad_(grad_TD is not None) for x_TD in inputs]
        self.x_TD = self.inputs[0]
        for peer in peers:
            peer.module.train(grad_TD is not None)

    def prepare(self) -> None:
        """The next layer and input, without gradients."""
        self.peer = self.peers[self.call % len(self.peers)]
        self.x_TD = self.inputs[self.call % len(self.inputs)]
        self.call += 1
        self.rest()

    def run(self) -> None:
        """Forward, and backward where there is a gradient."""
        y_TD = self.peer.forward(self.x_TD)
        if self.grad_TD is not None:
            torch.autograd.backward(y_TD, self.grad_TD)

    def rest(self) -> None:
        """Drop all gradients."""
        if self.grad_TD is not None:
            self.peer.clear()
            self.x_TD.grad = None


def draw_weights(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Weights:
    """Random weights of variance 1 / fan-in."""
    generator = torch.Generator().manual_seed(seed)
    router_ED = draw_router(shape.E, shape.D, generator).to(device)
    on_device = torch.Generator(device).manual_seed(seed)
    w_in = torch.empty(shape.E, shape.D, 2 * shape.H, dtype=dtype, device=device)
    w_out = torch.empty(shape.E, shape.H, shape.D, dtype=dtype, device=device)
    w_in.normal_(std=shape.D**-0.5, generator=on_device)
    w_out.normal_(std=shape.H**-0.5, generator=on_device)
    return Weights(router_ED, w_in, w_out)


# ---- sparse contenders ---------------------------------------------------------------------------------------------


def moesaic_peer(shape: Shape, weights: Weights, backend: str = "auto") -> Peer:
    """moesaic's layer on these very tensors, not copies."""
    with torch.device("meta"):  # initialising hundreds of millions of weights would take longer than timing them
        layer = MoE(shape.D, shape.H, shape.E, shape.k, router="topk", backend=backend)  # type: ignore[arg-type]
    names = {
        "router.gate.weight": weights.router_ED,
        "experts.w_in": weights.w_in,
        "experts.w_out": weights.w_out,
    }
    layer.load_state_dict(names, assign=True)
    parameters = dict(layer.named_parameters())

    def gradients() -> dict[str, Tensor | None]:
        keys = ("router", "w_in", "w_out")
        return {key: parameters[name].grad for key, name in zip(keys, names, strict=True)}

    return Peer(layer, lambda x_TD: layer(x_TD)[0], gradients)


def asked_hf(backends: Sequence[str]) -> list[str]:
    """The back ends asked for on the command line; none for "none", nor, with a word about it, without transformers."""
    if "none" in backends:
        return []
    if importlib.util.find_spec("transformers") is None:
        print("transformers is not installed, so Hugging Face's layers are left out (pip install -e '.[hf]').")
        return []
    return list(backends)


def hf_peers(shape: Shape, weights: Weights, backends: Sequence[str] = HF_BACKENDS) -> dict[str, Peer]:
    """Hugging Face's Qwen3-MoE block, one per back end; all share one copy of the weights in its own layout."""
    from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    dtype = weights.w_in.dtype
    router = nn.Parameter(weights.router_ED.to(dtype, copy=True))
    gate_up = nn.Parameter(weights.w_in.transpose(1, 2).contiguous())
    down = nn.Parameter(weights.w_out.transpose(1, 2).contiguous())

    def build(backend: str) -> Peer:
        config = Qwen3MoeConfig(
            hidden_size=shape.D,
            moe_intermediate_size=shape.H,
            num_experts=shape.E,
            num_experts_per_tok=shape.k,
            norm_topk_prob=True,
            hidden_act="silu",
        )
        config._experts_implementation = backend
        with torch.device("meta"):
            block = Qwen3MoeSparseMoeBlock(config)
        block.gate.weight, block.experts.gate_up_proj, block.experts.down_proj = router, gate_up, down

        def gradients() -> dict[str, Tensor | None]:
            grads = {"router": router.grad, "w_in": gate_up.grad, "w_out": down.grad}
            return {k: g if g is None or k == "router" else g.transpose(1, 2) for k, g in grads.items()}

        return Peer(block, lambda x_TD: block(x_TD[None])[0], gradients)

    return {f"hf {backend}": build(backend) for backend in backends}


def hf_batched_bytes(shape: Shape, tokens: int, dtype: torch.dtype, *, backward: bool) -> int:
    """What ``batched_mm`` allocates: it copies the weights of every row's expert, and backward their gradients."""
    return tokens * shape.active_parameters * dtype.itemsize * (2 if backward else 1)


def cuda_peers(shape: Shape, weights: Weights) -> dict[str, Peer]:
    """ScatterMoE and MegaBlocks where they import; both run on CUDA only."""
    peers = {}
    if importlib.util.find_spec("scattermoe") is not None:
        peers["scattermoe"] = _scattermoe(shape, weights)
    if importlib.util.find_spec("megablocks") is not None and weights.w_in.dtype == torch.bfloat16:
        peers["megablocks"] = _megablocks(shape, weights)
    return peers


def _scattermoe(shape: Shape, weights: Weights) -> Peer:
    from scattermoe.mlp import GLUMLP  # type: ignore[import-not-found, unused-ignore]

    H, dtype = shape.H, weights.w_in.dtype
    mlp = GLUMLP(shape.D, H, shape.E, shape.k, activation=nn.SiLU()).to(weights.w_in.device, dtype)
    mlp.router = nn.Linear(shape.D, shape.E, bias=False, dtype=dtype, device=weights.w_in.device)
    stacked = weights.w_in.transpose(1, 2)
    with torch.no_grad():  # it keeps up before gate
        mlp.experts.weight.copy_(torch.cat([stacked[:, H:], stacked[:, :H]], dim=1))
        mlp.output_experts.weight.copy_(weights.w_out.transpose(1, 2))
        mlp.router.weight.copy_(weights.router_ED)

    def forward(x_TD: Tensor) -> Tensor:
        probs_TE = mlp.router(x_TD).float().softmax(dim=-1)
        weight_TK, expert_TK = probs_TE.topk(shape.k, dim=-1)
        weight_TK = (weight_TK / weight_TK.sum(dim=-1, keepdim=True)).to(x_TD.dtype)
        y_TD: Tensor = mlp(x_TD, weight_TK, expert_TK)
        return y_TD

    def gradients() -> dict[str, Tensor | None]:
        grad = mlp.experts.weight.grad
        w_in = None if grad is None else torch.cat([grad[:, H:], grad[:, :H]], dim=1).transpose(1, 2)
        out = mlp.output_experts.weight.grad
        w_out = None if out is None else out.transpose(1, 2)
        return {"router": mlp.router.weight.grad, "w_in": w_in, "w_out": w_out}

    return Peer(mlp, forward, gradients)


def _megablocks(shape: Shape, weights: Weights) -> Peer:
    from megablocks.layers.arguments import Arguments  # type: ignore[import-not-found, unused-ignore]
    from megablocks.layers.dmoe import dMoE  # type: ignore[import-not-found, unused-ignore]

    D, H, E = shape.D, shape.H, shape.E
    args = Arguments(
        hidden_size=D,
        ffn_hidden_size=H,
        moe_num_experts=E,
        moe_top_k=shape.k,
        moe_normalize_expert_weights=1,
        moe_loss_weight=0.0,
        activation_fn=F.silu,
        mlp_type="glu",
        mlp_impl="sparse",
        bias=False,
        return_bias=False,
        fp16=False,
        bf16=True,
        device=weights.w_in.device,
    )
    layer = dMoE(args)
    mlp, router = layer.experts.mlp, layer.router.layer
    stacked = weights.w_in.transpose(1, 2)
    with torch.no_grad():
        mlp.w1.copy_(stacked[:, :H].reshape(E * H, D))
        mlp.v1.copy_(stacked[:, H:].reshape(E * H, D))
        mlp.w2.copy_(weights.w_out.reshape(E * H, D))
        router.weight.copy_(weights.router_ED)

    def forward(x_TD: Tensor) -> Tensor:
        y = layer(x_TD[:, None])
        y_T1D: Tensor = y[0] if isinstance(y, tuple) else y
        return y_T1D[:, 0]

    def gradients() -> dict[str, Tensor | None]:
        w1, v1, w2 = mlp.w1.grad, mlp.v1.grad, mlp.w2.grad
        if w1 is None or v1 is None or w2 is None:
            return {"router": router.weight.grad, "w_in": None, "w_out": None}
        w_in = torch.cat([w1.view(E, H, D), v1.view(E, H, D)], dim=1).transpose(1, 2)
        return {"router": router.weight.grad, "w_in": w_in, "w_out": w2.view(E, H, D)}

    return Peer(layer, forward, gradients)


# ---- dense twins ---------------------------------------------------------------------------------------------------


class DenseFFN(nn.Module):
    """A gated SwiGLU network as a user of plain PyTorch writes it: three linear layers. (T, D) to (T, D)."""

    def __init__(self, gate: Tensor, up: Tensor, down: Tensor) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Parameter(gate), nn.Parameter(up), nn.Parameter(down)

    def forward(self, x_TD: Tensor) -> Tensor:
        """SwiGLU."""
        return F.linear(F.silu(F.linear(x_TD, self.gate)) * F.linear(x_TD, self.up), self.down)


def dense_peers(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int = 0) -> dict[str, Peer]:
    """The twins of equal active FLOPs, width k * H: plain PyTorch, and ``nn.MLP`` (one product for gate and up)."""
    D, wide = shape.D, shape.k * shape.H
    generator = torch.Generator(device).manual_seed(seed)
    w_in = torch.empty(2 * wide, D, dtype=dtype, device=device).normal_(std=D**-0.5, generator=generator)
    w_out = torch.empty(D, wide, dtype=dtype, device=device).normal_(std=wide**-0.5, generator=generator)
    plain = DenseFFN(w_in[:wide], w_in[wide:], w_out)
    with torch.device("meta"):
        mlp = MLP(D, wide)
    mlp.load_state_dict({"w_in.weight": w_in, "w_out.weight": w_out}, assign=True)
    return {"dense": Peer(plain, plain), "dense (moesaic)": Peer(mlp, mlp)}
