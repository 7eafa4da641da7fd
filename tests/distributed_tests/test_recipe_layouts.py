"""What the recipe adds is the same on every layout: the router's losses, multi-token prediction,
phases, optimizers."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from tests.distributed_tests.test_expert_parallel import SIZE, SPLIT_INSIDE
from tests.distributed_tests.test_layouts import WHOLE_LOGITS, layout, nodes_of, pipeline
from tests.distributed_tests.training_ranks import (
    FP32,
    assert_trained_alike,
    train_on_this_rank,
)
from torchtitan.components.optimizer.muon import Muon
from torchtitan.models.moe import MoE, MoEArgs

DDP = "--parallelism.data_parallel_shard_degree=1"
REPLICATE = "--parallelism.data_parallel_replicate_degree="


def ep(degree: int, *more: str) -> list[str]:
    return [f"--parallelism.expert_parallel_degree={degree}", *more]


NO_RECOMPUTE = "--activation_checkpoint.mode=none"
LAYOUTS = {
    "accumulation": (1, [SIZE + "2"]),
    "FSDP 2, recomputation": (2, [SIZE + "4", "--activation_checkpoint.mode=full"]),
    "FSDP 2, compiled": (
        2,
        [
            SIZE + "4",
            "--compile.enable",
            "--compile.backend=aot_eager",
            "--activation_checkpoint.mode=full",
        ],
    ),
    "DDP 2, EP 2": (2, [*ep(2), REPLICATE + "2", DDP, SIZE + "2"]),
    "EP 2 x HSDP 2 x 2": (4, [*ep(2, nodes_of(1)), REPLICATE + "2", SIZE + "2"]),
    "EP 4, nodes of 2": (4, [*ep(4, nodes_of(2)), SIZE + "2"]),
    # Each rank has a part of every sequence to route and to predict further.
    "CP 2": layout(2, cp=2),
    "TP 2, whole logits": layout(2, WHOLE_LOGITS, tp=2, accumulation=2),
    "CP 2, TP 2, EP 4": layout(4, cp=2, tp=2, ep=4),
    "PP 2": layout(2, pp=2),
    "PP 2, TP 2": layout(4, pp=2, tp=2),
    "PP 2, CP 2, ZBVZeroBubble": layout(4, *pipeline("ZBVZeroBubble", 4), pp=2, cp=2),
}
# Weights large enough that a loss left out would show in the fifth digit.
EVERYTHING = [
    "--model.args.n_mtp_layers=2",
    "--model.args.mtp_loss_weight=0.5",
    "--model.args.moe_args.sequence_balance_coeff=0.1",
    "--model.args.moe_args.z_loss_coeff=0.05",
]


@pytest.fixture(scope="module")
def one_process(ranks, tmp_path_factory) -> dict:
    options = [FP32, NO_RECOMPUTE, *EVERYTHING, SIZE + "8"]
    return ranks(1).run(train_on_this_rank, options, str(tmp_path_factory.mktemp("one")))[0]


@pytest.mark.parametrize("name", LAYOUTS)
def test_router_losses_and_mtp_train_like_one_process(ranks, one_process, name, tmp_path):
    world_size, options = LAYOUTS[name]
    options = [FP32, NO_RECOMPUTE, *EVERYTHING, *options]
    for result in ranks(world_size).run(train_on_this_rank, options, str(tmp_path)):
        assert_trained_alike(result, one_process)
        for side, expected in zip(result["side_losses"], one_process["side_losses"], strict=True):
            assert len(side) == 2 and side == pytest.approx(expected, rel=1e-6)


def test_each_of_them_moves_the_gradient(ranks, one_process, tmp_path):
    """Otherwise the comparison above would say nothing about it."""
    for n, option in enumerate(EVERYTHING[1:]):
        without = [o for o in EVERYTHING if o != option] + [option.partition("=")[0] + "=0.0"]
        options = [FP32, NO_RECOMPUTE, *without, SIZE + "8"]
        norms = ranks(1).run(train_on_this_rank, options, str(tmp_path / str(n)))[0]["norms"]
        # The layouts must equal one process within 1e-5 (training_ranks.py).
        assert norms[0] != pytest.approx(one_process["norms"][0], rel=3e-5), option


MUON = ["--optimizer.name=Muon", FP32, NO_RECOMPUTE]
MUON_LAYOUTS = {
    "FSDP 2": (2, [SIZE + "4"]),
    "FSDP 4, uneven": (4, [SIZE + "2", "--model.args.kv_lora_rank=18"]),
    "EP 2 x HSDP 2 x 2": (4, [*ep(2), REPLICATE + "2", SIZE + "2"]),
    "EP 2 x FSDP 4, split inside of experts": (8, [*SPLIT_INSIDE, SIZE + "1"]),
    "TP 2, FSDP 2, split experts": layout(4, tp=2, etp=2),
}


@pytest.mark.parametrize("name", MUON_LAYOUTS)
def test_muon_trains_like_one_process(ranks, name, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("Muon's bf16 products on GPUs round differently for another layout")
    world_size, options = MUON_LAYOUTS[name]
    axes = ("expert", "tensor", "expert_tensor")
    alone = [f"--parallelism.{axis}_parallel_degree=1" for axis in axes]
    alone += [REPLICATE + "1", SIZE + "8"]
    expected = ranks(1).run(train_on_this_rank, [*MUON, *options, *alone], str(tmp_path))[0]
    for result in ranks(world_size).run(train_on_this_rank, [*MUON, *options], str(tmp_path)):
        assert_trained_alike(result, expected)


BF16_STATES = ["--optimizer.state_dtype=bfloat16", FP32, NO_RECOMPUTE]


def test_bf16_states_train_like_one_process(ranks, tmp_path):
    """A mean next to a rounding border may round the other way: 0.4 % of a step of 2e-3."""
    expected = ranks(1).run(train_on_this_rank, [*BF16_STATES, SIZE + "8"], str(tmp_path))[0]
    options = [*BF16_STATES, *ep(2, nodes_of(1)), REPLICATE + "2", SIZE + "2"]
    for result in ranks(4).run(train_on_this_rank, options, str(tmp_path)):
        assert result["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        for name, tensor in expected["state"].items():
            error = (result["state"][name] - tensor).norm().item()
            assert error <= 1e-4 * tensor.norm().item(), f"{name} is off by {error:.1e}"


def muon_on_a_grid() -> float:
    """How far a matrix that is split in both dims, as under tensor parallelism, ends from one that
    is not."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "tp"))
    torch.manual_seed(0)
    start, grads = torch.randn(6, 8), torch.randn(3, 6, 8)
    whole = nn.Parameter(start.clone())
    place = (Shard(0), Shard(1))
    split = nn.Parameter(distribute_tensor(start, mesh, place))
    settings = {"lr": 0.1, "momentum": 0.9, "adjust": "original", "adamw": {}}
    for p in (whole, split):
        optimizer = Muon([{"params": [p], "muon": True}], **settings)
        for grad in grads:
            p.grad = grad if p is whole else distribute_tensor(grad, mesh, place)
            optimizer.step()
    return (split.full_tensor() - whole).abs().max().item()


