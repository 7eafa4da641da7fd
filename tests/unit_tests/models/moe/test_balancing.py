"""Counts of real training tokens, each once, and the bias that they move."""

import copy
import dataclasses
from collections import Counter

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from torchtitan.config import ActivationCheckpoint
from torchtitan.distributed.activation_checkpoint import apply_activation_checkpoint
from torchtitan.models.deepseek_v3 import DeepSeekV3Model, DeepSeekV3ModelArgs
from torchtitan.models.moe import MoE, MoEArgs
from torchtitan.models.moe.balancing import record_load, step_loads, update_expert_bias
from torchtitan.models.moe.load import count_tokens

ARGS = DeepSeekV3ModelArgs(
    vocab_size=32,
    max_seq_len=16,
    dim=16,
    inter_dim=32,
    moe_inter_dim=16,
    n_layers=4,
    n_dense_layers=1,
    n_heads=2,
    q_lora_rank=12,  # so that no linear layer has the router gate's shape
    kv_lora_rank=8,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=8,
    init_std=0.3,
    moe_args=MoEArgs(
        num_experts=8,
        top_k=2,
        num_expert_groups=4,
        num_limited_groups=2,
        score_before_experts=False,
        load_balance_coeff=0.05,
    ),
)
RECOMPUTE = {
    "none": ActivationCheckpoint(mode="none"),
    "full": ActivationCheckpoint(mode="full"),
    "every 2nd layer": ActivationCheckpoint(mode="selective", selective_ac_option="2"),
    "op": ActivationCheckpoint(mode="selective", selective_ac_option="op"),
    "elementwise": ActivationCheckpoint(mode="selective", selective_ac_option="elementwise"),
}


def make_model(args: DeepSeekV3ModelArgs = ARGS) -> DeepSeekV3Model:
    torch.manual_seed(0)
    model = DeepSeekV3Model(args)
    model.init_weights()
    return model.train()


