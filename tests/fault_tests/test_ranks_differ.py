"""Ranks that were started with different settings, files or versions: all end before the first
step, with exit code 2 and one sentence that names what differs."""

import functools
import json
import os
from pathlib import Path

import pytest
import torch

from tests.fault_tests.processes import Run
from tests.tiny_run import tiny
from torchtitan.trainer import same_run


def with_options(rank: int, argv: list[str], *, options: list[str]) -> None:
    if rank == 1:
        argv += options


def with_another_torch(rank: int, argv: list[str]) -> None:
    if rank == 1:
        torch.__version__ = "2.99.0"


def with_other_code(rank: int, argv: list[str]) -> None:
    if rank == 1:
        digests = same_run.source_digests() | {"torchtitan/trainer/trainer.py": "another"}
        same_run.source_digests = lambda: digests


def with_a_variable(rank: int, argv: list[str]) -> None:
    os.environ["NVIDIA_TF32_OVERRIDE"] = str(rank)


def with_its_own_data(rank: int, argv: list[str], *, folder: Path) -> None:
    """Train on data of its own, as a machine with an older copy would."""
    argv.append(f"--training.dataset_path={folder / f'{rank}.jsonl'}")


def lines(run: Run) -> list[str]:
    return [line for line in run.log.read_text().splitlines() if " E " in line]


def check_all_are_told(run: Run, *parts: str) -> None:
    assert run.exit_codes() == [2] * len(run.ranks), run.log.read_text()
    (told,) = lines(run)  # once for all
    assert "Traceback" not in run.log.read_text()
    assert all(part in told for part in parts), told


@pytest.mark.parametrize(
    "options, sentence",
    [
        (["--optimizer.lr=5e-2"], "differ in optimizer.lr: 0.05 on rank 1, 0.01 on rank 0;"),
        (
            # before a group of that mesh is made, which would wait for ever
            ["--parallelism.tensor_parallel_degree=2", "--model.args.n_layers=3"],
            "differ in parallelism.tensor_parallel_degree: 2 on rank 1, 1 on rank 0 (1 more",
        ),
    ],
)
def test_another_setting(tmp_path, options, sentence):
    other = functools.partial(with_options, options=options)
    with Run(tiny(tmp_path), 2, tmp_path / "log", other) as run:
        check_all_are_told(run, sentence)
    assert not (tmp_path / "metrics.jsonl").exists() and not (tmp_path / ".lock").exists()


@pytest.mark.parametrize(
    "prepare, sentence",
    [
        (with_another_torch, 'torch\'s version: "2.99.0" on rank 1, "'),
        (with_other_code, 'the code in torchtitan/trainer/trainer.py: "another" on rank 1, "'),
        (with_a_variable, 'the variable NVIDIA_TF32_OVERRIDE: "1" on rank 1, "0" on rank 0'),
    ],
)
def test_another_version_or_environment(tmp_path, prepare, sentence):
    with Run(tiny(tmp_path), 2, tmp_path / "log", prepare) as run:
        check_all_are_told(run, sentence)


def test_other_data_under_the_same_settings(tmp_path):
    for rank in range(2):
        text = json.dumps({"text": f"the data of rank {rank}. " * (100 + rank)})
        (tmp_path / f"{rank}.jsonl").write_text(f"{text}\n" * 8)
    argv = tiny(tmp_path / "out", training__dataset="text")
    other = functools.partial(with_its_own_data, folder=tmp_path)
    with Run(argv, 2, tmp_path / "log", other) as run:
        check_all_are_told(run, "the ranks of this run differ in data ", " on rank 1, ")


def test_a_mistake_that_one_rank_alone_finds_is_told_to_all(tmp_path):
    """Rank 1 ends before the groups; the others would wait comm.init_timeout_seconds for it."""
    wrong = functools.partial(with_options, options=["--model.hf_assets_path=nowhere"])
    with Run(tiny(tmp_path), 2, tmp_path / "log", wrong) as run:
        check_all_are_told(run, " E rank 1: ", "nowhere")


def test_a_mistake_that_all_ranks_find_is_told_by_one(tmp_path):
    with Run(tiny(tmp_path, model__flavor="debugmodle"), 2, tmp_path / "log") as run:
        assert run.exit_codes() == [2, 2]
    (sentence,) = lines(run)
    assert sentence.startswith("[titan] ") and "debugmodle" in sentence


def test_paths_and_descriptions_may_differ(tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(
        Path("tests/assets/tokenizer/tokenizer.json").read_bytes()
    )
    for name in ("tokenizer_config.json",):
        (tmp_path / name).write_bytes(Path("tests/assets/tokenizer", name).read_bytes())
    own = [f"--model.hf_assets_path={tmp_path}", "--job.description=mine"]
    own.append(f"--job.dump_folder={tmp_path / 'own'}")
    other = functools.partial(with_options, options=own)
    with Run(tiny(tmp_path / "out", training__steps=1), 2, tmp_path / "log", other) as run:
        assert run.exit_codes() == [0, 0], run.log.read_text()
