"""scripts/prove.py: what the user can mend is one sentence and code 2; Ctrl-C leaves nothing."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.scripts import SCRIPTS, script

DEBUG_TOML = SCRIPTS.parent / "train_configs/debug_model.toml"


@pytest.fixture(scope="module")
def prove():
    kept = dict(os.environ)
    module = script("prove.py")
    os.environ.clear()
    os.environ |= kept
    return module


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nowhere.toml"], "job.config_file nowhere.toml does not exist;"),
        ([DEBUG_TOML, "--world-size", "0"], "--world-size 0 must be a number of processes"),
        ([DEBUG_TOML, "--world-size", "1000000"], "--world-size 1000000 must be a number"),
        ([DEBUG_TOML, "--processes", "1"], "--processes 1 must be 2 or more"),
        ([DEBUG_TOML, "--node-size", "0"], "--node-size 0 must be 1 or more"),
        ([DEBUG_TOML, "--world-size", "many"], "--world-size many must be a whole number"),
    ],
)
def test_bad_input_is_one_sentence(prove, capsys, arguments, sentence):
    assert prove.main([str(word) for word in arguments]) == 2
    said = capsys.readouterr()
    assert said.out == "" and len(said.err.splitlines()) == 1
    assert said.err.startswith(sentence)


def test_a_world_size_that_the_degrees_do_not_divide(prove, capsys, tmp_path):
    file = tmp_path / "x.toml"
    file.write_text("[parallelism]\ntensor_parallel_degree = 4\n")
    assert prove.main([str(file), "--world-size", "6"]) == 2
    assert "tensor_parallel_degree = 4 does not divide" in capsys.readouterr().err


def test_ctrl_c_ends_the_ranks_and_removes_the_folder(tmp_path):
    run = subprocess.Popen(
        [sys.executable, SCRIPTS / "prove.py", DEBUG_TOML],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"TMPDIR": str(tmp_path)},
    )
    while "Not covered" not in run.stdout.readline():
        assert run.poll() is None
    while not list(tmp_path.glob("prove-*/world-1/seed-7/logs/*.log")):
        time.sleep(0.05)
    ranks = children_of(run.pid)
    run.send_signal(signal.SIGINT)
    _, said = run.communicate(timeout=60)
    assert (run.returncode, said) == (130, "Interrupted\n")
    assert ranks and not any(Path(f"/proc/{pid}").exists() for pid in ranks)
    assert list(tmp_path.glob("prove-*")) == []


def children_of(parent: int) -> list[str]:
    return Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
