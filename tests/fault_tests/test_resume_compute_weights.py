"""A run on one process in bf16 goes on bit for bit: its checkpoint holds the fp32 weights."""

import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from tests.tiny_run import losses, tiny
from torchtitan.train import main

MIXED = {"training__mixed_precision_param": "bfloat16"}
ALL_BF16 = MIXED | {"training__dtype": "bfloat16"}
EARLY = ALL_BF16 | {"optimizer__early_step_in_backward": True, "training__max_norm": "inf"}
CHECKPOINT = {"checkpoint__interval": 2, "checkpoint__last_save_model_only": False}


def run(folder: Path, **changes) -> None:
    options = tiny(folder, **CHECKPOINT, **changes)
    assert main([*options, "--checkpoint.enable"]) == 0


def saved_dtype(step: Path) -> torch.dtype:
    index = dcp.FileSystemReader(step).read_metadata().state_dict_metadata
    return index["model.layers.1.moe.experts.w1"].properties.dtype


@pytest.mark.parametrize("changes", [MIXED, ALL_BF16, EARLY], ids=["mixed", "bf16", "early"])
def test_the_resumed_run_has_the_same_losses(tmp_path, changes):
    run(tmp_path, **changes)
    (last,) = tmp_path.glob("*/step-4")
    expected = losses(tmp_path)
    assert saved_dtype(last) == (torch.float32 if changes is MIXED else torch.bfloat16)
    shutil.rmtree(last)
    run(tmp_path, **changes)
    assert last.exists(), "steps 3 and 4 were not trained again"
    assert losses(tmp_path)[-2:] == expected[-2:] and len(expected) == 4
