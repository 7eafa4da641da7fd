"""Processes that are killed, asked to stop, or hang: the next start goes on bit for bit."""

import os
import random
import signal
import time
from pathlib import Path

import pytest

from scripts.soak import ranks_of
from tests.fault_tests.processes import Run
from tests.tiny_run import losses, records, tiny
from torchtitan.components.checkpoint.folder import damage, step_folder, steps_with_folder

STEPS = 16
SAVES = {
    "training__steps": STEPS,
    "training__local_batch_size": 1,
    "checkpoint__enable": True,
    "checkpoint__interval": 1,
    "checkpoint__keep_latest_k": 2,
    "checkpoint__last_save_model_only": False,
    "comm__train_timeout_seconds": 10,
}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[int, float]:
    """Losses by step of a run of two processes that nobody touches."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with Run(tiny(folder, **SAVES), 2, folder / "log") as run:
        assert run.exit_codes() == [0, 0], run.log.read_text()
    return dict(enumerate(losses(folder), start=1))


def losses_by_step(folder: Path) -> dict[int, set[float]]:
    """Losses of all lives of a run, by step: two lives of one step must agree."""
    found: dict[int, set[float]] = {}
    for record in [each for path in folder.glob("metrics*") for each in records(folder, path.name)]:
        found.setdefault(record["step"], set()).add(record["loss"])
    return found


def whole_checkpoints(folder: Path) -> list[int]:
    """Steps that have their marker; every one of them must be readable."""
    complete = [step for step, whole in steps_with_folder(folder).items() if whole]
    problems = {step: damage(step_folder(folder, step)) for step in complete}
    assert not any(problems.values()), problems
    return complete


@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_killed_at_random_moments_a_run_loses_nothing(undisturbed, tmp_path, mode):
    """Two kills a mode, of one rank or of both; a checkpoint is written after every step, so most
    of them hit a save. scripts/soak.py does the same with a launcher, and longer."""
    chooser = random.Random(mode)
    argv = tiny(tmp_path, **SAVES, checkpoint__async_mode=mode)
    checkpoints = tmp_path / "checkpoint"
    for life in range(2):
        before = max(whole_checkpoints(checkpoints), default=0)
        with Run(argv, 2, tmp_path / "log") as run:
            run.wait_for(step_folder(checkpoints, before + 2))
            time.sleep(chooser.uniform(0, 0.2))
            for rank in chooser.choice([[0], [1], [0, 1]]):
                run.kill(rank)
            codes = run.exit_codes()
            assert None not in codes and -signal.SIGKILL in codes, (life, codes)
        assert max(whole_checkpoints(checkpoints)) >= before + 2
    with Run(argv, 2, tmp_path / "log") as run:
        assert run.exit_codes() == [0, 0], run.log.read_text()
    assert [record["step"] for record in records(tmp_path)] == list(range(1, STEPS + 1))
    assert losses_by_step(tmp_path) == {step: {loss} for step, loss in undisturbed.items()}
    assert whole_checkpoints(checkpoints) == [STEPS - 1, STEPS]
    assert not list(checkpoints.glob("*.tmp")) + list(checkpoints.glob("*.old"))


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 0), (signal.SIGUSR1, 0), (signal.SIGINT, 130)],
    ids=["SIGTERM", "SIGUSR1", "SIGINT"],
)
def test_a_signal_to_one_rank_ends_all_after_the_same_step_with_a_checkpoint(
    undisturbed, tmp_path, number, code
):
    rarely = {"checkpoint__interval": 1000, "checkpoint__enable_first_step_checkpoint": True}
    argv = tiny(tmp_path, **SAVES | rarely)
    with Run(argv, 2, tmp_path / "log") as run:
        run.wait_for(step_folder(tmp_path / "checkpoint", 1))
        run.kill(1, number)
        assert run.exit_codes() == [code, code], run.log.read_text()
    last = losses(tmp_path)
    assert 1 < len(last) < STEPS, "it did not wait for the end"
    assert whole_checkpoints(tmp_path / "checkpoint") == [1, len(last)]
    said = run.log.read_text()
    assert f"{number.name}: the run ends after this step, with a checkpoint" in said
    assert said.count(f"Training was ended by {number.name} short of {STEPS} steps") == 2
    with Run(argv, 2, tmp_path / "log") as run:
        assert run.exit_codes() == [0, 0], run.log.read_text()
    assert losses(tmp_path) == list(undisturbed.values())


def with_stop_code(rank: int, argv: list[str]) -> None:
    os.environ["STOP_CODE"] = "75"


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)], ids=["SIGTERM", "SIGINT"]
)
def test_schedulers_may_ask_for_a_code_of_their_own(tmp_path, number, code):
    options = tiny(tmp_path, training__steps=10_000)
    with Run(options, 1, tmp_path / "log", with_stop_code) as run:
        run.wait_for_words(" step: ")
        run.kill(0, number)
        assert run.exit_codes() == [code], run.log.read_text()


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGHUP, 129), (signal.SIGQUIT, 131)],
    ids=["SIGHUP", "SIGQUIT"],
)
def test_without_checkpoints_every_signal_ends_after_a_step_too(tmp_path, number, code):
    with Run(tiny(tmp_path, training__steps=10_000), 1, tmp_path / "log") as run:
        run.wait_for_words(" step: ")
        run.kill(0, number)
        assert run.exit_codes() == [code], run.log.read_text()
    said = run.log.read_text()
    assert f"{number.name}: the run ends after this step\n" in said and "Traceback" not in said
    assert (
        f"ended by {number.name} short of 10000 steps, after step {len(losses(tmp_path))}" in said
    )


def test_a_signal_before_the_first_step_ends_all_ranks_together(tmp_path):
    argv = tiny(tmp_path, **SAVES | {"training__steps": 10_000})
    with Run(argv, 2, tmp_path / "log") as run:
        run.wait_for(tmp_path / "config.json")  # the ranks have met, and build the model
        run.kill(1, signal.SIGINT)
        assert run.exit_codes() == [130, 130], run.log.read_text()
    assert "Training was ended by SIGINT short of 10000 steps, after step 0" in run.log.read_text()


def test_a_lone_process_ends_at_once_before_its_first_step(tmp_path):
    with Run(tiny(tmp_path), 1, tmp_path / "log") as run:
        run.wait_for_words("Seed")
        run.kill(0, signal.SIGINT)
        assert run.exit_codes() == [130]
    assert "W SIGINT: the run " in run.log.read_text(), "and not a traceback"


@pytest.mark.parametrize(
    ("mode", "steps"),
    [("disabled", 10_000), ("async", 10_000), ("async", 3)],
    ids=["save", "save in the background", "last save"],
)
def test_a_signal_during_a_save_lets_it_finish(tmp_path, mode, steps):
    """To all ranks, as a terminal and SLURM send it."""
    changes = {"training__steps": steps, "checkpoint__async_mode": mode}
    checkpoints = tmp_path / "checkpoint"
    with Run(tiny(tmp_path, **SAVES | changes), 2, tmp_path / "log") as run:
        run.wait_until(lambda: bool(list(checkpoints.glob("step-3*"))), "no third save")
        for rank in (0, 1):
            run.kill(rank, signal.SIGTERM)
        assert run.exit_codes() == [0, 0], run.log.read_text()
    assert max(whole_checkpoints(checkpoints)) == len(losses(tmp_path)) <= min(steps, 50)
    assert "Traceback" not in run.log.read_text()


def test_loader_processes_outlive_the_signals_that_the_run_answers(tmp_path):
    """scancel sends them to every process of the job, a terminal to those in the foreground."""
    options = {"training__dataset_num_workers": 2, "training__steps": 10_000}
    with Run(tiny(tmp_path, **SAVES | options), 1, tmp_path / "log") as run:
        run.wait_for(step_folder(tmp_path / "checkpoint", 2))
        below = descendants(run.ranks[0].pid)
        assert len(below) >= 3, "two workers and the server that they come from"
        for pid in below:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                os.kill(pid, number)
        time.sleep(0.2)  # were they to die, the loader would notice
        run.kill(0, signal.SIGINT)
        assert run.exit_codes() == [130], run.log.read_text()
    said = run.log.read_text()
    assert "Traceback" not in said and "killed by signal" not in said, said
    assert max(whole_checkpoints(tmp_path / "checkpoint")) == len(losses(tmp_path))
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in below):
        assert time.monotonic() < deadline, "they stay behind"
        time.sleep(0.05)


def descendants(pid: int) -> list[int]:
    """Process ids of its children and of theirs."""
    children = ranks_of(pid)
    return children + [below for child in children for below in descendants(child)]


def test_a_second_signal_ends_at_once(tmp_path):
    """The first one waits for the step, which waits for a rank that is stopped."""
    with Run(tiny(tmp_path, **SAVES), 2, tmp_path / "log") as run:
        run.wait_for(step_folder(tmp_path / "checkpoint", 2))
        run.kill(1, signal.SIGSTOP)
        time.sleep(0.3)  # rank 0 comes to wait for rank 1
        run.kill(0, signal.SIGTERM)
        time.sleep(0.5)
        assert run.ranks[0].is_alive()
        run.kill(0, signal.SIGTERM)
        began = time.monotonic()
        run.ranks[0].join(10)
        assert run.ranks[0].exitcode == 128 + signal.SIGTERM and time.monotonic() - began < 2


def test_ranks_that_lose_a_peer_end_and_name_it(tmp_path):
    with Run(tiny(tmp_path, **SAVES), 3, tmp_path / "log") as run:
        run.wait_for(step_folder(tmp_path / "checkpoint", 2))
        run.kill(1)
        assert run.exit_codes(20) == [1, -signal.SIGKILL, 1], run.log.read_text()
    said = run.log.read_text()
    assert said.count("rank 1 has gone (") == 2 and "Traceback" not in said, said


def test_ranks_whose_peer_hangs_end_within_the_timeout_and_name_it_and_the_collective(tmp_path):
    argv = tiny(tmp_path, **SAVES | {"comm__train_timeout_seconds": 3, "checkpoint__enable": False})
    with Run(argv, 3, tmp_path / "log") as run:
        run.wait_for(tmp_path / "metrics.jsonl")
        while len(losses(tmp_path)) < 3:
            time.sleep(0.01)
        run.kill(2, signal.SIGSTOP)
        began = time.monotonic()
        run.ranks[0].join(20)
        run.ranks[1].join(5)
        assert run.ranks[0].exitcode == run.ranks[1].exitcode == 1, run.log.read_text()
        assert time.monotonic() - began < 3 + 8 + 5
    said = run.log.read_text()
    assert said.count("rank 2 does not answer (") == 2, said
