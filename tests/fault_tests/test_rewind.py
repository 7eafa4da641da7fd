"""A loss that is not finite, or far too high: back to the last checkpoint, past the bad batch."""

import json
import math
from contextlib import closing
from pathlib import Path

import pytest
import torch

from tests.fault_tests.test_non_finite import poisoned_loss, state_of
from tests.tiny_run import records, tiny
from torchtitan.components.metrics.loss_guard import MAX_REWINDS_IN_A_ROW, RECENT_LOSSES, LossGuard
from torchtitan.config import ConfigManager, Training
from torchtitan.tools.errors import RunError
from torchtitan.train import main
from torchtitan.trainer import Trainer, forward_backward
from torchtitan.trainer.step_log import Interval

SAVES = {
    "checkpoint__enable": True,
    "checkpoint__interval": 2,
    "checkpoint__last_save_model_only": False,
    "training__non_finite_loss": "rewind",
}


def start(folder: Path, **changes) -> Trainer:
    return Trainer(ConfigManager().parse_args(tiny(folder, **SAVES | changes)))


def test_a_rewind_goes_on_as_if_the_batches_since_the_checkpoint_had_not_been(
    tmp_path, monkeypatch
):
    """Poison in step 4, checkpoint of step 2: batches 3 and 4 are passed over. The oracle is a run
    that resumes from the checkpoint by hand with batch 5."""
    loss_fn = poisoned_loss("loss nan", at_call=4)
    monkeypatch.setattr(forward_backward, "build_loss", lambda *_, **__: loss_fn)
    with closing(start(tmp_path / "a", training__steps=5)) as trainer:
        trainer.train()
        rewound, tokens = state_of(trainer), trainer.tokens_seen
        assert trainer.loss_guard.rewinds == 1 and trainer.loss_guard.skipped_steps == 0
    found = records(tmp_path / "a")
    assert [record["step"] for record in found] == [1, 2, 3, 4, 5]
    assert [record["rewinds"] for record in found] == [0, 0, 1, 1, 1]
    replaced = (tmp_path / "a/metrics.replaced.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in replaced] == [3, 4]
    assert json.loads(replaced[-1])["loss"] == "NaN", "what led to it is kept"
    assert tokens == 5 * 4 * 32, "of the steps that count"

    monkeypatch.undo()
    with closing(start(tmp_path / "b", training__steps=5)) as oracle:
        batches, losses = iter(oracle.dataloader), []
        for step in (1, 2, 3, 4, 5):
            if step == 3:
                next(batches), next(batches)
            oracle.step = step
            losses.append(oracle.train_step(batches, Interval()).loss)
        expected = state_of(oracle)
    assert [float(record["loss"]) for record in found[-3:]] == losses[-3:]
    for name, value in expected.items():
        assert torch.equal(rewound[name], value), name


def test_a_restart_after_a_rewind_does_not_meet_the_bad_batch_again(tmp_path, monkeypatch):
    """The rewound state was saved at once, with the data position behind the bad batch."""
    loss_fn = poisoned_loss("loss nan", at_call=4)
    monkeypatch.setattr(forward_backward, "build_loss", lambda *_, **__: loss_fn)
    with closing(start(tmp_path, training__steps=5)) as trainer:
        trainer.train()
        position = trainer.dataloader.local_state()["consumed"]
        whole = state_of(trainer)
    for step in (4, 5):
        for path in (tmp_path / f"checkpoint/step-{step}").iterdir():
            path.unlink()
        (tmp_path / f"checkpoint/step-{step}").rmdir()
    monkeypatch.undo()
    with closing(start(tmp_path, training__steps=5)) as trainer:
        assert trainer.step == 2 and trainer.loss_guard.rewinds == 1
        trainer.train()
        assert trainer.dataloader.local_state()["consumed"] == position == 7 * 4
        for name, value in state_of(trainer).items():
            assert torch.equal(value, whole[name]), name


def rewind_where_rank_1_is_poisoned(folder: Path) -> tuple[int, int, list[float]]:
    trainer = start(folder, training__steps=4)
    if trainer.rank == 1:
        trainer.passes.loss_fn = poisoned_loss("loss nan", at_call=3)
    trainer.train()
    trainer.close()
    return trainer.step, trainer.loss_guard.rewinds, [float(r["loss"]) for r in records(folder)]


def test_all_ranks_rewind_together(ranks, tmp_path):
    for step, rewinds, losses in ranks(2).run(rewind_where_rank_1_is_poisoned, tmp_path):
        assert (step, rewinds) == (4, 1)
        assert len(losses) == 4 and all(map(math.isfinite, losses)), "the bad record has gone"


def test_without_a_checkpoint_a_rewind_is_a_sentence_and_exit_code_1(tmp_path, monkeypatch, capfd):
    loss_fn = poisoned_loss("loss nan", at_call=1)
    monkeypatch.setattr(forward_backward, "build_loss", lambda *_, **__: loss_fn)
    assert main(tiny(tmp_path, **SAVES)) == 1
    assert "can't rewind:" in (said := capfd.readouterr().err) and "holds no checkpoint yet" in said


# ---------------------------------------------------------------------------------------------
# The judge alone
# ---------------------------------------------------------------------------------------------


def watch_after(losses: list[float], **settings) -> LossGuard:
    watch = LossGuard(Training(**settings))
    for step, loss in enumerate(losses, start=1):
        assert watch.judge(step, [loss], 1.0) == "update"
    return watch


USUAL = [2.0, 3.0] * (RECENT_LOSSES // 2)


@pytest.mark.parametrize(
    ("policy", "verdict"), [("warn", "update"), ("skip_step", "skip"), ("rewind", "rewind")]
)
def test_a_spike_is_a_loss_above_so_many_medians(policy, verdict, caplog):
    settings = {"loss_spike": policy, "loss_spike_factor": 2.0}
    assert watch_after(USUAL, **settings).judge(33, [2.5, 2.4], 1.0) == "update", "below 2 x 2.5"
    assert watch_after(USUAL, **settings).judge(33, [2.6, 2.5], 1.0) == verdict
    assert "more than training.loss_spike_factor (2.0) times the median" in caplog.text


def test_without_a_factor_and_at_the_start_of_a_run_nothing_is_a_spike():
    assert watch_after(USUAL).judge(40, [1e9], 1.0) == "update"
    early = watch_after(
        USUAL[: RECENT_LOSSES // 2 - 1], loss_spike="skip_step", loss_spike_factor=2.0
    )
    assert early.judge(40, [1e9], 1.0) == "update"


def test_a_resumed_watch_judges_as_the_one_before():
    settings = {"loss_spike": "skip_step", "loss_spike_factor": 2.0}
    watch, resumed = watch_after(USUAL, **settings), LossGuard(Training(**settings))
    watch.judge(33, [9.0], 1.0)
    resumed.load_state_dict(watch.state_dict())
    assert resumed.skipped_steps == resumed.skips_in_a_row == 1
    assert resumed.judge(34, [5.1], 1.0) == watch.judge(34, [5.1], 1.0) == "skip"
    assert resumed.state_dict() == watch.state_dict()


def test_rewinds_that_do_not_help_come_to_an_end():
    watch = LossGuard(Training(non_finite_loss="rewind"))
    watch.count_rewind(9, 6)
    for _ in range(MAX_REWINDS_IN_A_ROW):
        watch.count_rewind(15, 10)
    assert watch.rewinds == 1 + MAX_REWINDS_IN_A_ROW
    with pytest.raises(RunError, match="3 rewinds to step 10 have not helped"):
        watch.count_rewind(15, 10)