def batch(step: int, rows: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randint(0, ARGS.vocab_size, (rows, 12), generator=generator)


def mean_square(logits: Tensor, rows: int = 4) -> Tensor:
    """A loss whose gradients of parts of the batch add up to those of the whole."""
    return logits.pow(2).sum() / rows


# ---------------------------------------------------------------------------------------------
# Counting
# ---------------------------------------------------------------------------------------------


def test_count_tokens_is_bincount():
    torch.manual_seed(0)
    ids = torch.stack([torch.randperm(9)[:3] for _ in range(50)])
    ids[ids == 4] = 8  # an expert without tokens
    mask = torch.rand(50) < 0.6
    counts = count_tokens(ids, 9)
    assert counts.dtype == torch.int64
    assert torch.equal(counts, torch.bincount(ids.flatten(), minlength=9))
    assert torch.equal(count_tokens(ids, 9, mask), torch.bincount(ids[mask].flatten(), minlength=9))
    assert torch.equal(
        count_tokens(ids, 9, torch.zeros(50, dtype=torch.bool)), torch.zeros(9).long()
    )


def test_training_counts_every_routed_copy_once_a_layer():
    model = make_model()
    model(batch(0)).sum().backward()
    loads = step_loads(list(model.moe_layers().values())).tokens_E
    assert loads.shape == (3, 8) and loads.dtype == torch.int64
    assert loads.sum(dim=1).tolist() == [4 * 12 * 2] * 3


def test_counts_are_those_of_the_router():
    model, seen = make_model(), {}
    for i, moe in model.moe_layers().items():
        moe.router.register_forward_hook(lambda m, a, out, i=i: seen.update({i: out[1]}))
    model(batch(0))
    for i, moe in model.moe_layers().items():
        assert torch.equal(moe.tokens_per_expert, torch.bincount(seen[i].flatten(), minlength=8))


def test_evaluation_is_never_counted():
    model = make_model()
    with torch.no_grad():
        model(batch(0))
    model.eval()
    model(batch(0))
    assert not any(moe.tokens_per_expert.any() for moe in model.moe_layers().values())


def test_padding_is_never_counted():
    model, tokens = make_model(), batch(0)
    real = torch.ones_like(tokens, dtype=torch.bool)
    real[1:] = False  # whole rows, so that the other rows' routing can be checked alone
    model(tokens, token_mask=real)
    padded = step_loads(list(model.moe_layers().values())).tokens_E
    model(tokens[:1])
    assert torch.equal(padded, step_loads(list(model.moe_layers().values())).tokens_E)


def test_taking_the_loads_starts_again_from_zero():
    model = make_model()
    moes = list(model.moe_layers().values())
    model(batch(0))
    first = step_loads(moes).tokens_E
    assert first.any() and not step_loads(moes).tokens_E.any()
    model(batch(0))
    assert torch.equal(step_loads(moes).tokens_E, first)


# ---------------------------------------------------------------------------------------------
# The bias
# ---------------------------------------------------------------------------------------------


def bare_layer(num_experts: int, coeff: float | None = 0.001) -> MoE:
    args = MoEArgs(num_experts=num_experts, load_balance_coeff=coeff)
    return MoE(args, dim=2, hidden_dim=2)


def test_update_is_the_centred_sign_of_mean_minus_load():
    torch.manual_seed(0)
    layers, loads = [bare_layer(8), bare_layer(8)], torch.randint(0, 100, (2, 8))
    loads[1, :4] = 50
    start = [layer.expert_bias.normal_().clone() for layer in layers]
    update_expert_bias(layers, loads)
    for layer, load, bias in zip(layers, loads, start, strict=True):
        sign = [(load.sum().item() > 8 * n) - (load.sum().item() < 8 * n) for n in load.tolist()]
        step = [0.001 * (s - sum(sign) / 8) for s in sign]
        torch.testing.assert_close(layer.expert_bias, bias + torch.tensor(step), rtol=0, atol=1e-6)
        assert layer.expert_bias.mean().item() == pytest.approx(bias.mean().item(), abs=1e-6)


def test_overloaded_experts_lose_and_idle_ones_gain():
    layer = bare_layer(4)
    update_expert_bias([layer], torch.tensor([[10, 0, 5, 5]]))
    assert torch.equal(layer.expert_bias, torch.tensor([-0.001, 0.001, 0.0, 0.0]))


def test_one_token_of_a_hundred_million_decides_the_sign():
    # In fp32 all of these counts round to the same number (above 2^24 only even ones exist).
    base = 100_000_000
    layer = bare_layer(4)
    update_expert_bias([layer], torch.tensor([[base + 1, base - 1, base, base]]))
    assert torch.equal(layer.expert_bias, torch.tensor([-0.001, 0.001, 0.0, 0.0]))


def test_a_layer_without_balancing_has_no_bias_to_update():
    layer = bare_layer(4, coeff=None)
    update_expert_bias([layer], torch.tensor([[4, 0, 0, 0]]))
    assert layer.expert_bias is None


def test_a_perfectly_even_load_changes_nothing():
    layer = bare_layer(3)
    update_expert_bias([layer], torch.tensor([[7, 7, 7]]))
    assert torch.equal(layer.expert_bias, torch.zeros(3))


def test_balancing_evens_out_a_lopsided_router():
    torch.manual_seed(0)
    args = MoEArgs(num_experts=8, top_k=2, num_shared_experts=0, load_balance_coeff=0.02)
    layer = MoE(args, dim=4, hidden_dim=4)
    layer.init_weights(0.5)
    x = torch.randn(1, 512, 4) + 1.0  # a common direction, which some experts like
    violation = []
    for _ in range(100):
        _, load = layer(x, return_load=True)
        violation.append(load.tokens_E.max().item() / load.tokens_E.float().mean().item() - 1)
        record_load(layer, load)
        update_expert_bias([layer], step_loads([layer]).tokens_E)
    assert violation[0] > 1.0 and violation[-1] < 0.3


# ---------------------------------------------------------------------------------------------
# The same trajectory however a step is computed
# ---------------------------------------------------------------------------------------------


def trajectory(model: DeepSeekV3Model, accumulation: int = 1, steps: int = 4) -> dict:
    """Loads and biases of each step and the last gradients, with the weights standing still."""
    moes = list(model.moe_layers().values())
    loads, biases = [], []
    for step in range(steps):
        model.zero_grad()
        for part in batch(step).chunk(accumulation):
            mean_square(model(part)).backward()
        loads.append(step_loads(moes).tokens_E)
        update_expert_bias(moes, loads[-1])
        biases.append(torch.stack([moe.expert_bias for moe in moes]))
    gradients = {name: param.grad for name, param in model.named_parameters()}
    return {"loads": loads, "biases": biases, "gradients": gradients}


def recomputing(mode: str) -> DeepSeekV3Model:
    model = make_model()
    apply_activation_checkpoint(model.layers, RECOMPUTE[mode])
    return model


@pytest.fixture(scope="module")
def of_dtype() -> dict[torch.dtype, dict]:
    """Trajectories that nothing is recomputed or accumulated in."""
    return {dtype: trajectory(make_model().to(dtype)) for dtype in (torch.float32, torch.float64)}


@pytest.mark.parametrize("accumulation", [1, 2, 4])
@pytest.mark.parametrize("mode", RECOMPUTE)
def test_loads_and_bias_are_the_same_however_a_step_is_computed(of_dtype, mode, accumulation):
    # Recomputation changes no bit; adding up micro-batches rounds once more.
    dtype, error = (torch.float32, 0.0) if accumulation == 1 else (torch.float64, 1e-13)
    plain, ours = of_dtype[dtype], trajectory(recomputing(mode).to(dtype), accumulation)
    for step, (loads, biases) in enumerate(zip(plain["loads"], plain["biases"], strict=True)):
        assert torch.equal(ours["loads"][step], loads)
        assert torch.equal(ours["biases"][step], biases)
    assert not torch.equal(plain["biases"][-1], plain["biases"][0])
    assert ours["gradients"].keys() == plain["gradients"].keys()
    for name, gradient in plain["gradients"].items():
        atol = error * gradient.abs().max().item()
        torch.testing.assert_close(ours["gradients"][name], gradient, rtol=0, atol=atol)


def train_flops(model: DeepSeekV3Model) -> int:
    with FlopCounterMode(display=False) as counter:
        mean_square(model(batch(0))).backward()
    return counter.get_total_flops()


def test_recomputation_costs_what_each_mode_promises():
    # The loop's products are counted; FlopCounterMode knows no grouped GEMM.
    loop = dataclasses.replace(
        ARGS, moe_args=dataclasses.replace(ARGS.moe_args, use_grouped_mm=False)
    )
    flops = {}
    for mode, config in RECOMPUTE.items():
        model = make_model(loop)
        apply_activation_checkpoint(model.layers, config)
        flops[mode] = train_flops(model)
    with FlopCounterMode(display=False) as counter:
        hidden = torch.zeros(4, 12, ARGS.dim)
        model = make_model(loop)
        for layer in model.layers.values():
            hidden, _ = layer(hidden, model.rope)
    one_forward = counter.get_total_flops()
    assert flops["full"] - flops["none"] == one_forward
    assert 0 < flops["every 2nd layer"] - flops["none"] < one_forward
    assert 0 < flops["op"] - flops["none"] < one_forward


def test_full_recomputation_passes_each_router_twice():
    calls = dict.fromkeys(RECOMPUTE, 0)
    for mode in calls:
        model = recomputing(mode)

        def count(*_, mode=mode):
            calls[mode] += 1

        for moe in model.moe_layers().values():
            moe.router.register_forward_hook(count)
        mean_square(model(batch(0))).backward()
    # Layers 0 to 3, experts in 1 to 3, of which 1 and 3 are "second" ones.
    assert calls == {"none": 3, "full": 6, "every 2nd layer": 5, "op": 6, "elementwise": 6}


class OpCounter(TorchDispatchMode):
    """Counts operations that are carried out; results kept by checkpointing are not seen again."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func] += 1
        return func(*args, **(kwargs or {}))


def test_op_mode_repeats_no_attention_no_expert_gemm_and_half_of_the_matmuls():
    dear = (
        torch.ops.aten._grouped_mm.default,
        torch.ops.torchtitan.causal_blocks.default,
        torch.ops.aten.mm.default,
    )
    calls = {}
    for mode in ("none", "full", "op"):
        model = recomputing(mode)
        with OpCounter() as counter:
            mean_square(model(batch(0))).backward()
        calls[mode] = [counter.calls[op] for op in dear]
    more = {
        mode: [n - m for n, m in zip(calls[mode], calls["none"], strict=True)] for mode in calls
    }
    # 3 expert GEMMs in each of 3 MoE layers; 4 attentions; 5 linear layers of MLA, 3 of a dense or
    # shared feed-forward, and 3 gates.
    assert more["full"] == [9, 4, 4 * 8 + 3]
    assert more["op"] == [
        0,
        0,
        4 * 4 + 3,
    ]  # gates are recomputed always, of the others every second


def test_wrapping_changes_no_parameter_name():
    names = list(make_model().state_dict())
    for mode in RECOMPUTE:
        assert list(recomputing(mode).state_dict()) == names


def test_a_copied_model_counts_for_itself():
    model = make_model()
    twin = copy.deepcopy(model)
    twin(batch(0))
    assert not any(moe.tokens_per_expert.any() for moe in model.moe_layers().values())


def test_a_coefficient_of_zero_keeps_the_loaded_bias():
    moe = MoE(MoEArgs(num_experts=4, load_balance_coeff=0.0), dim=8, hidden_dim=8)
    moe.expert_bias.copy_(torch.tensor([0.5, -0.5, 7.0, 0.0]))
    update_expert_bias([moe], torch.tensor([[9, 1, 0, 2]]))
    assert moe.expert_bias.tolist() == [0.5, -0.5, 7.0, 0.0]
