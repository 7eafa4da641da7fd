"""The router's own losses: the report's formula in loops, in layers, recomputed."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from tests.unit_tests.models.moe.test_balancing import ARGS, RECOMPUTE, batch
from torchtitan.config.schedule_tables import EXPERT_COEFFICIENTS
from torchtitan.distributed.activation_checkpoint import apply_activation_checkpoint
from torchtitan.models.deepseek_v3 import DeepSeekV3Model
from torchtitan.models.moe.aux_loss import sequence_balance_sum, z_sum
from torchtitan.models.moe.balancing import step_router_stats

ALPHA, Z = 0.3, 0.02


def report_balance(scores_SE: Tensor, top_k: int) -> Tensor:
    """Equations 17 to 20 for one sequence without padding, alpha left out."""
    length, num_experts = scores_SE.shape
    total = scores_SE.new_zeros(())
    for i in range(num_experts):
        chosen = sum(i in scores_SE[t].topk(top_k).indices.tolist() for t in range(length))
        f = num_experts / (top_k * length) * chosen
        P = sum(scores_SE[t, i] / scores_SE[t].sum() for t in range(length)) / length
        total = total + f * P
    return total


def plain_losses(logits_BSE: Tensor, score_func: str, top_k: int, mask_BS: Tensor) -> Tensor:
    """alpha and z-loss over a step that is this batch alone."""
    total = logits_BSE.new_zeros(())
    for logits_SE, mask_S in zip(logits_BSE, mask_BS, strict=True):
        logits_SE = logits_SE[mask_S]
        if len(logits_SE):
            scores_SE = logits_SE.sigmoid() if score_func == "sigmoid" else logits_SE.softmax(-1)
            total = total + ALPHA * len(logits_SE) * report_balance(scores_SE, top_k)
            total = total + Z * sum(torch.log(torch.exp(row).sum()) ** 2 for row in logits_SE)
    return total / mask_BS.sum()


def some_mask() -> Tensor:
    mask_BS = torch.ones(3, 7, dtype=torch.bool)
    mask_BS[1, 4:] = False
    mask_BS[2] = False  # nothing but padding
    return mask_BS


def test_sums_are_the_formula_in_value_and_gradient():
    torch.manual_seed(0)
    logits = torch.randn(3, 7, 6, dtype=torch.float64, requires_grad=True)
    mask = some_mask()
    ours = ALPHA * sequence_balance_sum(logits.sigmoid(), mask, 2)
    ours = (ours + Z * z_sum(logits.flatten(0, 1), mask.flatten())) / mask.sum()
    plain = plain_losses(logits, "sigmoid", 2, mask)
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=0)
    grads = [torch.autograd.grad(loss, logits)[0] for loss in (ours, plain)]
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-14)


def test_an_even_router_has_the_smallest_loss_one():
    even = torch.eye(4, dtype=torch.float64).repeat(2, 1)[None] + 1e-6
    assert sequence_balance_sum(even, None, 1).item() == pytest.approx(8.0, rel=1e-5)
    lopsided = torch.tensor([[[1.0, 0, 0, 0]] * 8], dtype=torch.float64)
    assert sequence_balance_sum(lopsided, None, 1).item() == pytest.approx(8 * 4.0)


# ---------------------------------------------------------------------------------------------
# In a model
# ---------------------------------------------------------------------------------------------


def make_model(score_func: str = "sigmoid", **coefficients: float) -> DeepSeekV3Model:
    moe_args = dataclasses.replace(ARGS.moe_args, score_func=score_func, **coefficients)
    torch.manual_seed(0)
    model = DeepSeekV3Model(dataclasses.replace(ARGS, moe_args=moe_args))
    model.init_weights()
    return model.double().train()


def gradients(model: DeepSeekV3Model, losses: list[Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    for loss in losses:
        loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def plain_gradients(score_func: str, tokens: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """The formula from the gates' logits, added to the loss by hand."""
    model, logits = make_model(score_func), []

    def keep(gate: torch.nn.Module, args: tuple[Tensor]) -> None:
        logits.append((args[0].double() @ gate.gate.weight.T).unflatten(0, tokens.shape))

    for moe in model.moe_layers().values():
        moe.router.register_forward_pre_hook(keep)
    loss = model(tokens, token_mask=mask).square().sum() / mask.sum()
    loss = loss + sum(plain_losses(each, score_func, ARGS.moe_args.top_k, mask) for each in logits)
    return gradients(model, [loss])


def assert_alike(ours: dict[str, Tensor], plain: dict[str, Tensor]) -> None:
    for name, expected in plain.items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("score_func", ["sigmoid", "softmax"])