def test_muon_gathers_what_two_axes_split(ranks):
    assert max(ranks(4).run(muon_on_a_grid)) < 1e-6


# ---------------------------------------------------------------------------------------------
# Sequences that are split over ranks
# ---------------------------------------------------------------------------------------------


def balance_gradients(split: bool) -> list[Tensor]:
    """Gradients of the sequence-wise loss alone, for the gate and this rank's tokens."""
    torch.manual_seed(0)
    args = MoEArgs(num_experts=8, top_k=2, num_shared_experts=0, sequence_balance_coeff=0.5)
    layer = MoE(args, dim=4, hidden_dim=4).double().train()
    layer.init_weights(0.5)
    x, mask = torch.randn(3, 8, 4, dtype=torch.float64), torch.rand(3, 8) < 0.7
    layer.tokens_in_step.copy_(mask.sum())
    if split:
        layer.sequence_group = dist.group.WORLD
        mine = slice(dist.get_rank(), None, dist.get_world_size())  # parts need not be contiguous
        x, mask = x[:, mine], mask[:, mine]
    x = x.clone().requires_grad_()
    (layer(x, mask) * 0).sum().backward()
    return [layer.router.gate.weight.grad, x.grad]


def test_a_split_sequence_is_balanced_as_a_whole(ranks):
    gate, x = ranks(1).run(balance_gradients, False)[0]
    parts = ranks(2).run(balance_gradients, True)
    torch.testing.assert_close(sum(part[0] for part in parts), gate, rtol=1e-10, atol=1e-14)
    whole = torch.stack([part[1] for part in parts], dim=2).flatten(1, 2)
    torch.testing.assert_close(whole, x, rtol=1e-10, atol=1e-14)
    assert gate.abs().max() > 1e-3
