"""Initial weights depend on the seed and the name, on nothing else."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from torchtitan.ops.init import init_parameters


class Experts(nn.Module):
    def __init__(self, num_experts: int = 4, *, reverse: bool = False):
        super().__init__()
        shapes = {"matrix": (6, 5), "stack": (num_experts, 8, 6), "scale": (5,), "other": (6, 5)}
        for name in reversed(shapes) if reverse else shapes:
            setattr(self, name, nn.Parameter(torch.full(shapes[name], float("nan"))))


def values(model: nn.Module, seed: int = 1, std: float = 0.02) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    init_parameters(model, std)
    return {name: param.detach().clone() for name, param in model.named_parameters()}


@pytest.fixture
def one_process_mesh(tmp_path):
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


def test_values_do_not_depend_on_order_or_on_random_numbers_drawn_before():
    first = values(Experts())
    torch.manual_seed(1)
    torch.randn(100)
    shuffled = Experts(reverse=True)
    init_parameters(shuffled, 0.02)
    for name, param in shuffled.named_parameters():
        assert torch.equal(param, first[name])


def test_values_depend_on_the_seed_and_on_the_name():
    first, second = values(Experts()), values(Experts(), seed=2)
    assert not torch.equal(first["matrix"], second["matrix"])
    assert not torch.equal(first["stack"], second["stack"])
    assert not torch.equal(first["matrix"], first["other"])
    assert len({tuple(expert.flatten().tolist()) for expert in first["stack"]}) == 4
    # A layer inside a model has another name, so other values.
    inside = values(nn.Sequential(Experts(), Experts()))
    assert not torch.equal(inside["0.matrix"], inside["1.matrix"])


def test_drawing_weights_leaves_the_random_state_alone():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    init_parameters(Experts(), 0.02)
    assert torch.equal(torch.rand(4), expected)


def test_matrices_are_normal_with_the_given_std_and_vectors_one():
    model = nn.Module()
    model.matrix = nn.Parameter(torch.empty(300, 200))
    model.stack = nn.Parameter(torch.empty(3, 200, 100))
    model.scale = nn.Parameter(torch.empty(7))
    drawn = values(model, std=0.006)
    assert torch.equal(drawn["scale"], torch.ones(7))
    for name in ("matrix", "stack"):  # 60,000 values: the std of their std is 0.3 %
        assert drawn[name].std().item() == pytest.approx(0.006, rel=0.02)
        assert abs(drawn[name].mean().item()) < 4 * 0.006 / 60_000**0.5
        kurtosis = (drawn[name] / 0.006).pow(4).mean().item()
        assert kurtosis == pytest.approx(3.0, abs=0.15)


def test_one_expert_has_its_values_whatever_the_number_of_experts():
    few, many = values(Experts(2))["stack"], values(Experts(4))["stack"]
    assert torch.equal(few, many[:2])


@pytest.mark.parametrize("default_dtype", [torch.float32, torch.bfloat16])
def test_bf16_parameters_are_the_rounded_fp32_ones(default_dtype):
    exact = values(Experts())
    torch.set_default_dtype(default_dtype)
    try:
        drawn = values(Experts().bfloat16())
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(tensor.dtype == torch.bfloat16 for tensor in drawn.values())
    for name, tensor in exact.items():
        assert torch.equal(drawn[name], tensor.bfloat16())


@pytest.mark.parametrize("placement", [Shard(0), Shard(1), Replicate()])
def test_sharded_parameters_get_the_plain_values(one_process_mesh, placement):
    plain, model = values(Experts()), Experts()
    for name in ("matrix", "stack", "other"):
        sharded = distribute_tensor(getattr(model, name).data, one_process_mesh, [placement])
        setattr(model, name, nn.Parameter(sharded))
    torch.manual_seed(1)
    init_parameters(model, 0.02)
    for name in ("matrix", "stack", "other"):
        assert torch.equal(getattr(model, name).full_tensor(), plain[name])


def test_meta_parameters_stay_on_meta():
    model = Experts().to("meta")
    init_parameters(model, 0.02)
    assert all(param.is_meta for param in model.parameters())
