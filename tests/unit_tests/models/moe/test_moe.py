"""The MoE layer computes what its slow twin computes, with all gradients."""

import pytest
import torch

from tests.reference import moe as twin
from torchtitan.models.moe import FeedForward, MoE, MoEArgs

DIM, HIDDEN, BATCH, SEQ = 8, 12, 2, 5

LAYERS = {
    "v3": MoEArgs(
        num_experts=8,
        num_shared_experts=1,
        top_k=3,
        num_expert_groups=4,
        num_limited_groups=2,
        route_norm=True,
        route_scale=2.5,
        score_before_experts=False,
    ),
    "v2": MoEArgs(
        num_experts=6,
        num_shared_experts=2,
        top_k=2,
        num_expert_groups=3,
        num_limited_groups=2,
        group_score_func="max",
        score_func="softmax",
        route_scale=16.0,
        score_before_experts=False,
        load_balance_coeff=None,
    ),
    "score before experts": MoEArgs(num_experts=5, top_k=2, score_before_experts=True),
    "no shared experts": MoEArgs(num_experts=4, num_shared_experts=0, top_k=2),
    "top 1": MoEArgs(num_experts=4, top_k=1, score_before_experts=False),
    "all experts": MoEArgs(num_experts=4, top_k=4, route_norm=True, score_before_experts=False),
    "more experts than copies": MoEArgs(num_experts=32, top_k=1),
}


def make_layer(args: MoEArgs, *, dtype: torch.dtype, grouped: bool = False) -> MoE:
    layer = MoE(args, dim=DIM, hidden_dim=HIDDEN)
    layer.init_weights(0.5)
    layer.experts.use_grouped_mm = grouped
    if layer.expert_bias is not None:
        layer.expert_bias.normal_(std=0.3)
    return layer.to(dtype)


def outputs_and_gradients(function, x: torch.Tensor, weights: dict) -> dict[str, torch.Tensor]:
    """Output, and gradients of a random projection of it, by name."""
    torch.manual_seed(7)
    x = x.clone().requires_grad_()
    out = function(x)
    (out * torch.randn(out.shape, dtype=torch.float64)).sum().backward()
    return {"out": out.detach(), "x": x.grad} | {n: w.grad for n, w in weights.items()}


def assert_equals_twin(layer: MoE, args: MoEArgs, x: torch.Tensor, **tolerance) -> None:
    params = dict(layer.named_parameters())
    ours = outputs_and_gradients(layer, x, params)
    state = {n: t.detach().double() for n, t in layer.state_dict().items()}
    weights = {n: state[n].requires_grad_() for n in params}

    def slow(x_BSD):
        return twin.moe(x_BSD.flatten(0, 1), state, args).view_as(x_BSD)

    for name, expected in outputs_and_gradients(slow, x.double(), weights).items():
        if expected is None:  # the twin never touches an expert without tokens
            expected = torch.zeros_like(ours[name], dtype=torch.float64)
        torch.testing.assert_close(
            ours[name].double(), expected, msg=lambda text, n=name: f"{n}: {text}", **tolerance
        )


@pytest.mark.parametrize("args", LAYERS.values(), ids=LAYERS.keys())
def test_layer_equals_the_twin_in_fp64(args):
    torch.manual_seed(1)
    x = torch.randn(BATCH, SEQ, DIM, dtype=torch.float64)
    layer = make_layer(args, dtype=torch.float64)
    assert_equals_twin(layer, args, x, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("args", LAYERS.values(), ids=LAYERS.keys())
def test_grouped_gemm_layer_equals_the_twin_in_fp32(args):
    torch.manual_seed(1)
    x = torch.randn(BATCH, SEQ, DIM)
    layer = make_layer(args, dtype=torch.float32, grouped=True)
    assert_equals_twin(layer, args, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("grouped", [False, True], ids=["loop", "grouped"])
@pytest.mark.parametrize("args", [LAYERS["top 1"], LAYERS["no shared experts"]])
def test_experts_without_tokens_get_zero_gradients(args, grouped):
    torch.manual_seed(1)
    layer = make_layer(args, dtype=torch.float32, grouped=grouped)
    layer.expert_bias.zero_()
    layer.expert_bias[: args.top_k] = 100.0  # all tokens on the first expert (or two)
    x = torch.randn(BATCH, SEQ, DIM)
    assert_equals_twin(layer, args, x, rtol=1e-4, atol=1e-4)
    for weight in (layer.experts.w1, layer.experts.w2, layer.experts.w3):
        busy = weight.grad.flatten(1).any(dim=1).tolist()
        assert busy == [e < args.top_k for e in range(args.num_experts)]


@pytest.mark.parametrize("before", [True, False], ids=["score before", "score after"])
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)], ids=["fp32", "bf16"]
)
def test_grouped_gemm_and_loop_agree(dtype, tolerance, before):
    torch.manual_seed(1)
    args = MoEArgs(num_experts=8, top_k=3, score_before_experts=before)
    results = []
    layer = MoE(args, dim=32, hidden_dim=16)
    layer.init_weights(0.2)
    layer.to(dtype)
    x = torch.randn(BATCH, 20, 32, dtype=dtype)
    for grouped in (True, False):
        layer.experts.use_grouped_mm = grouped
        layer.zero_grad()
        results.append(outputs_and_gradients(layer, x, dict(layer.named_parameters())))
    for name, tensor in results[0].items():
        scale = results[1][name].abs().max().item()
        torch.testing.assert_close(tensor, results[1][name], rtol=0, atol=tolerance * scale)


