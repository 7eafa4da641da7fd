"""The schedule against closed forms, torch's own schedulers, and its properties."""

import logging
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchtitan.components.optimizer.lr_scheduler import build_lr_scheduler, lr_factor

PLAIN = dict(decay_ratio=None, decay_type="linear", min_lr_factor=0.0)


def factors(total_steps, **schedule):
    return [lr_factor(step, total_steps=total_steps, **schedule) for step in range(total_steps + 1)]


def test_warmup_stable_decay_by_hand():
    got = factors(10, warmup_steps=2, decay_ratio=0.4, decay_type="linear", min_lr_factor=0.2)
    #     warm-up  stable                decay: 1 - 0.8 * 1/4, 2/4, 3/4, and the step after the end
    hand = [0.5, 1, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2]
    assert got == pytest.approx(hand, abs=1e-12)


@pytest.mark.parametrize(
    "decay_type, half_way", [("linear", 0.5), ("sqrt", 1 - math.sqrt(0.5)), ("cosine", 0.5)]
)
def test_decay_shapes_half_way_and_at_a_quarter(decay_type, half_way):
    quarter = {"linear": 0.75, "sqrt": 0.5, "cosine": 0.5 + math.sqrt(2) / 4}[decay_type]
    got = factors(8, warmup_steps=0, decay_ratio=None, decay_type=decay_type, min_lr_factor=0.0)
    assert got[0] == 1.0
    assert got[2] == pytest.approx(quarter)
    assert got[4] == pytest.approx(half_way)


def optimizer_of(lr=0.3):
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)


def rates(optimizer, scheduler, steps):
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


def test_cosine_equals_torchs_cosine_annealing():
    ours, theirs = optimizer_of(), optimizer_of()
    mine = build_lr_scheduler(
        ours,
        total_steps=50,
        warmup_steps=0,
        decay_ratio=None,
        decay_type="cosine",
        min_lr_factor=0.1,
    )
    torchs = torch.optim.lr_scheduler.CosineAnnealingLR(theirs, T_max=50, eta_min=0.03)
    assert rates(ours, mine, 50) == pytest.approx(rates(theirs, torchs, 50), rel=1e-9)


def test_linear_warmup_and_decay_equal_torchs_chain():
    ours, theirs = optimizer_of(), optimizer_of()
    mine = build_lr_scheduler(ours, total_steps=30, warmup_steps=6, **PLAIN)
    linear = torch.optim.lr_scheduler.LinearLR
    # Ours is 1 at step 5 (the last of the warm-up) and at step 6 (the first of the decay).
    up = [0.3 * f for f in (1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1)]
    down = rates(theirs, linear(theirs, start_factor=1.0, end_factor=0.0, total_iters=24), 24)
    assert rates(ours, mine, 30) == pytest.approx(up + down, rel=1e-9)


schedules = st.fixed_dictionaries(
    dict(
        warmup_steps=st.integers(0, 80),
        decay_ratio=st.none() | st.floats(0, 1),
        decay_type=st.sampled_from(["linear", "sqrt", "cosine"]),
        min_lr_factor=st.floats(0, 1),
    )
)


@settings(max_examples=150, deadline=None)
@given(total=st.integers(1, 60), schedule=schedules)
def test_rises_then_stays_then_falls_and_never_reaches_zero(total, schedule):
    got = factors(total, **schedule)
    peak = min(schedule["warmup_steps"], total)
    assert all(a < b for a, b in zip(got[:peak], got[1:peak], strict=False))
    assert all(a >= b - 1e-12 for a, b in zip(got[peak:], got[peak + 1 :], strict=False))
    assert all(0 < f <= 1 for f in got[:-1]), "every real step learns"
    decays = peak < total and (
        schedule["decay_ratio"] is None or round(schedule["decay_ratio"] * total) > 0
    )
    assert got[total] == pytest.approx(schedule["min_lr_factor"] if decays else 1.0)
    after_the_end = lr_factor(total + 7, total_steps=total, **schedule)
    assert after_the_end == got[total]


@settings(max_examples=60, deadline=None)
@given(schedule=schedules, decay_type=st.sampled_from(["linear", "cosine"]))
def test_no_jump_between_neighbouring_steps(schedule, decay_type):
    total = 4000
    got = factors(total, **{**schedule, "decay_type": decay_type, "decay_ratio": 0.5})
    warmup = schedule["warmup_steps"]
    jumps = [abs(a - b) for a, b in zip(got[warmup:], got[warmup + 1 :], strict=False)]
    # Half of 4000 steps decay; the steepest slope is pi/2 times the mean one (cosine, middle).
    assert max(jumps) <= 1.01 * math.pi / 2 / 2000


def test_a_long_warmup_is_clamped_with_a_warning(caplog):
    optimizer = optimizer_of(lr=1.0)
    with caplog.at_level(logging.WARNING, logger="torchtitan"):
        scheduler = build_lr_scheduler(optimizer, total_steps=4, warmup_steps=200, **PLAIN)
    assert rates(optimizer, scheduler, 4) == [0.25, 0.5, 0.75, 1.0]
    assert "warmup_steps = 200" in caplog.text and "training.steps = 4" in caplog.text


def test_a_decay_that_does_not_fit_is_shortened_with_a_warning(caplog):
    optimizer = optimizer_of(lr=1.0)
    with caplog.at_level(logging.WARNING, logger="torchtitan"):
        scheduler = build_lr_scheduler(
            optimizer,
            total_steps=4,
            warmup_steps=2,
            decay_ratio=1.0,
            decay_type="linear",
            min_lr_factor=0.0,
        )
    assert rates(optimizer, scheduler, 4) == [0.5, 1.0, 1.0, 0.5]
    assert "decay_ratio = 1.0" in caplog.text


def test_state_dict_resumes_in_the_middle():
    whole, first, second = optimizer_of(), optimizer_of(), optimizer_of()
    build = dict(total_steps=20, warmup_steps=3, **PLAIN)
    expected = rates(whole, build_lr_scheduler(whole, **build), 20)
    before = build_lr_scheduler(first, **build)
    rates(first, before, 8)
    after = build_lr_scheduler(second, **build)
    after.load_state_dict(before.state_dict())
    second.load_state_dict(first.state_dict())
    assert rates(second, after, 12) == expected[8:]
