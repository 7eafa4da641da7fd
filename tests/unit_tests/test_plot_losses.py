"""scripts/plot_losses.py: the contract is what the run wrote; a mistake is a sentence."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts/plot_losses.py"


def lines(*records):
    return "".join(json.dumps(record) + "\n" for record in records)


GOOD = lines({"step": 1, "loss": 7.123456789012345}, {"step": 2, "loss": 6.5})


def copy_of_script(folder):
    """The script writes beside itself, so a copy leaves the repository alone."""
    for name in ("scripts", "docs"):
        (folder / name).mkdir()
    copy = folder / "scripts/plot_losses.py"
    copy.write_bytes(SCRIPT.read_bytes())
    for name in ("entry.py", "check_dependencies.py"):  # what it imports from beside it
        copy.with_name(name).write_bytes(SCRIPT.with_name(name).read_bytes())
    return copy


def run(script, *arguments, prelude="pass"):
    code = f"import runpy, sys; {prelude}; sys.argv = sys.argv[1:]; "
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", code, str(script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "cannot be read (No such file or directory); correct the path."),
        ("not json\n", "is not a metrics.jsonl"),
        (lines({"step": 1}), "is not a metrics.jsonl"),
        (lines(1), "is not a metrics.jsonl"),
        ("", "does not have one record for each step from 1 on (found none)"),
        (lines({"step": 1, "loss": 7.0}, {"step": 10, "loss": 6.0}), "(found 1, 10)"),
        (GOOD + GOOD, "(found 1, 2, 1, 2)"),
        (lines({"step": 1, "loss": "NaN"}), "has the loss nan at step 1"),
    ],
)
def test_a_file_that_is_no_whole_curve_is_refused_and_changes_nothing(tmp_path, content, sentence):
    script = copy_of_script(tmp_path)
    if content is not None:
        (tmp_path / "m.jsonl").write_text(content)
    result = run(script, tmp_path / "m.jsonl")
    assert result.returncode == 2 and sentence in result.stderr
    assert result.stderr.startswith(f"{tmp_path}/m.jsonl") and result.stderr.count("\n") == 1
    assert not (tmp_path / "tests").exists()


def test_no_argument_and_no_matplotlib_are_sentences_too(tmp_path):
    script = copy_of_script(tmp_path)
    (tmp_path / "m.jsonl").write_text(GOOD)
    asked = run(script)
    assert (asked.returncode, asked.stderr.count("\n")) == (2, 1)
    without = run(script, tmp_path / "m.jsonl", prelude="sys.modules['matplotlib'] = None")
    assert without.returncode == 2 and without.stderr.startswith("matplotlib is not installed")
    assert not (tmp_path / "tests").exists()


def test_the_losses_are_written_to_the_last_digit_and_drawn(tmp_path):
    pytest.importorskip("matplotlib", reason="an optional dependency, extra 'docs'")
    script = copy_of_script(tmp_path)
    (tmp_path / "m.jsonl").write_text(GOOD)
    result = run(script, tmp_path / "m.jsonl")
    assert result.returncode == 0, result.stderr
    written = (tmp_path / "tests/assets/losses/deepseek_v3_debugmodel_cpu.txt").read_text()
    assert written == "7.123456789012345\n6.5\n"
    assert (tmp_path / "docs/debug_model_loss.png").read_bytes().startswith(b"\x89PNG")
