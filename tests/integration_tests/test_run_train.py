"""./run_train.sh as a user calls it: processes, files, exit codes and what the terminal shows."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.forks import Forked, forking_python
from tests.tiny_run import losses, records, tiny
from torchtitan.data.permutation import order
from torchtitan.train import main

# A run by itself takes ten seconds; machines that run the tests may be busy.
pytestmark = pytest.mark.timeout(240)

REPO = Path(__file__).parents[2]
V02_TOML = REPO / "tests/unit_tests/config/v02/debug_model.toml"

# The script's own settings, and what it is to find out itself.
NOT_INHERITED = (
    "NGPU CONFIG_FILE LOG_RANK MAX_RESTARTS COMM_MODE PYTHONPATH NNODES NODE_RANK STOP_CODE "
    "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE"
).split()

# What the `python` that the script finds does after it has noted its call: be a real one, or
# nothing but count GPUs as torch would. (The default is a fork that has imported torch.)
IS_REAL = f'exec {sys.executable} "$@"'
COUNTS_GPUS = '[ "$1" != -c ] || echo "$GPUS"'


@pytest.fixture(scope="module")
def forks() -> Iterator[str]:
    with forking_python() as command:
        yield f'exec {command} "$@"'


@pytest.fixture
def run_train(tmp_path, forks):
    """Calls the script from an empty folder, in this interpreter's environment.

    The `python` that it finds notes the processes asked for and the arguments, a line a call, in
    the file `calls`. `call.install(name, script)` puts another program into the PATH.
    """
    bin_folder, calls, empty = tmp_path / "bin", tmp_path / "calls", tmp_path / "cwd"
    bin_folder.mkdir()
    empty.mkdir()

    def install(name: str, script: str) -> None:
        program = bin_folder / name
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)

    def call(*options: str, python: str = forks, **variables: str) -> subprocess.CompletedProcess:
        install("python", f'echo "${{WORLD_SIZE:-no}} processes: $*" >> {calls}\n{python}')
        env = {name: value for name, value in os.environ.items() if name not in NOT_INHERITED}
        env |= {
            "VIRTUAL_ENV": str(tmp_path),  # activated: `python` counts
            "PATH": f"{bin_folder}:{os.environ['PATH']}",
            "CUDA_VISIBLE_DEVICES": "",  # the CPU is there everywhere
            "OMP_NUM_THREADS": "1",
        }
        return subprocess.run(
            [REPO / "run_train.sh", *options],
            cwd=empty,
            env=env | variables,
            capture_output=True,
            text=True,
            timeout=180,
        )

    call.cwd, call.calls, call.install = empty, calls, install
    return call


def test_the_debug_model_with_everything_a_toml_offers_trains_like_one_process(run_train, tmp_path):
    """Experts on two nodes, accumulation, document masks, loader processes, the flavor's own
    sizes; the ranks of LOG_RANK speak."""
    settings = {
        "job.config_file": REPO / "train_configs/debug_model.toml",
        "model.flavor": "debugmodel_node_limited",
        "model.args.attn_mask_type": "block_causal",
        "training.seq_len": 32,
        "training.steps": 3,
        "training.global_batch_size": 16,
        "training.mixed_precision_param": "float32",
        "training.dataset_num_workers": 1,
        "lr_scheduler.warmup_steps": 0,
        "metrics.log_freq": 1,
        "debug.seed": 7,
    }
    options = [f"--{key}={value}" for key, value in settings.items()]
    out = "--job.dump_folder=" + str(tmp_path / "out")
    spread = ["--parallelism.expert_parallel_degree=2", "--parallelism.expert_parallel_node_size=1"]
    size = "--training.local_batch_size="
    done = run_train(*options, *spread, out, f"{size}4", NGPU="2", LOG_RANK="0,1")
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    assert [record["tokens_seen"] for record in records(tmp_path / "out")] == [512, 1024, 1536]
    assert "3 steps of 16 sequences of 32 tokens" in output
    assert "FSDP: weights split over 2 ranks" in output
    assert re.search(r"^\[rank0\]:\[titan\] \S+ I step: ", output, re.MULTILINE)
    assert re.search(r"^\[rank1\]:\[titan rank 1\] \S+ I Training: ", output, re.MULTILINE)
    assert "2 ranks of 4 experts each, one copy of a token per destination node" in output
    assert "Expert layout: 8 experts over 2 ranks on 2 nodes; a token meets" in output
    alone = "--job.dump_folder=" + str(tmp_path / "alone")
    assert main([*options, alone, f"{size}16"]) == 0
    assert all(math.isfinite(loss) for loss in losses(tmp_path / "out"))
    assert losses(tmp_path / "out") == pytest.approx(losses(tmp_path / "alone"), rel=1e-4)


def test_a_file_written_for_torchtitan_v02_runs_at_once(run_train):
    """With real processes. Its data set and tokenizer are there; rank 0 alone speaks; files land
    where it says."""
    sizes = [option for option in tiny(Path("outputs")) if "model.args" in option]
    options = ["--training.seq_len=32", "--training.steps=2"]
    done = run_train(*sizes, *options, python=IS_REAL, CONFIG_FILE=str(V02_TOML))
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    assert "training.dataset 'c4_test' is read from the shipped sample" in output
    assert "[rank0]:" in output and "[rank1]:" not in output
    written = run_train.cwd / "outputs"
    assert len(losses(written)) == 2 and list((written / "tb").iterdir())
    saved = json.loads((written / "config.json").read_text())
    assert saved["training"]["dataset"] == "c4_test"
    assert saved["job"]["description"] == "debug run of DeepSeek-V3", "the TOML was read"


def test_a_wrong_config_is_one_sentence_and_torchrun_is_not_started(run_train, tmp_path):
    wrong = "--parallelism.data_parallel_shard_degree=3"
    done = run_train(*tiny(tmp_path / "out"), wrong, NGPU="2")
    assert done.returncode == 2
    sentences = [line for line in done.stderr.splitlines() if " I " not in line]
    assert len(sentences) == 1 and done.stdout == ""
    assert "the number of processes is 2; set data_parallel_shard_degree to 2" in sentences[0]
    started = run_train.calls.read_text()
    assert "torchtitan.train" in started and "launch.py" not in started
    assert not (tmp_path / "out").exists()


def test_the_fake_backend_is_a_dry_run_of_one_of_64_ranks(run_train, tmp_path):
    options = {"training__steps": 2, "parallelism__data_parallel_replicate_degree": 2}
    done = run_train(*tiny(tmp_path / "out", **options), NGPU="64", COMM_MODE="fake_backend")
    assert done.returncode == 0, done.stderr
    assert "a dry run of rank 0 of 64 in one process" in done.stderr
    assert "2 steps of 256 sequences of 32 tokens" in done.stderr
    assert [record["tokens_seen"] for record in records(tmp_path / "out")] == [8192, 16384]
    assert "launch.py" not in run_train.calls.read_text()


def test_a_mistake_that_one_rank_meets_late_is_the_last_line_and_exit_code_2(run_train, tmp_path):
    """Rank 0 fails too, in its communication; rank 1, whose output is not shown, knows why."""
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"text": "a good text. " * 400}) + '\n{"broken\n')
    options = {"training__dataset": "text", "training__dataset_path": data}
    options |= {"training__dataset_lanes": 2, "debug__seed": 14}
    assert {order(2, 14, epoch)[0] for epoch in range(11)} == {0}, "the broken one is rank 1's"
    done = run_train(*tiny(tmp_path / "out", **options), NGPU="2")
    assert done.returncode == 2, done.stderr
    last = done.stderr.splitlines()[-1]
    assert re.match(r"\[titan\] \S+ E rank 1: training.dataset 'text' had no usable document", last)


def test_training_that_fails_by_itself_is_the_last_line_and_exit_code_1(run_train, tmp_path):
    done = run_train(*tiny(tmp_path / "out", optimizer__lr=1e30), NGPU="1")
    assert done.returncode == 1, done.stderr
    last = done.stderr.splitlines()[-1]
    assert re.match(r"\[titan\] \S+ E rank 0: step 2: .* is not finite", last)


def test_a_crash_is_reported_by_torchrun(tmp_path):
    """Nothing is known about it: the launcher hides no traceback."""
    script = tmp_path / "crash.py"
    script.write_text("1 / 0\n")
    log, env = tmp_path / "log", os.environ | {"PYTHONPATH": str(REPO), "GLOO_SOCKET_IFNAME": "lo"}
    run = Forked(log, [str(REPO / "scripts/launch.py"), "--standalone", str(script)], env)
    assert run.wait(60) == 1
    said = log.read_text()
    assert "ZeroDivisionError" in said and "ChildFailedError" in said


@pytest.mark.parametrize(
    "variable, value",
    [
        ("NGPU", "0"),
        ("NGPU", "abc"),
        ("NGPU", "-1"),
        ("LOG_RANK", "one"),
        ("MAX_RESTARTS", "-1"),
        ("COMM_MODE", "fake"),
        ("STOP_CODE", "256"),
        ("NNODES", "two"),
    ],
)
def test_a_wrong_variable_is_one_sentence_and_nothing_is_started(run_train, variable, value):
    done = run_train(**{variable: value})
    assert done.returncode == 2 and done.stdout == ""
    (sentence,) = done.stderr.splitlines()
    assert sentence.startswith(f"{variable} is '{value}': ")
    assert not run_train.calls.exists()


def test_a_rank_that_could_show_nothing_is_refused(run_train):
    done = run_train(LOG_RANK="0,2")
    assert done.returncode == 2 and done.stdout == ""
    said = "LOG_RANK is '0,2': it lists ranks of this machine, which are 0 to 1."
    assert done.stderr.splitlines()[-1] == said
    assert "torchtitan.train" not in run_train.calls.read_text()


@pytest.mark.parametrize(
    "variables, sentence",
    [
        (
            {},
            "NODE_RANK is '': it is the number of this machine, from 0 to 1, because NNODES is 2.",
        ),
        ({"NODE_RANK": "2"}, "NODE_RANK is '2': "),
        ({"NODE_RANK": "1"}, "MASTER_ADDR is not set: "),
        ({"PET_NODE_RANK": "1", "PET_MASTER_ADDR": "a", "MASTER_PORT": "x"}, "MASTER_PORT is 'x'"),
        ({"NODE_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "65536"}, "MASTER_PORT is '65536'"),
        ({"NODE_RANK": "1", "MASTER_ADDR": "a", "NODES_TIMEOUT": "0"}, "NODES_TIMEOUT is '0'"),
    ],
)
def test_a_wrong_place_among_nodes_is_one_sentence(run_train, variables, sentence):
    done = run_train(PET_NNODES="2", **variables)
    assert done.returncode == 2 and done.stdout == ""
    (said,) = done.stderr.splitlines()
    assert said.startswith(sentence)


def test_nodes_do_not_install_packages_at_once(run_train, tmp_path):
    """A python without torch stands for a machine that was not set up."""
    place = {"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "a", "VIRTUAL_ENV": ""}
    run_train.install("python3", "exit 1")
    copy = tmp_path / "copy"
    (copy / "scripts").mkdir(parents=True)
    for name in ("run_train.sh", "scripts/setup_env.sh", "scripts/check_dependencies.py"):
        shutil.copy(REPO / name, copy / name)
    shutil.copy(REPO / "pyproject.toml", copy)
    env = os.environ | place | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    done = subprocess.run([copy / "run_train.sh"], env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert "run_train.sh --help once before a run on several machines" in done.stderr
    assert not (copy / ".venv").exists()


def test_help_is_shown_once_by_one_process(run_train):
    done = run_train("--help", NGPU="2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: ") == 1 and "--training.steps" in done.stdout
    assert (
        done.stdout.index("NGPU ")
        < done.stdout.index("CONFIG_FILE ")
        < done.stdout.index("usage: ")
    )
    started = run_train.calls.read_text()
    assert started.count("torchtitan.train") == 1 and "launch.py" not in started


def test_every_gpu_that_torch_sees_gets_a_process(run_train):
    run_train.install("nvidia-smi", "exit 1")  # being there is all that is asked of it
    done = run_train(python=COUNTS_GPUS, GPUS="3")
    (said,) = done.stderr.splitlines()  # at once: torch's imports are silent for some seconds
    assert done.returncode == 0 and said.endswith(
        "I Checking the settings, then starting 3 processes"
    )
    *_, check, launch = run_train.calls.read_text().splitlines()
    assert check.startswith("3 processes: -m torchtitan.train")
    assert "launch.py" in launch and "--nproc-per-node 3" in launch


def test_a_torch_that_sees_no_gpu_of_the_machine_trains_on_the_cpu_and_says_so(run_train):
    run_train.install("nvidia-smi", "echo GPU 0: one that this torch was not built for")
    done = run_train(python=COUNTS_GPUS, GPUS="0")
    assert done.stderr.splitlines()[0] == "no GPU visible to this torch: running on CPU"
    assert "--nproc-per-node 2" in run_train.calls.read_text()
