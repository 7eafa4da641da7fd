"""The balance loss over the global batch: the formula in loops, over steps, recomputed."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from tests.unit_tests.models.moe.test_balancing import ARGS, RECOMPUTE, batch
from torchtitan.distributed.activation_checkpoint import apply_activation_checkpoint
from torchtitan.models.deepseek_v3 import DeepSeekV3Model
from torchtitan.models.moe.balancing import step_loads, step_router_stats, update_expert_bias

ALPHA = 0.3
TOP_K = ARGS.moe_args.top_k


def make_model(alpha: float) -> DeepSeekV3Model:
    moe_args = dataclasses.replace(ARGS.moe_args, global_balance_coeff=alpha)
    torch.manual_seed(0)
    model = DeepSeekV3Model(dataclasses.replace(ARGS, moe_args=moe_args))
    model.init_weights()
    with torch.no_grad():
        for moe in model.moe_layers().values():
            moe.expert_bias[3] = 0.5  # what is chosen is not what scores best
    return model.double().train()


def micro_batches() -> list[tuple[Tensor, Tensor]]:
    """Make micro-batches of three sequences; one has padding, one is nothing else."""
    mask = torch.ones(3, 7, dtype=torch.bool)
    mask[1, 4:] = False
    mask[2] = False
    tokens = batch(0, rows=6)[:, :7]
    return [(tokens[:3], mask), (tokens[3:], torch.ones(3, 7, dtype=torch.bool))]


def plain_loss(scores_TE: Tensor, before: list[list[int]]) -> Tensor:
    """N_E Σ_i f_i P_i of one micro-batch: f from what the tokens of the step before have chosen."""
    num_experts = scores_TE.size(1)
    total = scores_TE.new_zeros(())
    for i in range(num_experts):
        f = sum(i in ids for ids in before) / (TOP_K * len(before)) if before else 1 / num_experts
        P = sum(scores[i] / scores.sum() for scores in scores_TE) / len(scores_TE)
        total = total + num_experts * f * P
    return total


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.fixture(scope="module")
def by_the_formula() -> list[tuple[dict[str, Tensor], list[float]]]:
    """Gradients, and each layer's loss as a mean over tokens, of two steps of two micro-batches."""
    model, seen = make_model(0.0), []
    for layer, moe in model.moe_layers().items():

        def keep(router: nn.Module, args: tuple, out: tuple, layer: int = layer) -> None:
            scores = (args[0].double() @ router.gate.weight.T).sigmoid()
            seen.append((layer, scores, out[1].tolist()))

        moe.router.register_forward_hook(keep)
    step_tokens = sum(mask.sum() for _, mask in micro_batches())
    before: dict[int, list] = {layer: [] for layer in model.moe_layers()}
    steps = []
    for _ in range(2):
        model.zero_grad()
        chosen = {layer: [] for layer in before}
        sums = dict.fromkeys(before, 0.0)
        for tokens, mask in micro_batches():
            seen.clear()
            loss = model(tokens, token_mask=mask).square().sum() / step_tokens
            real = mask.flatten()
            for layer, scores, ids in seen:
                chosen[layer] += [each for each, counts in zip(ids, real, strict=True) if counts]
                share = plain_loss(scores[real], before[layer]) * real.sum() / step_tokens
                sums[layer] += share.item()
                loss = loss + ALPHA * share
            loss.backward()
        before = chosen
        steps.append((gradients(model), list(sums.values())))
    return steps


@pytest.mark.parametrize("how", RECOMPUTE)
def test_every_gradient_is_that_of_the_formula(by_the_formula, how):
    model = make_model(ALPHA)
    moes = list(model.moe_layers().values())
    apply_activation_checkpoint(model.layers, RECOMPUTE[how])
    step_tokens = sum(mask.sum() for _, mask in micro_batches())
    for expected, losses in by_the_formula:
        model.zero_grad()
        model.set_tokens_in_step(step_tokens, step_tokens)
        for tokens, mask in micro_batches():
            (model(tokens, token_mask=mask).square().sum() / step_tokens).backward()
        for name, grad in gradients(model).items():
            torch.testing.assert_close(grad, expected[name], rtol=1e-9, atol=1e-12, msg=name)
        measured = step_router_stats(moes)[:, 4] / step_tokens
        torch.testing.assert_close(measured, torch.tensor(losses), rtol=1e-5, atol=0)
        bias = [moe.expert_bias.clone() for moe in moes]
        update_expert_bias(moes, step_loads(moes).tokens_E)
        for moe, same in zip(moes, bias, strict=True):  # the plain model has none that moves
            moe.expert_bias.copy_(same)


def test_the_loss_moves_the_gate_from_the_second_step_on(by_the_formula):
    """Otherwise the comparison above would say nothing about it."""
    model = make_model(0.0)
    step_tokens = sum(mask.sum() for _, mask in micro_batches())
    for tokens, mask in micro_batches():
        (model(tokens, token_mask=mask).square().sum() / step_tokens).backward()
    gate = "layers.2.moe.router.gate.weight"
    without = gradients(model)[gate]
    (first, losses), (second, _) = by_the_formula
    torch.testing.assert_close(without, first[gate], rtol=1e-9, atol=1e-12)
    assert losses == pytest.approx([1.0] * len(losses))
    assert not torch.allclose(without, second[gate], rtol=1e-2)


def test_a_step_that_is_not_taken_leaves_the_loads_as_they_were():
    """`step_loads` takes a step's counts; only the update keeps them for the next one."""
    model = make_model(ALPHA)
    moes = list(model.moe_layers().values())
    for tokens, mask in micro_batches():
        model(tokens, token_mask=mask)
    loads = step_loads(moes).tokens_E
    assert not any(moe.global_tokens_per_expert.any() for moe in moes)
    update_expert_bias(moes, loads)
    assert all(torch.equal(m.global_tokens_per_expert, x) for m, x in zip(moes, loads, strict=True))
