"""scripts/setup_env.sh: what it finds, makes, mends and says, in a small repository of its own.

The repository here asks for packages that the test builds (one module each), so that pip needs
neither an index nor minutes.
"""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
NEEDED_BY_THE_SCRIPT = ("bash", "dirname", "rm", "grep", "sed", "tail")
# This interpreter, and as it would be without the torch that the tests have.
PYTHON = f'exec {sys.executable} "$@"'
WITHOUT_TORCH = f'case "$*" in *find_spec*) exit 1 ;; esac\n{PYTHON}'


def build_wheel(folder: Path, name: str, version: str) -> None:
    """A package with one module that knows its version."""
    info = f"{name}-{version}.dist-info"
    files = {
        f"{name}.py": f"version = '{version}'\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        for path, text in (files | {f"{info}/RECORD": record}).items():
            wheel.writestr(path, text)


class Repository:
    """A clone of our set-up scripts around other dependencies."""

    def __init__(self, root: Path) -> None:
        self.root, self.wheels, self.path = root, root / "wheels", root / "path"
        for folder in (root / "scripts", self.wheels, self.path):
            folder.mkdir(parents=True)
        for script in ("setup_env.sh", "check_dependencies.py"):
            shutil.copy(REPO / "scripts" / script, root / "scripts")
        for tool in NEEDED_BY_THE_SCRIPT:
            (self.path / tool).symlink_to(shutil.which(tool))
        self.install_program("python3", WITHOUT_TORCH)
        for version in ("1.0", "2.0"):
            build_wheel(self.wheels, "tool_a", version)
            build_wheel(self.wheels, "tool_b", version)
        self.ask_for(["tool_a>=1.0"], pins={"tool_a": "1.0"})

    def ask_for(self, dependencies: list[str], pins: dict[str, str]) -> None:
        """Write pyproject.toml and constraints.txt; the extra `test` is tool_b."""
        (self.root / "pyproject.toml").write_text(
            f"[project]\nname = 'x'\nversion = '1'\ndependencies = {dependencies}\n"
            "[project.optional-dependencies]\ntest = ['tool_b']\nreport = []\n"
        )
        lines = [f"{name}=={version}" for name, version in pins.items()]
        (self.root / "constraints.txt").write_text("\n".join(["# pins", *lines]) + "\n")

    def install_program(self, name: str, script: str) -> None:
        program = self.path / name
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)

    def set_up(self, extras: str = "", **variables: str) -> subprocess.CompletedProcess:
        """Call it as the scripts do; stdout is the interpreter chosen."""
        script = f"set -euo pipefail; source scripts/setup_env.sh; set_up {extras}; echo $PYTHON"
        env = {
            "PATH": str(self.path),
            "HOME": os.environ["HOME"],
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": self.wheels.as_uri(),
            "PIP_CONFIG_FILE": os.devnull,
            "EXTRAS": "a variable of the user's own",
        }
        return subprocess.run(
            ["bash", "-c", script],
            cwd=self.root,
            env=env | variables,
            capture_output=True,
            text=True,
        )

    @property
    def python(self) -> Path:
        return self.root / ".venv/bin/python"

    @property
    def site(self) -> Path:
        (folder,) = self.root.glob(".venv/lib/python*/site-packages")
        return folder

    def installed(self, name: str) -> str:
        """The version that an import finds."""
        code = f"import {name}; print({name}.version)"
        done = subprocess.run([self.python, "-c", code], capture_output=True, text=True, check=True)
        return done.stdout.strip()


@pytest.fixture(scope="module")
def filled(tmp_path_factory) -> tuple[Repository, subprocess.CompletedProcess]:
    """A repository whose .venv the first call has made, and what that call said."""
    repository = Repository(tmp_path_factory.mktemp("setup") / "a folder with spaces")
    return repository, repository.set_up()


