"""Routing that cannot do what it is set for is told, and only that; what is told is true."""

import dataclasses

import pytest
import torch

from tests.tiny_run import as_option, tiny
from torchtitan.config import ConfigManager
from torchtitan.models.deepseek_v3 import deepseekv3_args
from torchtitan.models.moe import MoE, MoEArgs
from torchtitan.models.moe.balancing import record_load, step_loads, update_expert_bias
from torchtitan.models.moe.without_effect import without_effect
from torchtitan.models.qwen3 import qwen3_args
from torchtitan.trainer import Trainer

NORMED = {"top_k": 1, "route_norm": True}
GROUPS = {"num_expert_groups": 4, "num_limited_groups": 2}


def moe_args(**changes) -> MoEArgs:
    return MoEArgs(**{"num_experts": 8, "top_k": 2, "num_shared_experts": 0} | changes)


def trained_layer(args: MoEArgs) -> MoE:
    """After a backward pass of a random loss, in fp64; its load is recorded."""
    torch.manual_seed(1)
    layer = MoE(args, dim=6, hidden_dim=8).double().train()
    layer.init_weights(0.5)
    x = torch.randn(4, 16, 6, dtype=torch.float64)
    out, load = layer(x, return_load=True)
    record_load(layer, load)
    (out * torch.randn_like(out)).sum().backward()
    return layer


def largest_gradient(layer: MoE) -> float:
    return layer.router.gate.weight.grad.abs().max().item()


# ---------------------------------------------------------------------------------------------
# The router's gradient
# ---------------------------------------------------------------------------------------------

NO_GRADIENT = {
    "sigmoid": NORMED,
    "softmax": NORMED | {"score_func": "softmax"},
    "before the experts": NORMED | {"score_before_experts": True},
    "in groups": NORMED | GROUPS,
    "in groups of one": NORMED
    | {"num_expert_groups": 8, "num_limited_groups": 1, "group_score_func": "max"},
    "scaled": NORMED | {"route_scale": 2.5},
    "one expert": NORMED | {"num_experts": 1},
    "one expert, not normalised": {"num_experts": 1, "top_k": 1, "score_func": "softmax"},
}


@pytest.mark.parametrize("name", NO_GRADIENT)
def test_a_router_without_gradient_is_told(name):
    args = moe_args(**NO_GRADIENT[name])
    assert largest_gradient(trained_layer(args)) < 1e-12
    told = [sentence for sentence in without_effect(args) if "gradient" in sentence]
    assert len(told) == 1 and "; set " in told[0]


LEARNS = {
    "top-1 with the score as weight": {"top_k": 1},
    "softmax": {"top_k": 1, "score_func": "softmax"},
    "top-2, normalised": {"route_norm": True},
    "one expert, scaled by its sigmoid": {"num_experts": 1, "top_k": 1},
    "two groups of one": {"num_expert_groups": 4, "num_limited_groups": 2, "route_norm": True},
}


@pytest.mark.parametrize("name", LEARNS)
def test_a_router_with_a_gradient_is_not_accused(name):
    args = moe_args(**LEARNS[name])
    assert largest_gradient(trained_layer(args)) > 1e-3
    assert not any("gradient" in sentence for sentence in without_effect(args))


@pytest.mark.parametrize("loss", ["sequence_balance_coeff", "global_balance_coeff", "z_loss_coeff"])
def test_losses_of_the_router_are_named_as_what_is_left(loss):
    (told,) = without_effect(moe_args(**NORMED, **{loss: 0.1}))
    assert f"it learns from {loss} alone" in told and "rounding noise" not in told
    (told,) = without_effect(moe_args(**NORMED))
    assert "it moves by rounding noise" in told and "set route_norm to false" in told


# ---------------------------------------------------------------------------------------------
# Choices and balance
# ---------------------------------------------------------------------------------------------


def choices(args: MoEArgs, **changes) -> torch.Tensor:
    torch.manual_seed(2)
    layer = MoE(dataclasses.replace(args, **changes), dim=6, hidden_dim=8).double()
    layer.init_weights(0.5)
    layer.expert_bias.copy_(torch.randn(8) / 4)
    x = torch.randn(256, 6, dtype=torch.float64)
    return layer.router(x, layer.expert_bias)[1].sort(dim=1).values


LIMITS = {
    "all groups": {"num_expert_groups": 4, "num_limited_groups": 4},
    "one group": {"num_expert_groups": 1, "num_limited_groups": 1},
    "as many as experts a token": GROUPS | {"group_score_func": "max"},
    "more than experts a token": {
        "num_expert_groups": 4,
        "num_limited_groups": 3,
        "group_score_func": "max",
    },
}


@pytest.mark.parametrize("name", LIMITS)
def test_a_limit_that_changes_no_choice_is_told(name):
    args = moe_args(**LIMITS[name])
    free = choices(args, num_expert_groups=None, num_limited_groups=None)
    assert torch.equal(choices(args), free)
    (told,) = without_effect(args)
    assert "the limit changes no choice" in told
    assert "leave num_limited_groups and num_expert_groups out" in told


