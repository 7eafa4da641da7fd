"""./run_train.sh as a user calls it: processes, files, exit codes and what the terminal shows."""

import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny_run import losses, records, tiny
from torchtitan.components.tokenizer import load_tokenizer
from torchtitan.train import main

REPO = Path(__file__).parents[2]
V02_TOML = REPO / "tests/unit_tests/config/v02/debug_model.toml"

# The script's own settings, and what it is to find out itself.
NOT_INHERITED = "NGPU CONFIG_FILE LOG_RANK COMM_MODE PYTHONPATH RANK LOCAL_RANK WORLD_SIZE".split()


@pytest.fixture
def run_train(tmp_path):
    """Calls the script from an empty folder, in this interpreter's environment.

    The `python` that it finds notes each of its calls in the file `calls` before it works.
    """
    bin_folder, calls = tmp_path / "bin", tmp_path / "calls"
    bin_folder.mkdir()
    python = bin_folder / "python"
    python.write_text(f'#!/bin/sh\necho "$*" >> {calls}\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    empty = tmp_path / "cwd"
    empty.mkdir()

    def call(*options: str, **variables: str) -> subprocess.CompletedProcess:
        env = {name: value for name, value in os.environ.items() if name not in NOT_INHERITED}
        env |= {
            "VIRTUAL_ENV": sys.prefix,
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

    call.cwd, call.calls = empty, calls
    return call


def test_two_processes_train_with_everything_a_toml_offers(run_train, tmp_path):
    """Accumulation, document masks, loader processes; LOG_RANK shows the ranks that it names."""
    options = {
        "training__steps": 3,
        "training__global_batch_size": 16,
        "training__dataset_num_workers": 1,
        "model__args.attn_mask_type": "block_causal",
        "lr_scheduler__warmup_steps": 20,  # longer than the run: every rank warns
    }
    done = run_train(*tiny(tmp_path / "out", **options), NGPU="2", LOG_RANK="0,1")
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    assert [record["tokens_seen"] for record in records(tmp_path / "out")] == [512, 1024, 1536]
    assert all(math.isfinite(loss) for loss in losses(tmp_path / "out"))
    assert "3 steps of 16 sequences of 32 tokens" in output
    assert "FSDP: weights split over 2 ranks" in output
    assert "[rank0]:[titan]" in output and "[rank1]:[titan rank 1]" in output


def write_sequences(path: Path, count: int, length: int) -> None:
    """Documents that, with their first and last token, are one sequence each: ranks that take
    turns in reading them get, all together, what one process gets."""
    tokenizer = load_tokenizer(str(REPO / "tests/assets/tokenizer"))
    letters = [c for c in "abcdefghijklmnopqrstuvwxyz" if len(tokenizer.encode(" " + c)) == 1]
    chooser = random.Random(3)
    texts = [" ".join(chooser.choices(letters, k=length - 2)) for _ in range(count)]
    assert {len(tokenizer.encode(text)) for text in texts} == {length - 2}
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def test_the_debug_model_with_experts_on_four_ranks_of_two_nodes_trains_like_one_process(
    run_train, tmp_path
):
    """The flavor's own sizes."""
    write_sequences(tmp_path / "data.jsonl", count=40, length=32)
    settings = {
        "job.config_file": REPO / "train_configs/debug_model.toml",
        "model.flavor": "debugmodel_node_limited",
        "training.dataset": "text",
        "training.dataset_path": tmp_path / "data.jsonl",
        "training.seq_len": 32,
        "training.steps": 3,
        "training.global_batch_size": 8,
        "training.mixed_precision_param": "float32",
        "lr_scheduler.warmup_steps": 0,
        "metrics.log_freq": 1,
        "debug.seed": 7,
    }
    options = [f"--{key}={value}" for key, value in settings.items()]
    out = "--job.dump_folder=" + str(tmp_path / "out")
    spread = ["--parallelism.expert_parallel_degree=4", "--parallelism.expert_parallel_node_size=2"]
    done = run_train(*options, *spread, out, "--training.local_batch_size=2", NGPU="4")
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    assert "4 ranks of 2 experts each, one copy of a token per destination node" in output
    assert "Expert layout: 8 experts over 4 ranks on 2 nodes; a token meets" in output
    alone = "--job.dump_folder=" + str(tmp_path / "alone")
    assert main([*options, alone, "--training.local_batch_size=8"]) == 0
    assert len(losses(tmp_path / "out")) == 3
    assert losses(tmp_path / "out") == pytest.approx(losses(tmp_path / "alone"), rel=1e-4)


def test_a_file_written_for_torchtitan_v02_runs_at_once(run_train):
    """Its data set and tokenizer are there; rank 0 alone speaks; files land where it says."""
    sizes = [option for option in tiny(Path("outputs")) if "model.args" in option]
    options = ["--training.seq_len=32", "--training.steps=2"]
    done = run_train(*sizes, *options, CONFIG_FILE=str(V02_TOML))
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
    assert "torchtitan.train" in started and "torch.distributed.run" not in started
    assert not (tmp_path / "out").exists()


def test_the_fake_backend_plays_one_of_64_ranks(run_train, tmp_path):
    options = {"training__steps": 2, "parallelism__data_parallel_replicate_degree": 2}
    done = run_train(*tiny(tmp_path / "out", **options), NGPU="64", COMM_MODE="fake_backend")
    assert done.returncode == 0, done.stderr
    assert "one process plays rank 0 of 64" in done.stderr
    assert "2 steps of 256 sequences of 32 tokens" in done.stderr
    assert [record["tokens_seen"] for record in records(tmp_path / "out")] == [8192, 16384]
    assert "torch.distributed.run" not in run_train.calls.read_text()


def test_a_failure_in_training_is_the_exit_code(run_train, tmp_path):
    """Found by a rank, after the processes have met: torchrun reports that it failed."""
    data = tmp_path / "data.jsonl"
    data.write_text('{"txet": "a text under the wrong key"}\n' * 8)
    options = tiny(tmp_path / "out", training__dataset="text", training__dataset_path=data)
    done = run_train(*options, NGPU="2")
    assert done.returncode != 0
    assert "training.dataset 'text' has no usable document" in done.stdout + done.stderr
