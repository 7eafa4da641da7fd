"""Disks that fill up and folders that are closed; tests skip where this user can't make them."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

NOBODY = 65534


@contextmanager
def mounted(*arguments: str) -> Iterator[None]:
    """A mount for the time of a test; skips where that is not allowed."""
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mounting needs a root that may: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", arguments[-1]], check=True)


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    """size: as of tmpfs, "64k"."""
    folder.mkdir(parents=True, exist_ok=True)
    with mounted("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)):
        yield


@contextmanager
def as_nobody() -> Iterator[None]:
    """Permissions don't bind root, so it is nobody meanwhile; any other user stays who it is."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)
