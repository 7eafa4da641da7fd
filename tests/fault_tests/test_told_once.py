"""Mistakes that are found behind the config check: told once where all ranks find the same one,
with the rank's name where only some do, and never lost."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fault_tests.processes import Run
from tests.fault_tests.test_launcher import environment, launch
from tests.tiny_run import tiny
from torchtitan.tools import error_file
from torchtitan.tools.errors import RunError, UserError
from torchtitan.trainer import built_run

pytestmark = pytest.mark.timeout(240)
SENTENCE = "found while the model is built; mend it."


def failing(rank: int, argv: list[str], *, ranks: dict[int, str], error: type = UserError) -> None:
    """Make these ranks fail where only a rank itself can find it, each with its sentence."""
    if rank in ranks:

        def fail(*_: object) -> None:
            raise error(ranks[rank])

        built_run.build_model = fail


def told(log: Path) -> list[str]:
    return [line for line in log.read_text().splitlines() if " E " in line]


def ended(folder: Path, world_size: int, **how) -> tuple[list[int | None], list[str]]:
    prepare = functools.partial(failing, **how)
    with Run(tiny(folder), world_size, folder / "log", prepare) as run:
        codes = run.exit_codes()
    assert "Traceback" not in (folder / "log").read_text()
    return codes, told(folder / "log")


@pytest.mark.parametrize("error, code", [(UserError, 2), (RunError, 1)])
def test_the_error_of_all_ranks_is_told_once(tmp_path, error, code):
    ranks = dict.fromkeys(range(3), SENTENCE)
    codes, (line,) = ended(tmp_path, 3, ranks=ranks, error=error)
    assert codes == [code] * 3
    assert line.startswith("[titan] ") and line.endswith(f" E {SENTENCE}")


@pytest.mark.parametrize("rank", [0, 1])
def test_the_error_of_one_rank_names_it(tmp_path, rank):
    codes, lines = ended(tmp_path, 2, ranks={rank: SENTENCE})
    assert codes[rank] == 2
    (line,) = [line for line in lines if SENTENCE in line]
    assert "rank 0: " in line if rank == 0 else line.startswith("[titan rank 1] ")


def test_the_error_of_some_ranks_is_told_by_the_first_with_their_number(tmp_path):
    _, lines = ended(tmp_path, 3, ranks={0: SENTENCE, 2: SENTENCE})
    (line,) = [line for line in lines if SENTENCE in line]
    assert line.endswith(f" E rank 0 and 1 of 2 others: {SENTENCE}")


def test_no_error_is_lost_where_ranks_have_different_ones(tmp_path):
    codes, lines = ended(tmp_path, 3, ranks={n: f"file {n} is empty." for n in range(3)})
    assert codes == [2] * 3
    assert len(lines) == 3
    assert all(sum(f"file {n} is empty." in line for line in lines) == 1 for n in range(3))


def unusable_data(folder: Path) -> list[str]:
    data = folder / "bad.jsonl"
    data.write_text('{"txt": 1}\n')
    return tiny(folder, training__dataset="text", training__dataset_path=str(data))


def test_plain_torchrun_tells_it_once(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "torchtitan.train", *unusable_data(tmp_path)]
    found = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=200)
    assert found.stderr.count("has no usable document") == 1, found.stderr
    assert "exitcode  : 2" in found.stderr


@pytest.mark.parametrize("filtered", [[], ["--local-ranks-filter=0", "--tee=3"]])
def test_the_launcher_tells_it_once_in_its_last_line(tmp_path, filtered):
    options = ["--nproc-per-node=2", *filtered, "-m", "torchtitan.train"]
    run = launch(tmp_path / "log", *options, *unusable_data(tmp_path))
    assert run.wait(200) == 2
    said = (tmp_path / "log").read_text()
    assert said.count("has no usable document") == 1, said
    assert "E training.dataset 'text' has no usable document" in said.splitlines()[-1]


def test_the_launcher_tells_each_of_different_errors_with_its_ranks(tmp_path, monkeypatch):
    path = tmp_path / "errors"
    monkeypatch.setenv(error_file.ERROR_FILE, str(path))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    for rank, sentence in enumerate(["one", "two", "one", "three"]):
        monkeypatch.setenv("RANK", str(rank))
        assert error_file.leave_error(sentence, 2)
    found = [each.sentence for each in error_file.read_errors(path)]
    assert found == ["ranks 0, 2: one", "rank 1: two", "rank 3: three"]


def test_a_rank_logs_what_the_launcher_will_not_tell(tmp_path, monkeypatch):
    assert not error_file.leave_error("without a launcher", 2)
    monkeypatch.setenv(error_file.ERROR_FILE, str(tmp_path / "gone" / "errors"))
    assert not error_file.leave_error("no such folder", 2)
    monkeypatch.setenv(error_file.ERROR_FILE, str(tmp_path / "errors"))
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "1")
    assert not error_file.leave_error("before a restart", 2)
    (record,) = (tmp_path / "errors").read_text().splitlines()
    assert json.loads(record)["is_left"] is False
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert error_file.leave_error("at last", 2)
