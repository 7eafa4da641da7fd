"""Every file in scripts/ that is called by hand: from any folder, with nothing installed, and at
Ctrl-C, its last word is a sentence."""

import ast
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import entry

SCRIPTS = Path(__file__).parents[2] / "scripts"
CALLED = [path for path in SCRIPTS.rglob("*.py") if '__name__ == "__main__"' in path.read_text()]
# One runs before anything is there; one is given a peer's package in place of ours.
APART = {SCRIPTS / "check_dependencies.py", SCRIPTS / "benchmarks/peer_step.py"}
WITHOUT_OURS = [name for name in os.environ if name != "PYTHONPATH"]


def call(folder: Path, *command: object, site: bool = True) -> subprocess.CompletedProcess:
    env = {name: os.environ[name] for name in WITHOUT_OURS}
    options = [] if site else ["-I", "-S"]  # without site-packages: nothing is installed
    return subprocess.run(
        [sys.executable, *options, *map(str, command)],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
    )


def imports(statement: ast.stmt) -> list[str]:
    """The top-level packages that a statement imports."""
    if isinstance(statement, ast.Import):
        return [alias.name.partition(".")[0] for alias in statement.names]
    if isinstance(statement, ast.ImportFrom):
        return [statement.module.partition(".")[0]]
    return []


@pytest.mark.parametrize(
    "path", sorted(set(CALLED) - APART), ids=lambda path: str(path.relative_to(SCRIPTS))
)
def test_a_script_finds_the_package_before_it_imports_what_may_be_missing(path):
    body = ast.parse(path.read_text()).body
    (inserts,) = [
        i for i, each in enumerate(body) if ast.unparse(each).startswith("sys.path.insert(0,")
    ]
    up = len(path.relative_to(SCRIPTS).parts)
    assert f"Path(__file__).resolve().parents[{up}]" in ast.unparse(body[inserts])
    before = [name for each in body[:inserts] for name in imports(each)]
    assert set(before) <= sys.stdlib_module_names
    assert ast.unparse(body[inserts + 1]) == "from scripts import entry"
    assert "entry.run(main" in ast.unparse(body[-1])


GONE = "gone/away"
# By script: a wrong command line, and what the last line says. Of the others: an unknown option.
WRONG = {
    "bench.py": (["step", "--trainin.steps", "3"], "trainin"),
    "card.py": (["16b"], "did you mean '16B'"),
    "checkpoint_conversion/convert_from_hf.py": ([GONE, "new"], f"{GONE} does not exist"),
    "checkpoint_conversion/convert_to_hf.py": (
        [".", "new", "--assets", GONE],
        f"--assets {GONE} does not exist",
    ),
    "explain_hang.py": ([GONE], f"{GONE} does not exist"),
    "from_torchtitan.py": ([GONE], f"{GONE} does not exist"),
    "generate.py": ([".", "--prompt", "a", "--tokenizer", GONE], f"--tokenizer {GONE} does not "),
    "measure_overlap.py": ([], "expert_parallel_degree = 1"),
    "plan.py": ([GONE, "--world-size", "8"], f"job.config_file {GONE} does not exist"),
    "plot_losses.py": ([GONE], f"{GONE} cannot be read"),
    "plot_step_time.py": ([GONE, "--out", "x.png"], f"{GONE} does not exist"),
    "prove.py": ([GONE], f"job.config_file {GONE} does not exist"),
    "report.py": ([".", GONE], f"{GONE} does not exist"),
    "show_batch.py": ([GONE], f"job.config_file {GONE} does not exist"),
    "soak.py": (["--kills", "many"], "--kills: invalid int value: 'many'"),
}
# Their command line is torchrun's, or another script's.
NOT_BY_HAND = {"launch.py", "node_traffic_rank.py"}
BY_HAND = {str(path.relative_to(SCRIPTS)) for path in set(CALLED) - APART} - NOT_BY_HAND


@pytest.mark.parametrize("name", sorted(BY_HAND))
def test_a_wrong_command_line_is_told_before_imports_that_take_seconds(name, tmp_path):
    stand_in = tmp_path / "torch/__init__.py"
    stand_in.parent.mkdir()
    stand_in.write_text("raise SystemExit('torch is imported')")
    arguments, sentence = WRONG.get(name, (["--no_such_option"], "error: "))
    env = {name: os.environ[name] for name in WITHOUT_OURS} | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, SCRIPTS / name, *arguments]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert sentence in done.stderr.splitlines()[-1]


def test_a_script_runs_from_any_folder(tmp_path):
    done = call(tmp_path, SCRIPTS / "checkpoint_conversion/convert_to_hf.py", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: convert_to_hf.py")


@pytest.mark.parametrize(
    "name", ["generate.py", "checkpoint_conversion/convert_from_hf.py", "launch.py", "bench.py"]
)
def test_a_script_names_the_packages_that_the_environment_lacks(tmp_path, name):
    done = call(tmp_path, SCRIPTS / name, "x", site=False)
    assert (done.returncode, done.stdout) == (2, "")
    (sentence,) = done.stderr.splitlines()
    assert sentence.startswith(f"{Path(name).name} needs torch>=2.11, datasets>=3.6, ")
    assert f"tyro>=1.0, which {sys.executable} lacks; " in sentence


def test_a_step_that_does_not_exist_is_answered_with_those_that_do(tmp_path):
    for step in (9, 10, 100, 20, 30, 40):
        (tmp_path / f"step-{step}").mkdir()
    (tmp_path / "step-x").mkdir()
    there = "beside it are step-10, step-20, step-30, step-40, step-100."
    assert entry._beside(tmp_path / "step-280") == there
    for path in (tmp_path / "text", tmp_path / "gone/step-280", tmp_path / "7"):
        assert entry._beside(path) == "correct the path."


def test_ctrl_c_while_a_script_imports_and_while_it_works_is_a_sentence(tmp_path):
    """A package that takes its time, then work that does."""
    slow = tmp_path / "slow.py"
    slow.write_text("import time\nprint('imports', flush=True)\ntime.sleep(60)\n")
    imports = f"import sys; sys.argv = ['x']; sys.path.insert(0, {str(tmp_path)!r}); "
    starts = f"import __main__; __main__.__file__ = {str(SCRIPTS / 'generate.py')!r}; "
    works = "entry.run(lambda: print('works', flush=True) or __import__('time').sleep(60))"
    for code in ("from scripts import entry; import slow", f"from scripts import entry; {works}"):
        run = subprocess.Popen(
            [sys.executable, "-c", imports + starts + code],
            cwd=SCRIPTS.parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert run.stdout.readline().strip() in ("imports", "works")
        run.send_signal(signal.SIGINT)
        _, said = run.communicate(timeout=20)
        assert (run.returncode, said) == (130, "Interrupted\n")
