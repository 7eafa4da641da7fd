"""Whether this interpreter has what pyproject.toml asks for: exit code 0, or 1.

`check_dependencies.py PYPROJECT [EXTRA ...]`; an extra is a name of optional dependencies.
Standard library only (tomllib is there from Python 3.11): it runs before anything is installed.
"""

import importlib.metadata
import re
import sys
import tomllib


def missing(requirements: list[str]) -> list[str]:
    """Requirements whose package is absent or older than its lower bound."""
    return [requirement for requirement in requirements if not _is_met(requirement)]


def _is_met(requirement: str) -> bool:
    name, bound = re.fullmatch(r"([\w.-]+)(?:\[.*\])?\s*(?:>=\s*([\d.]+))?.*", requirement).groups()
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return bound is None or _numbers(version) >= _numbers(bound)


def _numbers(version: str) -> list[int]:
    return [int(n) for n in re.match(r"[\d.]*", version).group().strip(".").split(".")]


def main(pyproject: str, *extras: str) -> int:
    with open(pyproject, "rb") as file:
        project = tomllib.load(file)["project"]
    wanted = list(project["dependencies"])
    for extra in extras:
        wanted += project["optional-dependencies"][extra]
    absent = missing(wanted)
    if absent:
        print("missing:", ", ".join(absent), file=sys.stderr)
    return bool(absent)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
