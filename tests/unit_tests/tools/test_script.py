"""The end of a script whose standard output is lost: a sentence, or silence, and no traceback."""

import subprocess
import sys

import pytest

PRINTS = "from torchtitan.tools.script import run_script; import sys; " + (
    "sys.exit(run_script(lambda: [print('x' * 999) for _ in range(999)]))"
)


@pytest.mark.parametrize("target, code", [("| true; exit ${PIPESTATUS[0]}", 0), ("> /dev/full", 2)])
def test_a_lost_standard_output_is_no_traceback(target, code):
    command = f'"$0" -c "$1" {target}'
    shell = ["bash", "-c", command, sys.executable, PRINTS]
    done = subprocess.run(shell, capture_output=True, text=True, check=False)
    assert done.returncode == code and "Traceback" not in done.stderr
    assert ("can't be written: No space left" in done.stderr) == (code == 2)


def test_a_checked_config_whose_output_is_lost_is_no_traceback():
    command = '"$0" -m torchtitan.train --job.check_config > /dev/full'
    shell = ["bash", "-c", command, sys.executable]
    done = subprocess.run(shell, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
