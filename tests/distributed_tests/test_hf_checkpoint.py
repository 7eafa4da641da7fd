"""Hugging Face folders straight into any layout and out of it: one process's loss and bytes."""

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from tests.distributed_tests.test_expert_parallel import SPLIT_INSIDE
from tests.distributed_tests.test_layouts import DUAL, layout
from tests.distributed_tests.training_ranks import (
    FP32,
    MODEL,
    SEQ_LEN,
    SEQUENCES,
    config_of,
    counts_of,
    global_batches,
)
from torchtitan.components.huggingface.load_save import load_hf, save_hf
from torchtitan.components.loss import cross_entropy_sum
from torchtitan.models.deepseek_v3 import (
    DeepSeekV3Model,
    DeepSeekV3ModelArgs,
    DeepSeekV3StateDictAdapter,
    deepseekv3_args,
)
from torchtitan.ops.cross_entropy import IGNORE_INDEX
from torchtitan.tools.errors import UserError
from torchtitan.trainer import Trainer

ARGS = deepseekv3_args["debugmodel_node_limited"].for_run(overrides=MODEL, seq_len=SEQ_LEN)


@dataclasses.dataclass(frozen=True)
class Folder:
    """A folder that one process wrote, and that process's loss of the first global batch."""

    path: Path
    loss: float


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Folder:
    return written_by_one_process(ARGS, tmp_path_factory.mktemp("one") / "hf")


def written_by_one_process(args: DeepSeekV3ModelArgs, path: Path) -> Folder:
    torch.manual_seed(11)
    model = DeepSeekV3Model(args)
    model.init_weights()
    for moe in model.moe_layers().values():
        moe.expert_bias.normal_()
        moe.expert_bias -= moe.expert_bias.min()
    save_hf(model, DeepSeekV3StateDictAdapter(args), path, dtype=torch.float32)
    tokens, labels = global_batches()[0]
    with torch.no_grad():
        # as it was written: the bias begins at 0 there
        load_hf(model, DeepSeekV3StateDictAdapter(args), path)
        loss = cross_entropy_sum(model(tokens), labels) / (labels != IGNORE_INDEX).sum()
    return Folder(path, loss.item())


def in_and_out(options: list[str], source: str, target: str, dump_folder: str) -> float:
    """The loss of a run that starts from `source`, saved as `target` before any step."""
    trainer = Trainer(config_of(FP32, *options, f"--job.dump_folder={dump_folder}"))
    adapter = DeepSeekV3StateDictAdapter(trainer.model_args)
    load_hf(trainer.model, adapter, source)
    tokens, labels = global_batches()[0]
    share = SEQUENCES // trainer.dims.dp_degree
    first = trainer.dims.dp_rank(trainer.rank) * share
    mine = slice(first, first + share)
    valid = (labels != IGNORE_INDEX).sum()
    loss = trainer.forward_backward(({"input": tokens[mine]}, labels[mine]), counts_of(valid))
    dist.all_reduce(loss)  # over TP groups, too, whose ranks have the same
    loss /= trainer.dims.tp
    save_hf(trainer.model, adapter, target, dtype=torch.float32)
    trainer.close()
    return loss.item()


def assert_same_files(folder: Path, expected: Path) -> None:
    assert sorted(p.name for p in folder.iterdir()) == sorted(p.name for p in expected.iterdir())
    for file in expected.iterdir():
        assert (folder / file.name).read_bytes() == file.read_bytes(), file.name


