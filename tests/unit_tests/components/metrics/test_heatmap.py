"""The heat map of the expert load: its colours, and the picture in TensorBoard."""

import io

import numpy as np
import torch
from PIL import Image

from tests.unit_tests.components.metrics.test_metrics import event_files, log_once, only_run
from torchtitan.components.metrics.heatmap import BOTTOM, LEFT, TOP, load_heatmap


def brightness(pixels):
    return pixels.astype(int).sum(axis=-1)


def test_heat_map_in_tensorboard_shows_the_overloaded_expert_brightest(tmp_path):
    log_once(tmp_path, enable_tensorboard=True)
    (image,) = event_files(only_run(tmp_path)).Images("expert_load")
    picture = np.array(Image.open(io.BytesIO(image.encoded_image_string)))
    cells_high = picture.shape[0] - TOP - BOTTOM
    pixels = picture[TOP:-BOTTOM, LEFT : LEFT + 2 * cells_high]
    assert (picture[TOP:-BOTTOM, LEFT + 2 * cells_high :] == 255).all(), "4 experts, no more"
    assert pixels.shape[0] / 2 == pixels.shape[1] / 4, "2 layers down, 4 experts across, square"
    cell = pixels.shape[0] // 2
    cells = brightness(pixels)[cell // 2 :: cell, cell // 2 :: cell]
    assert np.unravel_index(cells.argmax(), cells.shape) == (0, 2)  # Layer 1, expert 2: 9 of 12.
    assert np.unravel_index(cells.argmin(), cells.shape) == (0, 3)  # Idle.
    assert cells[1, 0] == cells[1, 3], "equal loads, equal colours"


def test_heat_map_gets_brighter_with_every_token():
    loads = torch.linspace(0.25, 4, 200)[None]
    row = brightness(load_heatmap(loads))[0, ::8]
    assert (np.diff(row) >= 0).all() and row[0] < row[100] < row[-1]
