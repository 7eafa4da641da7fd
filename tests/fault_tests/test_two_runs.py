"""Two runs in one folder: the second is refused, and a run that is gone is in nobody's way."""

import signal

from tests.fault_tests.processes import Run
from tests.tiny_run import records, tiny
from torchtitan.tools import folder_lock

SAVES = {
    "checkpoint__enable": True,
    "checkpoint__interval": 1000,
    "checkpoint__last_save_model_only": False,
}


def impatient(rank: int, argv: list[str]) -> None:
    folder_lock.PATIENCE_SECONDS = 0.2


def test_the_second_run_is_refused_until_the_first_one_is_gone(tmp_path):
    folder = tmp_path / "out"
    first_argv = tiny(folder, **SAVES, training__steps=100_000)
    with Run(first_argv, 2, tmp_path / "first") as first:
        first.wait_for(folder / "metrics.jsonl")
        with Run(tiny(folder, **SAVES), 1, tmp_path / "second", impatient) as second:
            assert second.exit_codes() == [2], second.log.read_text()
        said = second.log.read_text()
        assert f"by another run (process {first.ranks[0].pid} on " in said
        assert "Traceback" not in said and said.count(" E ") == 1
        assert first.ranks[0].is_alive(), "nobody disturbed it"
        for rank in range(2):
            first.kill(rank, signal.SIGKILL)
        first.exit_codes()
    with Run(tiny(folder, **SAVES, training__steps=3), 2, tmp_path / "third") as third:
        assert third.exit_codes() == [0, 0], third.log.read_text()
    assert [record["step"] for record in records(folder)] == [1, 2, 3], "of the third alone"
    assert not list(folder.rglob(".lock"))


def test_all_ranks_of_the_second_run_end_with_one_sentence(tmp_path):
    """Rank 0 looks for all of them; rank 1 would wait for it."""
    folder = tmp_path / "out"
    with Run(tiny(folder, training__steps=100_000), 1, tmp_path / "first") as first:
        first.wait_for(folder / "metrics.jsonl")
        with Run(tiny(folder), 2, tmp_path / "second", impatient) as second:
            assert second.exit_codes() == [2, 2], second.log.read_text()
    assert second.log.read_text().count("is being written to by another run (process ") == 1
