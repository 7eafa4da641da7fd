"""A step whose loss or gradient is not finite never reaches the weights: stop there, or skip it."""

import math
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.tiny_run import records, tiny
from torchtitan.components.loss import cross_entropy_sum
from torchtitan.components.metrics.loss_guard import MAX_SKIPS_IN_A_ROW
from torchtitan.config import ConfigManager
from torchtitan.tools.errors import RunError
from torchtitan.train import main
from torchtitan.trainer import Trainer, forward_backward
from torchtitan.trainer.step_log import Interval

# The same learning rate at each step: a run without the poisoned step is then an exact twin.
CONSTANT_LR = {"lr_scheduler__min_lr_factor": 1}
KINDS = ["loss nan", "loss inf", "gradient nan", "activations nan"]


def poisoned_loss(kind: str, at_call: int) -> Callable[[Tensor, Tensor], Tensor]:
    """`cross_entropy_sum`, but what it is called with (or gives) for the n-th time is poisoned."""
    calls, bad = 0, float(kind.split()[1])

    def loss_fn(logits: Tensor, labels: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == at_call and kind.startswith("gradient"):
            logits.register_hook(lambda gradient: gradient * bad)
        loss = cross_entropy_sum(logits, labels)
        return loss * bad if calls == at_call and kind.startswith("loss") else loss

    return loss_fn


def poison(trainer: Trainer, kind: str, at_call: int) -> None:
    """Spoil one micro-batch of this trainer, counted from 1."""
    trainer.passes.loss_fn = poisoned_loss(kind, at_call)
    if kind.startswith("activations"):
        calls = 0

        def spoil(_module, _inputs, x_BSD: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            return x_BSD * math.nan if calls == at_call else x_BSD

        trainer.model.tok_embeddings.register_forward_hook(spoil)


def state_of(trainer: Trainer) -> dict[str, Tensor]:
    """Weights, expert bias and optimizer state of this rank, copied."""
    state = {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}
    state |= {
        f"{index}.{name}": value.clone()
        for index, slots in enumerate(trainer.optimizer.state.values())
        for name, value in slots.items()
    }
    return {name: getattr(value, "_local_tensor", value) for name, value in state.items()}


def assert_same_bits(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


def start(folder: Path, policy: str, **changes) -> Trainer:
    options = tiny(folder, training__non_finite_loss=policy, **CONSTANT_LR, **changes)
    return Trainer(ConfigManager().parse_args(options))


def step(trainer: Trainer, batches) -> float:
    trainer.step += 1
    return trainer.train_step(batches, Interval()).loss


@pytest.mark.parametrize("kind", KINDS)
def test_stop_leaves_the_weights_of_the_last_good_step(tmp_path, kind):
    with closing(start(tmp_path, "stop")) as trainer:
        poison(trainer, kind, at_call=3)
        batches = iter(trainer.dataloader)
        step(trainer, batches), step(trainer, batches)
        good = state_of(trainer)
        with pytest.raises(RunError, match=r"step 3: .* those of step 2, the last one with finite"):
            step(trainer, batches)
        assert_same_bits(state_of(trainer), good)


def test_a_first_step_that_is_not_finite_asks_for_the_loaded_weights(tmp_path):
    with closing(start(tmp_path, "stop")) as trainer:
        poison(trainer, KINDS[0], at_call=1)
        with pytest.raises(RunError, match="step 1: .* if they were loaded, see whether they are"):
            step(trainer, iter(trainer.dataloader))


@pytest.mark.parametrize("kind", KINDS)
def test_a_skipped_step_leaves_no_trace(tmp_path, kind):
    """The oracle is a run that never saw the poisoned micro-batches: weights, expert bias (so its
    token counts too) and optimizer state are the same bits one step later."""
    accumulate = {"training__global_batch_size": 8}  # two micro-batches a step
    with (
        closing(start(tmp_path, "skip_step", **accumulate)) as skipping,
        closing(start(tmp_path / "twin", "skip_step", **accumulate)) as twin,
    ):
        poison(skipping, kind, at_call=4)  # the second micro-batch of step 2
        batches, twin_batches = iter(skipping.dataloader), iter(twin.dataloader)

        step(skipping, batches), step(twin, twin_batches)
        before = state_of(skipping)
        loss = step(skipping, batches)
        assert math.isfinite(loss) == kind.startswith("gradient")
        assert_same_bits(state_of(skipping), before)
        assert skipping.loss_guard.skipped_steps == 1

        next(twin_batches), next(twin_batches)
        for _ in range(2):
            assert step(skipping, batches) == step(twin, twin_batches)
        assert_same_bits(state_of(skipping), state_of(twin))
        assert any(bool(moe.expert_bias.any()) for moe in twin.moes.values()), "the bias does move"


def test_the_program_stops_with_one_sentence_and_exit_code_1(tmp_path, monkeypatch, capfd):
    loss_fn = poisoned_loss("loss nan", at_call=3)
    monkeypatch.setattr(forward_backward, "build_loss", lambda *_, **__: loss_fn)
    assert main(tiny(tmp_path)) == 1
    error, *more = [line for line in capfd.readouterr().err.splitlines() if " E " in line]
    assert not more and "Traceback" not in error
    for part in (
        "step 3:",
        "the loss of rank 0 is not finite",
        "of step 2, the last one with finite numbers",
    ):
        assert part in error
    assert "training.non_finite_loss to 'skip_step'" in error, "the way out"
    assert [record["step"] for record in records(tmp_path)] == [1, 2]


def test_the_program_goes_on_after_a_skipped_step_and_counts_it(tmp_path, monkeypatch, capfd):
    loss_fn = poisoned_loss("loss nan", at_call=3)
    monkeypatch.setattr(forward_backward, "build_loss", lambda *_, **__: loss_fn)
    options = ["--training.non_finite_loss=skip_step", "--metrics.enable_tensorboard"]
    assert main([*tiny(tmp_path, training__steps=5), *options]) == 0
    assert "Step 3 skipped (1 so far): the loss of rank 0 is not finite" in capfd.readouterr().err
    found = records(tmp_path)
    assert [record["skipped_steps"] for record in found] == [0, 0, 1, 1, 1]
    assert found[2]["loss"] == "NaN" and all(float(found[n]["loss"]) < 10 for n in (3, 4))


# ---------------------------------------------------------------------------------------------
# Several ranks
# ---------------------------------------------------------------------------------------------

LAYOUTS = {
    "FSDP": {},
    "DDP": {
        "parallelism__data_parallel_replicate_degree": 2,
        "parallelism__data_parallel_shard_degree": 1,
    },
}


def poison_rank_1(folder: Path, policy: str, kind: str, layout: str) -> dict:
    """Two steps, the second one poisoned on rank 1; then, unless stopped, a good one."""
    trainer = start(folder, policy, **LAYOUTS[layout])
    if trainer.rank == 1:
        poison(trainer, kind, at_call=2)
    batches = iter(trainer.dataloader)
    step(trainer, batches)
    before, sentence, loss = state_of(trainer), None, math.nan
    try:
        step(trainer, batches)
    except RunError as error:
        sentence = str(error)
    unchanged = all(torch.equal(value, before[name]) for name, value in state_of(trainer).items())
    if sentence is None:
        loss = step(trainer, batches)
    skipped = trainer.loss_guard.skipped_steps
    trainer.close()
    return {"sentence": sentence, "unchanged": unchanged, "skipped": skipped, "loss": loss}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["loss nan", "activations nan", "gradient nan"])
def test_all_ranks_stop_together_and_name_the_culprit(ranks, tmp_path, kind, layout):
    first, second = ranks(2).run(poison_rank_1, tmp_path, "stop", kind, layout)
    assert first["sentence"] == second["sentence"]
    # A gradient is summed before anybody looks at it, so nobody knows whose it was.
    culprit = "the gradient norm" if kind.startswith("gradient") else "the loss of rank 1"
    assert first["sentence"].startswith(f"step 2: {culprit} is not finite")
    assert first["unchanged"] and second["unchanged"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["activations nan", "gradient nan"])
def test_all_ranks_skip_together(ranks, tmp_path, kind, layout):
    first, second = ranks(2).run(poison_rank_1, tmp_path, "skip_step", kind, layout)
    assert first["unchanged"] and second["unchanged"]
    assert first["skipped"] == second["skipped"] == 1
    assert first["loss"] == second["loss"] and math.isfinite(first["loss"])


def test_skipping_gives_up_on_a_model_that_is_lost(tmp_path):
    with closing(start(tmp_path, "skip_step")) as trainer:
        batches = iter(trainer.dataloader)
        step(trainer, batches)
        torch.nn.init.constant_(trainer.model.output.weight, math.nan)
        for _ in range(MAX_SKIPS_IN_A_ROW - 1):
            step(trainer, batches)
        with pytest.raises(RunError, match=", for the 10th step in a row; .* those of step 1, the"):
            step(trainer, batches)
