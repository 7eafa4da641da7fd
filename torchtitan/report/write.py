"""Writing of a report: at the end of a run, which it never makes fail, and on request."""

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from torchtitan.report.page import page
from torchtitan.report.read import Run, read_run
from torchtitan.tools.disk import SideOutput, write_whole
from torchtitan.tools.errors import UserError
from torchtitan.tools.logging import logger

NAME = "report.html"
INSTALL = f"{sys.executable} -m pip install plotly"


def report_at_end(dump_folder: str | os.PathLike) -> None:
    """Write the report of a run that ends. Failures are logged in a sentence."""
    path, began = Path(dump_folder, NAME), time.monotonic()
    if find_spec("plotly") is None:
        logger.info(
            f"report: plotly draws it, and is not installed: {INSTALL}, then python "
            f"scripts/report.py {dump_folder}"
        )
        return
    again = f"python scripts/report.py {dump_folder} tries again"
    with SideOutput(str(path), path.parent, again).attempt(Exception):
        _write([Path(dump_folder)], path)
        logger.info(f"report: wrote {path} in {time.monotonic() - began:.1f} s")


def write_report(folders: Sequence[Path], path: Path) -> list[Run]:
    """Write the report of one run, or of several beside each other. Returns what was read.

    Raises `UserError` for folders that are no runs, and where plotly is missing.
    """
    if find_spec("plotly") is None:
        raise UserError(f"plotly draws the report, and is not installed; run {INSTALL}.")
    try:
        return _write(folders, path)
    except OSError as error:
        raise UserError(
            f"{path} can't be written ({error.strerror}); name another file with --out."
        ) from None


def _write(folders: Sequence[Path], path: Path) -> list[Run]:
    runs = _named_apart([read_run(folder) for folder in folders])
    text = page(runs).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text)
    return runs


def _named_apart(runs: list[Run]) -> list[Run]:
    """Name runs by so much of their paths that names differ."""
    if len({run.name for run in runs}) == len(runs):
        return runs
    return [replace(run, name=str(run.path)) for run in runs]
