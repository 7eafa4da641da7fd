"""One norm over parameters on several meshes: that of all gradients in one process."""

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from torchtitan.distributed.grad_norm import clip_grad_norm

SHAPES = {"dense": (8, 6), "other dense": (7, 3), "experts": (4, 4, 2), "copies": (5,)}


def gradients(scale: float) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {
        name: scale * torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in SHAPES.items()
    }


def clip_on_this_rank(scale: float, max_norm: float) -> tuple[float, dict[str, Tensor]]:
    """Dense weights split over four ranks (unevenly, too), experts over two ranks twice, and a
    plain tensor that every rank has; one parameter got no gradient."""
    flat = init_device_mesh("cpu", (4,))
    square = init_device_mesh("cpu", (2, 2))
    places = {
        "dense": (flat, [Shard(0)]),
        "other dense": (flat, [Shard(0)]),
        "experts": (square, [Replicate(), Shard(0)]),
    }
    params = {}
    for name, grad in gradients(scale).items():
        value = distribute_tensor(grad, *places[name]) if name in places else grad
        params[name] = nn.Parameter(torch.zeros_like(value))
        params[name].grad = value.clone()
    unused = nn.Parameter(torch.ones(2))
    norm = clip_grad_norm([*params.values(), unused], max_norm)
    assert unused.grad is None
    clipped = {n: p.grad.full_tensor() if n in places else p.grad for n, p in params.items()}
    return norm.item(), clipped


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_norm_and_clipped_gradients_are_those_of_one_process(ranks, scale):
    max_norm = 0.5
    whole = gradients(scale)
    expected = torch.cat([grad.flatten() for grad in whole.values()]).norm().item()
    factor = min(1.0, max_norm / expected)
    for norm, clipped in ranks(4).run(clip_on_this_rank, scale, max_norm):
        assert norm == pytest.approx(expected, rel=1e-12)
        for name, grad in whole.items():
            # torch divides by norm + 1e-6
            torch.testing.assert_close(clipped[name], grad * factor, rtol=1e-5, atol=0)
