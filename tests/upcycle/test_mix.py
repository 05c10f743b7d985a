"""Several dense models made one sparse one: experts in their order, the mean of the rest by hand, routers from prompts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.models.decoder import Decoder
from moesaic.nn.mlp import MLP
from moesaic.plan.plan import RoutingPlan
from moesaic.upcycle import UpcycleConfig, assemble, difference
from tests.models.tiny import VOCAB
from tests.upcycle.dense import ORDER_A, SHAPES, dense, ids
from tests.upcycle.test_upcycle import equal, experts_of, of_mlp

DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def btx(**changes: Any) -> UpcycleConfig:
    """Two experts per token unless changed."""
    return UpcycleConfig(method="btx", **changes)


def three(shape: str = "plain", dtype: torch.dtype = torch.float32, **changes: Any) -> list[Decoder]:
    """Models of one shape, no two numbers alike."""
    return [dense(shape, dtype, seed, **changes) for seed in (1, 2, 3)]


def mlp(model: Decoder, layer: int) -> MLP:
    """A dense layer."""
    ffn = model.blocks[layer].ffn
    assert isinstance(ffn, MLP)
    return ffn


def prompts() -> list[Tensor]:
    """int64 (2, 30) each: texts of three models, of three thirds of the vocabulary."""
    generator = torch.Generator().manual_seed(4)
    third = VOCAB // 3
    return [torch.randint(e * third, (e + 1) * third, (2, 30), generator=generator) for e in range(3)]


# ---- experts and the rest ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_expert_e_is_the_layer_of_model_e_bit_for_bit(shape: str) -> None:
    models = three(shape)
    made = assemble(models, btx())
    assert made.config.moe is not None
    assert (made.config.moe.num_experts, made.config.moe.k) == (3, 2)
    assert made.moe_layers().keys() == {0, 1}
    for layer in made.moe_layers():
        for expert, model in zip(experts_of(made, layer), models, strict=True):
            assert equal(expert, of_mlp(mlp(model, layer)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_rest_is_the_mean(dtype: torch.dtype) -> None:
    """Every tensor outside of the chosen layer, the other layer's experts-to-be included, number by number."""
    models = three("biases", dtype)
    made = assemble(models, btx(layers=(1,)))
    states, state = [model.state_dict() for model in models], made.state_dict()
    rest = [name for name in states[0] if not name.startswith("blocks.1.ffn.")]
    assert {"blocks.0.ffn.w_in.weight", "blocks.0.attention.wq.weight", "embedding.weight"} <= set(rest)
    assert {name for name in state if not name.startswith("blocks.1.ffn.")} == set(rest)
    for name in rest:
        one, two, three_ = (of_model[name].flatten().tolist() for of_model in states)
        wanted = torch.tensor([(a + b + c) / 3 for a, b, c in zip(one, two, three_, strict=True)], dtype=torch.float64)
        assert state[name].dtype == dtype
        torch.testing.assert_close(
            state[name].flatten(), wanted.to(dtype), rtol=0, atol=1e-15 if dtype == torch.float64 else 0
        )


