"""The balance loss over the global batch is the same on every layout: all ranks' tokens count."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.distributed_tests.test_layouts import COMPILED, layout, pipeline
from tests.distributed_tests.training_ranks import (
    FP32,
    SEQUENCES,
    assert_trained_alike,
    train_on_this_rank,
)
from torchtitan.models.moe import MoE, MoEArgs

# Large enough that a loss left out would show in the third digit.
GLOBAL = "--model.args.moe_args.global_balance_coeff=2.0"
OFF = "--model.args.moe_args.global_balance_coeff=0.0"
NO_RECOMPUTE = "--activation_checkpoint.mode=none"


@pytest.fixture(scope="module")
def one_process(ranks, tmp_path_factory) -> dict:
    options = [FP32, NO_RECOMPUTE, GLOBAL, f"--training.local_batch_size={SEQUENCES}"]
    return ranks(1).run(train_on_this_rank, options, str(tmp_path_factory.mktemp("one")))[0]


LAYOUTS = {
    "FSDP 2, compiled, recomputed": layout(2, *COMPILED, ac="full"),
    # Tokens travel, so the layers are compiled in pieces, inside of what is recomputed.
    "EP 2, compiled, recomputed": layout(2, *COMPILED, ac="full", ep=2),
    "CP 2 x TP 2": layout(4, cp=2, tp=2),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_trains_like_one_process(ranks, one_process, name, tmp_path):
    world_size, options = LAYOUTS[name]
    for result in ranks(world_size).run(train_on_this_rank, [GLOBAL, *options], str(tmp_path)):
        assert_trained_alike(result, one_process)


def test_a_pipeline_trains_like_accumulation_over_its_micro_batches(ranks, tmp_path):
    """Its buffer fills micro-batch by micro-batch, whatever the schedule does between; layer 0 has
    no experts, so one stage has none to count."""
    alone = [FP32, NO_RECOMPUTE, GLOBAL, "--training.local_batch_size=1"]
    expected = ranks(1).run(train_on_this_rank, alone, str(tmp_path / "one"))[0]
    world_size, options = layout(2, *pipeline("1F1B"), ac="full", pp=2)
    for result in ranks(world_size).run(
        train_on_this_rank, [GLOBAL, *options], str(tmp_path / "two")
    ):
        assert_trained_alike(result, expected)


def test_the_loss_moves_the_gradient(ranks, one_process, tmp_path):
    """Otherwise the comparisons above would say nothing about it."""
    options = [FP32, NO_RECOMPUTE, OFF, f"--training.local_batch_size={SEQUENCES}"]
    norms = ranks(1).run(train_on_this_rank, options, str(tmp_path))[0]["norms"]
    assert norms[0] != pytest.approx(one_process["norms"][0], rel=1e-3)


# ---------------------------------------------------------------------------------------------
# One layer
# ---------------------------------------------------------------------------------------------


def gradients_and_counts(split: bool) -> list[Tensor]:
    """Of the loss alone, for the gate and this rank's sequences; the counts that made f."""
    torch.manual_seed(0)
    args = MoEArgs(num_experts=8, top_k=2, num_shared_experts=0, global_balance_coeff=0.5)
    layer = MoE(args, dim=4, hidden_dim=4).double().train()
    layer.init_weights(0.5)
    x, mask = torch.randn(4, 8, 4, dtype=torch.float64), torch.rand(4, 8) < 0.7
    layer.tokens_in_step.copy_(mask.sum())
    if split:
        layer.step_group = dist.group.WORLD
        mine = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
        x, mask = x[mine], mask[mine]
    x = x.clone().requires_grad_()
    out, load = layer(x, mask, return_load=True)
    (out * 0).sum().backward()
    return [load.global_E, layer.router.gate.weight.grad, x.grad]


def test_two_ranks_count_what_one_process_counts(ranks):
    counts, gate, x = ranks(1).run(gradients_and_counts, False)[0]
    parts = ranks(2).run(gradients_and_counts, True)
    assert all(torch.equal(part[0], counts) for part in parts)
    torch.testing.assert_close(torch.cat([part[2] for part in parts]), x, rtol=1e-14, atol=0)
    torch.testing.assert_close(sum(part[1] for part in parts), gate, rtol=1e-12, atol=1e-16)
    assert gate.abs().max() > 1e-3
