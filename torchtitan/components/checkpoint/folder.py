"""Folders of checkpoints: published whole, checked, removed. No tensors here.

    <folder>/step-120/        a checkpoint if and only if it contains COMPLETE
        __0_0.distcp …        tensors, a file per rank      .metadata   position of each tensor
        state.json            all values but tensors        meta.json   for people
        manifest.json         size and SHA-256 of all files above
        COMPLETE              SHA-256 of manifest.json; written last
    <folder>/step-140.tmp/    being written, or left by a save that died
    <folder>/step-120.old/    a former step-120, about to be replaced by a new one

Every change of a name is one atomic rename, so a process that is killed at any moment leaves either
the state before it or the state after it.
"""

import hashlib
import itertools
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchtitan.tools.errors import UserError
from torchtitan.tools.logging import logger
from torchtitan.tools.near_path import near_path

MARKER, MANIFEST, META, NUMBERS = "COMPLETE", "manifest.json", "meta.json", "state.json"
TENSOR_INDEX = ".metadata"
_STEP = re.compile(r"step-(\d+)")
_LEFTOVER = re.compile(r"step-(\d+)\.(tmp|old)")
_WRITTEN_BY_A_SAVE = re.compile(
    r"__\d+_\d+\.distcp|\.metadata(\.tmp)?|(manifest|meta|state)\.json|COMPLETE"
)


@dataclass(frozen=True)
class FileChecksum:
    """Expected content of a file.

    size: bytes.
    sha256: in hex.
    """

    size: int
    sha256: str


def step_folder(folder: Path, step: int) -> Path:
    return folder / f"step-{step}"


def is_complete(checkpoint: Path) -> bool:
    """Tell whether the folder is a checkpoint. Raises `UserError` where it can't be read."""
    try:
        return (checkpoint / MARKER).is_file()
    except OSError as error:
        raise _unreadable(checkpoint, error) from None


def _unreadable(folder: Path, error: OSError) -> UserError:
    return UserError(
        f"{folder} can't be searched for checkpoints ({error.strerror}); let this user read it, or "
        "name another folder."
    )


def steps_with_folder(folder: Path) -> dict[int, bool]:
    """List the steps that have a step-N folder, in ascending order, with whether it is complete.

    Raises `UserError` where the folders can't be read.
    """
    try:
        found = [_STEP.fullmatch(path.name) for path in folder.iterdir()] if folder.is_dir() else []
    except OSError as error:
        raise _unreadable(folder, error) from None
    steps = sorted(int(match[1]) for match in found if match)
    return {step: is_complete(step_folder(folder, step)) for step in steps}


def require_checkpoint(path: Path, key: str = "") -> None:
    """Raise `UserError` for a folder that is not a checkpoint.

    key: begins the message.
    """
    if is_complete(path):
        return
    if not path.exists():
        raise UserError(f"{key}{path} does not exist; {near_path(path)}")
    whole = [step for step, complete in steps_with_folder(path).items() if complete]
    hint = (
        f"did you mean {step_folder(path, whole[-1])}?"
        if whole
        else "name the folder of one step, with its file COMPLETE."
    )
    raise UserError(f"{key}{path} is not a checkpoint; {hint}")


def read_json(checkpoint: Path, name: str) -> dict[str, Any]:
    """Read META or NUMBERS. Raises `UserError` where the file is missing or not JSON."""
    try:
        content = json.loads((checkpoint / name).read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it is not an object")
        return content
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"checkpoint {checkpoint} can't be used: its {name} is missing or damaged ({error}); "
            "take another checkpoint."
        ) from None


# ------------------------------------------------------------------ writing


def begin(folder: Path, step: int) -> Path:
    """Make the empty temporary folder of a new checkpoint."""
    tmp = folder / f"step-{step}.tmp"
    if tmp.exists():
        shutil.rmtree(tmp)
    tmp.mkdir(parents=True)
    return tmp


