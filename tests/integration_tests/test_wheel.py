"""The wheel: an installed torchtitan trains without the repository around it."""

import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.tiny_run import losses, tiny

REPO = Path(__file__).parents[2]


def run(*command: str, cwd: Path, **variables: str) -> str:
    """stdout and stderr of a Python command that must succeed."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env=env | {"OMP_NUM_THREADS": "1"} | variables,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    for needed in ("hatchling", "pip"):
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"building a wheel needs {needed}, which this environment lacks")
    folder = tmp_path_factory.mktemp("wheel")
    options = ["--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    run("-m", "pip", "wheel", "--quiet", *options, str(REPO), cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


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
