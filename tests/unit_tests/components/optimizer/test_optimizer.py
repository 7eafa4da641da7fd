"""Parameter groups, and updates equal to AdamW written out in ten lines."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from tests.unit_tests.components.optimizer import settings
from torchtitan.components.optimizer import build_optimizer
from torchtitan.tools.errors import UserError

SETTINGS = settings.SETTINGS | {"name": "AdamW", "implementation": "for-loop"}
IMPLEMENTATIONS = ["fused", "foreach", "for-loop"]


class Toy(nn.Module):
    """One of each kind: embedding, stacked experts, matrix, norm scale, bias, frozen, shared."""

    def __init__(self):
        super().__init__()
        self.tok_embeddings = nn.Embedding(7, 4)
        self.experts = nn.Parameter(torch.randn(3, 5, 4))
        self.linear = nn.Linear(4, 4)
        self.norm = nn.RMSNorm(4)
        self.frozen = nn.Parameter(torch.randn(4, 4), requires_grad=False)
        self.tied = self.linear


def build(parts, **changes):
    return build_optimizer(parts, **{**SETTINGS, **changes})


def test_matrices_decay_and_vectors_do_not():
    model = Toy()
    groups = build([model]).param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    ids = [{id(p) for p in group["params"]} for group in groups]
    assert ids[0] == {id(model.tok_embeddings.weight), id(model.experts), id(model.linear.weight)}
    assert ids[1] == {id(model.linear.bias), id(model.norm.weight)}


def test_all_means_all():
    groups = build([Toy()], weight_decay_on="all").param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.1]


def test_every_trainable_parameter_of_every_part_is_in_exactly_one_group():
    parts = [Toy(), Toy()]
    parts[1].linear = parts[0].linear  # Shared between parts: still once.
    parts[1].tied = parts[0].linear
    seen = [id(p) for group in build(parts).param_groups for p in group["params"]]
    expected = {id(p) for part in parts for p in part.parameters() if p.requires_grad}
    assert len(seen) == len(set(seen)) and set(seen) == expected


def test_a_part_without_vectors_still_has_two_groups():
    part = nn.Linear(4, 4, bias=False)
    optimizer = build([part], implementation="fused")
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 0]
    part.weight.grad = torch.ones(4, 4)
    before = part.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(part.weight, before)


def written_out_adamw(param, grads, *, lr, beta1, beta2, eps, weight_decay):
    mean = torch.zeros_like(param)
    square = torch.zeros_like(param)
    for t, grad in enumerate(grads, start=1):
        param = param - lr * weight_decay * param
        mean = beta1 * mean + (1 - beta1) * grad
        square = beta2 * square + (1 - beta2) * grad**2
        unbiased_mean, unbiased_square = mean / (1 - beta1**t), square / (1 - beta2**t)
        param = param - lr * unbiased_mean / (unbiased_square.sqrt() + eps)
    return param


@pytest.mark.parametrize("weight_decay_on", ["matrices", "all"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_updates_equal_adamw_written_out(implementation, weight_decay_on):
    torch.manual_seed(0)
    model = Toy()
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    start = {name: p.detach().double() for name, p in params.items()}
    grads = {name: [torch.randn_like(p) for _ in range(5)] for name, p in params.items()}
    optimizer = build([model], implementation=implementation, weight_decay_on=weight_decay_on)
    for t in range(5):
        for name, p in params.items():
            p.grad = grads[name][t].clone()
        optimizer.step()
    for name, p in params.items():
        decay = 0.1 if p.ndim >= 2 or weight_decay_on == "all" else 0.0
        double_grads = [grad.double() for grad in grads[name]]
        expected = written_out_adamw(
            start[name], double_grads, lr=0.02, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=decay
        )
        torch.testing.assert_close(p.detach().double(), expected, atol=1e-6, rtol=0, msg=name)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_adam_puts_the_decay_into_the_gradient(implementation):
    torch.manual_seed(0)
    model, reference = nn.Linear(3, 3), nn.Linear(3, 3)
    reference.load_state_dict(model.state_dict())
    optimizer = build([model], name="Adam", implementation=implementation)
    no_decay = build([reference], name="Adam", weight_decay=0.0)
    for _ in range(3):
        grad = torch.randn(3, 3)
        model.weight.grad = grad.clone()
        reference.weight.grad = grad + 0.1 * reference.weight.detach()
        optimizer.step()
        no_decay.step()
    torch.testing.assert_close(model.weight, reference.weight, atol=1e-6, rtol=0)


def test_unknown_name_is_refused_with_the_choices():
    with pytest.raises(UserError, match="optimizer.name = 'Lion' is not known.*Adam, AdamW"):
        build([Toy()], name="Lion")


@pytest.fixture
def four_fake_ranks():
    """Rank 0 of 4, with a back-end that talks to nobody: a step needs no communication."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_sharded_parameters_on_two_meshes_beside_plain_ones(four_fake_ranks, implementation):
    fsdp = init_device_mesh("cpu", (4,), mesh_dim_names=("fsdp",))
    experts = init_device_mesh("cpu", (2, 2), mesh_dim_names=("efsdp", "ep"))
    torch.manual_seed(0)
    shards = [torch.randn(2, 3), torch.randn(1, 4, 3), torch.randn(5), torch.randn(3, 2)]
    model = nn.Module()
    model.dense = nn.Parameter(DTensor.from_local(shards[0].clone(), fsdp, [Shard(0)]))
    model.w1 = nn.Parameter(DTensor.from_local(shards[1].clone(), experts, [Shard(0), Shard(0)]))
    model.norm = nn.Parameter(DTensor.from_local(shards[2].clone(), fsdp, [Replicate()]))
    model.plain = nn.Parameter(shards[3].clone())
    optimizer = build([model], implementation=implementation)
    grads = [torch.randn_like(shard) for shard in shards]
    for p, grad in zip(model.parameters(), grads, strict=True):
        p.grad = (
            DTensor.from_local(grad, p.device_mesh, p.placements, run_check=False)
            if isinstance(p, DTensor)
            else grad.clone()
        )
    optimizer.step()
    for p, shard, grad in zip(model.parameters(), shards, grads, strict=True):
        local = p.to_local() if isinstance(p, DTensor) else p
        expected = written_out_adamw(
            shard,
            [grad],
            lr=0.02,
            beta1=0.9,
            beta2=0.95,
            eps=1e-8,
            weight_decay=0.1 if p.ndim >= 2 else 0.0,
        )
        torch.testing.assert_close(local.detach(), expected, atol=1e-6, rtol=0)
