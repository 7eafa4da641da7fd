"""Heat map of the expert load, as an image of one byte per channel."""

from collections.abc import Mapping

import numpy as np
import torch

# Dark blue (idle) through teal (average) to pale yellow (overloaded), evenly spaced RGB values. The
# brightness only rises, so the image is readable in greyscale and for the colour-blind.
_COLOURS = np.array([[13, 8, 60], [40, 60, 130], [40, 130, 140], [130, 200, 100], [255, 250, 190]])
_CELL = 8  # Pixels a side for one expert of one layer.


def load_heatmap(relative_loads: torch.Tensor) -> np.ndarray:
    """Draw loads (layers, experts), relative to the layer's mean: (height, width, 3) uint8.

    The first layer is the top row, expert 0 the left column. The scale is logarithmic and fixed, so
    that images of different steps can be compared: a quarter of the mean or less is darkest, the
    mean is in the middle, four times the mean or more is brightest.
    """
    loads = relative_loads.double().cpu().numpy()
    brightness = np.log(np.clip(loads, 0.25, 4.0)) / np.log(4.0) / 2 + 0.5
    position = brightness * (len(_COLOURS) - 1)
    knots = np.arange(len(_COLOURS))
    channels = [np.interp(position, knots, _COLOURS[:, channel]) for channel in range(3)]
    picture = np.stack(channels, axis=-1).round().astype(np.uint8)
    return picture.repeat(_CELL, axis=0).repeat(_CELL, axis=1)


# Pixels around the heat map, for what is written there.
LEFT, TOP, RIGHT, BOTTOM = 64, 18, 8, 52
_LEAST_WIDTH = 260  # for the scale
_SCALE = {0.25: "1/4 or less", 1.0: "fair share", 4.0: "4x or more"}


def labelled_heatmap(relative: Mapping[int, torch.Tensor]) -> np.ndarray:
    """Draw `load_heatmap` with its axes and scale: (height, width, 3) uint8.

    relative: by layer, (E,): tokens over the layer's mean.
    """
    from PIL import Image, ImageDraw  # comes with torch's own writer of images

    cells = load_heatmap(torch.stack(list(relative.values())))
    height, width = cells.shape[:2]
    whole = max(LEFT + width + RIGHT, _LEAST_WIDTH)
    picture = Image.new("RGB", (whole, TOP + height + BOTTOM), "white")
    picture.paste(Image.fromarray(cells), (LEFT, TOP))
    draw = ImageDraw.Draw(picture)
    last = width // _CELL - 1
    draw.text((LEFT, 3), f"expert 0 to {last}, left to right", fill="black")
    every = -(-14 // _CELL)  # rows that a line of text needs
    for row, layer in enumerate(relative):
        if row % every == 0:
            draw.text((4, TOP + row * _CELL - 2), f"layer {layer}", fill="black")
    _draw_scale(picture, draw, TOP + height + 6)
    return np.asarray(picture)


def _draw_scale(picture, draw, top: int) -> None:
    """Draw the colours from the smallest to the largest load, with three values."""
    from PIL import Image

    wide = picture.width - 16
    steps = torch.logspace(-1, 1, wide // _CELL, base=4.0)
    picture.paste(Image.fromarray(load_heatmap(steps[None])), (8, top))
    for place, text in zip((0.0, 0.5, 1.0), _SCALE.values(), strict=True):
        x = 8 + place * (wide - draw.textlength(text))
        draw.text((x, top + _CELL + 2), text, fill="black")
    draw.text((8, top + _CELL + 16), "tokens of an expert over its layer's mean", fill="black")
