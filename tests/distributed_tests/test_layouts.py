"""Every layout trains like one process: loss, gradient norm, weights and bias of two steps.

One row of LAYOUTS is a layout. Refused combinations: test_layout_refusals.py.
"""

import json
from itertools import combinations
from math import prod
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.distributed_tests.training_ranks import (
    FP32,
    SEQUENCES,
    assert_trained_alike,
    evaluated_and_trained,
    one_process,  # noqa: F401 (a fixture)
    one_process_with_documents,  # noqa: F401 (a fixture)
    train_on_this_rank,
)
from torchtitan.distributed import overlap

DEGREES = {
    "replicate": "data_parallel_replicate_degree",
    "shard": "data_parallel_shard_degree",
    "tp": "tensor_parallel_degree",
    "cp": "context_parallel_degree",
    "pp": "pipeline_parallel_degree",
    "ep": "expert_parallel_degree",
    "etp": "expert_tensor_parallel_degree",
}
PIPELINE_SIZE = "--parallelism.pipeline_parallel_microbatch_size"


def layout(
    world_size: int, *more: str, accumulation: int = 1, ac: str = "none", **degrees: int
) -> tuple[int, list[str]]:
    """Processes, and the options of the run; the global batch is the same for all layouts."""
    not_data = [degrees.get(name, 1) for name in ("tp", "cp", "pp")]
    dp = world_size // (not_data[0] * not_data[1] * not_data[2])
    size = max(1, SEQUENCES // dp // accumulation)
    # Four micro-batches fill every schedule; each more costs a pass.
    micro = [f"{PIPELINE_SIZE}={max(1, size // 4)}"] if degrees.get("pp", 1) > 1 else []
    return world_size, [
        FP32,
        f"--training.local_batch_size={size}",
        *micro,
        f"--activation_checkpoint.mode={ac}",
        *(f"--parallelism.{DEGREES[name]}={degree}" for name, degree in degrees.items()),
        *more,
    ]


def nodes_of(size: int) -> str:
    return f"--parallelism.expert_parallel_node_size={size}"


ALL_TO_ALL = "--parallelism.expert_parallel_dispatch=all_to_all"
ALL_GATHER = "--parallelism.expert_parallel_dispatch=all_gather"
NO_ROOM = "--parallelism.expert_parallel_capacity=1"  # some rank always gets more than the mean
NODE_LIMITED = "--parallelism.expert_parallel_dispatch=node_limited"
KEEP_WEIGHTS = "--parallelism.fsdp_reshard_after_forward=never"
WHOLE_LOGITS = "--parallelism.disable_loss_parallel"
BY_HEADS = "--parallelism.context_parallel_rotate_method=alltoall"
BY_OPERATION = "--activation_checkpoint.selective_ac_option=op"
BUT_PRODUCTS = "--activation_checkpoint.selective_ac_option=elementwise"
ASYNC = "--parallelism.enable_async_tensor_parallel"
COMPILED = ("--compile.enable", "--compile.backend=aot_eager")
# On GPUs context parallelism takes flex attention, which only inductor can compile.
CP_COMPILED = COMPILED if not torch.cuda.is_available() else ("--compile.enable",)
BUDGETED = ("--compile.enable", "--compile.backend=aot_eager_decomp_partition")
BUDGET_0 = (*BUDGETED, "--activation_checkpoint.memory_budget=0")  # recompute all that can be
BUDGET_HALF = (*BUDGETED, "--activation_checkpoint.memory_budget=0.5")


INTERLEAVED = "--parallelism.pipeline_parallel_expert_parallel_overlap"
PARTS = [["tok_embeddings"], ["layers.0"], ["layers.1"], ["norm", "output"]]
FOUR_STAGES = f"--parallelism.module_fqns_per_model_part={json.dumps(PARTS)}"
SCHEDULE_FILE = Path(__file__).parents[1] / "assets/schedule.csv"  # of two micro-batches
FROM_FILE = f"--parallelism.pipeline_parallel_schedule_csv={SCHEDULE_FILE}"
PAIRS_OF_SEQUENCES = f"{PIPELINE_SIZE}=2"
ONE_BY_ONE = f"{PIPELINE_SIZE}=1"


def pipeline(schedule: str, stages: int = 2) -> tuple[str, ...]:
    """Two stages: as the layer counts have it. Four: the embedding and the output alone."""
    name = f"--parallelism.pipeline_parallel_schedule={schedule}"
    return (name, FOUR_STAGES) if stages == 4 else (name,)


LAYOUTS = {
    # Data parallel
    "one process": layout(1),
    "one process, accumulation": layout(1, accumulation=4),
    "FSDP 2": layout(2),
    "FSDP 2, accumulation": layout(2, accumulation=4),
    "FSDP 2, weights kept, recomputed": layout(2, KEEP_WEIGHTS, ac="full"),
    "FSDP 2, every second layer recomputed": layout(2, ac="selective"),
    "FSDP 2, all but matrix products recomputed": layout(2, BUT_PRODUCTS, ac="selective"),
    "DDP 2": layout(2, replicate=2, shard=1),
    "DDP 2, accumulation": layout(2, replicate=2, shard=1, accumulation=2),
    "FSDP 4": layout(4),
    "HSDP 2 x 2": layout(4, replicate=2),
    "HSDP 2 x 2, accumulation, by operation": layout(
        4, BY_OPERATION, replicate=2, accumulation=2, ac="selective"
    ),
    "DDP 4": layout(4, replicate=4, shard=1),
    # Experts
    "EP 2": layout(2, ep=2),
    "EP 2, nodes of 1": layout(2, nodes_of(1), ep=2),
    "EP 2, DDP 2": layout(2, ep=2, replicate=2, shard=1),
    "EP 2, FSDP 2": layout(4, ep=2),
    "EP 2, FSDP 2, node-limited on one node": layout(4, NODE_LIMITED, ep=2),
    "EP 4": layout(4, ALL_TO_ALL, ep=4),
    "EP 2, gathered": layout(2, ALL_GATHER, ep=2),
    "EP 4, gathered, steps redone, accumulation": layout(
        4, ALL_GATHER, NO_ROOM, ep=4, accumulation=2
    ),
    "EP 2, FSDP 2, gathered, by operation": layout(
        4, ALL_GATHER, BY_OPERATION, ep=2, ac="selective"
    ),
    "TP 2, EP 2, gathered, recomputed": layout(2, ALL_GATHER, tp=2, ep=2, ac="full"),
    "EP 4, nodes of 2, accumulation": layout(4, nodes_of(2), ep=4, accumulation=2),
    "EP 4, nodes of 1": layout(4, nodes_of(1), ep=4),
    "EP 2, HSDP 2 x 2, recomputed": layout(4, nodes_of(1), ep=2, replicate=2, ac="full"),
    "EP 4 from DDP 4": layout(4, nodes_of(2), ep=4, replicate=4, shard=1),
    "EP 8": layout(8, ALL_TO_ALL, ep=8),
    "EP 8, nodes of 2": layout(8, nodes_of(2), ep=8),
    "EP 4, FSDP 2, nodes of 2": layout(8, nodes_of(2), ep=4),
    "EP 2, HSDP 2 x 4": layout(8, ep=2, replicate=2),
    "EP 4 from HSDP 4 x 2, nodes of 1": layout(8, nodes_of(1), ep=4, replicate=4),
    # Tensors
    "TP 2": layout(2, tp=2),
    "TP 2, accumulation, whole logits": layout(2, WHOLE_LOGITS, tp=2, accumulation=2),
    "TP 2, recomputed": layout(2, tp=2, ac="full"),
    "TP 2, compiled": layout(2, *COMPILED, tp=2),
    "TP 2, EP 2": layout(2, tp=2, ep=2),
    "TP 2, split experts": layout(2, tp=2, etp=2),
    "TP 4": layout(4, tp=4),
    "TP 2, FSDP 2": layout(4, tp=2),
    "TP 2, DDP 2": layout(4, tp=2, replicate=2, shard=1),
    "TP 2, DDP 2, split experts": layout(4, tp=2, etp=2, replicate=2, shard=1),
    "TP 2, FSDP 2, EP 4": layout(4, tp=2, ep=4),
    "TP 2, FSDP 2, EP 2, by operation": layout(4, BY_OPERATION, tp=2, ep=2, ac="selective"),
    "TP 2, FSDP 2, split experts": layout(4, tp=2, etp=2),
    "TP 2, EP 2 of split experts": layout(4, tp=2, ep=2, etp=2),
    # Context
    "CP 2": layout(2, cp=2),
    "CP 2, by heads": layout(2, BY_HEADS, cp=2),
    "CP 2, recomputed": layout(2, cp=2, ac="full"),
    "CP 2, compiled": layout(2, *CP_COMPILED, cp=2),
    "CP 2, EP 2": layout(2, cp=2, ep=2),
    "CP 4": layout(4, cp=4),
    "CP 4, by heads": layout(4, BY_HEADS, cp=4),
    "CP 2, FSDP 2, accumulation": layout(4, cp=2, accumulation=2),
    "CP 2, DDP 2": layout(4, cp=2, replicate=2, shard=1),
    "CP 2, FSDP 2, EP 4": layout(4, cp=2, ep=4),
    "CP 2, TP 2": layout(4, cp=2, tp=2),
    "CP 2, TP 2, by heads": layout(4, BY_HEADS, cp=2, tp=2),
    # Recomputation and the compiler, where tokens travel
    "EP 2, by operation": layout(2, BY_OPERATION, ep=2, ac="selective"),
    "EP 2, compiled, recomputed": layout(2, *COMPILED, ep=2, ac="full"),
    "EP 2, compiled, by operation": layout(2, *COMPILED, BY_OPERATION, ep=2, ac="selective"),
    "EP 2, memory budget": layout(2, *BUDGET_0, ep=2, ac="memory_budget"),
    "EP 2, half a memory budget": layout(2, *BUDGET_HALF, ep=2, ac="memory_budget"),
    # Three and more together
    "CP 2, TP 2, EP 4": layout(4, cp=2, tp=2, ep=4),
    "CP 2, TP 2, EP 2 of split experts": layout(4, cp=2, tp=2, ep=2, etp=2),
    "FSDP 2, CP 2, TP 2, EP 4, nodes of 2": layout(8, nodes_of(2), cp=2, tp=2, ep=4),
    "DDP 2, CP 2, TP 2, EP 2, recomputed": layout(
        8, cp=2, tp=2, ep=2, replicate=2, shard=1, ac="full"
    ),
    "HSDP 2 x 2, TP 2, EP 2 of split experts": layout(8, tp=2, ep=2, etp=2, replicate=2),
    "HSDP 2 x 2, CP 2, EP 8, by heads": layout(8, BY_HEADS, cp=2, ep=8, replicate=2),
}


# torch's schedules: stages, with one or two of them a rank.
SCHEDULES = {
    "GPipe": 2,
    "1F1B": 2,
    "LoopedBFS": 4,
    "Interleaved1F1B": 4,
    "InterleavedZeroBubble": 4,
    "ZBVZeroBubble": 4,
    "DualPipeV": 4,
}
for _name, _stages in SCHEDULES.items():
    _options = pipeline(_name, _stages)
    LAYOUTS |= {
        f"PP 2, {_name}": layout(2, *_options, pp=2),
        f"PP 2, {_name}, EP 2": layout(4, *_options, pp=2, ep=2),
    }
if torch.__version__ >= (2, 13):  # refused before
    LAYOUTS["PP 2, DualPipeV interleaved, EP 2, compiled, recomputed"] = layout(
        4, *pipeline("DualPipeV", 4), *COMPILED, INTERLEAVED, pp=2, ep=2, ac="full"
    )
else:
    LAYOUTS["PP 2, FSDP 2, compiled"] = layout(4, *COMPILED, pp=2)
ZERO_BUBBLE = pipeline("InterleavedZeroBubble", 4)
DUAL = pipeline("DualPipeV", 4)
LAYOUTS |= {
    "PP 2, DualPipeV interleaved, EP 2": layout(4, *DUAL, INTERLEAVED, pp=2, ep=2),
    "PP 2, accumulation": layout(2, pp=2, accumulation=2),
    "PP 2, eight micro-batches": layout(2, *ZERO_BUBBLE, ONE_BY_ONE, pp=2),
    # In pairs of sequences: each weight's part of a backward pass recomputes its layer.
    "PP 2, recomputed": layout(2, *ZERO_BUBBLE, PAIRS_OF_SEQUENCES, pp=2, ac="full"),
    "PP 2, DDP 2": layout(4, pp=2, replicate=2, shard=1),
    "PP 2, FSDP 2, by operation": layout(4, BY_OPERATION, pp=2, ac="selective"),
    "PP 2, TP 2": layout(4, pp=2, tp=2),
    "PP 2, TP 2, split experts": layout(4, pp=2, tp=2, etp=2),
    "PP 2, CP 2": layout(4, pp=2, cp=2),
    # Two neighbouring stages a rank, halves of backward passes, a pair: no schedule of torch's.
    "PP 2, a schedule from a file, EP 2": layout(
        4, FROM_FILE, FOUR_STAGES, PAIRS_OF_SEQUENCES, INTERLEAVED, pp=2, ep=2
    ),
    "PP 2, HSDP 2 x 2": layout(8, pp=2, replicate=2),
    "PP 2, FSDP 2, TP 2, EP 2, interleaved": layout(8, *DUAL, INTERLEAVED, pp=2, tp=2, ep=2),
    "PP 2, FSDP 2, CP 2, EP 2": layout(8, *ZERO_BUBBLE, pp=2, cp=2, ep=2),
    "PP 2, CP 2, TP 2, EP 4, nodes of 2": layout(8, nodes_of(2), pp=2, cp=2, tp=2, ep=4),
}


def parallelisms(world_size: int, options: list[str]) -> set[str]:
    """Degrees of DEGREES that are more than 1."""
    told = dict(option.split("=", 1) for option in options if "_degree=" in option)
    degrees = {name: int(told.get(f"--parallelism.{key}", 1)) for name, key in DEGREES.items()}
    if f"--parallelism.{DEGREES['shard']}" not in told:  # all that the others leave
        degrees["shard"] = world_size // prod(degrees[n] for n in ("replicate", "tp", "cp", "pp"))
    return {name for name, degree in degrees.items() if degree > 1}


def test_the_table_has_each_pair_of_parallelisms_and_many_of_four() -> None:
    rows = [parallelisms(*row) for row in LAYOUTS.values()]
    for pair in combinations(DEGREES, 2):
        assert any(set(pair) <= row for row in rows), pair
    assert sum(len(row - {"etp"}) >= 4 for row in rows) >= 6
    assert len(rows) >= 40


# AdamW hides a wrong factor, and the norm a small gradient: here each is compared.
EACH_GRADIENT = [
    "EP 2",
    "EP 2, HSDP 2 x 2, recomputed",
    "EP 4, nodes of 1",
    "EP 4 from DDP 4",
    "EP 8, nodes of 2",
    "EP 4, FSDP 2, nodes of 2",
    "TP 2",
    "TP 4",
    "TP 2, split experts",
    "TP 2, FSDP 2, EP 2, by operation",
    "CP 2",
    "CP 2, by heads",
    "CP 4",
    "CP 2, TP 2, EP 2 of split experts",
    "FSDP 2, CP 2, TP 2, EP 4, nodes of 2",
    "PP 2, 1F1B",
    "PP 2, TP 2",
    "PP 2, DualPipeV interleaved, EP 2",
]


@pytest.fixture(scope="module")
def gradients_of_one_process(ranks, tmp_path_factory) -> dict[str, Tensor]:
    folder = str(tmp_path_factory.mktemp("one"))
    return ranks(1).run(train_on_this_rank, layout(1)[1], folder, True)[0]["gradients"]


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_trains_like_one_process(
    ranks,
    one_process,  # noqa: F811
    gradients_of_one_process,
    name,
    tmp_path,
):
    world_size, options = LAYOUTS[name]
    told = options, str(tmp_path), name in EACH_GRADIENT
    for result in ranks(world_size).run(train_on_this_rank, *told):
        assert_trained_alike(result, one_process)
        if name in EACH_GRADIENT:
            assert_equal_gradients(result["gradients"], gradients_of_one_process)


def assert_equal_gradients(gradients: dict, expected: dict) -> None:
    assert gradients.keys() == expected.keys()
    for name, one in expected.items():
        error = ((gradients[name] - one).norm() / one.norm()).item()
        assert error <= 1e-6, f"the gradient of {name} is off by {error:.1e}"


@pytest.mark.parametrize("name", ["FSDP 2", "HSDP 2 x 2", "PP 2, FSDP 2, by operation"])
def test_gradients_that_are_summed_in_bf16_are_rounded_and_no_more(
    ranks,
    gradients_of_one_process,
    name,
    tmp_path,
):
    """Each addend and each sum loses at most 2^-9 of itself."""
    world_size, options = LAYOUTS[name]
    told = [*options, "--training.mixed_precision_reduce=bfloat16"], str(tmp_path), True
    for result in ranks(world_size).run(train_on_this_rank, *told):
        for tensor, expected in gradients_of_one_process.items():
            error = (result["gradients"][tensor] - expected).norm() / expected.norm()
            assert 1e-5 < error < 1e-2, tensor


# Attention ends where a document does.
DOCUMENTS = "--model.args.attn_mask_type=block_causal"
WITH_DOCUMENTS = ["one process", "TP 2", "CP 2", "CP 2, by heads", "CP 4", "CP 2, TP 2, EP 4"]


@pytest.mark.parametrize("name", WITH_DOCUMENTS)
def test_packed_documents_train_like_one_process(
    ranks,
    one_process_with_documents,  # noqa: F811
    name,
    tmp_path,
):
    world_size, options = LAYOUTS[name]
    for result in ranks(world_size).run(train_on_this_rank, [*options, DOCUMENTS], str(tmp_path)):
        assert_trained_alike(result, one_process_with_documents)


@pytest.mark.parametrize(
    "name", ["PP 2, 1F1B", "PP 2, DualPipeV", "PP 2, a schedule from a file, EP 2"]
)
def test_a_pipeline_evaluates_like_one_process(ranks, one_process, name, tmp_path):  # noqa: F811
    """Also where neighbouring stages share a rank; and it trains on afterwards."""
    world_size, options = LAYOUTS[name]
    for losses in ranks(world_size).run(evaluated_and_trained, options, str(tmp_path)):
        expected = one_process["losses"]
        assert losses == pytest.approx([expected[0], expected[1], expected[1]], rel=1e-6)


def trained_and_turns(options: list[str], folder: str) -> tuple[dict, int]:
    """And how often one pass of a pair has let the other work."""
    turns, patch = 0, pytest.MonkeyPatch()
    real = overlap._Turns.yield_turn

    def counted(self: overlap._Turns) -> None:
        nonlocal turns
        turns += not any(self._ended)
        real(self)

    patch.setattr(overlap._Turns, "yield_turn", counted)
    try:
        return train_on_this_rank(options, folder), turns
    finally:
        patch.undo()


def test_interleaved_passes_compute_the_same_bits(ranks, tmp_path):
    """Each of four stages has experts, so both passes of a pair do."""
    world_size, options = layout(4, *pipeline("DualPipeV"), pp=2, ep=2)
    options += ["--model.args.n_layers=4", "--model.args.n_dense_layers=0"]
    plain = ranks(world_size).run(trained_and_turns, options, str(tmp_path))
    results = ranks(world_size).run(trained_and_turns, [*options, INTERLEAVED], str(tmp_path))
    for (result, turns), (expected, no_turns) in zip(results, plain, strict=True):
        assert turns > 0 == no_turns
        assert (result["losses"], result["norms"]) == (expected["losses"], expected["norms"])
        for name, tensor in expected["state"].items():
            assert torch.equal(result["state"][name], tensor), name


def test_a_combined_layout_repeats_bit_for_bit(ranks, tmp_path) -> None:
    options = LAYOUTS["CP 2, TP 2, EP 4"][1]
    first = ranks(4).run(train_on_this_rank, options, str(tmp_path))[0]
    again = ranks(4).run(train_on_this_rank, options, str(tmp_path))[0]
    assert first["losses"] == again["losses"] and first["norms"] == again["norms"]
    for name, tensor in first["state"].items():
        assert torch.equal(tensor, again["state"][name]), name
