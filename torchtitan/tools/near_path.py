"""Suggestion of a path that exists for one that does not."""

import difflib
import os
from itertools import islice
from pathlib import Path

from torchtitan.tools.errors import UserError

_MOST_NAMES = 10_000  # of a folder that are compared


def near_path(path: str | Path, otherwise: str = "correct the path.") -> str:
    """End of a sentence about a path that does not exist: "did you mean ./data/text?".

    otherwise: the end where nothing near it exists.
    """
    try:
        near = _near(Path(path))
    except (OSError, ValueError, RuntimeError):  # a folder that can't be read, a NUL, no home
        near = None
    return f"did you mean {near}?" if near else otherwise


def require_path(key: str, path: str | Path) -> None:
    """Raise `UserError` where the path of a key does not exist."""
    if not os.path.exists(os.path.expanduser(path)):
        raise UserError(f"{key} {path} does not exist; {near_path(path)}")


def _near(path: Path) -> Path | None:
    """Replace the first part that does not exist, and where the rest then doesn't, that too."""
    there, wrong = Path(path.anchor), False
    for part in path.relative_to(there).parts:
        if not os.path.exists(os.path.expanduser(there / part)):
            if (near := _near_name(there.expanduser(), part)) is None:
                return None
            part, wrong = near, True
        there /= part
    return there if wrong else None


def _near_name(folder: Path, name: str) -> str | None:
    """Find the name in a folder that is closest, its ending aside."""
    there, stem = list(islice(folder.iterdir(), _MOST_NAMES)), Path(name).stem.lower()
    there.sort(key=lambda each: each.suffix == Path(name).suffix)  # the last of equal stems counts
    stems = {each.stem.lower(): each.name for each in there}
    near = difflib.get_close_matches(stem, stems, n=1, cutoff=0.75)
    return stems[near[0]] if near else None
