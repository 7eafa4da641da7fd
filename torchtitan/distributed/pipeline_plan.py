"""The layers of each pipeline stage, and the schedules that can run: plain arithmetic.

Stages are numbered along the model. With one stage a rank, stage s lives on rank s; with several,
they go around the ranks (s modulo the degree) or up the ranks and back down ("v"); a schedule from
a file (pipeline_schedule_file.py) may place them anywhere.
"""

from dataclasses import dataclass

from torchtitan.config.degrees import divisors, nearest
from torchtitan.config.job_config import Parallelism
from torchtitan.distributed.pipeline_schedule_file import KEY as _FILE
from torchtitan.distributed.pipeline_schedule_file import ScheduleFile, read_schedule_file
from torchtitan.tools.errors import UserError, suggest

# Modules beside the layers, on the first and the last stage.
ENDS = ("tok_embeddings", "norm", "output")
SINGLE = ("1F1B", "GPipe")
LOOPED = ("Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble")
V_SHAPED = ("ZBVZeroBubble", "DualPipeV")
SCHEDULES = (*SINGLE, *LOOPED, *V_SHAPED)
# Schedules that run a backward pass in two pieces, for the inputs and for the weights.
SPLIT_BACKWARD = ("InterleavedZeroBubble", *V_SHAPED)
_KEY = "parallelism.pipeline_parallel_"


@dataclass(frozen=True)
class PipelinePlan:
    """Stages, ranks and micro-batches of a pipeline.

    schedule: torch's name, or the path of the file.
    degree: ranks of the pp axis.
    stages: names of the modules of each stage.
    rank_of_stage: rank on the pp axis of each stage.
    num_microbatches: of the batch that it was planned for.
    microbatch_size: sequences.
    file: the schedule, where it comes from a file.
    """

    schedule: str
    degree: int
    stages: tuple[tuple[str, ...], ...]
    rank_of_stage: tuple[int, ...]
    num_microbatches: int
    microbatch_size: int
    file: ScheduleFile | None = None

    def stages_of(self, rank: int) -> list[int]:
        """List the stages of a rank of the pp axis, in order."""
        return [s for s in range(len(self.stages)) if self.rank_of(s) == rank]

    def rank_of(self, stage: int) -> int:
        return self.rank_of_stage[stage]

    @property
    def splits_backward(self) -> bool:
        return self.file.splits_backward if self.file else self.schedule in SPLIT_BACKWARD


def plan_pipeline(
    parallelism: Parallelism,
    *,
    num_layers: int,
    local_batch_size: int,
    batch_key: str = "training.local_batch_size",
) -> PipelinePlan:
    """Plan a pipeline of two or more ranks. Raises `UserError` for impossible settings.

    local_batch_size: sequences.
    batch_key: key that messages name as the source of `local_batch_size`.
    """
    degree = parallelism.pipeline_parallel_degree
    schedule = parallelism.pipeline_parallel_schedule
    if schedule not in SCHEDULES:
        raise UserError(
            f"{_KEY}schedule = '{schedule}' is not a schedule{suggest(schedule, SCHEDULES)}"
        )
    n = _num_microbatches(parallelism, local_batch_size, batch_key)
    path, file = parallelism.pipeline_parallel_schedule_csv, None
    if path:
        file = read_schedule_file(path, degree=degree, num_microbatches=n, batch_key=batch_key)
    _check_reshard(parallelism, file)
    if parallelism.module_fqns_per_model_part is not None:
        stages = _as_listed(parallelism.module_fqns_per_model_part, num_layers)
        key = "parallelism.module_fqns_per_model_part"
    else:
        stages, key = _evenly(parallelism, num_layers, file), f"{_KEY}layers_per_stage"
    _check_count(len(stages), schedule, degree, key, file)
    plan = PipelinePlan(
        schedule=path or schedule,
        degree=degree,
        stages=stages,
        rank_of_stage=file.rank_of_stage if file else _places(len(stages), schedule, degree),
        num_microbatches=n,
        microbatch_size=parallelism.pipeline_parallel_microbatch_size,
        file=file,
    )
    if file is None:
        _check_microbatches(plan, batch_key)
    return plan


def _check_reshard(parallelism: Parallelism, file: ScheduleFile | None) -> None:
    schedule, key = parallelism.pipeline_parallel_schedule, f"{_KEY}schedule"
    in_pieces = schedule in SPLIT_BACKWARD
    if file is not None:
        schedule, key, in_pieces = file.path, _FILE, file.splits_backward
    if in_pieces and parallelism.fsdp_reshard_after_forward == "always":
        raise UserError(
            'parallelism.fsdp_reshard_after_forward = "always" frees weights between the two '
            f"pieces of the backward pass of {key} '{schedule}': set it to "
            '"default" or "never".'
        )


def _places(num_stages: int, schedule: str, degree: int) -> tuple[int, ...]:
    """Rank of each stage: see the top of the file."""

    def rank_of(stage: int) -> int:
        around, place = divmod(stage, degree)
        back = schedule in V_SHAPED and around % 2 == 1
        return degree - 1 - place if back else place

    return tuple(map(rank_of, range(num_stages)))


def _names(layers: range, *, first: bool, last: bool) -> tuple[str, ...]:
    names = [f"layers.{i}" for i in layers]
    return tuple(["tok_embeddings"] * first + names + ["norm", "output"] * last)


