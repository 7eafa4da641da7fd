"""The release: sdist and wheel, which trains without the repository around it."""

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import PathDistribution
from pathlib import Path

import pytest

import torchtitan
from tests.tiny_run import losses, tiny

REPO = Path(__file__).parents[2]
PYTHONS = ("3.11", "3.12", "3.13")


def run(*command: str, cwd: Path, python: str | Path = sys.executable, **variables: str) -> str:
    """stdout and stderr of a Python command that must succeed."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [python, *command],
        cwd=cwd,
        env=env | {"OMP_NUM_THREADS": "1"} | variables,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    for needed in ("hatchling", "pip"):
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"a release is built with {needed}, which this environment lacks")
    folder = tmp_path_factory.mktemp("sdist")
    run("-m", "hatchling", "build", "-t", "sdist", "-d", str(folder), cwd=REPO)
    (built,) = folder.glob("*.tar.gz")
    return built


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory) -> Path:
    """Built from the sdist, as an index does where it has no wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    options = ["--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    run("-m", "pip", "wheel", "--quiet", *options, str(sdist), cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


def find_python(version: str) -> Path:
    """An interpreter of this version: of PATH or of pyenv. Skips where there is none."""
    candidates = [shutil.which(f"python{version}")]
    candidates += sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
    if sys.version_info[:2] == tuple(map(int, version.split("."))):
        candidates.insert(0, sys.executable)
    for python in filter(None, candidates):
        works = subprocess.run([python, "-c", "import venv, ssl"], capture_output=True)
        if works.returncode == 0:
            return Path(python)
    pytest.skip(f"this machine has no Python {version}")


@pytest.fixture(params=PYTHONS)
def environment(request, wheel, tmp_path) -> Path:
    """The interpreter of a new environment that holds nothing."""
    run("-m", "venv", "--without-pip", "env", cwd=tmp_path, python=find_python(request.param))
    return tmp_path / "env/bin/python"


def install(python: Path, *what: str) -> None:
    """By this environment's pip, which reads what the other interpreter can take."""
    run("-m", "pip", "--python", str(python), "install", "--quiet", *what, cwd=python.parent)


def test_the_wheel_holds_the_package_its_sample_and_its_tokenizer(wheel):
    assert wheel.name.startswith("torchtitan_moe-")
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {str(path.relative_to(REPO)) for path in REPO.glob("torchtitan/**/*.py")}
    assert modules <= names
    assert "torchtitan/data/sample/sample.jsonl" in names
    assert "torchtitan/assets/tokenizer/tokenizer.json" in names
    assert "torchtitan/assets/tokenizer/tokenizer_config.json" in names
    top = {name.partition("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"torchtitan"}
    assert any(name.endswith("/licenses/LICENSE") for name in names)


def test_an_installed_wheel_trains_in_an_empty_folder(wheel, tmp_path):
    site, cwd = tmp_path / "site", tmp_path / "cwd"
    cwd.mkdir()
    run("-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel), cwd=cwd)
    defaults = ("training.dataset", "training.mixed_precision_param", "debug.seed")
    options = [
        option
        for option in tiny(Path("outputs"), training__steps=2)
        if not option.startswith(tuple(f"--{key}=" for key in defaults))
    ]
    log = run("-m", "torchtitan.train", *options, cwd=cwd, PYTHONPATH=str(site))
    assert f"Tokenizer {site}/torchtitan/assets/tokenizer/tokenizer.json" in log
    assert f"read from the shipped sample, {site}/torchtitan/data/sample" in log
    assert len(losses(cwd / "outputs")) == 2


def test_the_sdist_holds_the_repository_and_nothing_else(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "run_train.sh", "scripts/test.sh"} <= names
    assert "tests/integration_tests/test_wheel.py" in names
    assert not [name for name in names if name.startswith((".venv", "outputs", "build", "dist"))]


def test_the_version_has_one_home(wheel):
    (info,) = [p for p in zipfile.Path(wheel).iterdir() if p.name.endswith(".dist-info")]
    named = PathDistribution(info)
    assert named.version == torchtitan.__version__
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    assert "version" not in project and project["dynamic"] == ["version"]
    assert named.metadata["Requires-Python"] == project["requires-python"]


def test_the_wheel_goes_into_a_new_environment(environment, wheel, tmp_path):
    """Every module compiles there without a warning; what it needs comes in the release's test."""
    install(environment, "--no-deps", str(wheel))
    code = (
        "import importlib.metadata, torchtitan; print(torchtitan.__path__[0]); "
        "assert importlib.metadata.version('torchtitan-moe') == torchtitan.__version__"
    )
    package = run("-c", code, cwd=tmp_path, python=environment).strip()
    assert package.startswith(str(tmp_path))
    run("-W", "error", "-m", "compileall", "-q", "-f", package, cwd=tmp_path, python=environment)


@pytest.mark.skipif("RELEASE" not in os.environ, reason="installs torch: RELEASE=1, some minutes")
@pytest.mark.timeout(3600)
def test_a_release_trains_in_a_new_environment(environment, wheel, tmp_path):
    install(environment, "--constraint", str(REPO / "constraints.txt"), str(wheel))
    train = ("-m", "torchtitan.train")
    version = run(*train, "--version", cwd=tmp_path, python=environment)
    assert version == f"torchtitan-moe {torchtitan.__version__}\n"
    options = tiny(Path("outputs"), training__steps=2)
    run(*train, *options, cwd=tmp_path, python=environment)
    assert len(losses(tmp_path / "outputs")) == 2
