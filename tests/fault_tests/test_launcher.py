"""scripts/launch.py: restarts by itself, hands signals on, and says how a rank came to its end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scripts.soak import ranks_of
from tests.fault_tests.processes import Run
from tests.fault_tests.test_kills import SAVES, losses_by_step
from tests.forks import Forked
from tests.tiny_run import tiny
from torchtitan.trainer import built_run

# A launch takes seconds of imports; machines that run the tests may be busy.
pytestmark = pytest.mark.timeout(240)

REPO = Path(__file__).parents[2]


def launch(log: Path, *arguments: object) -> Forked:
    return Forked(log, [*LAUNCH, *map(str, arguments)], environment())


LAUNCH = [str(REPO / "scripts/launch.py"), "--standalone"]


def environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, (str(REPO), os.environ.get("PYTHONPATH"))))
    return os.environ | {"PYTHONPATH": path, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}


def test_a_killed_rank_makes_the_run_go_on_by_itself_and_a_signal_ends_it_well(tmp_path):
    log, checkpoints = tmp_path / "log", tmp_path / "checkpoint"
    options = tiny(tmp_path, **SAVES | {"training__steps": 2000})
    restarts = ["--nproc-per-node", 2, "--max-restarts", 1]
    run = launch(log, *restarts, "-m", "torchtitan.train", *options)
    try:
        until(lambda: (checkpoints / "step-3").exists(), log)
        os.kill(ranks_of(run.pid)[0], signal.SIGKILL)
        until(lambda: "steps are done" in log.read_text(), log)
        reached = max(losses_by_step(tmp_path))
        until(lambda: max(losses_by_step(tmp_path)) > reached + 2, log)
        run.send_signal(signal.SIGTERM)
        assert run.wait(60) == 0, log.read_text()
    finally:
        run.kill()
    assert "has gone (" in log.read_text(), "what the other rank said"
    found = losses_by_step(tmp_path)
    assert list(found) == list(range(1, max(found) + 1)), "no step is missing"
    assert {len(losses) for losses in found.values()} == {1}, "steps done twice gave the same"
    assert (checkpoints / f"step-{max(found)}").exists(), "saved at its end"
    assert "SignalException" not in log.read_text()


@pytest.mark.parametrize(
    "options, sentence",
    [
        (["--nproc-per-node", "abc", "-m", "torchtitan.train"], "Unsupported nproc_per_node"),
        (["-m", "torchtitan.nope"], "there is no module torchtitan.nope to run"),
        (["-m", "nope.train"], "there is no module nope.train to run"),
        (["nope.py"], "there is no file nope.py to run"),
    ],
)
def test_a_launch_of_nothing_is_one_sentence(tmp_path, options, sentence):
    run = launch(log := tmp_path / "log", *options)
    assert run.wait(60) == 2
    assert sentence in log.read_text() and "Traceback" not in log.read_text()


def test_one_signal_to_the_whole_group_counts_once(tmp_path):
    """Send it as a terminal and `timeout` do: ranks get theirs, and what the launcher hands on."""
    log = tmp_path / "log"
    options = {"training__steps": 100_000, "checkpoint__interval": 1000}
    restarts = ["--nproc-per-node", 2, "--max-restarts", 1]
    run = launch(log, *restarts, "-m", "torchtitan.train", *tiny(tmp_path, **SAVES | options))
    try:
        until(lambda: log.read_text().count(" loss: ") > 2, log)
        # As `timeout` does: to the process and to its group.
        run.send_signal(signal.SIGINT)
        os.killpg(run.pid, signal.SIGINT)
        assert run.wait(60) == 130, log.read_text()
    finally:
        run.kill()
    said = log.read_text()
    assert "Traceback" not in said and "second signal" not in said, said
    (saved,) = (tmp_path / "checkpoint").glob("step-*")
    assert saved.name == f"step-{max(losses_by_step(tmp_path))}"


def test_a_second_signal_to_the_launcher_ends_all_at_once(tmp_path):
    """Also ranks that hang: these here don't listen to the first one."""
    script = tmp_path / "hangs.py"
    script.write_text(
        "import sys, time\n"
        "from torchtitan.tools.error_file import mark_steps_begun\n"
        "mark_steps_begun()\n"
        "print('begun', flush=True)\n"
        "time.sleep(100)\n"
    )
    log = tmp_path / "log"
    run = launch(log, "--nproc-per-node", 2, script)
    try:
        until(lambda: log.read_text().count("begun") == 2, log)
        ranks = ranks_of(run.pid)
        run.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert run.poll() is None
        run.send_signal(signal.SIGINT)
        assert run.wait(10) == 130, log.read_text()
    finally:
        run.kill()
    until(lambda: not any(Path(f"/proc/{rank}").exists() for rank in ranks), log, 5)
    assert log.read_text().endswith("SIGINT: the second signal, so all ranks end at once\n")


