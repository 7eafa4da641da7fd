"""The bar: only in a terminal, never mixed with log lines, as a terminal shows them."""

import os
import pty
import re
import subprocess
import sys
import termios
import threading

import pytest

from tests.pages import REPO
from torchtitan.tools import progress_bar

PROGRAM = """
from torchtitan.tools.logging import init_logger, logger
from torchtitan.tools.progress_bar import track
init_logger()
for n in track(range(3), 3, "working", "step"):
    logger.info("line %d", n)
"""


def open_terminal() -> tuple[int, int]:
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    return ours, theirs


def run(terminal: bool, **variables: str) -> str:
    """Return what the program writes to its stderr, which may be a terminal."""
    env = os.environ | {"PYTHONPATH": str(REPO), "TERM": "xterm"} | variables
    env.pop(progress_bar.TERMINAL, None)
    ours, theirs = open_terminal() if terminal else os.pipe()
    process = subprocess.Popen([sys.executable, "-c", PROGRAM], stderr=theirs, env=env)
    os.close(theirs)
    text = b""
    try:
        while part := os.read(ours, 65536):
            text += part
    except OSError:  # a terminal whose other end is closed
        pass
    os.close(ours)
    assert process.wait() == 0
    return text.decode()


def screen(text: str) -> list[str]:
    """The lines that a terminal shows in the end."""
    lines, at = [""], 0
    for part in re.findall(r"\033\[K|\033\[A|[\r\n]|[^\r\n\033]+", text):
        if part == "\n":
            lines.append("")
        elif part == "\r":
            at = 0
        elif part == "\033[K":
            lines[-1] = lines[-1][:at]
        elif part != "\033[A":
            lines[-1] = lines[-1][:at] + part + lines[-1][at + len(part) :]
            at += len(part)
    return [line.rstrip() for line in lines]


def test_log_lines_and_the_bar_do_not_mix():
    text = run(terminal=True)
    assert "working:" in text and "/3" in text
    lines = [line for line in screen(text) if line]
    assert [line.rpartition(" ")[0][-4:] for line in lines[:3]] == ["line"] * 3
    assert all(line.startswith("[titan] ") and "|" not in line for line in lines[:3])


@pytest.mark.parametrize(
    "terminal, variables",
    [(False, {}), (True, {"TERM": "dumb"}), (True, {"RANK": "1", "LOG_RANK": "1"})],
)
def test_elsewhere_there_are_plain_lines(terminal, variables):
    text = run(terminal, **variables)
    assert text.count("line") == 3 and "working" not in text


def test_a_rank_behind_a_launcher_draws_on_its_terminal(monkeypatch):
    ours, theirs = open_terminal()
    monkeypatch.setenv(progress_bar.TERMINAL, os.ttyname(theirs))
    monkeypatch.setenv("TERM", "xterm")
    for name in ("RANK", "LOG_RANK"):
        monkeypatch.setenv(name, "0")
    with progress_bar.progress_bar(2, "training", "step") as bar:
        bar.update()
        assert b"training" in os.read(ours, 4096)
    assert progress_bar.beside_a_bar()


def test_a_bar_starts_no_thread_which_a_fork_would_lose(monkeypatch):
    ours, theirs = open_terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv(progress_bar.TERMINAL, os.ttyname(theirs))
    before = threading.active_count()
    with progress_bar.progress_bar(2, "proving", "check") as bar:
        bar.update()
        assert threading.active_count() == before
    os.close(ours)
    os.close(theirs)
