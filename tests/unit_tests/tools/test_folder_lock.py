"""One writer at a time: locks of processes that live, that are gone, and on other machines."""

import errno
import fcntl
import json
import os
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.tiny_run import tiny
from torchtitan.components import dump_folder
from torchtitan.components.checkpoint.convert import _explaining_disk_errors
from torchtitan.components.dump_folder import alone_in_folders, own_folders
from torchtitan.config import ConfigManager
from torchtitan.tools import folder_lock
from torchtitan.tools.errors import UserError
from torchtitan.tools.folder_lock import FolderLock

GONE = 2**22 + 1  # above the largest process id


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(folder_lock, "PATIENCE_SECONDS", 0.1)
    monkeypatch.setattr(folder_lock, "SILENCE_SECONDS", 0.3)
    monkeypatch.setattr(folder_lock, "BEAT_SECONDS", 0.02)


@pytest.fixture
def no_flock(monkeypatch):
    def refuse(file: int, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)


def lock(folder: Path) -> FolderLock:
    return FolderLock(folder / ".lock", f"job.dump_folder {folder}", "name another job.dump_folder")


def write_owner(folder: Path, **changes: object) -> Path:
    owner = {
        "pid": GONE,
        "host": socket.gethostname(),
        "since": "2026-11-26 12:00:00",
        "boot": folder_lock._boot_id(),
        "started": "1",
        "beat": 0,
    }
    path = folder / ".lock"
    path.write_text(json.dumps(owner | changes))
    return path


def test_the_second_is_told_who_is_there(tmp_path):
    with lock(tmp_path):
        with pytest.raises(UserError) as error, lock(tmp_path):
            pass
        assert (tmp_path / ".lock").exists(), "still the first one's"
    for part in (
        f"job.dump_folder {tmp_path} is being written to by another run (process {os.getpid()} on "
        f"{socket.gethostname()} since 20",
        "or name another job.dump_folder; ",
        f"remove {tmp_path / '.lock'}.",
    ):
        assert part in str(error.value)
    with lock(tmp_path):
        pass


def test_nothing_is_left_behind_but_what_others_wrote(tmp_path):
    with lock(tmp_path / "a/b"):
        pass
    assert not (tmp_path / "a").exists()
    with lock(tmp_path / "a/b"):
        (tmp_path / "a/file").touch()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["file"]


