"""Progress of a conversion, on disk, so that it resumes after an interruption."""

import contextlib
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any


class ConversionProgress:
    """Finished units of a conversion, one JSON line each.

    A folder with the progress of another conversion is emptied.

    folder: of the conversion's output.
    key: values that the conversion depends on; others = another conversion.
    """

    def __init__(self, folder: Path, key: dict[str, Any]) -> None:
        self.path = folder / "progress.jsonl"
        text = json.dumps(key, sort_keys=True, default=str)
        key_hash = hashlib.sha256(text.encode()).hexdigest()
        self.done = self._read()
        self.continues = self.done.pop("key", None) == key_hash
        if not self.continues:
            self.done = {}
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            self._write("key", key_hash)

    def add(self, unit: str, info: Any = None) -> None:
        """Mark a unit as finished; its output must be on disk already."""
        self.done[unit] = info
        self._write(unit, info)

    def remove(self) -> None:
        self.path.unlink()

    def _read(self) -> dict[str, Any]:
        done = {}
        for line in self.path.read_text().splitlines() if self.path.is_file() else []:
            with contextlib.suppress(ValueError):  # torn by a power cut
                unit, info = json.loads(line)
                done[unit] = info
        return done

    def _write(self, unit: str, info: Any) -> None:
        with self.path.open("a") as file:
            file.write("\n" + json.dumps([unit, info]))  # a new line even after a torn one
            file.flush()
            os.fsync(file.fileno())
