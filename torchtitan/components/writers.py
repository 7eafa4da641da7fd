"""How a log record reaches disk: JSON lines for programs, TensorBoard for eyes.

A record is a flat dict of one logged step: numbers, and under a few names a number per MoE layer
({layer id: number}, or a list with one per expert) or per dataset ({name: number}). Both writers
give every number the same name. The heat map of the expert load is a picture of one byte per
channel, made with numpy alone.
"""

import json
import math
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from torchtitan.tools.logging import logger

_TAIL_BYTES = 2**20  # More than the longest line: some 100 layers make 10 kB.
_RUN_NAME = re.compile(r"(\d{8}-\d{4})(?:-(\d\d+))?")

Record = Mapping[str, float | int | Mapping[int | str, float | list[float]]]


class JsonlWriter:
    """One JSON object a line, flushed at once. A resumed run goes on in the file of the newest run;
    a new one (start_step 0) moves that aside as metrics.1.jsonl, metrics.2.jsonl and so on.

    Floats have full precision. A number that is not finite becomes the string "NaN", "Infinity" or
    "-Infinity": JSON has no such numbers; `float()` and JavaScript's `Number()` read these words.
    """

    def __init__(self, path: Path, start_step: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if start_step == 0:
            _move_aside(path)
        else:
            _drop_torn_line(path)
        self.file = path.open("a", encoding="utf-8")

    def write(self, record: Record) -> None:
        self.file.write(json.dumps(_finite(record), allow_nan=False) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


def _move_aside(path: Path) -> None:
    """Keep an earlier run's file under the next free number; one without a record may go."""
    if not path.exists() or path.stat().st_size == 0:
        return
    pattern = re.compile(rf"{re.escape(path.stem)}\.(\d+){re.escape(path.suffix)}")
    found = [pattern.fullmatch(other.name) for other in path.parent.iterdir()]
    number = 1 + max((int(match[1]) for match in found if match), default=0)
    kept = path.rename(path.with_name(f"{path.stem}.{number}{path.suffix}"))
    logger.info(f"metrics: {path} of an earlier run is now {kept.name}")


def _drop_torn_line(path: Path) -> None:
    """Cut the half line that a killed process left; the next record would stick to it."""
    size = path.stat().st_size if path.exists() else 0
    if size == 0:
        return
    with path.open("rb") as file:
        tail_start = max(0, size - _TAIL_BYTES)
        file.seek(tail_start)
        whole = tail_start + file.read().rfind(b"\n") + 1
    if whole < size:
        logger.warning(f"{path}: dropped an unfinished last line ({size - whole} bytes)")
        os.truncate(path, whole)


def _finite(value):
    if isinstance(value, Mapping):
        return {str(name): _finite(item) for name, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


class TensorBoardWriter:
    """Scalars under the record's names, per-layer numbers under `name/layer_N` (others by name:
    `name/key`), and one image.

    Each new run has its own dated folder below `parent`, which shows all of them. A resumed run
    goes on in the newest; what the interrupted one wrote after `start_step` is replaced.
    """

    def __init__(self, parent: Path, start_step: int) -> None:
        # Costs a second and needs a package, so only runs that want TensorBoard import it.
        from torch.utils.tensorboard import SummaryWriter

        newest = _newest_run(parent)
        self.folder = newest if newest and start_step else parent / _next_run_name(newest)
        self.writer = SummaryWriter(str(self.folder), purge_step=start_step + 1)

    def write(self, record: Record, heatmap: np.ndarray | None) -> None:
        step = record["step"]
        for name, value in record.items():
            if isinstance(value, Mapping):
                for key, number in value.items():
                    if isinstance(number, list):  # one per expert: the heat map shows them
                        continue
                    curve = f"layer_{key}" if isinstance(key, int) else key
                    self.writer.add_scalar(f"{name}/{curve}", number, step)
            elif name not in ("step", "time"):  # TensorBoard's own axes.
                self.writer.add_scalar(name, value, step)
        if heatmap is not None:
            self.writer.add_image("expert_load", heatmap, step, dataformats="HWC")
        self.writer.flush()

    def write_texts(self, texts: Mapping[str, str], step: int) -> None:
        """Beginnings and what follows them; bold is the beginning (TensorBoard shows Markdown)."""
        for number, (beginning, text) in enumerate(texts.items(), start=1):
            self.writer.add_text(f"samples/{number}", f"**{beginning}**{text}", step)

    def close(self) -> None:
        self.writer.close()


def _newest_run(parent: Path) -> Path | None:
    runs = parent.iterdir() if parent.is_dir() else ()
    return max((run for run in runs if _RUN_NAME.fullmatch(run.name)), default=None)


def _next_run_name(newest: Path | None) -> str:
    """YYYYMMDD-HHMM in local time; names only ever rise, so a second run within the minute (or
    the hour that comes twice in autumn) is numbered: YYYYMMDD-HHMM-02."""
    now = time.strftime("%Y%m%d-%H%M")
    if newest is None or newest.name < now:
        return now
    minute, number = _RUN_NAME.fullmatch(newest.name).groups()
    return f"{minute}-{int(number or 1) + 1:02d}"


# Dark blue (idle) through teal (average) to pale yellow (overloaded). The brightness only ever
# rises, so the picture survives grey printing and colour-blind eyes. Evenly spaced RGB values.
_COLOURS = np.array([[13, 8, 60], [40, 60, 130], [40, 130, 140], [130, 200, 100], [255, 250, 190]])
_CELL = 8  # Pixels a side for one expert of one layer.


def load_heatmap(relative_loads: torch.Tensor) -> np.ndarray:
    """(layers, experts) loads relative to the layer's mean -> (height, width, 3) uint8 picture.

    The first layer is the top row, expert 0 the left column. The scale is logarithmic and fixed,
    so pictures of different steps compare: a quarter of the mean or less is darkest, the mean is
    in the middle, four times the mean or more is brightest.
    """
    loads = relative_loads.double().cpu().numpy()
    brightness = np.log(np.clip(loads, 0.25, 4.0)) / np.log(4.0) / 2 + 0.5
    position = brightness * (len(_COLOURS) - 1)
    knots = np.arange(len(_COLOURS))
    channels = [np.interp(position, knots, _COLOURS[:, channel]) for channel in range(3)]
    picture = np.stack(channels, axis=-1).round().astype(np.uint8)
    return picture.repeat(_CELL, axis=0).repeat(_CELL, axis=1)
