"""The balance loss over the global batch: Qwen's formula in loops, its buffer, recomputed."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from tests.unit_tests.models.moe.test_balancing import ARGS, RECOMPUTE, batch
from torchtitan.distributed.activation_checkpoint import apply_activation_checkpoint
from torchtitan.models.deepseek_v3 import DeepSeekV3Model
from torchtitan.models.moe.balancing import step_loads
from torchtitan.models.moe.watch import step_watch

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
    """Of three sequences; one has padding, one is nothing else."""
    mask = torch.ones(3, 7, dtype=torch.bool)
    mask[1, 4:] = False
    mask[2] = False
    tokens = batch(0, rows=6)[:, :7]
    return [(tokens[:3], mask), (tokens[3:], torch.ones(3, 7, dtype=torch.bool))]


def paper_loss(scores_TE: Tensor, chosen: list[list[int]], so_far: list[list[int]]) -> Tensor:
    """N_E Σ_i f̄_i P_i of one micro-batch: f̄ from what the step's tokens `so_far` have chosen."""
    num_experts = scores_TE.size(1)
    total = scores_TE.new_zeros(())
    for i in range(num_experts):
        f = sum(i in ids for ids in so_far) / (TOP_K * len(so_far))
        P = sum(scores[i] / scores.sum() for scores in scores_TE) / len(chosen)
        total = total + num_experts * f * P
    return total


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.fixture(scope="module")
def by_the_paper() -> tuple[dict[str, Tensor], list[float]]:
    """Gradients of a step of two micro-batches, and each layer's loss: the mean over its tokens."""
    model, seen = make_model(0.0), []
    for layer, moe in model.moe_layers().items():

        def keep(router: nn.Module, args: tuple, out: tuple, layer: int = layer) -> None:
            scores = (args[0].double() @ router.gate.weight.T).sigmoid()
            seen.append((layer, scores, out[1].tolist()))

        moe.router.register_forward_hook(keep)
    step_tokens = sum(mask.sum() for _, mask in micro_batches())
    so_far = {layer: [] for layer in model.moe_layers()}
    sums = dict.fromkeys(so_far, 0.0)
    for tokens, mask in micro_batches():
        seen.clear()
        loss = model(tokens, token_mask=mask).square().sum() / step_tokens
        real = mask.flatten()
        for layer, scores, ids in seen:
            chosen = [each for each, counts in zip(ids, real, strict=True) if counts]
            so_far[layer] += chosen
            share = paper_loss(scores[real], chosen, so_far[layer]) * real.sum() / step_tokens
            sums[layer] += share.item()
            loss = loss + ALPHA * share
        loss.backward()
    return gradients(model), list(sums.values())


@pytest.mark.parametrize("how", RECOMPUTE)
def test_every_gradient_is_that_of_the_paper(by_the_paper, how):
    model = make_model(ALPHA)
    moes = list(model.moe_layers().values())
    apply_activation_checkpoint(model.layers, RECOMPUTE[how])
    step_tokens = sum(mask.sum() for _, mask in micro_batches())
    for again in range(2):  # a step begins with an empty buffer
        model.zero_grad()
        model.set_tokens_in_step(step_tokens)
        for tokens, mask in micro_batches():
            (model(tokens, token_mask=mask).square().sum() / step_tokens).backward()
        counted = torch.stack([moe.global_tokens_per_expert for moe in moes])
        assert torch.equal(counted, step_loads(moes).tokens_E), f"step {again}"
    expected, losses = by_the_paper
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-9, atol=1e-12, msg=name)
    measured = step_watch(moes)[:, 4] / 2 / step_tokens
    torch.testing.assert_close(measured, torch.tensor(losses), rtol=1e-5, atol=0)


def test_the_loss_moves_the_gate(by_the_paper):
    """Otherwise the comparison above would say nothing about it."""
    model = make_model(0.0)
    step_tokens = sum(mask.sum() for _, mask in micro_batches())
    for tokens, mask in micro_batches():
        (model(tokens, token_mask=mask).square().sum() / step_tokens).backward()
    gate = "layers.2.moe.router.gate.weight"
    assert not torch.allclose(gradients(model)[gate], by_the_paper[0][gate], rtol=1e-2)
    assert not any(m.global_tokens_per_expert.any() for m in model.moe_layers().values())