@pytest.fixture
def repository(filled) -> Repository:
    """The same, brought back to what the first call left."""
    repository, _ = filled
    repository.ask_for(["tool_a>=1.0"], pins={"tool_a": "1.0"})
    done = repository.set_up()
    assert done.returncode == 0, done.stderr
    return repository


def test_the_first_call_makes_an_environment_with_the_pinned_versions(filled):
    repository, first = filled
    assert first.returncode == 0, first.stderr
    assert first.stdout.strip() == str(repository.python)
    made, installing = first.stderr.splitlines()
    assert made == f"Making {repository.root}/.venv"
    assert installing.startswith(f"Installing into {repository.root}/.venv")
    assert repository.installed("tool_a") == "1.0", "2.0 is there too, but not pinned"


def test_the_repository_is_importable_from_anywhere(repository, tmp_path):
    (repository.root / "torchtitan.py").write_text("")
    subprocess.run([repository.python, "-c", "import torchtitan"], cwd=tmp_path, check=True)


def test_what_is_there_is_neither_asked_for_nor_installed_again(repository):
    """The tests' packages first, then training: it needs no more, and no index to know it."""
    done = repository.set_up("test")
    assert done.returncode == 0 and done.stderr.endswith("tool_b\n"), done.stderr
    no_wheels = {"PIP_FIND_LINKS": os.devnull}
    for extras in ("test", ""):
        again = repository.set_up(extras, **no_wheels)
        assert (again.returncode, again.stderr) == (0, "")


def test_a_changed_pyproject_or_constraint_is_installed(repository):
    repository.ask_for(["tool_a>=2.0"], pins={})
    assert repository.set_up().returncode == 0
    assert repository.installed("tool_a") == "2.0"
    repository.ask_for(["tool_a"], pins={"tool_a": "1.0"})
    assert repository.set_up().returncode == 0
    assert repository.installed("tool_a") == "1.0"


def test_an_installation_that_was_interrupted_is_finished(repository):
    """pip itself takes a package without a RECORD for whole."""
    (repository.site / "tool_a-1.0.dist-info/RECORD").unlink()
    (repository.site / "tool_a.py").unlink()
    done = repository.set_up()
    assert done.returncode == 0, done.stderr
    assert repository.installed("tool_a") == "1.0"


def test_an_environment_without_pip_is_made_anew(repository):
    """Start from bin/python and nothing else, as Debian without python3-venv leaves it."""
    shutil.rmtree(repository.root / ".venv/lib")
    done = repository.set_up()
    assert done.returncode == 0, done.stderr
    assert repository.installed("tool_a") == "1.0"


def test_a_python_that_cannot_make_environments_is_not_taken(tmp_path):
    """Debian without python3-venv: `import venv` works there, `import ensurepip` does not."""
    repository = Repository(tmp_path / "repository")
    without = f'case "$*" in *ensurepip*) exit 1 ;; esac\n{WITHOUT_TORCH}'
    repository.install_program("python3", without)
    done = repository.set_up()
    assert done.returncode == 2 and done.stdout == ""
    (sentence,) = done.stderr.splitlines()
    assert "Python 3.11 or newer with venv" in sentence and "python3-venv" in sentence
    assert not (repository.root / ".venv").exists()


@pytest.fixture
def with_torch(tmp_path) -> Repository:
    """A clone without .venv on a machine whose `python` and `python3` are this one, with torch."""
    repository = Repository(tmp_path / "clone")
    for name in ("python", "python3"):
        repository.install_program(name, PYTHON)
    return repository


def test_an_activated_environment_that_has_all_is_used_whatever_its_versions(with_torch):
    with_torch.ask_for(["pytest>=1.0"], pins={"pytest": "1.0"})
    done = with_torch.set_up(VIRTUAL_ENV="/somewhere")
    assert (done.returncode, done.stdout, done.stderr) == (0, "python\n", "")