RUNS = {
    "FSDP 2": layout(2),
    "EP 2, DDP 2": layout(2, ep=2, replicate=2, shard=1),
    "EP 2, FSDP 2": layout(4, ep=2),
    "EP 2, HSDP 2 x 2": layout(4, ep=2, replicate=2),
    "DDP 2": layout(2, replicate=2, shard=1),
    "TP 2": layout(2, tp=2),
    "PP 2": layout(2, pp=2),
    "PP 2, EP 2, two stages a rank": layout(4, *DUAL, pp=2, ep=2),
    "CP 2, TP 2, EP 2 of split experts": layout(4, cp=2, tp=2, ep=2, etp=2),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_loads_and_saves_what_one_process_would(ranks, folder, name, tmp_path):
    world_size, options = RUNS[name]
    target = tmp_path / "out"
    losses = ranks(world_size).run(
        in_and_out, options, str(folder.path), str(target), str(tmp_path)
    )
    assert losses == [pytest.approx(folder.loss, rel=1e-6)] * world_size
    assert_same_files(target, folder.path)


def test_copies_for_prediction_layers_are_written_wherever_their_original_is(ranks, tmp_path):
    """Embedding on the first stage, head and prediction layers on the last."""
    args = dataclasses.replace(ARGS, n_mtp_layers=2)
    expected = written_by_one_process(args, tmp_path / "one")
    options = [*layout(2, pp=2)[1], "--model.args.n_mtp_layers=2"]
    ranks(2).run(in_and_out, options, str(expected.path), str(tmp_path / "out"), str(tmp_path))
    assert_same_files(tmp_path / "out", expected.path)


def test_experts_split_inside_are_put_together(ranks, tmp_path):
    overrides = MODEL | {"moe_args": {"num_experts": 4, "num_expert_groups": 2}}
    args = deepseekv3_args["debugmodel_node_limited"].for_run(overrides=overrides, seq_len=SEQ_LEN)
    expected = written_by_one_process(args, tmp_path / "one")
    options = [*SPLIT_INSIDE, "--training.local_batch_size=1"]
    ranks(8).run(in_and_out, options, str(expected.path), str(tmp_path / "out"), str(tmp_path))
    assert_same_files(tmp_path / "out", expected.path)


# ---------------------------------------------------------------------------------------------
# Layouts by hand: what tensor and pipeline parallelism make of the weights
# ---------------------------------------------------------------------------------------------


def split_matrices(model: nn.Module) -> nn.Module:
    """Half of the matrices by rows, half by columns, over 2 of 4 ranks; FSDP over the others."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    for module in model.modules():
        for number, (name, param) in enumerate(list(module.named_parameters(recurse=False))):
            placement = Replicate() if param.ndim == 1 else Shard((number + param.shape[0]) % 2)
            split = distribute_tensor(param.data, mesh["tp"], [placement])
            module.register_parameter(name, nn.Parameter(split))
    return fully_shard(model, mesh=mesh["dp"])


def one_stage(model: nn.Module) -> nn.Module:
    """Keep one of two stages: embedding and layer 0 on even ranks, the rest on odd ones."""
    first = dist.get_rank() % 2 == 0
    for name in ("norm", "output") if first else ("tok_embeddings",):
        setattr(model, name, None)
    del model.layers["1" if first else "0"]
    return model


def through_by_hand(split, source: str, target: str) -> None:
    model = DeepSeekV3Model(ARGS)
    model.init_weights()
    adapter = DeepSeekV3StateDictAdapter(ARGS)
    model = split(model)
    load_hf(model, adapter, source)
    save_hf(model, adapter, target, dtype=torch.float32)


@pytest.mark.parametrize("split, world_size", [(split_matrices, 4), (one_stage, 2)])
def test_split_matrices_and_stages_pass_through_bit_by_bit(
    ranks, folder, split, world_size, tmp_path
):
    target = tmp_path / "out"
    ranks(world_size).run(through_by_hand, split, str(folder.path), str(target))
    assert_same_files(target, folder.path)


# ---------------------------------------------------------------------------------------------
# What one rank finds, all are told
# ---------------------------------------------------------------------------------------------


def refusal_of(source: str) -> tuple[str, bool]:
    """The sentence of this rank, and whether its weights stayed as they were."""
    model = DeepSeekV3Model(ARGS)
    model.init_weights()
    model = one_stage(model)
    before = copy.deepcopy(model.state_dict())
    try:
        load_hf(model, DeepSeekV3StateDictAdapter(ARGS), source)
    except UserError as error:
        after = model.state_dict()
        return str(error), all(torch.equal(before[n], after[n]) for n in before)
    return "", False


def test_a_misshapen_tensor_of_one_stage_is_told_by_all_ranks(ranks, tmp_path):
    args = dataclasses.replace(ARGS, inter_dim=40)  # only layer 0, the first stage's
    other = written_by_one_process(args, tmp_path / "other").path
    (other / "config.json").unlink()  # which would tell before any tensor is looked at
    for sentence, unchanged in ranks(2).run(refusal_of, str(other)):
        assert "model.layers.0.mlp.gate_proj.weight 40 x 32 instead of 48 x 32" in sentence
        assert unchanged