def test_a_mean_worked_by_hand() -> None:
    models = three()
    for model, value in zip(models, (1.0, 2.0, 6.0), strict=True):
        model.embedding.weight.data.fill_(value)
    made = assemble(models, btx())
    assert made.embedding.weight.unique().tolist() == [3.0]
    assert made.head.weight is made.embedding.weight


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
def test_what_was_never_trained_comes_back_bit_for_bit(dtype: torch.dtype) -> None:
    """Rows of the embedding that no fine-tune touched stand beside rows that all of them did."""
    models = [dense(dtype=dtype) for _ in range(3)]
    before = models[0].embedding.weight.detach().clone()
    for e, model in enumerate(models):
        model.embedding.weight.data[: VOCAB // 2] += e
    made = assemble(models, btx())
    assert torch.equal(made.embedding.weight[VOCAB // 2 :], before[VOCAB // 2 :])
    assert not torch.equal(made.embedding.weight[: VOCAB // 2], before[: VOCAB // 2])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("changes", [{}, {"every": 2}, {"router": ORDER_A}, {"scale_in": "router"}], ids=str)
def test_models_that_are_all_the_same_give_their_own_function_back(shape: str, changes: dict[str, Any]) -> None:
    models = [dense(shape) for _ in range(3)]
    assert difference(models[0], assemble(models, btx(**changes)), ids()).max_abs < 1e-5


def test_without_renormalised_weights_experts_make_up_for_it() -> None:
    models = three("biases")
    made = assemble(models, btx(router=ORDER_A))
    for expert, model in zip(experts_of(made, 0), models, strict=True):  # 1/3 each, two chosen: times 3/2
        torch.testing.assert_close(expert.w_out_HD, of_mlp(mlp(model, 0)).w_out_HD * 1.5, rtol=1e-5, atol=0)
        assert expert.b_out_D is not None
        torch.testing.assert_close(expert.b_out_D, mlp(model, 0).w_out.bias * 1.5, rtol=1e-5, atol=0)
        assert torch.equal(expert.w_in_PHD, of_mlp(mlp(model, 0)).w_in_PHD)


def test_noise_is_added_to_the_experts_alone() -> None:
    models = three(hidden=512, dim=64)
    quiet, noisy = assemble(models, btx()), assemble(models, btx(noise=0.2))
    for first, second in zip(experts_of(quiet, 1), experts_of(noisy, 1), strict=True):
        apart = second.w_out_HD - first.w_out_HD
        assert float(apart.std() / first.w_out_HD.std()) == pytest.approx(0.2, rel=0.05)
    others = [name for name in quiet.state_dict() if ".experts." not in name]
    assert all(torch.equal(quiet.state_dict()[name], noisy.state_dict()[name]) for name in others)


# ---- routers from prompts ----------------------------------------------------------------------------------------------


def inputs_by_hand(models: list[Decoder], texts: list[Tensor], layer: int) -> list[Tensor]:
    """fp64 (T, D) of each text: what the feed-forward layer of the mean model is given."""
    average = dense()
    states = [model.state_dict() for model in models]
    average.load_state_dict({name: torch.stack([s[name] for s in states]).double().mean(0) for name in states[0]})
    seen: list[Tensor] = []
    handle = average.blocks[layer].ffn.register_forward_pre_hook(lambda _, args: seen.append(args[0][0].double()))  # type: ignore[union-attr, operator]
    with torch.no_grad():
        for text in texts:
            for row in text:
                average(row[None])
    handle.remove()
    return [torch.cat(seen[2 * e : 2 * e + 2]) for e in range(3)]


def test_router_rows_point_along_each_text_s_mean_input() -> None:
    models, texts = three(), prompts()
    made = assemble(models, btx(router_init="prompts"), texts)
    for layer, sparse in made.moe_layers().items():
        x = inputs_by_hand(models, texts, layer)
        means = [of_text.mean(dim=0) for of_text in x]
        centre = (means[0] + means[1] + means[2]) / 3
        rows = torch.stack([(mean - centre) / (mean - centre).norm() for mean in means])
        logits = torch.cat(x) @ rows.T
        rows = rows / (logits - logits.mean(dim=1, keepdim=True)).std()
        torch.testing.assert_close(sparse.router.gate.weight.double(), rows, rtol=1e-4, atol=1e-5)  # type: ignore[union-attr, operator]


def test_each_text_goes_to_the_expert_of_its_model_and_tells_the_order() -> None:
    """Turned round, the texts go to the other experts; with a random router they do not know where to go."""
    models, texts = three(), prompts()
    for given, home in ((texts, (0, 1, 2)), (texts[::-1], (2, 1, 0))):
        made = assemble(models, btx(router_init="prompts"), given)
        for text, expert in zip(texts, home, strict=True):
            plan = made(text).plans[0]
            assert isinstance(plan, RoutingPlan)
            assert plan.gate is not None
            first_T = plan.gate.logits_TE.argmax(dim=1)
            assert float((first_T == expert).float().mean()) > 0.5
            assert int(first_T.bincount(minlength=3).argmax()) == expert


# ---- purity ------------------------------------------------------------------------------------------------------------


def test_the_models_are_left_alone_and_nothing_is_shared() -> None:
    models = [model.train() for model in three("biases")]
    models[0].tokenizer, models[0].companions = None, {"chat_template.jinja": b"x"}
    models[0].compute_dtype, models[0].source = torch.bfloat16, {"family": "llama"}
    before = [{name: tensor.clone() for name, tensor in model.state_dict().items()} for model in models]
    made = assemble(models, btx(router_init="prompts"), prompts())
    assert all(model.training for model in models)
    assert not made.training
    assert (made.companions, made.compute_dtype, made.source) == ({"chat_template.jinja": b"x"}, torch.bfloat16, None)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(1)
    for model, old in zip(models, before, strict=True):
        assert all(torch.equal(tensor, old[name]) for name, tensor in model.state_dict().items())


def test_the_same_seed_gives_the_same_model() -> None:
    states = [assemble(three(), btx(seed=seed, noise=0.1)).state_dict() for seed in (5, 5, 6)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    for part in ("router.gate.weight", "experts.w_out"):
        assert not torch.equal(states[0][f"blocks.0.ffn.{part}"], states[2][f"blocks.0.ffn.{part}"])
        assert not torch.equal(states[0][f"blocks.0.ffn.{part}"][:, :1], states[0][f"blocks.1.ffn.{part}"][:, :1])


# ---- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seeds", "changes", "words"),
    [
        ((1,), {}, "at least two models, not 1"),
        ((1, 2), {"experts": 3}, "2 models make 2 experts, not experts=3"),
        ((1, 2), {"k": 3}, "k=3 experts per token are impossible with 2 experts"),
        ((1, 2), {"k": 1}, "the router gets no gradient"),
        ((1, 2), {"router_init": "prompts"}, "2 models and 0 texts were given"),
        ((1, 2), {"method": "copy"}, 'method="copy" upcycles one model, and 2 were given'),
        ((1, 2), {"layers": (5,)}, "must list blocks 0 to 1"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(seeds: tuple[int, ...], changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        assemble([dense(seed=seed) for seed in seeds], UpcycleConfig(**({"method": "btx"} | changes)))


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"hidden": 48}, "Model 3 is of another architecture than the first: .*hidden.*48.*24 in the first"),
        ({"num_layers": 3}, "Model 3 is of another architecture than the first: .*num_layers.*3.*2 in the first"),
        ({"tie_embeddings": False}, "Model 3 is of another architecture than the first: .*tie_embeddings"),
        ({"dtype": torch.bfloat16}, "Model 3 holds torch.bfloat16 and the first torch.float32"),
    ],
    ids=str,
)
def test_models_that_do_not_match_are_refused(other: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        assemble([dense(), dense(seed=2), dense(**other)], btx())


class Words:
    """A tokenizer that says what it is."""

    def __init__(self, text: str) -> None:
        self.text = text

    def to_str(self) -> str:
        """Its file."""
        return self.text


def test_other_tokenizers_and_sparse_models_are_refused() -> None:
    first, second = dense(), dense(seed=2)
    first.tokenizer, second.tokenizer = Words("a"), Words("a")
    made = assemble([first, second], btx())
    assert made.tokenizer is first.tokenizer
    with pytest.raises(ConfigError, match=r"sparse already \(layers 0, 1\)"):
        assemble([made, made], btx())
    second.tokenizer = Words("b")
    with pytest.raises(ConfigError, match="Model 2 has another tokenizer than the first"):
        assemble([first, second], btx())
