"""scripts/plot_schedules.py, and the numbers of docs/parallelism.md that come from it."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from torchtitan.distributed.pipeline_plan import SCHEDULES, SPLIT_BACKWARD

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    pytest.importorskip("matplotlib")
    spec = importlib.util.spec_from_file_location("plot", ROOT / "scripts/plot_schedules.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_pass_is_drawn_once_and_after_what_it_needs(script, schedule) -> None:
    passes = [one for rank in script.play(schedule) for one in rank]
    end = {(one.kind, one.stage, one.microbatch): one.end for one in passes}
    assert len(end) == len(passes)
    last = max(one.stage for one in passes)
    for stage in range(last + 1):
        for microbatch in range(script.MICROBATCHES):
            assert ("F", stage, microbatch) in end
            backward = [("B", stage, microbatch) in end]
            backward += [(half, stage, microbatch) in end for half in "IW"]
            assert backward in ([True, False, False], [False, True, True])
    for one in passes:
        if one.kind == "F" and one.stage > 0:
            assert end["F", one.stage - 1, one.microbatch] <= one.start
    assert any(one.kind == "W" for one in passes) == (schedule in SPLIT_BACKWARD)


def test_the_docs_tell_how_long_ranks_are_idle(script) -> None:
    page = (ROOT / "docs/parallelism.md").read_text()
    rows = [line for line in page.splitlines() if re.match(r"\| `\w+`.*\d %", line)]
    told = {
        name: int(re.search(r"(\d+) %", row)[1])
        for row in rows
        for name in re.findall(r"`(\w+)`", row.split("|")[1])
    }
    assert told == {name: round(100 * script.idle(script.play(name))) for name in SCHEDULES}


def test_a_picture_is_drawn(script, tmp_path, capsys) -> None:
    script.main(str(tmp_path / "picture.png"))
    assert (tmp_path / "picture.png").stat().st_size > 10_000
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == list(SCHEDULES)