def test_an_activated_environment_with_torch_is_told_the_line_that_completes_it(with_torch):
    with_torch.ask_for(["torch>=2.11", "tool_a>=1.0", "pytest"], pins={"torch": "2.11"})
    done = with_torch.set_up("test", CONDA_PREFIX="/some where")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "the activated environment, /some where, has torch but lacks tool_a>=1.0, tool_b; "
        "run: python -m pip install 'tool_a>=1.0' 'tool_b'\n"
    )
    assert not (with_torch.root / ".venv").exists(), "no second torch"


def test_an_activated_environment_without_torch_is_passed_over(repository):
    repository.install_program("python", WITHOUT_TORCH)
    done = repository.set_up("test", VIRTUAL_ENV="/somewhere")
    assert done.returncode == 0 and done.stdout.strip() == str(repository.python)
    first = done.stderr.splitlines()[0]
    assert first == "the activated environment, /somewhere, has no torch: using .venv"


def test_a_python_that_is_too_old_is_no_reason_for_a_second_torch(with_torch):
    old = f'case "$*" in *check_dep*) echo "Python>=3.11"; exit 1 ;; esac\n{PYTHON}'
    with_torch.install_program("python", old)
    done = with_torch.set_up(VIRTUAL_ENV="/somewhere")
    assert done.returncode == 2 and "has torch but not Python>=3.11; activate" in done.stderr
    assert not (with_torch.root / ".venv").exists()


def test_the_python_of_the_path_is_used_where_it_has_torch(with_torch):
    """A GPU machine or container: nothing is activated, and python3 has torch."""
    with_torch.ask_for(["pytest>=1.0"], pins={"pytest": "1.0"})
    done = with_torch.set_up()
    assert (done.returncode, done.stdout, done.stderr) == (0, "python3\n", "")
    done = with_torch.set_up("test")
    assert (done.returncode, done.stdout) == (2, "")
    way_out = "run: python3 -m pip install 'tool_b'\n"
    assert done.stderr == f"the python3 of PATH has torch but lacks tool_b; {way_out}"
    assert not (with_torch.root / ".venv").exists()


def test_a_venv_that_is_complete_comes_before_the_python_of_the_path(repository):
    repository.install_program("python3", PYTHON)
    try:
        assert repository.set_up().stdout.strip() == str(repository.python)
    finally:
        repository.install_program("python3", WITHOUT_TORCH)


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        (
            {"PIP_NO_INDEX": "0", "PIP_INDEX_URL": "http://127.0.0.1:9/simple"},
            "the package index can't be reached; connect this machine to a network",
        ),
        ({}, "No matching distribution found for tool_a>=3.0"),
    ],
    ids=["no network", "no such version"],
)
def test_what_pip_cannot_install_is_one_sentence(repository, variables, reason):
    repository.ask_for(["tool_a>=3.0"], pins={})
    done = repository.set_up(**variables)
    assert (done.returncode, done.stdout) == (2, "")
    told, sentence = done.stderr.splitlines()
    assert told.startswith("Installing into") and sentence.startswith(
        "pip could not install that: "
    )
    assert reason in sentence and f"{repository.root}/.venv/pip.log" in sentence


def test_our_own_environment_may_be_activated_too(repository):
    environment = str(repository.root / ".venv")
    done = repository.set_up(VIRTUAL_ENV=environment)
    assert (done.stdout.strip(), done.stderr) == (str(repository.python), "")


def test_every_dependency_is_pinned_and_pre_commit_has_the_same_tools():
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + sum(project["optional-dependencies"].values(), [])
    pins = (REPO / "constraints.txt").read_text()
    names = {re.match(r"[\w.-]+", requirement).group() for requirement in wanted}
    assert names == set(re.findall(r"^([\w.-]+)==", pins, re.MULTILINE))
    tools = re.findall(r"^(?:basedpyright|ruff)==.*", pins, re.MULTILINE)
    hooks = (REPO / ".pre-commit-config.yaml").read_text()
    hooked = re.findall(r"additional_dep.*: \[(.*)\]", hooks)
    assert len(hooked) == hooks.count("additional_dep") and sorted(set(hooked)) == sorted(tools)