def test_every_gradient_is_that_of_the_formula(score_func):
    tokens, mask = batch(0, rows=3)[:, :7], some_mask()
    plain = plain_gradients(score_func, tokens, mask)
    without = make_model(score_func)
    loss = without(tokens, token_mask=mask).square().sum() / mask.sum()
    gate = "layers.2.moe.router.gate.weight"
    assert not torch.allclose(gradients(without, [loss])[gate], plain[gate], rtol=1e-2)

    model = make_model(score_func, sequence_balance_coeff=ALPHA, z_loss_coeff=Z)
    model.set_tokens_in_step(mask.sum(), mask.sum())
    loss = model(tokens, token_mask=mask).square().sum() / mask.sum()
    assert_alike(gradients(model, [loss]), plain)


def test_coefficients_of_a_phase_are_those_of_the_arguments():
    """A model that a phase gives its coefficients has the gradients of one built with them."""
    tokens, mask = batch(0, rows=3)[:, :7], some_mask()
    values = {"sequence_balance_coeff": ALPHA, "global_balance_coeff": 0.2, "z_loss_coeff": Z}
    assert {"load_balance_coeff", *values} == set(EXPERT_COEFFICIENTS)

    def gradients_of(model: DeepSeekV3Model, values: dict[str, float]) -> dict[str, Tensor]:
        model.set_coefficients(values)
        model.set_tokens_in_step(mask.sum(), mask.sum())
        for moe in model.moe_layers().values():
            moe.global_tokens_per_expert.copy_(torch.arange(8))
        loss = model(tokens, token_mask=mask).square().sum() / mask.sum()
        return gradients(model, [loss])

    without = gradients_of(make_model(), {})
    for name, value in values.items():
        by_phase = gradients_of(make_model(), {name: value})
        assert_alike(by_phase, gradients_of(make_model(**{name: value}), {}))
        gate = "layers.2.moe.router.gate.weight"
        assert not torch.allclose(by_phase[gate], without[gate], rtol=1e-2), name


@pytest.mark.parametrize("how", RECOMPUTE)
def test_recomputation_and_accumulation_change_nothing(how):
    tokens, mask = batch(0, rows=3)[:, :7], some_mask()
    plain = plain_gradients("sigmoid", tokens, mask)
    model = make_model(sequence_balance_coeff=ALPHA, z_loss_coeff=Z)
    apply_activation_checkpoint(model.layers, RECOMPUTE[how])
    model.set_tokens_in_step(mask.sum(), mask.sum())
    losses = [
        model(t[None], token_mask=m[None]).square().sum() / mask.sum()
        for t, m in zip(tokens, mask, strict=True)
    ]
    assert_alike(gradients(model, losses), plain)
    sums = step_router_stats(list(model.moe_layers().values()))
    once = step_stats_of(tokens, mask)
    # The last one, over the batch, is not asked for here (test_global_balance.py).
    torch.testing.assert_close(sums[:, :4], once[:, :4], rtol=1e-5, atol=1e-5)


def step_stats_of(tokens: Tensor, mask: Tensor) -> Tensor:
    model = make_model()
    moes = list(model.moe_layers().values())
    for moe in moes:
        moe.collect_router_stats = True
    model(tokens, token_mask=mask)
    return step_router_stats(moes)


def test_router_statistics_by_hand():
    tokens, mask = batch(0, rows=3)[:, :7], some_mask()
    model, seen = make_model(), {}
    moe = model.moe_layers()[1]
    moe.collect_router_stats = True
    with torch.no_grad():
        moe.expert_bias[3] = 0.5  # so that group limit and bias both matter

    def keep(router: torch.nn.Module, args: tuple[Tensor], out: tuple[Tensor, ...]) -> None:
        seen.update(ids=out[1], scores=out[4])

    moe.router.register_forward_hook(keep)
    model(tokens, token_mask=mask)
    balance, _, entropy, limited, _ = step_router_stats([moe])[0].tolist()
    real = mask.flatten()
    ids, scores = seen["ids"][real], seen["scores"][real].detach()
    free = (scores + moe.expert_bias).topk(ARGS.moe_args.top_k).indices
    changed = [set(a) != set(b) for a, b in zip(ids.tolist(), free.tolist(), strict=True)]
    assert limited == sum(changed) > 0
    shares = (scores / scores.sum(dim=1, keepdim=True)).tolist()
    by_hand = -sum(p * math.log(p) for share in shares for p in share) / math.log(8)
    assert entropy == pytest.approx(by_hand, rel=1e-5)
    assert balance / real.sum().item() >= 0.9


def test_nothing_is_measured_or_added_in_evaluation():
    model = make_model(sequence_balance_coeff=ALPHA)
    with torch.no_grad():
        model(batch(0))
    model.eval()
    model(batch(0))
    assert not any(moe.router_stats.any() for moe in model.moe_layers().values())
