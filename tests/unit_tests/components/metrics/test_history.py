"""Events and expert loads, as a resumed, a rewound and a new run leave them."""

import json
from pathlib import Path

import torch

from torchtitan.components.metrics.history import History


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(folder: Path, start: int, *kinds: str) -> None:
    history = History(folder, start, total_steps=10)
    for step, kind in enumerate(kinds, start=start + 1):
        history.event(step, kind)
    history.close()


def test_a_resumed_run_goes_on_and_a_new_one_keeps_the_old(tmp_path):
    run(tmp_path, 0, "start", "checkpoint")
    run(tmp_path, 2, "start", "end")
    path = tmp_path / "events.jsonl"
    assert [event["event"] for event in lines(path)] == ["start", "checkpoint", "start", "end"]
    run(tmp_path, 0, "start")
    assert [event["event"] for event in lines(path)] == ["start"]
    assert len(lines(tmp_path / "events.1.jsonl")) == 4


def test_a_line_that_a_kill_has_cut_off_costs_only_itself(tmp_path):
    run(tmp_path, 0, "start")
    path = tmp_path / "events.jsonl"
    path.write_bytes(path.read_bytes() + b'{"step": 2, "ev')
    run(tmp_path, 1, "start")
    whole = [line for line in path.read_text().splitlines() if line.endswith("}")]
    assert [json.loads(line)["event"] for line in whole] == ["start", "start"]


def test_a_rewind_stays_among_the_events_but_its_loads_are_done_again(tmp_path):
    history = History(tmp_path, 0, total_steps=10)
    loads = {1: torch.tensor([0.5, 1.504])}
    for step in (1, 2, 3):
        history.loads(step, loads)
    history.event(3, "rewind", loss=float("inf"))
    history.rewind(1)
    history.loads(2, loads)
    history.close()
    assert [record["step"] for record in lines(tmp_path / "expert_load.jsonl")] == [1, 2]
    assert lines(tmp_path / "expert_load.jsonl")[0]["percent_of_mean"] == {"1": [50, 150]}
    assert [event["event"] for event in lines(tmp_path / "events.jsonl")] == ["rewind"]


def test_a_long_run_records_some_two_hundred_loads(tmp_path):
    history = History(tmp_path, 0, total_steps=100_000)
    for step in range(10, 100_001, 10):
        history.loads(step, {1: torch.ones(2)})
    history.close()
    assert 150 <= len(lines(tmp_path / "expert_load.jsonl")) <= 201
