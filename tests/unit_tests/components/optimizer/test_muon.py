"""Muon against torch's own, against the singular value decomposition, and as an optimizer."""

import pytest
import torch
from torch import nn

from tests.tiny_run import losses, tiny
from tests.unit_tests.components.optimizer import settings
from torchtitan.components.optimizer import build_optimizer
from torchtitan.components.optimizer.muon import orthogonalise, step_size
from torchtitan.models.deepseek_v3 import DeepSeekV3Model, deepseekv3_args
from torchtitan.train import main

SETTINGS = settings.SETTINGS | {"name": "Muon", "implementation": "fused"}


class Parts(nn.Module):
    """A matrix of each kind, a stack, a vector."""

    def __init__(self):
        super().__init__()
        self.tok_embeddings = nn.Embedding(7, 6)
        self.wide, self.tall = nn.Linear(12, 6, bias=False), nn.Linear(6, 12, bias=False)
        self.experts = nn.Parameter(torch.randn(3, 6, 4))
        self.norm = nn.RMSNorm(6)
        self.output = nn.Linear(6, 7, bias=False)


def give_gradients(module: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in module.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


def test_singular_values_become_about_one_and_directions_stay():
    x = torch.randn(4, 10, 6, dtype=torch.float64)
    got = orthogonalise(x, dtype=torch.float64)
    U, S, Vh = torch.linalg.svd(x, full_matrices=False)
    in_that_basis = U.mT @ got @ Vh.mT
    values = in_that_basis.diagonal(dim1=-2, dim2=-1)
    assert (0.6 < values).all() and (values < 1.3).all()
    off_diagonal = in_that_basis - torch.diag_embed(values)
    assert off_diagonal.abs().max() < 1e-9
    torch.testing.assert_close(got[2], orthogonalise(x[2], dtype=torch.float64))


def test_scaled_updates_are_as_large_as_adamws():
    for shape in ((64, 16), (16, 64), (32, 32)):
        update = orthogonalise(torch.randn(shape)) * step_size(shape, "match_rms_adamw")
        assert update.square().mean().sqrt().item() == pytest.approx(0.2, rel=0.25)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with 2.9")
@pytest.mark.parametrize("adjust", ["match_rms_adamw", "original"])
def test_steps_are_those_of_torchs_muon_and_adamw(adjust, monkeypatch):
    monkeypatch.setattr("torchtitan.components.optimizer.muon.orthogonalise", in_bf16)
    ours = Parts()
    theirs = Parts()
    theirs.load_state_dict(ours.state_dict())
    optimizer = build_optimizer([ours], **SETTINGS, muon_adjust=adjust, muon_momentum=0.9)
    # torch knows no stacks: each expert is a parameter of its own there.
    experts = [nn.Parameter(matrix.detach().clone()) for matrix in theirs.experts]
    muon = torch.optim.Muon(
        [theirs.wide.weight, theirs.tall.weight, *experts],
        lr=0.02,
        weight_decay=0.1,
        momentum=0.9,
        adjust_lr_fn=adjust,
    )
    matrices = [theirs.tok_embeddings.weight, theirs.output.weight]
    adamw = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": 0.1},
            {"params": [theirs.norm.weight], "weight_decay": 0.0},
        ],
        lr=0.02,
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    for step in range(4):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        for expert, grad in zip(experts, theirs.experts.grad, strict=True):
            expert.grad = grad
        optimizer.step()
        muon.step()
        adamw.step()
    with torch.no_grad():
        theirs.experts.copy_(torch.stack(list(experts)))
    for name, expected in theirs.named_parameters():
        # Both round to bf16 along the way, in another order of operations.
        tolerance = 1e-6 if name.startswith(("tok", "output", "norm")) else 4e-3
        torch.testing.assert_close(
            dict(ours.named_parameters())[name], expected, rtol=0, atol=tolerance, msg=name
        )


def in_bf16(x: torch.Tensor, **settings: object) -> torch.Tensor:
    return orthogonalise(x, dtype=torch.bfloat16)


def test_every_parameter_of_the_model_has_one_owner():
    args = deepseekv3_args["debugmodel"].for_run(overrides={"n_layers": 2}, seq_len=16)
    with torch.device("meta"):
        model = DeepSeekV3Model(args)
    optimizer = build_optimizer([model], **SETTINGS)
    by_muon = {p for g in optimizer.param_groups if g["muon"] for p in g["params"]}
    for name, p in model.named_parameters():
        owners = sum(any(p is q for q in g["params"]) for g in optimizer.param_groups)
        assert owners == 1, name
        matrix = p.ndim >= 2 and not name.startswith(("tok_embeddings", "output"))
        assert (p in by_muon) == matrix, name


def test_a_run_learns_and_resumes_with_the_same_bits(tmp_path):
    options = ["--optimizer.name=Muon", "--optimizer.lr=3e-3", "--checkpoint.enable"]
    options += ["--checkpoint.last_save_model_only=false", "--lr_scheduler.min_lr_factor=1"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main([*tiny(whole, training__steps=6), *options]) == 0
    assert main([*tiny(parts, training__steps=3), *options]) == 0
    assert main([*tiny(parts, training__steps=6), *options]) == 0
    assert losses(parts) == losses(whole)
    assert losses(whole)[-1] < losses(whole)[0] - 0.2
