"""Dumps in the flight recorder's format (its version 2.10), and the sentence about them."""

import os
import pickle
import time

import pytest

from tests.scripts import script
from torchtitan.tools.flight_recorder import explain


def entry(number, state, name="nccl:all_reduce", group="0", desc="default_pg", at=0):
    return {
        "process_group": (group, desc),
        "collective_seq_id": number,
        "p2p_seq_id": 0,
        "is_p2p": False,
        "profiling_name": name,
        "state": state,
        "time_created_ns": at or number,
    }


def dump(folder, rank, entries, groups=None):
    groups = groups or {"0": ("default_pg", [0, 1, 2])}
    config = {
        name: {"name": name, "desc": desc, "ranks": str(ranks)}
        for name, (desc, ranks) in groups.items()
    }
    content = {"version": "2.10", "pg_config": config, "pg_status": {}, "entries": entries}
    (folder / f"rank_{rank}").write_bytes(pickle.dumps(content))


@pytest.mark.parametrize(("desc", "shown"), [("weights", "weights"), ("undefined", "12")])
def test_a_group_is_called_by_its_use_or_its_number(tmp_path, desc, shown):
    """NCCL writes "undefined" where a group was made without a description."""
    waits = entry(3, "started", group="12", desc=desc)
    dump(tmp_path, 0, [waits], {"12": (desc, [0, 1])})
    assert f"number 3 of the group {shown}, was not finished: rank 1 left no file" in explain(
        tmp_path
    )


def test_the_rank_that_did_not_come_is_named(tmp_path):
    for rank in (0, 2):
        dump(tmp_path, rank, [entry(1, "completed"), entry(2, "started", "nccl:all_gather")])
    dump(tmp_path, 1, [entry(1, "completed")])
    assert explain(tmp_path) == (
        f"the flight recorder's files in {tmp_path} (of rank 0, 1, 2) say: nccl:all_gather, number "
        "2 of the group default_pg, was not finished: rank 1 has not entered it, while rank 0, 2 "
        "waited"
    )


def test_a_rank_without_a_file_and_one_held_up_inside(tmp_path):
    dump(tmp_path, 0, [entry(7, "started")])
    dump(tmp_path, 1, [entry(7, "scheduled")])
    assert "rank 2 left no file, while rank 0, 1 waited" in explain(tmp_path)
    dump(tmp_path, 2, [entry(7, "scheduled")])
    assert "all its ranks have entered it" in explain(tmp_path)


def test_of_ranks_that_wait_for_each_other_the_cause_is_named(tmp_path):
    """Rank 0 waits for rank 1 in one group, which waits for rank 2 in another."""
    groups = {"a": ("fsdp", [0, 1]), "b": ("ep", [1, 2])}
    dump(tmp_path, 0, [entry(5, "started", group="a", desc="fsdp", at=1)], groups)
    dump(tmp_path, 1, [entry(3, "started", "nccl:all_to_all", "b", "ep", at=2)], groups)
    dump(tmp_path, 2, [entry(2, "completed", "nccl:all_to_all", "b", "ep")], groups)
    sentence = explain(tmp_path)
    assert "nccl:all_to_all, number 3 of the group ep" in sentence
    assert "rank 2 has not entered it" in sentence


def test_files_of_an_earlier_hang_and_other_files_are_left_out(tmp_path):
    dump(tmp_path, 0, [entry(1, "started")])
    os.utime(tmp_path / "rank_0", (1, 1))
    assert explain(tmp_path, since=time.time() - 60) is None
    (tmp_path / "rank_1").write_bytes(pickle.dumps(os.getcwd))  # no plain value: never loaded
    (tmp_path / "rank_2").write_bytes(b"\x80\x04half")
    assert "(of rank 0)" in explain(tmp_path)


@pytest.mark.parametrize("missing", [True, False])
def test_a_folder_without_dumps_is_refused(tmp_path, capsys, missing):
    folder = tmp_path / "no" if missing else tmp_path
    assert script("explain_hang.py").main([str(folder)]) == 2
    assert "comm.save_traces_folder" in capsys.readouterr().err


def test_the_script_prints_the_sentence(tmp_path, capsys):
    dump(tmp_path, 0, [entry(1, "completed")])
    assert script("explain_hang.py").main([str(tmp_path)]) == 0
    assert capsys.readouterr().out.endswith("have no unfinished collective.\n")
