"""The run that is planned, and its ranks, built as in training on tensors without memory."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.distributed as dist

from torchtitan.config import JobConfig, Parallelism, resolve_degrees, run_schedule, validate
from torchtitan.config.degrees import Degrees
from torchtitan.config.phases import StepSettings
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.dry_run import init_dry_run
from torchtitan.distributed.expert_parallel import gathers_by_default
from torchtitan.distributed.gathered_weight import parts_travel
from torchtitan.distributed.pipeline_plan import PipelinePlan, plan_pipeline
from torchtitan.models.decoder import DecoderArgs
from torchtitan.planning.elements import Elements
from torchtitan.planning.stand_ins import without_filling
from torchtitan.protocols.model import BaseModel
from torchtitan.protocols.train_spec import TrainSpec, get_train_spec
from torchtitan.tools.errors import UserError
from torchtitan.tools.logging import logger
from torchtitan.tools.utils import TORCH_DTYPES
from torchtitan.trainer.build import build_parallel_dims, resolve_node_size, shape_model
from torchtitan.trainer.preflight import model_args_of

# Every mesh lists all ranks; published runs end at a tenth of this.
MOST_RANKS = 131_072


@dataclass(frozen=True)
class PlannedRun:
    """The run that is planned.

    config: with the sizes of the planned phase in [training].
    device_type: of the machines that will run it, "cuda" or "cpu".
    node_size: consecutive ranks that share a node.
    now: batch and sequences of the planned steps.
    phase: number of the schedule's phase whose last step is planned; 0: the run's first step.
    """

    config: JobConfig
    spec: TrainSpec
    model_args: DecoderArgs
    world_size: int
    device_type: str
    node_size: int
    degrees: Degrees
    pipeline: PipelinePlan | None
    now: StepSettings
    phase: int = 0

    @property
    def passes(self) -> int:
        """Forward and backward passes of a step; with a pipeline, of all its micro-batches."""
        return self.now.accumulation(self.degrees.dp_replicate * self.degrees.dp_shard)

    @property
    def sums_gradients(self) -> bool:
        """Tell whether a parameter's gradient is the sum of several backward passes."""
        return self.passes > 1 or bool(self.config.schedule.phase)

    @property
    def microbatch(self) -> int:
        """Sequences that pass through a layer at once."""
        return self.pipeline.microbatch_size if self.pipeline else self.now.local_batch_size

    @property
    def tokens_per_rank(self) -> int:
        """Tokens of a micro-batch that a rank holds between layers."""
        return self.microbatch * self.now.seq_len // self.degrees.cp // self.degrees.tp

    @property
    def bytes_between_stages(self) -> int:
        """Bytes of a micro-batch that a rank hands to the next pipeline stage."""
        size = TORCH_DTYPES[self.compute_dtype].itemsize
        return self.tokens_per_rank * self.model_args.stage_channels * size

    @property
    def bytes_of_sums(self) -> int:
        """Bytes of an element in FSDP's sums of gradients."""
        return TORCH_DTYPES[self.config.training.mixed_precision_reduce].itemsize

    @property
    def nodes_per_ep_group(self) -> int:
        return max(1, self.degrees.ep * self.degrees.etp // self.node_size)

    @property
    def reshards(self) -> bool:
        """Tell whether FSDP frees gathered weights after the forward pass (distributed/fsdp.py)."""
        how, degrees = self.config.parallelism.fsdp_reshard_after_forward, self.degrees
        if how == "default":
            return degrees.dp_shard * degrees.cp > 1 and degrees.pp == 1
        return how == "always"

    def freed(self, outside: Elements) -> Elements:
        """Return those weights outside of FSDP that are freed after the forward pass.

        outside: that several ranks share.
        """
        split = [kind for kind, (ranks, _) in self.shards.items() if ranks > 1]
        return outside.only(split if self.reshards else ())

    def narrow(self, outside: Elements) -> Elements:
        """Return those weights outside of FSDP whose gradients travel in the compute dtype
        (distributed/gathered_weight.py).

        outside: that several ranks share.
        """
        shards, node = self.shards.items(), self.node_size
        return outside.only([kind for kind, each in shards if parts_travel(*each, node)])

    @property
    def shards(self) -> dict[str, tuple[int, int]]:
        """Number of ranks that split weights, and the stride from one to the next, by kind: "dense"
        and "experts"."""
        d = self.degrees
        spread = d.ep * d.etp
        experts = max(1, d.dp_shard * d.cp * d.tp // spread)
        return {"dense": (d.dp_shard * d.cp, d.tp), "experts": (experts, spread)}

    @property
    def tokens_per_step(self) -> int:
        return self.now.batch_size * self.now.seq_len

    @property
    def compute_dtype(self) -> str:
        return self.config.training.mixed_precision_param

    @property
    def compiles(self) -> bool:
        return self.config.compile.enable and "model" in self.config.compile.components

    @property
    def stage_size(self) -> int:
        """Ranks of a pipeline place."""
        return self.world_size // self.degrees.pp

    def places(self) -> dict[int, list[int]]:
        """Places along the pipeline that hold different layers, each with those that are like it.

        One rank of a place is planned, the first of its FSDP, EP and TP groups: the others hold the
        same, or less where a weight's rows don't come out even.
        """
        if self.pipeline is None:
            return {0: [0]}
        alike: dict[tuple, list[int]] = {}
        for place in range(self.degrees.pp):
            stages = [self.pipeline.stages[stage] for stage in self.pipeline.stages_of(place)]
            kinds = tuple(self._kinds.get(name, name) for stage in stages for name in stage)
            alike.setdefault(kinds, []).append(place)
        return {places[0]: places for places in alike.values()}

    @cached_property
    def _kinds(self) -> dict[str, tuple]:
        """Names and sizes of each layer's weights, by the layer's name in a pipeline's plan."""
        with without_filling(), torch.device("meta"):
            layers = self.spec.model_cls(self.model_args).layers
        return {
            f"layers.{name}": tuple((n, p.shape) for n, p in layer.named_parameters())
            for name, layer in layers.items()
        }


def plan_run(
    config: JobConfig,
    world_size: int,
    *,
    gpus_per_node: int,
    device_type: str = "cuda",
    phase: int = 0,
) -> PlannedRun:
    """Check the config for so many ranks, as a run would. Raises `UserError`.

    gpus_per_node: where the config doesn't say it.
    device_type: of the machines that will run it, "cuda" or "cpu".
    phase: number of the schedule's phase whose last step is planned; 0: the run's first step.
    """
    if not 1 <= world_size <= MOST_RANKS:
        raise UserError(
            f"--world-size {world_size} must be from 1 to {MOST_RANKS:,}, the most that is planned."
        )
    validate(config, world_size, device_type)
    degrees = resolve_degrees(config.parallelism, world_size)
    now = _at_phase(config, degrees, phase)
    training = replace(config.training, local_batch_size=now.local_batch_size, seq_len=now.seq_len)
    config = replace(config, training=training)
    spec = get_train_spec(config.model.name)
    model_args = model_args_of(config, spec, now.seq_len, now.yarn)
    if not isinstance(model_args, DecoderArgs):
        raise UserError(f"model.name '{config.model.name}' is no decoder: it can't be planned.")
    model_args.check_layout(config.parallelism)
    node_size = resolve_node_size(config.parallelism, world_size, min(gpus_per_node, world_size))
    parallelism = replace(config.parallelism, expert_parallel_node_size=node_size)
    compiler = config.compile
    if _gathers_tokens(parallelism, degrees, node_size, model_args, device_type):
        # Its buffers have room for more rows than come, which a trace would count as computed.
        parallelism = replace(parallelism, expert_parallel_dispatch="all_to_all")
        compiler = replace(compiler, cuda_graph=False)  # of which nothing is planned
    pipeline = None
    if degrees.pp > 1:
        pipeline = plan_pipeline(
            parallelism, num_layers=model_args.n_layers, local_batch_size=now.local_batch_size
        )
    return PlannedRun(
        config=replace(config, parallelism=parallelism, compile=compiler),
        spec=spec,
        model_args=model_args,
        world_size=world_size,
        device_type=device_type,
        node_size=node_size,
        degrees=degrees,
        pipeline=pipeline,
        now=now,
        phase=phase,
    )


def _gathers_tokens(
    parallelism: Parallelism,
    degrees: Degrees,
    node_size: int,
    model_args: DecoderArgs,
    device_type: str,
) -> bool:
    """Tell whether experts' tokens travel by "all_gather" in a run on such machines."""
    moe_args, dispatch = getattr(model_args, "moe_args", None), parallelism.expert_parallel_dispatch
    if dispatch != "auto" or moe_args is None or device_type != "cuda":
        return dispatch == "all_gather"
    one_node = degrees.ep * degrees.etp <= node_size
    one_operator = moe_args.use_grouped_mm and not moe_args.score_before_experts
    by_default = gathers_by_default(degrees.ep, degrees.etp, degrees.pp)
    return one_node and one_operator and by_default


def _at_phase(config: JobConfig, degrees: Degrees, phase: int) -> StepSettings:
    schedule = run_schedule(config, degrees.dp_replicate * degrees.dp_shard)
    if not 0 <= phase <= len(config.schedule.phase):
        raise UserError(
            f"--phase {phase} must be from 0 (the first step) to {len(config.schedule.phase)}, the "
            "number of [[schedule.phase]] tables."
        )
    return schedule.ends[phase] if phase else schedule.at(0)


@dataclass(frozen=True)
class BuiltRank:
    """One rank's model, on the meta device.

    parts: of a pipeline, by stage.
    """

    dims: ParallelDims
    model: BaseModel
    parts: list[BaseModel]


@contextmanager
def built_rank(run: PlannedRun, rank: int) -> Iterator[BuiltRank]:
    """Build the model of a rank; its process groups live as long as the block."""
    level, hook = logger.level, sys.excepthook
    init_dry_run(run.world_size, rank)
    sys.excepthook = hook  # torch's puts a rank before every line of a traceback
    logger.setLevel(logging.ERROR)  # the lines of a start, once for each rank
    try:
        dims = build_parallel_dims(run.config, run.pipeline)
        with without_filling():
            built = shape_model(run.spec, run.model_args, dims, run.config, run.pipeline)
        yield BuiltRank(dims, *built)
    finally:
        logger.setLevel(level)
        dist.destroy_process_group()
