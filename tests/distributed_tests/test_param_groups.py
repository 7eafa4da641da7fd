"""[[optimizer.group]] means the same on every layout, also where a rank has none of a group."""

import pytest
import torch

from tests.distributed_tests.test_layouts import layout, pipeline
from tests.distributed_tests.training_ranks import (
    FP32,
    SEQUENCES,
    assert_trained_alike,
    train_on_this_rank,
)

# On two stages the first has no `output`, the second no `tok_embeddings`, and the first (layer 0,
# which is dense) no experts.
TABLES = (
    "--optimizer.group=["
    '{match = ["tok_embeddings.*", "output.*"], weight_decay = 0.0, lr_factor = 0.5}, '
    '{match = ["*.experts.w1", "*.experts.w3"], weight_decay = 2.0}, '
    '{match = ["*norm.weight"], weight_decay = 3.0, lr_factor = 2.0}]'
)
MUON = "--optimizer.name=Muon"
LAYOUTS = {
    "PP 2": (layout(2, *pipeline("1F1B"), pp=2), []),
    "EP 2 x TP 2": (layout(4, ep=2, tp=2), []),
    "FSDP 2, Muon": (layout(2), [MUON]),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_groups_by_name_train_like_one_process(ranks, name, tmp_path):
    (world_size, options), more = LAYOUTS[name]
    if MUON in more and torch.cuda.is_available():
        pytest.skip("Muon's bf16 products on GPUs round differently for another layout")
    alone = [FP32, "--activation_checkpoint.mode=none", f"--training.local_batch_size={SEQUENCES}"]
    one = ranks(1).run(train_on_this_rank, [*alone, TABLES, *more], str(tmp_path / "one"))[0]
    plain = ranks(1).run(train_on_this_rank, [*alone, *more], str(tmp_path / "plain"))[0]
    for part in ("output.weight", "layers.1.moe.experts.w1", "layers.0.ffn_norm.weight"):
        change = (one["state"][part] - plain["state"][part]).norm()
        assert change > 1e-3 * plain["state"][part].norm(), f"the tables must move {part}"
    told = [*options, TABLES, *more]
    for result in ranks(world_size).run(train_on_this_rank, told, str(tmp_path / "split")):
        assert_trained_alike(result, one)