def test_call_returns_a_tensor_and_the_load_on_request():
    torch.manual_seed(1)
    layer = make_layer(MoEArgs(num_experts=4, top_k=2), dtype=torch.float32)
    x = torch.randn(BATCH, SEQ, DIM)
    out = layer(x)
    assert isinstance(out, torch.Tensor) and out.shape == x.shape and out.dtype == x.dtype
    same, load = layer(x, return_load=True)
    assert torch.equal(out, same)
    assert load.tokens_E.dtype == torch.int64 and load.tokens_E.sum() == BATCH * SEQ * 2
    assert load.traffic is None
    assert layer.tokens_per_expert.sum() == 0  # calling keeps nothing


def test_padding_is_computed_but_not_counted():
    torch.manual_seed(1)
    layer = make_layer(MoEArgs(num_experts=4, top_k=2), dtype=torch.float32)
    x = torch.randn(BATCH, SEQ, DIM)
    real = torch.ones(BATCH, SEQ, dtype=torch.bool)
    real[0, 3:] = False
    out, load = layer(x, real, return_load=True)
    _, ids, _ = layer.router(x.flatten(0, 1), layer.expert_bias)
    expected = torch.bincount(ids[real.flatten()].flatten(), minlength=4)
    assert torch.equal(load.tokens_E, expected)
    assert torch.equal(out, layer(x))


CASTS = {
    ".bfloat16()": lambda model: model.bfloat16(),
    ".half()": lambda model: model.half(),
    ".to(dtype)": lambda model: model.to(torch.bfloat16),
    ".to(device, dtype)": lambda model: model.to("cpu", torch.bfloat16),
    ".double()": lambda model: model.double(),
}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS.keys())
def test_expert_bias_stays_fp32_bit_for_bit_when_the_model_is_cast(cast):
    layer = MoE(MoEArgs(num_experts=4), dim=DIM, hidden_dim=HIDDEN)
    layer.expert_bias.copy_(torch.tensor([7.001, -0.0003, 1 / 3, 0.0]))
    before = layer.expert_bias.clone()
    model = cast(torch.nn.Sequential(layer))
    assert model[0].experts.w1.dtype != torch.float32
    assert model[0].expert_bias.dtype == torch.float32
    assert torch.equal(model[0].expert_bias, before)
    assert model.state_dict()["0.expert_bias"].dtype == torch.float32
    assert model[0].tokens_per_expert.dtype == torch.int64


def test_expert_bias_is_fp32_under_a_bf16_default_dtype():
    torch.set_default_dtype(torch.bfloat16)
    try:
        layer = MoE(MoEArgs(num_experts=4), dim=DIM, hidden_dim=HIDDEN)
    finally:
        torch.set_default_dtype(torch.float32)
    assert layer.experts.w1.dtype == torch.bfloat16 and layer.expert_bias.dtype == torch.float32


def test_a_cast_to_another_device_takes_the_bias_along():
    layer = MoE(MoEArgs(num_experts=4), dim=DIM, hidden_dim=HIDDEN).to("meta", torch.bfloat16)
    assert layer.expert_bias.is_meta and layer.expert_bias.dtype == torch.float32
    layer.to_empty(device="cpu").init_weights(0.02)
    assert torch.equal(layer.expert_bias, torch.zeros(4))
    assert torch.equal(layer.tokens_per_expert, torch.zeros(4, dtype=torch.int64))


def test_state_dict_names_and_shapes():
    def shapes(args: MoEArgs) -> dict[str, tuple[int, ...]]:
        state = MoE(args, dim=DIM, hidden_dim=HIDDEN).state_dict()
        return {name: tuple(tensor.shape) for name, tensor in state.items()}

    experts = {
        "router.gate.weight": (4, DIM),
        "experts.w1": (4, HIDDEN, DIM),
        "experts.w2": (4, DIM, HIDDEN),
        "experts.w3": (4, HIDDEN, DIM),
    }
    shared = {
        "shared_experts.w1.weight": (2 * HIDDEN, DIM),
        "shared_experts.w2.weight": (DIM, 2 * HIDDEN),
        "shared_experts.w3.weight": (2 * HIDDEN, DIM),
    }
    bias = {"expert_bias": (4,)}
    assert shapes(MoEArgs(num_experts=4, num_shared_experts=2)) == experts | shared | bias
    assert shapes(MoEArgs(num_experts=4, num_shared_experts=0)) == experts | bias
    no_bias = MoEArgs(num_experts=4, num_shared_experts=0, load_balance_coeff=None)
    assert shapes(no_bias) == experts


def test_feed_forward_is_swiglu():
    torch.manual_seed(0)
    layer, x = FeedForward(DIM, HIDDEN).double(), torch.randn(3, DIM, dtype=torch.float64)
    weights = (layer.w1.weight, layer.w2.weight, layer.w3.weight)
    expected = torch.stack([twin.feed_forward(x_D, *weights) for x_D in x])
    torch.testing.assert_close(layer(x), expected)
