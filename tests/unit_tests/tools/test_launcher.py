"""Variables of a launcher that can't be right: one sentence that names the variable."""

import re
import socket
import time

import pytest

from tests.tiny_run import tiny
from torchtitan.distributed import meeting_point
from torchtitan.tools.errors import UserError
from torchtitan.tools.launcher import Launch, planned_processes, read_launch
from torchtitan.train import main

RIGHT = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "node-0",
    "MASTER_PORT": "29500",
}


@pytest.fixture
def launched(monkeypatch):
    def set_variables(**variables: str | None) -> None:
        for name in RIGHT:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            if value is not None:
                monkeypatch.setenv(name, value)

    set_variables()
    return set_variables


def test_torchruns_variables_are_read(launched):
    launched(**RIGHT)
    assert read_launch() == Launch(3, 4, 1, 2, "node-0", 29500)


@pytest.mark.parametrize(
    "alone", [{}, {"WORLD_SIZE": "1"}, {"RANK": "0", "WORLD_SIZE": "1"}, {"LOCAL_RANK": "0"}]
)
def test_one_process_needs_none(launched, alone):
    launched(**alone)
    assert read_launch() == Launch(local_world_size=1)


@pytest.mark.parametrize("name", RIGHT)
@pytest.mark.parametrize("value", [None, "", " "])
def test_each_is_needed_among_several(launched, name, value):
    launched(**RIGHT | {name: value})
    what = "is not set" if value is None else "is empty"
    with pytest.raises(UserError, match=f"variable {name} {what}.* torchrun .*one process"):
        read_launch()


@pytest.mark.parametrize("name", [name for name in RIGHT if name != "MASTER_ADDR"])
@pytest.mark.parametrize("value", ["abc", "-1", "1.5", "1e3", "1_0", "٣", "0x1", "9" * 5000, "+1"])
def test_each_is_a_whole_number(launched, name, value):
    launched(**RIGHT | {name: value})
    with pytest.raises(UserError, match=f"variable {name} is '{re.escape(value[:40])}', but"):
        read_launch()


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"RANK": "4"}, "RANK is 4, but must be below WORLD_SIZE (4)"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0', but the number of processes of the run"),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK is 2, but must be below LOCAL_WORLD_SIZE (2)"),
        ({"LOCAL_WORLD_SIZE": "5"}, "LOCAL_WORLD_SIZE is 5, but must be at most WORLD_SIZE (4)"),
        ({"RANK": "0"}, "LOCAL_RANK is 1, but must be at most RANK (0)"),
        ({"MASTER_PORT": "0"}, "MASTER_PORT is '0', but the port"),
        ({"MASTER_PORT": "65536"}, "a whole number from 1 to 65535"),
    ],
)
def test_they_must_fit_each_other(launched, changes, sentence):
    launched(**RIGHT | changes)
    with pytest.raises(UserError) as error:
        read_launch()
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    "variables, name",
    [
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, "SLURM_NTASKS is 2, .* srun"),
        ({"SLURM_PROCID": "1"}, "SLURM_PROCID is 1, .* srun"),
        ({"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "8"}, "SLURM_STEP_NUM_TASKS is 8"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "OMPI_COMM_WORLD_SIZE is 4, .*Open MPI"),
        ({"PMI_SIZE": "3", "PMI_RANK": "0"}, "PMI_SIZE is 3, .* mpiexec"),
    ],
)
def test_tasks_of_other_launchers_do_not_train_each_alone(launched, monkeypatch, variables, name):
    launched(**variables)
    with pytest.raises(UserError, match=f"variable {name}.* set WORLD_SIZE=1 to train"):
        read_launch()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert read_launch().world_size == 1, "the way out"


def test_one_task_of_a_scheduler_trains(launched):
    launched(SLURM_NTASKS="1", SLURM_PROCID="0", SLURM_JOB_ID="17")
    assert read_launch().world_size == 1


@pytest.mark.parametrize(
    "variables, name",
    [
        ({"WORLD_SIZE": "2"}, "RANK is not set, but WORLD_SIZE is 2"),
        ({"RANK": "", "WORLD_SIZE": "1"}, "RANK is empty"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "LOCAL_RANK is not set"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK is 'x'"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
        ({"RANK": "0"}, "WORLD_SIZE is not set, but RANK is 0"),
    ],
)
def test_a_run_ends_with_the_sentence(launched, tmp_path, capfd, variables, name):
    launched(**variables)
    assert main(tiny(tmp_path / "out")) == 2
    errors = [line for line in capfd.readouterr().err.splitlines() if " E " in line]
    assert len(errors) == 1 and f"environment variable {name}" in errors[0], errors
    assert not (tmp_path / "out").exists()


def test_a_config_is_checked_for_a_number_of_processes(launched, tmp_path):
    """run_train.sh does so before it starts them."""
    launched(WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    assert planned_processes() == (2, 2)
    assert main([*tiny(tmp_path), "--job.check_config"]) == 0


def test_only_rank_0_has_a_dry_run(launched, tmp_path, capfd):
    launched(RANK="1", WORLD_SIZE="4")
    assert main([*tiny(tmp_path / "out"), "--comm.mode=fake_backend"]) == 2
    assert "is a dry run of rank 0 in one process, but RANK is 1" in capfd.readouterr().err


# ---------------------------------------------------------------------------------------------
# Where ranks meet
# ---------------------------------------------------------------------------------------------


def meet(rank: int, *, address: str = "127.0.0.1", port: int, seconds: float = 1):
    return meeting_point.meet(Launch(rank, 2, rank, 2, address, port), seconds)


@pytest.fixture
def foreign_port():
    """At which something listens that is no store, and answers nothing."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]


def test_a_port_that_is_taken(foreign_port):
    with pytest.raises(UserError, match=f"variable MASTER_PORT is {foreign_port}, on which anoth"):
        meet(0, port=foreign_port)


def test_a_server_of_something_else_is_not_waited_for_for_ever(foreign_port):
    began = time.monotonic()
    with pytest.raises(
        UserError, match=f"127.0.0.1:{foreign_port}.* another kind of server answers"
    ):
        meet(1, port=foreign_port)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("address", ["no-such-host.invalid", "a" * 300, "has space", "x..y"])
def test_an_address_that_does_not_resolve(monkeypatch, address):
    monkeypatch.setattr(meeting_point, "_RESOLVE_SECONDS", 0)
    with pytest.raises(UserError, match="variable MASTER_ADDR is '.*', which does not resolve"):
        meet(1, address=address, port=29500)


def test_nobody_at_the_address():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.raises(UserError, match=f"not found at MASTER_ADDR:MASTER_PORT .*:{port}.*refused"):
        meet(1, port=port, seconds=0.2)


def test_a_rank_that_was_given_twice(monkeypatch):
    monkeypatch.setattr(meeting_point, "_rounds", 1000)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    meet(0, port=port)
    meet(1, port=port)
    monkeypatch.setattr(meeting_point, "_rounds", 1001)  # as another process would count
    with pytest.raises(UserError, match=f"variable RANK is 1, which another .*:{port} already has"):
        meet(1, port=port)
