"""What is done of a conversion, on disk, so that it goes on after an interruption."""

import contextlib
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any


class Journal:
    """What is done of a conversion, a JSON line each; of another conversion = nothing is done."""

    def __init__(self, folder: Path, key: dict[str, Any]) -> None:
        """key: what the conversion depends on. An unfit `folder` is emptied."""
        self.path = folder / "journal.jsonl"
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
        """What it stands for must be on disk already."""
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
            file.write("\n" + json.dumps([unit, info]))  # behind a torn line, too
            file.flush()
            os.fsync(file.fileno())
