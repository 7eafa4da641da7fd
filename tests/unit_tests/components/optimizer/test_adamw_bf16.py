"""AdamW with bf16 running means: the formula with the rounding written out, and in a run."""

import pytest
import torch
from torch import nn

from tests.tiny_run import losses, tiny
from torchtitan.components.optimizer.adamw_bf16 import AdamWBf16
from torchtitan.config import ConfigManager, validate
from torchtitan.tools.errors import UserError
from torchtitan.train import main

LR, BETAS, EPS, DECAY = 0.01, (0.9, 0.95), 1e-8, 0.1
BF16 = "--optimizer.state_dtype=bfloat16"


def test_five_steps_are_the_formula_with_two_roundings():
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(4, 5))
    w = p.detach().double().clone()
    mean = square = torch.zeros(4, 5)
    optimizer = AdamWBf16([{"params": [p], "weight_decay": DECAY}], lr=LR, betas=BETAS, eps=EPS)
    for t in range(1, 6):
        p.grad = torch.randn(4, 5)
        optimizer.step()
        exact_mean = BETAS[0] * mean + (1 - BETAS[0]) * p.grad
        exact_square = BETAS[1] * square + (1 - BETAS[1]) * p.grad**2
        corrected = exact_mean / (1 - BETAS[0] ** t)
        w = w * (1 - LR * DECAY)
        w -= LR * corrected / ((exact_square / (1 - BETAS[1] ** t)).sqrt() + EPS)
        mean, square = exact_mean.bfloat16().float(), exact_square.bfloat16().float()
    torch.testing.assert_close(p.detach().double(), w, rtol=1e-5, atol=1e-6)
    assert {t.dtype for n, t in optimizer.state[p].items() if n != "step"} == {torch.bfloat16}


def test_with_fp32_states_it_is_torchs_adamw():
    """The same update but for the rounding: the first step has nothing to round yet."""
    a = nn.Parameter(torch.randn(6, 3))
    b = nn.Parameter(a.detach().clone())
    a.grad = b.grad = torch.randn(6, 3)
    AdamWBf16([{"params": [a], "weight_decay": DECAY}], lr=LR, betas=BETAS, eps=EPS).step()
    torch.optim.AdamW([b], lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY).step()
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_a_run_stays_near_fp32_and_resumes_with_the_same_bits(tmp_path):
    options = ["--checkpoint.enable", "--checkpoint.last_save_model_only=false"]
    options.append("--lr_scheduler.min_lr_factor=1")
    fp32, whole, parts = (tmp_path / name for name in ("fp32", "whole", "parts"))
    assert main([*tiny(fp32, training__steps=8), *options]) == 0
    assert main([*tiny(whole, training__steps=8), *options, BF16]) == 0
    assert main([*tiny(parts, training__steps=4), *options, BF16]) == 0
    assert main([*tiny(parts, training__steps=8), *options, BF16]) == 0
    assert losses(parts) == losses(whole) != losses(fp32)
    assert losses(whole) == pytest.approx(losses(fp32), rel=0.01)


@pytest.mark.parametrize(
    "option, sentence",
    [
        ("--optimizer.beta2=0.999", "optimizer.beta2 = 0.999 .* less than bf16 resolves"),
        ("--optimizer.name=Muon", 'is for AdamW, but optimizer.name is "Muon"'),
    ],
)
def test_what_bf16_can_not_do_is_one_sentence(option, sentence):
    with pytest.raises(UserError, match=sentence):
        validate(ConfigManager().parse_args([BF16, option]), 1)
