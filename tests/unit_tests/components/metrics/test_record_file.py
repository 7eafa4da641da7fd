"""Records reach the disk whole, each step once, however often the disk fails."""

import errno
import io
import json
import os
from pathlib import Path

import pytest
import torch

from torchtitan.components.checkpoint.dcp_storage import HashingStream, raising_write_errors
from torchtitan.components.metrics import record_file
from torchtitan.components.metrics.record_file import RecordFile, take_back
from torchtitan.components.metrics.writers import JsonlWriter


def lines(*steps: int) -> bytes:
    return b"".join(b'{"step": %d, "loss": 1.5}\n' % step for step in steps)


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


CASES = {
    "nothing after the step": (lines(1, 2), 2, [1, 2], None),
    "steps done again": (lines(1, 2, 3, 4), 2, [1, 2], [3, 4]),
    "only some steps are logged": (lines(1, 10, 20, 30), 25, [1, 10, 20], [30]),
    "all of them": (lines(5, 6), 2, [], [5, 6]),
    "torn last line": (lines(1, 2) + b'{"step": 3, "lo', 2, [1, 2], None),
    "torn line of a kept step": (lines(1) + b'{"step": 2', 2, [1], None),
    "torn and done again": (lines(1, 2, 3) + b'{"st', 2, [1, 2], [3]),
    "zeros of a power cut": (lines(1, 2) + bytes(100), 2, [1, 2], None),
    "zeros in the middle": (lines(1) + bytes(50) + b"\n" + lines(2), 2, [1, 2], None),
    "twice there already": (lines(1, 2, 3, 4, 3, 4), 4, [1, 2, 3, 4], [4, 3]),
    "no records": (b"", 2, [], None),
}


@pytest.mark.parametrize("name", CASES)
def test_a_resumed_run_finds_each_step_up_to_its_own_once(tmp_path, name):
    content, step, kept, replaced = CASES[name]
    path, others = tmp_path / "metrics.jsonl", tmp_path / "metrics.replaced.jsonl"
    path.write_bytes(content)
    writer = JsonlWriter(path, start_step=step)
    writer.write({"step": step + 1})
    writer.close()
    assert steps(path) == [*kept, step + 1]
    assert (steps(others) if others.exists() else None) == replaced
    assert {p.name for p in tmp_path.iterdir()} <= {path.name, others.name}


def test_replaced_records_of_several_resumes_are_all_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for _ in range(2):
        path.write_bytes(lines(1, 2, 3))
        take_back(path, 1)
    assert steps(tmp_path / "metrics.replaced.jsonl") == [2, 3, 2, 3]


def test_a_rewind_takes_back_what_waits_and_what_is_on_disk(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    writer = JsonlWriter(path, start_step=0)
    for step in (1, 2, 3):
        writer.write({"step": step})
    with monkeypatch.context() as broken:
        broken.setattr(os, "fstat", fail)
        writer.write({"step": 4})
        writer.rewind(2)
        writer.write({"step": 3, "again": True})
    writer.write({"step": 4, "again": True})
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert [record.get("again") for record in records] == [None, None, True, True]


def fail(*_: object) -> None:
    raise OSError(errno.EIO, "Input/output error")


def test_when_too_many_records_wait_the_oldest_are_lost_and_counted(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(record_file, "MAX_WAITING", 3)
    (tmp_path / "in the way").touch()
    path = tmp_path / "in the way/metrics.jsonl"
    file = RecordFile(path)
    for step in range(1, 6):
        file.append(step, lines(step))
    (tmp_path / "in the way").unlink()
    file.append(6, lines(6))
    file.close()
    assert steps(path) == [4, 5, 6]
    assert caplog.messages[-1].endswith("lacks 3 records that could not be written")


def test_half_a_record_that_a_full_disk_took_is_cut_off(tmp_path, monkeypatch):
    """Also where cutting it off fails at first."""
    path = tmp_path / "metrics.jsonl"
    file = RecordFile(path)
    file.append(1, lines(1))

    class Full(io.FileIO):
        def write(self, data):
            super().write(bytes(data)[:5])
            raise OSError(errno.ENOSPC, "No space left on device")

        def truncate(self, size=None):
            raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as broken:
        broken.setattr(record_file, "open", lambda name, *_, **__: Full(name, "a"), raising=False)
        file.append(2, lines(2))
    assert path.stat().st_size == len(lines(1)) + 5
    file.append(3, lines(3))
    assert path.read_bytes() == lines(1, 2, 3)


def test_an_earlier_run_s_file_that_can_not_be_moved_is_not_added_to(tmp_path, monkeypatch):
    """Its steps would be there twice."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(lines(1, 2))
    with monkeypatch.context() as broken:
        broken.setattr(Path, "rename", fail)
        writer = JsonlWriter(path, start_step=0)
        writer.write({"step": 1})
    assert path.read_bytes() == lines(1, 2)
    writer.write({"step": 2})
    assert steps(path) == [1, 2] and (tmp_path / "metrics.1.jsonl").read_bytes() == lines(1, 2)


class FullDisk(io.BytesIO):
    def write(self, data):
        if self.tell() + len(data) > 4096:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(data)


def test_torch_s_zip_writer_does_not_hide_the_disk():
    tensor = torch.zeros(10_000)
    with pytest.raises(RuntimeError, match="unexpected pos|PytorchStreamWriter"):
        torch.save(tensor, FullDisk())
    stream = HashingStream(FullDisk())
    with pytest.raises(OSError, match="No space left"), raising_write_errors(stream):
        torch.save(tensor, stream)
