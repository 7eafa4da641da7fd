"""Which files a `dataset_path` means: what is read, in one order, and what is left out.

Links are followed. A folder or file that is reached twice counts once, by its shortest name, so
links that lead in a circle end. What can't be read is an error: documents would be missing.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from torchtitan.data.settings import DatasetSettings
from torchtitan.tools.errors import UserError
from torchtitan.tools.near_path import near_path

SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet", ".txt")
GLOB_SIGNS = frozenset("*?[")


@dataclass(frozen=True)
class Found:
    """Files of a dataset.

    root: folder that the files' names are relative to
    files: those that are read, sorted
    left_out: what is not read, by reason, for the log
    """

    root: Path
    files: list[Path]
    left_out: list[str] = field(default_factory=list)


@dataclass
class _Tree:
    """Content of a folder and all below it: folders (itself first), all else, hidden names."""

    folders: list[Path] = field(default_factory=list)
    others: list[Path] = field(default_factory=list)
    hidden: list[Path] = field(default_factory=list)


def search(settings: DatasetSettings, pattern: str | None = None) -> Found:
    """Look up a file, all files below a folder, or a glob; sorted.

    Raises `UserError` for a path that means nothing, or below which something can't be read.

    settings: dataset with a path
    pattern: glob to prefer inside a folder, where it matches anything
    """
    try:
        return _search(settings, pattern)
    except OSError as error:
        raise UserError(
            f"{_assignment(settings)}: {error.filename or settings.path} can't be read "
            f"({error.strerror}); give this user access to it, or name a path without it."
        ) from None


def _assignment(settings: DatasetSettings) -> str:
    return f"{settings.toml_key('dataset_path')} = '{settings.path}'"


def _search(settings: DatasetSettings, pattern: str | None) -> Found:
    assert settings.path, settings
    given = Path(settings.path).expanduser()
    if given.is_dir():
        preferred = list(given.glob(pattern)) if pattern else []
        if preferred:
            return Found(given, _chosen(given, settings, preferred).files)
        tree = _tree(given)
        return _chosen(given, settings, tree.others, tree.hidden)
    if given.exists():
        return _chosen(given.parent, settings, [given])
    root, matches = _expand(given)
    if not matches:
        raise UserError(
            f"{_assignment(settings)} names no file, folder or glob that matches anything here; "
            f"{near_path(given)}"
        )
    return _chosen(root, settings, matches)


def _chosen(
    root: Path, settings: DatasetSettings, found: Iterable[Path], hidden: Iterable[Path] = ()
) -> Found:
    """Choose the files that are read, each once, and count the rest by reason."""
    files: dict[str, Path] = {}
    reasons: dict[str, list[Path]] = {}
    for each in sorted(found, key=lambda each: (len(each.parts), each)):
        reason = _reason_against(each, settings)
        real = os.path.realpath(each)
        if reason is None and real in files:
            reason = "reached twice through links"
        if reason is None:
            files[real] = each
        else:
            reasons.setdefault(reason, []).append(each)
    if hidden:
        reasons["hidden by a dot"] = list(hidden)
    left_out = [
        f"{len(paths)} {reason} ({_name(paths[0], root)}{', ...' if paths[1:] else ''})"
        for reason, paths in reasons.items()
    ]
    if not files:
        found_instead = f" (but {', '.join(left_out)})" if left_out else ""
        raise UserError(
            f"{_assignment(settings)} holds no file that ends in {', '.join(SUFFIXES)}"
            f"{found_instead}; convert the documents to one of these (JSON lines are the simplest)."
        )
    return Found(root, sorted(files.values()), left_out)


def _reason_against(path: Path, settings: DatasetSettings) -> str | None:
    """Reason why a path is not read, or None. Raises `UserError` for a link to nothing."""
    if path.is_symlink() and not path.exists():
        raise UserError(
            f"{settings.toml_key('dataset_path')}: {path} is a link to {os.readlink(path)}, "
            "which does not exist; mend or remove the link."
        )
    if path.is_dir():
        return "folders, which a glob reads with /** only"
    if not path.name.endswith(SUFFIXES):
        return f"with suffix {path.suffix}" if path.suffix else "without a suffix"
    return None if path.is_file() else "that are no regular files"


def _tree(root: Path) -> _Tree:
    """Real folders come before linked ones, so that names go through as few links as can be."""
    tree, seen = _Tree(), set()
    folders, links = [root], []
    while folders or links:
        folder = folders.pop(0) if folders else links.pop(0)
        real = os.path.realpath(folder)
        if real in seen:
            continue
        seen.add(real)
        tree.folders.append(folder)
        for entry in _entries(folder):
            if entry.name.startswith("."):
                if entry.name.endswith(SUFFIXES) or entry.is_dir(follow_symlinks=False):
                    tree.hidden.append(folder / entry.name)
            elif entry.is_dir():
                (links if entry.is_symlink() else folders).append(folder / entry.name)
            else:
                tree.others.append(folder / entry.name)
    return tree


def _expand(pattern: Path) -> tuple[Path, list[Path]]:
    """Return the folder before the first glob sign, and the matches. Unlike `glob.glob`, raises
    OSError for a folder that it can't look into."""
    parts = [*pattern.parts] + (["*"] if pattern.name == "**" else [])
    first = next((n for n, part in enumerate(parts) if GLOB_SIGNS & set(part)), len(parts) - 1)
    root = Path(*parts[:first])
    paths = [root] if root.is_dir() else []
    for part in parts[first:]:
        folders = [path for path in paths if path.is_dir()]
        if part == "**":
            paths = [below for folder in folders for below in _tree(folder).folders]
        elif GLOB_SIGNS & set(part):
            paths = [
                folder / entry.name
                for folder in folders
                for entry in _entries(folder)
                if fnmatchcase(entry.name, part)
                and (part.startswith(".") or not entry.name.startswith("."))
            ]
        else:
            paths = [folder / part for folder in folders if os.path.lexists(folder / part)]
    return root, list(dict.fromkeys(paths))


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return sorted(entries, key=lambda entry: entry.name)


def _name(path: Path, root: Path) -> str:
    return str(path.relative_to(root))
