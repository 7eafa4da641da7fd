"""scripts/completion.py: what a shell offers for run_train.sh; and --version of a script."""

import shutil
import subprocess
import sys

import pytest

import torchtitan
from tests.scripts import SCRIPTS, script
from torchtitan.config.manager import completion

# Asks the function that the script registers, as the shell does when Tab is pressed.
ASK = """\
source {file}
complete -p run_train.sh >/dev/null || exit 3
COMP_WORDS=(./run_train.sh {words}) COMP_CWORD={at}
$(complete -p run_train.sh | sed 's/.*-F \\([^ ]*\\).*/\\1/')
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.fixture(scope="module")
def offers(tmp_path_factory):
    """Returns what bash offers behind these words."""
    file = tmp_path_factory.mktemp("completion") / "run_train.bash"
    file.write_text(completion("run_train.sh", "bash"))

    def ask(*words: str) -> list[str]:
        quoted = " ".join(f"'{word}'" for word in words)
        code = ASK.format(file=file, words=quoted, at=len(words))
        done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    return ask


def test_keys_and_choices_are_offered(offers):
    assert set(offers("--training.seq")) == {"--training.seq_len"}
    assert set(offers("--optimizer.name", "")) == {"Adam", "AdamW", "Muon"}
    assert "--parallelism.expert_parallel_degree" in offers("--parallelism.exp")


def test_the_script_prints_it_for_the_shell_that_is_named(capsys):
    script("completion.py").main(["zsh"])
    printed = capsys.readouterr().out
    assert printed.startswith("#compdef run_train.sh") and "training.seq_len" in printed


def test_another_shell_is_refused(capsys):
    with pytest.raises(SystemExit) as end:
        script("completion.py").main(["fish"])
    assert end.value.code == 2 and "fish" in capsys.readouterr().err


def test_a_script_says_the_version_at_once():
    """Without importing what takes seconds, or may be missing."""
    command = [sys.executable, "-I", "-S", str(SCRIPTS / "generate.py"), "--version"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, f"torchtitan-moe {torchtitan.__version__}\n")


def test_zsh_reads_it(tmp_path):
    if shutil.which("zsh") is None:
        pytest.skip("this machine has no zsh")
    file = tmp_path / "_run_train"
    file.write_text(completion("run_train.sh", "zsh"))
    done = subprocess.run(["zsh", "-n", str(file)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