def test_a_signal_before_the_first_step_ends_all_at_once(tmp_path):
    """A real start: the signal comes while the ranks import torch."""
    log = tmp_path / "log"
    command = [*LAUNCH, "--nproc-per-node", "2", "-m", "torchtitan.train", *tiny(tmp_path)]
    with log.open("a") as file:
        run = subprocess.Popen(
            [sys.executable, *command],
            stdout=file,
            stderr=file,
            env=environment(),
            start_new_session=True,
        )
    try:
        until(lambda: run.poll() is not None or ranks_of(run.pid), log)
        os.killpg(run.pid, signal.SIGINT)
        assert run.wait(20) == 130, log.read_text()
    finally:
        run.kill()
    (sentence,) = log.read_text().splitlines()
    assert "SIGINT: the run ends before its first step" in sentence


def until(condition, log: Path, seconds: float = 200) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)


def test_the_last_line_tells_which_signal_ended_which_rank(tmp_path):
    script = tmp_path / "dies.py"
    script.write_text("import os\nif os.environ['RANK'] == '1':\n    os.kill(os.getpid(), 9)\n")
    run = launch(tmp_path / "log", "--nproc-per-node", 2, script)
    assert run.wait(60) == 1
    last = (tmp_path / "log").read_text().splitlines()[-1]
    assert "E rank 1 was ended by SIGKILL (perhaps the machine ran out of memory" in last


def test_an_unexpected_error_of_one_rank_is_told_at_once_and_ends_the_run(tmp_path):
    """Not behind the closing of groups, which would wait for the other rank's collectives."""
    script = tmp_path / "fails.py"
    script.write_text(
        "import os, sys\n"
        "from torchtitan.trainer.forward_backward import ForwardBackward\n"
        "from torchtitan.train import main\n"
        "def fail(*_): raise ValueError('a mistake of ours')\n"
        "if os.environ['RANK'] == '1':\n"
        "    ForwardBackward.forward_backward = fail\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    run = launch(tmp_path / "log", "--nproc-per-node", 2, script, *tiny(tmp_path))
    try:
        assert run.wait(60) == 1
    finally:
        run.kill()
    log = (tmp_path / "log").read_text()
    assert "This rank failed\nTraceback" in log
    assert "E rank 1: ValueError: a mistake of ours" in log, "the launcher's last words"


def fail_while_building(rank: int, argv: list[str]) -> None:
    def fail(*_: object) -> None:
        raise ValueError("a mistake of ours")

    if rank == 1:
        built_run.build_metrics = fail


def test_so_is_one_while_the_run_is_built(tmp_path):
    """The launcher is left out: its part is the same."""
    with Run(tiny(tmp_path), 2, tmp_path / "log", fail_while_building) as run:
        run.ranks[1].join(60)
        assert run.ranks[1].exitcode == 1
    log = (tmp_path / "log").read_text()
    assert "This rank failed\nTraceback" in log
    assert "ValueError: a mistake of ours" in log
