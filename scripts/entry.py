"""Start and end of every script: it finds the package, and ends with a sentence, not a traceback.

Each script puts the repository into sys.path, so that nothing must be installed and any working
folder works, and imports this before modules that take seconds or may be missing. Before those it
calls `check_first`. It ends with `run(main)`.
"""

import argparse
import importlib.util
import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

if sys.version_info < (3, 11):  # noqa: UP036
    print(f"{sys.argv[0]} needs Python 3.11; {sys.executable} is older.", file=sys.stderr)
    sys.exit(2)
from scripts.check_dependencies import install_line, missing, read_requirements

REPO = Path(__file__).resolve().parents[1]
INTERRUPTED = 128 + signal.SIGINT


def about(doc: str | None) -> str:
    """Return the first line of a script's docstring, for --help."""
    return (doc or "").partition("\n")[0]


def check_first(check: Callable[[list[str]], Any], *paths: str) -> None:
    """Check the command line before imports that take seconds; exit with a sentence and 2.

    check: the script's parser of the command line; returns its options, alone or first of a tuple,
        and may raise `UserError`.
    paths: options whose files or folders must exist, spelled as `config` or `--routing-skew-from`.
    """
    if importlib.util.find_spec("torch") is None:  # nothing else helps then
        raise ModuleNotFoundError(name="torch")
    from torchtitan.tools.errors import UserError
    from torchtitan.tools.script import run_script

    def work() -> None:
        checked = check(sys.argv[1:])
        options = checked[0] if isinstance(checked, tuple) else checked
        for name in paths:
            if path := _lacking(options, name):
                shown = f"{name} {path}" if name.startswith("-") else path
                raise UserError(f"{shown} does not exist; {_beside(Path(path))}")

    logging.disable(logging.WARNING)  # the script itself repeats the warnings
    try:
        code = run_script(work)
    finally:
        logging.disable(logging.NOTSET)
    if code:
        sys.exit(code)


def _lacking(options: argparse.Namespace, name: str) -> Path | None:
    """Return the first path of an option that doesn't exist; None if all do, or none is given."""
    given = getattr(options, name.lstrip("-").replace("-", "_"), None)  # of another command
    paths = given if isinstance(given, list) else [given]
    there = os.path.expanduser
    return next((Path(path) for path in paths if path and not os.path.exists(there(path))), None)


def _beside(path: Path) -> str:
    """Name the last five that differ in their number only, as steps do; or a near path."""
    letters = path.name.rstrip("0123456789")
    there = path.expanduser().parent
    numbered = there.glob(f"{letters}*") if letters != path.name and there.is_dir() else ()
    near = [each.name for each in numbered if each.name[len(letters) :].isdigit()]
    near.sort(key=lambda name: int(name[len(letters) :]))
    from torchtitan.tools.near_path import near_path

    return f"beside it are {', '.join(near[-5:])}." if near else near_path(path)


def run(main: Callable[..., int | None], *arguments: object) -> NoReturn:
    """Exit with the code that `main` returns (None: 0); at Ctrl-C with a sentence and 130."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # it may have to clean up
    try:
        code = main(*arguments)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))  # the second one
        print("Interrupted", file=sys.stderr)
        code = INTERRUPTED
    sys.exit(code)


def _interrupted(*_: object) -> NoReturn:
    print("Interrupted", file=sys.stderr, flush=True)
    os._exit(INTERRUPTED)


def _tell(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Hook that the interpreter calls for an uncaught exception."""
    package = (getattr(error, "name", None) or "").partition(".")[0]
    if not isinstance(error, ModuleNotFoundError) or (REPO / package).is_dir():
        sys.__excepthook__(kind, error, trace)
        return
    print(f"{Path(sys.argv[0]).name} {_lacks(package)}", file=sys.stderr, flush=True)
    os._exit(2)


def _lacks(package: str) -> str:
    """Name the packages that this interpreter lacks, `package` included, with the way out."""
    lacking = missing(read_requirements(REPO / "pyproject.toml"))
    if not any(requirement.startswith(package) for requirement in lacking):
        lacking.append(package)
    environment = REPO / ".venv"
    python = environment / "bin/python"
    use_ours = python.exists() and Path(sys.prefix) != environment
    install = f"run {install_line(sys.executable, lacking)}"
    way_out = f"run it with {python}" if use_ours else install
    return f"needs {', '.join(lacking)}, which {sys.executable} lacks; {way_out}."


def _is_in_charge() -> bool:
    """Return whether this process runs a script of ours; tests import them as modules."""
    main = getattr(sys.modules["__main__"], "__file__", None)
    return main is not None and Path(main).resolve().is_relative_to(REPO / "scripts")


if _is_in_charge():
    if sys.argv[1:] == ["--version"]:
        import torchtitan

        print(f"torchtitan-moe {torchtitan.__version__}")
        sys.exit(0)
    signal.signal(signal.SIGINT, _interrupted)  # no import is left half-way with a traceback
    sys.excepthook = _tell
