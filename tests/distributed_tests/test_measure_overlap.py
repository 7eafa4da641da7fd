"""scripts/measure_overlap.py: a table on two ranks, a sentence for what can't be measured."""

import io
import json
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from scripts import measure_overlap
from tests.tiny_run import tiny

EP = "--parallelism.expert_parallel_degree=2"


def measured(options: list[str]) -> str:
    with redirect_stdout(io.StringIO()) as out:
        assert measure_overlap.main(["--pairs=1", *options]) == 0
    return out.getvalue()


def test_a_pair_is_timed_both_ways(ranks, tmp_path: Path):
    table, nothing = ranks(2).run(measured, [*tiny(tmp_path), EP])
    row = json.loads(table)
    assert row["one after the other, ms a pair"] > 0 < row["interleaved, ms a pair"]
    assert [len(times) for times in row["all rounds"].values()] == [measure_overlap.ROUNDS] * 2
    assert nothing == ""


@pytest.mark.parametrize(
    "options, sentence",
    [(["--pairs=0", EP], "--pairs = 0 must be 1 or more"), ([], "so nothing is exchanged")],
)
def test_what_can_not_be_measured_is_one_sentence(tmp_path, capsys, options, sentence):
    assert measure_overlap.main([*options, *tiny(tmp_path)]) == 2
    assert sentence in capsys.readouterr().err