def test_a_killed_process_frees_its_folder(tmp_path):
    script = (
        "import os, sys, time\nfrom pathlib import Path\n"
        "from torchtitan.tools.folder_lock import FolderLock\n"
        "FolderLock(Path(sys.argv[1]), 'x', 'y').__enter__()\nprint('in', flush=True)\n"
        "time.sleep(60)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / ".lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        with pytest.raises(UserError, match=f"process {process.pid} on"), lock(tmp_path):
            pass
        process.kill()
    assert (tmp_path / ".lock").exists()
    with lock(tmp_path):
        pass


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": 5}', "\0\0"])
def test_a_torn_lock_is_taken_over(tmp_path, content):
    (tmp_path / ".lock").write_text(content)
    with lock(tmp_path):
        pass


def test_a_machine_that_was_started_anew_has_no_former_processes(tmp_path):
    write_owner(tmp_path, boot="of another start")
    began = time.monotonic()
    with lock(tmp_path):
        assert time.monotonic() - began < 0.3


def test_an_owner_on_another_machine_that_has_gone_silent_is_gone(tmp_path, caplog):
    write_owner(tmp_path, host="elsewhere", boot="other")
    with lock(tmp_path):
        pass
    assert "on elsewhere; waiting 0 s" in caplog.text


def test_an_owner_on_another_machine_that_still_counts_lives(tmp_path):
    """Where the file system does not show its lock here."""
    path, over = write_owner(tmp_path, host="elsewhere", boot="other"), threading.Event()

    def count() -> None:
        beat = 0
        while not over.wait(0.05):
            beat += 1
            write_owner(tmp_path, host="elsewhere", boot="other", beat=beat)

    thread = threading.Thread(target=count)
    thread.start()
    with pytest.raises(UserError, match=f"on elsewhere since .* remove {path}"), lock(tmp_path):
        pass
    over.set()
    thread.join()


def test_a_long_lived_owner_counts(tmp_path):
    with lock(tmp_path):
        before = (tmp_path / ".lock").read_text()
        deadline = time.monotonic() + 5
        while (tmp_path / ".lock").read_text() == before:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_without_the_kernels_locks_the_process_is_looked_for(tmp_path, no_flock):
    with lock(tmp_path):
        with pytest.raises(UserError, match=f"process {os.getpid()} on"), lock(tmp_path):
            pass
    write_owner(tmp_path)
    with lock(tmp_path):
        pass
    write_owner(tmp_path, pid=os.getpid(), started="1")  # the number is another process's now
    with lock(tmp_path):
        pass


# ---------------------------------------------------------------------------------------------
# What a run and a conversion lock
# ---------------------------------------------------------------------------------------------


def config(folder: Path, **changes):
    return ConfigManager().parse_args(tiny(folder, **changes))


def test_every_folder_that_a_run_writes_to_is_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(dump_folder, "device_type", lambda: "cuda")
    options = {
        "checkpoint__enable": True,
        "profiling__enable_profiling": True,
        "profiling__enable_memory_snapshot": True,
        "metrics__enable_tensorboard": True,
        "metrics__save_tb_folder": tmp_path / "elsewhere",
    }
    names = {path.name for path in own_folders(config(tmp_path / "out", **options))}
    expected = {"out", "checkpoint", "profile_traces", "memory_snapshot", "elsewhere"}
    assert names == expected | {"comm_traces"}
    reads = config(tmp_path, checkpoint__enable=True, checkpoint__load_only=True)
    assert tmp_path / "checkpoint" not in own_folders(reads)


@pytest.mark.parametrize(
    "key, changes",
    [
        ("checkpoint.folder", {"checkpoint__enable": True, "checkpoint__folder": "{shared}"}),
        (
            "metrics.save_tb_folder",
            {"metrics__enable_tensorboard": True, "metrics__save_tb_folder": "{shared}"},
        ),
    ],
)
def test_a_folder_elsewhere_is_locked_too_under_any_of_its_names(tmp_path, key, changes):
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "real").mkdir()
    changes = {name: str(value) for name, value in changes.items()}

    def run(own: str, shared: str):
        told = {k: v.replace("{shared}", str(tmp_path / shared)) for k, v in changes.items()}
        return alone_in_folders(config(tmp_path / own, **told))

    with run("a", "real"):
        with pytest.raises(UserError, match=f"{key} .* by another run .* or name another {key}"):
            with run("b", "link"):
                pass
        with ExitStack() as free:
            free.enter_context(lock(tmp_path / "b"))  # what it had taken is free again
    with run("b", "link"):
        pass


def test_a_file_in_the_place_of_a_folder_is_named_with_its_key(tmp_path):
    (tmp_path / "file").touch()
    options = {"checkpoint__enable": True, "checkpoint__folder": tmp_path / "file"}
    with pytest.raises(UserError, match="checkpoint.folder .*/file can't be written to"):
        with alone_in_folders(config(tmp_path / "out", **options)):
            pass


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda p: p.symlink_to("/none/x")])
def test_a_lock_that_is_no_file_is_named(tmp_path, make):
    make(tmp_path / ".lock")
    with pytest.raises(UserError, match=r"its lock file .*/\.lock can't be used .*remove it"):
        with alone_in_folders(config(tmp_path)):
            pass


def test_two_conversions_into_one_folder(tmp_path):
    @_explaining_disk_errors
    def convert(source: Path, target: Path, inner) -> None:
        inner()

    again = lambda: convert(Path("elsewhere"), tmp_path / "model", lambda: None)  # noqa: E731
    with pytest.raises(UserError, match="model is being written to by another run .* name another"):
        convert(Path("elsewhere"), tmp_path / "model", again)
    again()
    assert list(tmp_path.iterdir()) == []
