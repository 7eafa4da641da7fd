"""How a log record reaches disk: JSON lines for programs, TensorBoard for eyes.

A record is a flat dict of one logged step: numbers, and under a few names a number per MoE layer
({layer id: number}). Both writers give every number the same name. The heat map of the expert load
is a picture of one byte per channel, made with numpy alone.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter

from torchtitan.tools.logging import logger

_TAIL_BYTES = 2**20  # More than the longest line: some 100 layers make 10 kB.

Record = Mapping[str, float | int | Mapping[int, float]]


class JsonlWriter:
    """One JSON object a line, flushed at once, always appended: a resumed run goes on in the file.

    Floats have full precision. A number that is not finite becomes the string "NaN", "Infinity" or
    "-Infinity": JSON has no such numbers; `float()` and JavaScript's `Number()` read these words.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        _drop_torn_line(path)
        self.file = path.open("a", encoding="utf-8")

    def write(self, record: Record) -> None:
        self.file.write(json.dumps(_finite(record), allow_nan=False) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


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
    """Scalars under the record's names, per-layer numbers under `name/layer_N`, and one image.

    The event file is opened at the first record, because only then it is known from which step on
    the curves of an earlier, interrupted run in the same folder are to be replaced.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.writer: SummaryWriter | None = None

    def write(self, record: Record, heatmap: np.ndarray | None) -> None:
        step = record["step"]
        if self.writer is None:
            self.writer = SummaryWriter(str(self.folder), purge_step=step)
        for name, value in record.items():
            if isinstance(value, Mapping):
                for layer, number in value.items():
                    self.writer.add_scalar(f"{name}/layer_{layer}", number, step)
            elif name not in ("step", "time"):  # TensorBoard's own axes.
                self.writer.add_scalar(name, value, step)
        if heatmap is not None:
            self.writer.add_image("expert_load", heatmap, step, dataformats="HWC")
        self.writer.flush()

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


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
