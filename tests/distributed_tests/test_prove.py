"""A proof passes where a layout is right, and fails at the right tensor where an error is planted.

Errors are planted inside of the ranks by replacing a function there; the run on one process never
has one. Worlds of two processes, so that each check costs a second or two.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp._fully_shard import _fsdp_collectives

from torchtitan.components.checkpoint.resume import CheckpointChoice
from torchtitan.config import ConfigManager, JobConfig
from torchtitan.distributed import tensor_parallel
from torchtitan.distributed.token_dispatch import AllToAllDispatcher
from torchtitan.proof import prove as proof
from torchtitan.proof.plan import Plan, make_plan
from torchtitan.trainer import build, built_run, trainer
from torchtitan.trainer.forward_backward import ForwardBackward

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="proofs run on CPUs")

DP, SHARD = "data_parallel_replicate_degree = ", "data_parallel_shard_degree = 1"
WORLDS = {
    "DDP": f"{DP}2\n{SHARD}",
    "FSDP": "",
    "TP": "tensor_parallel_degree = 2",
    "CP": "context_parallel_degree = 2",
    "EP": "expert_parallel_degree = 2",
    "PP": 'pipeline_parallel_degree = 2\npipeline_parallel_schedule = "Interleaved1F1B"',
}
TOML = """
[model]
flavor = "debugmodel_node_limited"
[model.args]
n_layers = 4
[training]
dataset = "sample"
local_batch_size = 4
seq_len = 2048
[activation_checkpoint]
mode = "full"
[parallelism]
{parallelism}
"""


def plan_of(world: str, folder: Path) -> Plan:
    file = folder / "run.toml"
    file.write_text(TOML.format(parallelism=WORLDS[world]))
    config = ConfigManager().parse_args(["--job.config_file", str(file)])
    return make_plan(config, 2, node_size=8, most=8, folder=folder)


# ---------------------------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------------------------

Plant = Callable[[pytest.MonkeyPatch], None]


def no_sum_over_replicas(patch: pytest.MonkeyPatch) -> None:
    silent = SimpleNamespace(**vars(dist) | {"all_reduce": lambda *args, **how: None})
    patch.setattr(_fsdp_collectives, "dist", silent)


def doubled_loss(patch: pytest.MonkeyPatch) -> None:
    real = ForwardBackward.forward_backward
    patch.setattr(ForwardBackward, "forward_backward", lambda *args: 2 * real(*args))


def stale_bias(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(trainer, "update_expert_bias", lambda moes, load: None)


def all_ranks_read_the_same(patch: pytest.MonkeyPatch) -> None:
    real = built_run.build_training_dataloader
    patch.setattr(
        built_run,
        "build_training_dataloader",
        lambda *args, dp_rank, **how: real(*args, dp_rank=0, **how),
    )


def wrong_rope_offset(patch: pytest.MonkeyPatch) -> None:
    real = ForwardBackward.inputs

    def shifted(self: ForwardBackward, batch: Any) -> Any:
        inputs = real(self, batch)
        return inputs._replace(positions=inputs.positions + self.dims.mesh.get_rank())

    patch.setattr(ForwardBackward, "inputs", shifted)


def no_sum_over_tensor_ranks(patch: pytest.MonkeyPatch) -> None:
    def scatter_output(self: tensor_parallel.TensorParallel, *modules: Any) -> None:
        for module in modules:
            module.register_forward_hook(
                lambda _, args, out: out.chunk(self.degree, dim=-2)[self.rank]
            )

    patch.setattr(tensor_parallel.TensorParallel, "scatter_output", scatter_output)


def swapped_stages(patch: pytest.MonkeyPatch) -> None:
    real = build.cut_into_parts

    def swapped(model: Any, plan: Any, rank: int) -> Any:
        names = {"layers.2": "layers.3", "layers.3": "layers.2"}
        stages = [tuple(names.get(name, name) for name in stage) for stage in plan.stages]
        return real(model, replace(plan, stages=tuple(stages)), rank)

    patch.setattr(build, "cut_into_parts", swapped)


def wrong_routing_weights(patch: pytest.MonkeyPatch) -> None:
    real = AllToAllDispatcher.bring

    def reversed_weights(*args: Any) -> Any:
        arrival = real(*args)
        weights_PK = arrival.rows.weights_PK.flip(0)
        return arrival._replace(rows=arrival.rows._replace(weights_PK=weights_PK))

    patch.setattr(AllToAllDispatcher, "bring", reversed_weights)


def lost_optimizer_state(patch: pytest.MonkeyPatch) -> None:
    real = CheckpointChoice.start_of
    patch.setattr(
        CheckpointChoice,
        "start_of",
        lambda self, path, parts: real(self, path, parts - {"optimizer"}),
    )


# Planted error: world, check, step, kind and name of the first tensor that differs.
ERRORS: dict[Plant, tuple[str, str, int, str, str]] = {
    no_sum_over_replicas: ("DDP", proof.AGAINST, 1, "gradient", "tok_embeddings.weight"),
    doubled_loss: ("FSDP", proof.AGAINST, 1, "loss", "loss"),
    stale_bias: ("EP", proof.AGAINST, 1, "expert bias", "layers.1.moe.expert_bias"),
    all_ranks_read_the_same: ("FSDP", proof.AGAINST, 1, "output", "tok_embeddings"),
    wrong_rope_offset: ("CP", proof.AGAINST, 1, "output", "layers.0.attention"),
    no_sum_over_tensor_ranks: ("TP", proof.AGAINST, 1, "output", "layers.0.attention"),
    swapped_stages: ("PP", proof.AGAINST, 1, "output", "layers.2.attention"),
    wrong_routing_weights: ("EP", proof.AGAINST, 1, "output", "layers.1.moe"),
    lost_optimizer_state: (
        "FSDP",
        proof.RESUMED,
        1,
        "optimizer state",
        "tok_embeddings.weight.exp_avg",
    ),
}


def run_with(plant: Plant, function: Callable[..., Any], arguments: tuple) -> Any:
    """In a rank."""
    with pytest.MonkeyPatch.context() as patch:
        plant(patch)
        return function(*arguments)


class PlantedRanks:
    """A pool whose ranks, if there are several, have the error."""

    def __init__(self, pool: Any, plant: Plant | None) -> None:
        self.pool, self.plant = pool, plant if pool.world_size > 1 else None

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        if self.plant is None:
            return self.pool.run(function, *arguments)
        return self.pool.run(run_with, self.plant, function, arguments)


def proved(ranks: Any, world: str, folder: Path, plant: Plant | None = None) -> list[proof.Check]:
    @contextmanager
    def start(count: int, logs: Path) -> Iterator[PlantedRanks]:
        yield PlantedRanks(ranks(count), plant)

    (run,) = plan_of(world, folder).runs
    checks, _ = proof.prove(run, start, folder, seeds=(7,))
    return checks


@pytest.mark.parametrize("world", WORLDS)
def test_right_layouts_pass(ranks, world, tmp_path):
    checks = proved(ranks, world, tmp_path)
    assert [check.name for check in checks if check.passed] == [
        proof.AGAINST,
        proof.RESUMED,
        proof.FROM_ONE,
        proof.ON_ONE,
    ], checks
    assert all(check.compared > 100 for check in checks)


@pytest.mark.parametrize("plant", ERRORS, ids=lambda plant: plant.__name__)
def test_a_planted_error_is_named(ranks, plant, tmp_path):
    world, name, *key = ERRORS[plant]
    check = proved(ranks, world, tmp_path, plant)[-1]
    assert (check.name, check.failure) == (name, None)
    assert check.difference is not None
    assert check.difference.key == tuple(key), check.difference.describe()
    assert check.difference.error > 1e-3


def test_a_rank_that_fails_is_told(tmp_path):
    (run,) = plan_of("FSDP", tmp_path).runs

    class Failing:
        def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
            raise proof.RunError("rank 1 has died (exit code -9)")

    @contextmanager
    def start(count: int, logs: Path) -> Iterator[Failing]:
        yield Failing()

    checks, seeds = proof.prove(run, start, tmp_path)
    assert [check.failure for check in checks] == ["rank 1 has died (exit code -9)"]
    assert seeds == 1 and isinstance(run.small, JobConfig)