def publish(tmp: Path, texts: dict[str, str], checksums: dict[str, FileChecksum]) -> Path:
    """Turn a temporary folder into a checkpoint; return its final path.

    texts: contents of META and NUMBERS, written here.
    checksums: of the other files, which must be on disk already.
    """
    for name, text in texts.items():
        _write_synced(tmp / name, text)
        checksums = checksums | {name: FileChecksum(len(text.encode()), _sha256(text))}
    manifest = {name: [each.size, each.sha256] for name, each in sorted(checksums.items())}
    text = json.dumps(manifest, indent=1) + "\n"
    _write_synced(tmp / MANIFEST, text)
    _sync_folder(tmp)
    _write_synced(tmp / MARKER, _sha256(text) + "\n")
    _sync_folder(tmp)
    final = tmp.with_suffix("")
    if final.exists():  # from an earlier attempt of this run, or damaged
        former = tmp.with_suffix(".old")
        if former.exists():
            _discard(former)
        final.rename(former)
        tmp.rename(final)
        _sync_folder(final.parent)
        _discard(former)
    else:
        tmp.rename(final)
        _sync_folder(final.parent)
    return final


def keep_latest(folder: Path, count: int) -> None:
    """Delete all complete checkpoints but the newest `count` (0: keep all).

    A failure is logged, not raised: nothing that is needed is lost.
    """
    try:
        complete = [step for step, whole in steps_with_folder(folder).items() if whole]
    except UserError as error:
        logger.warning("Old checkpoints could not be deleted: %s", error)
        return
    for step in complete[:-count] if count else []:
        path = step_folder(folder, step)
        try:
            # Renamed first: a kill during removal must not leave a checkpoint that lacks files.
            doomed = path.rename(path.with_name(path.name + ".tmp"))
            shutil.rmtree(doomed)
        except OSError as error:
            logger.warning("Old checkpoint %s could not be deleted: %s", path, error)


def clean_up(folder: Path) -> None:
    """Remove the remains of dead saves, and finish or undo a replacement; only our own files."""
    if not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        match = _LEFTOVER.fullmatch(path.name)
        if match is None:
            continue
        final = step_folder(folder, int(match[1]))
        try:
            if not path.is_dir() or not _is_ours(path):
                continue
            if match[2] == "old" and not final.exists():
                path.rename(final)
            else:
                shutil.rmtree(path)
                logger.info("Removed %s, the rest of a save that was interrupted", path)
        except OSError as error:
            logger.warning("Leftover %s could not be removed: %s", path, error)


def _discard(path: Path) -> None:
    """Remove a replaced folder, or give it a name that stays where it holds files of others."""
    if _is_ours(path):
        shutil.rmtree(path)
        return
    names = (path.with_name(f"{path.name}.{number}") for number in itertools.count(1))
    kept = path.rename(next(name for name in names if not name.exists()))
    logger.warning("%s was replaced, but held files that no save wrote: kept as %s", path, kept)


def _is_ours(path: Path) -> bool:
    names = [entry.name for entry in path.iterdir()] if path.is_dir() else [""]
    return all(map(_WRITTEN_BY_A_SAVE.fullmatch, names))


def _write_synced(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    """Put the names of a folder's files on disk, which takes an fsync of the folder itself."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


# ------------------------------------------------------------------ checking


def damage(checkpoint: Path, *, reader: int = 0, readers: int = 1) -> str | None:
    """Describe the damage of a checkpoint, None if it is intact. Reads every byte once.

    `readers` processes share the files between them; all of them check the manifest.

    reader: number of this process, from 0.
    """
    try:
        text = (checkpoint / MANIFEST).read_text()
        if _sha256(text) != (checkpoint / MARKER).read_text().strip():
            return f"{MANIFEST} does not have the checksum that {MARKER} holds"
        manifest = {name: FileChecksum(*entry) for name, entry in json.loads(text).items()}
        missing = {META, NUMBERS, TENSOR_INDEX} - manifest.keys()
        if missing:
            return f"{MANIFEST} does not list {', '.join(sorted(missing))}"
        outside = [name for name in manifest if Path(name).name != name]
        if outside:
            return f"{MANIFEST} lists {outside[0]}, which is not a file of this folder"
        for name, expected in sorted(manifest.items())[reader::readers]:
            problem = _compare(checkpoint / name, expected)
            if problem:
                return problem
    except (OSError, ValueError, TypeError) as error:
        return f"it can't be read ({error})"
    return None


def _compare(path: Path, expected: FileChecksum) -> str | None:
    if not path.is_file():
        return f"{path.name} is missing"
    if path.stat().st_size != expected.size:
        return f"{path.name} has {path.stat().st_size} bytes instead of {expected.size}"
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != expected.sha256:
            return f"{path.name} does not have the bytes that were written (its checksum differs)"
    return None
