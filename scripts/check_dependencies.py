"""List the requirements of pyproject.toml that this interpreter lacks; exit code 1 if it lacks any.

    check_dependencies.py PYPROJECT [EXTRA,... [CONSTRAINTS]]

With a constraints file, versions must equal its pins and packages must be completely installed.
The repository's own package need not be installed: the scripts set PYTHONPATH. Standard library
only: this runs before anything is installed.
"""

import re
import shlex
import signal
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

try:
    import tomllib
except ImportError:  # before 3.11
    print("Python>=3.11")
    sys.exit(1)


def missing(requirements: list[str], pins: dict[str, str] | None = None) -> list[str]:
    """List requirements whose package is absent, older than its lower bound, or not as pinned."""
    return [requirement for requirement in requirements if not _is_met(requirement, pins)]


def _is_met(requirement: str, pins: dict[str, str] | None) -> bool:
    parts = re.fullmatch(r"([\w.-]+)(?:\[.*\])?\s*(?:>=\s*([\d.]+))?", requirement)
    assert parts, f"{requirement}: only lower bounds are understood here"
    name, bound = parts.groups()
    try:
        package = distribution(name)
    except PackageNotFoundError:
        return False
    if pins is not None and not package.read_text("RECORD"):  # what pip writes last
        return False
    if bound is not None and _numbers(package.version) < _numbers(bound):
        return False
    public, _, _ = package.version.partition("+")  # a local build, such as 2.13.0+cpu, is as good
    return public == (pins or {}).get(name, public)


def _numbers(version: str) -> list[int]:
    public = re.split(r"[^\d.]", version, maxsplit=1)[0]
    return [int(n) for n in public.strip(".").split(".")]


def read_pins(constraints: str) -> dict[str, str]:
    """Read the versions of the lines `name==version`, by name."""
    return dict(re.findall(r"^([\w.-]+)==(\S+)", Path(constraints).read_text(), re.MULTILINE))


def read_requirements(pyproject: str | Path, extras: str = "") -> list[str]:
    """Read the project's requirements, with those of these optional dependencies ("test,docs")."""
    project = tomllib.loads(Path(pyproject).read_text())["project"]
    wanted = list(project["dependencies"])
    for extra in filter(None, extras.split(",")):
        wanted += project["optional-dependencies"][extra]
    return wanted


def install_line(python: str, requirements: list[str]) -> str:
    """Return the command that installs them for that interpreter."""
    return shlex.join([python, "-m", "pip", "install", *requirements])


def main(pyproject: str, extras: str = "", constraints: str | None = None) -> int:
    pins = read_pins(constraints) if constraints else None
    absent = missing(read_requirements(pyproject, extras), pins)
    for requirement in absent:
        print(requirement)
    return bool(absent)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C: no traceback
    sys.exit(main(*sys.argv[1:]))
