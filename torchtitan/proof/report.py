"""Report of a proof: shrunk settings, worlds, results, and limits."""

from collections.abc import Iterator
from dataclasses import asdict
from itertools import combinations
from typing import Any

import torchtitan
from torchtitan.config import JobConfig, to_dict
from torchtitan.proof.compare import TOLERANCES
from torchtitan.proof.plan import Plan, Run
from torchtitan.proof.prove import SEEDS, Check
from torchtitan.proof.worlds import Axes
from torchtitan.protocols.model import BaseModelArgs
from torchtitan.protocols.train_spec import get_train_spec
from torchtitan.trainer.preflight import model_args_of

# Tables whose keys are compared one by one; what else changes is listed as not covered.
_TABLES = (
    "training",
    "schedule",
    "optimizer",
    "lr_scheduler",
    "ema",
    "parallelism",
    "activation_checkpoint",
)
_OWN = ("training.dataset", "training.blend")


def opening(plan: Plan) -> Iterator[str]:
    """Yield the lines that are known before anything runs."""
    yield f"Proof of {plan.config.job.config_file} for {plan.whole.describe()}"
    yield f"Compared by torchtitan-moe {torchtitan.__version__}"
    yield ""
    yield "Shrunk (never a degree below 2, nor what is computed):"
    for key, (before, after) in changes(plan, plan.runs[0]).items():
        yield f"  {key}: {before} -> {after}"
    yield ""
    yield "Data: the first documents of each dataset, cut short."
    yield from (f"  {sentence}" for sentence in plan.replaced)
    yield ""
    yield "Worlds:"
    for n, run in enumerate(plan.runs, start=1):
        yield f"  {n}. {run.world.describe()}"
        yield f"     {_pairs_of(run.world.axes)}"
    yield ""
    yield "Not covered:"
    yield from (f"  - {sentence}" for sentence in not_covered(plan))
    yield ""


def of_world(n: int, run: Run, checks: list[Check], seeds: int) -> Iterator[str]:
    """Yield the lines on one world's checks."""
    yield f"World {n}: {run.world.describe()}, {run.small.training.steps} steps"
    if seeds > 1:
        yield f"  Seed {SEEDS[1]}; with {SEEDS[0]}, a tie in the routing went another way."
    for check in checks:
        yield f"  {'same' if check.passed else 'DIFFERENT':10}{check.name}: {_result(check)}"


def _result(check: Check) -> str:
    if check.failure is not None:
        return check.failure
    if check.difference is not None:
        return check.difference.describe()
    worst = ", ".join(
        f"{kind} {check.worst[kind]:.0e}" for kind in TOLERANCES if check.worst.get(kind)
    )
    return f"{check.compared} tensors; {f'largest errors: {worst}' if worst else 'bit for bit'}"


def ending(plan: Plan, results: list[list[Check]]) -> tuple[str, int]:
    """Return the last line, and the exit code."""
    for n, checks in enumerate(results, start=1):
        for check in checks:
            if not check.passed:
                return f"DIFFERENT: world {n}, {check.name}: {_result(check)}", 1
    tensors = sum(check.compared for checks in results for check in checks)
    worlds = f"{len(results)} worlds compute" if len(results) > 1 else "this layout computes"
    left_out = f", {len(plan.missing)} pairs of axes left out" if plan.missing else ""
    return f"PROVED: {worlds} what one process does ({tensors} tensors{left_out})", 0


def _pairs_of(axes: Axes) -> str:
    names = sorted(axes)
    if len(names) < 2:
        return f"axes: {', '.join(names) or 'none'}"
    pairs = ", ".join(f"{a} x {b}" for a, b in combinations(names, 2))
    return f"pairs of axes: {pairs}"


# ---------------------------------------------------------------------------------------------
# What changed
# ---------------------------------------------------------------------------------------------


def changes(plan: Plan, run: Run) -> dict[str, tuple[Any, Any]]:
    """Return each setting and model argument that shrinking changed: (before, after) by key."""
    small = run.small
    spec = get_train_spec(small.model.name)
    args = model_args_of(small, spec, small.training.seq_len)
    before = _flat(plan.config, plan.args)
    after = _flat(small, args)
    return {
        key: (before.get(key), after.get(key))
        for key in before | after
        if before.get(key) != after.get(key) and not key.startswith(_OWN)
    }


def _flat(config: JobConfig, args: BaseModelArgs) -> dict[str, Any]:
    tables = {name: table for name, table in to_dict(config).items() if name in _TABLES}
    return dict(_entries({"model": {"args": asdict(args)}} | tables))


def _entries(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        parts: Any = value.items()
    elif isinstance(value, list) and any(isinstance(part, dict) for part in value):
        parts = enumerate(value, start=1)
    else:
        yield key, value
        return
    for name, part in parts:
        yield from _entries(part, f"{key}.{name}" if key else str(name))


def not_covered(plan: Plan) -> Iterator[str]:
    """Yield sentences on what no run here can tell."""
    config, training = plan.config, plan.config.training
    yield "kernels of GPUs, NCCL and the network, memory and speed"
    if training.mixed_precision_param != "float32" or training.dtype != "float32":
        yield "bfloat16: everything is computed in float32, which tells an error from rounding"
    yield "the user's tokenizer: a shipped one of 2,048 entries takes its place"
    checkpoint, parallelism = config.checkpoint, config.parallelism
    has_copies = training.dtype == "float32" != training.mixed_precision_param
    off = {
        "torch.compile": config.compile.enable,
        "CUDA graphs": config.compile.cuda_graph,
        "asynchronous tensor parallelism": parallelism.enable_async_tensor_parallel,
        "CPU offload": training.enable_cpu_offload,
        "updates inside of the backward pass": config.optimizer.early_step_in_backward,
        "loader processes": training.dataset_num_workers > 0,
        "validation": config.validation.enable,
        "skipped and rewound steps": training.non_finite_loss != "stop"
        or training.loss_spike_factor is not None,
        f"the weights of {checkpoint.initial_load_path}": checkpoint.enable
        and checkpoint.initial_load_path is not None,
        "bf16 copies of weights that FSDP leaves alone": has_copies
        and not training.enable_cpu_offload
        and plan.whole.size > plan.whole.degrees.pp == 1,
        "Hugging Face's format": checkpoint.enable and checkpoint.last_save_in_hf,
    }
    switched = [name for name, asked in off.items() if asked]
    if switched:
        yield f"off here: {', '.join(switched)}"
    for axes in sorted(sorted(axes) for axes in plan.missing):
        yield f"{' with '.join(axes)}: no world of so few processes has it"