def _evenly(
    parallelism: Parallelism, num_layers: int, file: ScheduleFile | None
) -> tuple[tuple[str, ...], ...]:
    """Split the layers as evenly as possible; the embedding and the output count as the number of
    layers that the first and last stage have less."""
    less = (
        parallelism.pipeline_parallel_first_stage_less_layers,
        parallelism.pipeline_parallel_last_stage_less_layers,
    )
    for name, value in zip(("first", "last"), less, strict=True):
        if value < 0:
            raise UserError(f"{_KEY}{name}_stage_less_layers = {value} must be 0 or more.")
    total = num_layers + sum(less)
    num_stages = _num_stages(parallelism, total, file)
    sizes = [total // num_stages + (s < total % num_stages) for s in range(num_stages)]
    sizes[0] -= less[0]
    sizes[-1] -= less[1]
    if min(sizes) < 0 or min(sizes[1:-1], default=1) < 1:
        raise UserError(
            f"{num_stages} pipeline stages ({_KEY}degree {parallelism.pipeline_parallel_degree}) "
            f"are too many for model.args.n_layers ({num_layers}) with {less[0]} less on the first "
            f"and {less[1]} less on the last: lower the degree, raise {_KEY}layers_per_stage, or "
            f"set {_KEY}first_stage_less_layers and last_stage_less_layers to 0."
        )
    ends = [sum(sizes[: s + 1]) for s in range(num_stages)]
    return tuple(
        _names(range(end - size, end), first=s == 0, last=s == num_stages - 1)
        for s, (end, size) in enumerate(zip(ends, sizes, strict=True))
    )


def _num_stages(parallelism: Parallelism, total: int, file: ScheduleFile | None) -> int:
    degree, per_stage = (
        parallelism.pipeline_parallel_degree,
        parallelism.pipeline_parallel_layers_per_stage,
    )
    if per_stage is None and file is not None:
        return file.num_stages
    if per_stage is None:
        return degree if parallelism.pipeline_parallel_schedule in SINGLE else 2 * degree
    if per_stage < 1:
        raise UserError(f"{_KEY}layers_per_stage = {per_stage} must be 1 or more.")
    return -(-total // per_stage)


def _as_listed(parts: list[list[str]], num_layers: int) -> tuple[tuple[str, ...], ...]:
    key = "parallelism.module_fqns_per_model_part"
    expected = list(_names(range(num_layers), first=True, last=True))
    listed = [name for part in parts for name in part]
    for name in listed:
        if name not in expected:
            raise UserError(
                f"{key} names '{name}', which the model does not have{suggest(name, expected)}"
            )
    if listed != expected:
        missing = [name for name in expected if name not in listed]
        what = f"leaves out '{missing[0]}'" if missing else "names modules twice or out of order"
        raise UserError(
            f"{key} {what}: all parts together must list every module once, in the model's order, "
            "from 'tok_embeddings' over 'layers.0' to 'norm' and 'output'."
        )
    if not all(parts):
        raise UserError(f"{key} has an empty part; give each part at least one module.")
    return tuple(map(tuple, parts))


def _check_count(
    stages: int, schedule: str, degree: int, key: str, file: ScheduleFile | None
) -> None:
    rule = None
    if file is not None and stages != file.num_stages:
        rule = f"must be that of {_FILE} {file.path} ({file.num_stages})"
    elif stages % degree:
        key = key if file is None else f"{_FILE} {file.path}"
        rule = f"must be a multiple of {_KEY}degree ({degree})"
    elif file is not None:
        return
    elif schedule in SINGLE and stages != degree:
        rule = f"must be {_KEY}degree ({degree}): '{schedule}' has one stage a rank"
    elif schedule in V_SHAPED and stages != 2 * degree:
        rule = f"must be twice {_KEY}degree ({degree}): '{schedule}' has two stages a rank"
    elif schedule in LOOPED and stages < 2 * degree:
        rule = f"must be at least twice {_KEY}degree ({degree}): '{schedule}' goes around the ranks"
    if rule:
        raise UserError(f"{key} makes {stages} stages, but their number {rule}; change either.")


def _num_microbatches(parallelism: Parallelism, local_batch_size: int, batch_key: str) -> int:
    size = parallelism.pipeline_parallel_microbatch_size
    if size not in divisors(local_batch_size):
        raise UserError(
            f"{_KEY}microbatch_size = {size} must divide {batch_key} ({local_batch_size}); set it "
            f"to {nearest(size, divisors(local_batch_size))}."
        )
    return local_batch_size // size


def _check_microbatches(plan: PipelinePlan, batch_key: str) -> None:
    """Check the rules that torch's schedules have for the number of micro-batches."""
    n, stages, rule = plan.num_microbatches, len(plan.stages), None
    if plan.schedule in ("1F1B", *V_SHAPED) and n < stages:
        rule = f"at least as many as stages ({stages})"
    rounds = max(1, n // plan.degree)
    if plan.schedule in ("Interleaved1F1B", "InterleavedZeroBubble") and n % rounds:
        rule = f"a multiple of {_KEY}degree ({plan.degree}), or fewer than twice as many"
    if rule:
        raise UserError(
            f"{_KEY}schedule '{plan.schedule}' needs {rule} micro-batches, but "
            f"{batch_key} over {_KEY}microbatch_size ({plan.microbatch_size}) makes {n}; change "
            f"{batch_key}."
        )