def test_a_limit_that_changes_choices_is_not_told():
    args = moe_args(**GROUPS)
    free = choices(args, num_expert_groups=None, num_limited_groups=None)
    assert not torch.equal(choices(args), free)
    assert not list(without_effect(args))


@pytest.mark.parametrize("limited", [1, 2])
def test_groups_that_are_taken_whole_are_told(limited):
    args = moe_args(num_expert_groups=4, num_limited_groups=limited, top_k=2 * limited)
    pairs = choices(args).view(256, limited, 2)
    assert torch.equal(pairs[..., 0] + 1, pairs[..., 1])
    (told,) = without_effect(args)
    assert "the router chooses groups, not experts" in told


def test_all_experts_for_every_token_leave_nothing_to_balance():
    coefficients = {"sequence_balance_coeff": 0.5, "global_balance_coeff": 0.5}
    args = moe_args(num_experts=4, top_k=4)
    with_losses = trained_layer(dataclasses.replace(args, **coefficients))
    alone = trained_layer(args)
    update_expert_bias([alone], step_loads([alone]).tokens_E)
    assert not alone.expert_bias.any()
    gate = alone.router.gate.weight.grad
    torch.testing.assert_close(with_losses.router.gate.weight.grad, gate, rtol=1e-6, atol=1e-12)
    (told,) = without_effect(dataclasses.replace(args, **coefficients))
    assert "takes all experts" in told
    assert "load_balance_coeff, sequence_balance_coeff, global_balance_coeff can't" in told


BALANCE = {
    "none": ({"load_balance_coeff": None}, {}, "Nothing evens out the expert load"),
    "a loss": ({"load_balance_coeff": None, "sequence_balance_coeff": 0.1}, {}, None),
    "a loss of a phase": ({"load_balance_coeff": None}, {"global_balance_coeff": 0.1}, None),
    "a loss that evens out nothing": (
        {"load_balance_coeff": None, "z_loss_coeff": 0.1},
        {"z_loss_coeff": 0.2},
        "Nothing evens out the expert load",
    ),
    "a bias that stays": ({"load_balance_coeff": 0.0}, {}, None),
    "as fast as the scores": ({"load_balance_coeff": 1.0}, {}, "the bias chooses the experts"),
    "as fast in a phase": ({}, {"load_balance_coeff": 3.0}, "the bias chooses the experts"),
    "forced": ({"_debug_force_load_balance": True}, {}, "load_balance_coeff can't even out"),
    "usual": ({}, {"load_balance_coeff": 0.0}, None),
}


@pytest.mark.parametrize("name", BALANCE)
def test_what_evens_out_the_load(name):
    settings, of_phases, sentence = BALANCE[name]
    told = list(without_effect(moe_args(**settings), of_phases))
    assert len(told) == (sentence is not None)
    assert sentence is None or sentence in told[0]


def test_a_loss_of_a_phase_is_what_the_router_learns_from():
    (told,) = without_effect(moe_args(**NORMED), {"z_loss_coeff": 0.1})
    assert "it learns from z_loss_coeff alone" in told


def test_shipped_flavors_are_not_accused():
    balanced_by_losses = "Nothing evens out"  # V2's and Qwen's, whose coefficients the TOML sets
    for flavor in (deepseekv3_args | qwen3_args).values():
        told = [s for s in flavor.without_effect({}, {}) if balanced_by_losses not in s]
        assert not told


# ---------------------------------------------------------------------------------------------
# A run
# ---------------------------------------------------------------------------------------------

QWEN = ["--model.name=qwen3", "--model.flavor=debugmodel_moe", "--model.args.n_layers=1"]
PHASE = as_option([{"tokens": 1e6, "load_balance_coeff": 2.0}])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--model.args.moe_args.top_k=1"], "top_k = 1 with route_norm = true"),
        ([PHASE], "load_balance_coeff = 2 moves the bias"),
        (["--model.args.n_dense_layers=2", "--model.args.moe_args.top_k=2"], "no layer of this"),
        (["--debug.moe_force_load_balance"], "debug.moe_force_load_balance = true"),
    ],
)
def test_a_run_tells_it_once(options, sentence, tmp_path, caplog):
    Trainer(ConfigManager().parse_args([*tiny(tmp_path), *options])).close()
    assert [r.levelname for r in caplog.records if sentence in r.getMessage()] == ["WARNING"]


def test_qwen3_is_told_too(tmp_path, caplog):
    run = [option for option in tiny(tmp_path) if not option.startswith("--model.")]
    top_1 = "--model.args.moe_args.top_k=1"
    Trainer(ConfigManager().parse_args([*run, *QWEN, top_1])).close()
    assert "top_k = 1 with route_norm = true" in caplog.text
