"""Folders that can't be used are told before a run, and failures of a disk during it."""

import errno
import os
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.fault_tests.disks import as_nobody
from torchtitan.components.dump_folder import check_folders
from torchtitan.config import (
    Checkpoint,
    Comm,
    Compile,
    Job,
    JobConfig,
    Metrics,
    Profiling,
)
from torchtitan.tools.disk import (
    SideOutput,
    check_readable,
    check_writable,
    free_bytes,
    reason,
    write_whole,
)
from torchtitan.tools.errors import UserError


@pytest.fixture
def place() -> Iterator[Path]:
    """pytest's own folders are closed to other users than the one who runs it."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o777)
        yield Path(name)


WRONG = {
    "file": "file is not a folder",
    "file/inside": "file is not a folder",
    "dangling": "dangling is a link to nowhere, which doesn't exist",
    "dangling/inside": "dangling is a link to nowhere, which doesn't exist",
    "loop": "which doesn't exist",
    "closed": "Permission denied",
    "closed/inside": "Permission denied",
    "unreadable": "Permission denied",
    "read-only": "Permission denied",
    "read-only/inside": "Permission denied",
    "x" * 300: "File name too long",
    "x/" * 3000: "File name too long",
}


@pytest.mark.parametrize("name", WRONG, ids=lambda name: name[:20])
def test_why_a_folder_can_not_be_written_to(place, name):
    (place / "file").touch()
    (place / "dangling").symlink_to("nowhere")
    (place / "loop").symlink_to("loop")
    for closed, mode in (("closed", 0o000), ("unreadable", 0o333), ("read-only", 0o555)):
        (place / closed).mkdir()
        (place / closed).chmod(mode)
    with as_nobody(), pytest.raises(UserError) as told:
        check_writable("table.key", place / name)
    said = str(told.value)
    assert said.startswith(f"table.key {place / name}"[:60]) and WRONG[name] in said
    assert len(said) < 600


def test_a_folder_that_can_be_made_or_used_passes_and_nothing_is_made(place):
    (place / "there").mkdir()
    (place / "link").symlink_to("there")
    for name in ("there", "there/a/b", "link", "link/a", "there/../there"):
        check_writable("table.key", place / name)
    assert sorted(path.name for path in place.rglob("*")) == ["link", "there"]


def test_what_can_not_be_read_is_told_and_what_is_missing_left_to_its_reader(place):
    (place / "file").touch(0o000)
    (place / "closed").mkdir()
    (place / "closed").chmod(0o000)
    (place / "listed").mkdir()
    (place / "listed").chmod(0o444)
    (place / "loop").symlink_to("loop")
    check_readable("table.key", place / "missing")
    with as_nobody():
        for name in ("file", "closed", "closed/inside", "listed"):
            with pytest.raises(UserError, match=r"^table.key .* can't be read \(Permission denied"):
                check_readable("table.key", place / name)


def test_the_folders_of_what_is_switched_on_are_checked_and_no_others(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    job = Job(dump_folder=str(tmp_path))
    off = JobConfig(
        job=job,
        checkpoint=Checkpoint(folder="file"),
        metrics=Metrics(save_tb_folder="file"),
        profiling=Profiling(save_traces_folder="file", save_memory_snapshot_folder="file"),
        comm=Comm(save_traces_folder="file"),
    )
    check_folders(off, "cpu")
    on = {
        "checkpoint.folder": {"checkpoint": replace(off.checkpoint, enable=True)},
        "metrics.save_tb_folder": {"metrics": replace(off.metrics, enable_tensorboard=True)},
        "profiling.save_traces_folder": {
            "profiling": replace(off.profiling, enable_profiling=True),
        },
        "profiling.save_memory_snapshot_folder": {
            "profiling": replace(off.profiling, enable_memory_snapshot=True),
        },
        "comm.save_traces_folder": {},
    }
    for key, change in on.items():
        device_type = "cuda" if key.startswith("comm") else "cpu"
        with pytest.raises(UserError, match=f"^{key} .*file is not a folder"):
            check_folders(replace(off, **change), device_type)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(UserError, match="^TORCHINDUCTOR_CACHE_DIR "):
        check_folders(JobConfig(job=job, compile=Compile(enable=True)), "cpu")


def test_a_full_disk_is_told_with_its_numbers(tmp_path):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert reason(full, tmp_path, free=1000, needed=2000) == (
        "No space left on device: 1,000 bytes free, 2,000 bytes needed"
    )
    assert f"{free_bytes(tmp_path / 'not/there'):,}"[:3] in reason(full, tmp_path / "not/there")
    quota = OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
    assert reason(quota, tmp_path, needed=2000) == "Disk quota exceeded: 2,000 bytes needed"
    assert reason(OSError(errno.EIO, "Input/output error"), tmp_path) == "Input/output error"


@pytest.mark.parametrize("number", [errno.EIO, errno.EROFS, errno.EACCES, errno.EDQUOT])
def test_a_failure_is_said_once_until_it_works_again(tmp_path, caplog, number):
    output = SideOutput("x.jsonl", tmp_path, "its records follow")
    for fails in (True, True, False, False, True):
        with output.attempt():
            if fails:
                raise OSError(number, os.strerror(number))
    why = f"({os.strerror(number)}); training continues, and its records follow"
    told = f"x.jsonl can't be written {why}"
    assert caplog.messages == [told, "x.jsonl can be written again", told]


def test_mistakes_of_our_own_are_not_taken_for_the_disk(tmp_path):
    with pytest.raises(ZeroDivisionError), SideOutput("x", tmp_path, "").attempt():
        1 / 0  # noqa: B018


def test_a_file_is_written_whole_or_stays_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_whole(path, b"first")
    write = Path.write_bytes

    def half(self, content):
        write(self, content[:2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(OSError, match="No space"):
        write_whole(path, b"second")
    assert path.read_bytes() == b"first" and [p.name for p in tmp_path.iterdir()] == ["file"]
