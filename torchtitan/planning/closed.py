"""State of a rank by arithmetic on the sizes of its layers: quick, and a check of the exact count.

It takes rows of a weight to come out even between ranks.
"""

from torchtitan.components.optimizer.build_compute_weights import dtype_of_gradients
from torchtitan.planning.elements import Elements
from torchtitan.planning.ranks import PlannedRun
from torchtitan.planning.state import State
from torchtitan.planning.trace import Traced, Traces, names_at
from torchtitan.planning.traffic import FP32, groups
from torchtitan.tools.utils import TORCH_DTYPES

# Running means that the optimizer keeps of a weight.
_MEANS = {"Adam": 2, "AdamW": 2, "Muon": 1}


def closed_state(run: PlannedRun, traces: Traces, place: int) -> State:
    config = run.config
    size = TORCH_DTYPES[config.training.dtype].itemsize
    computes = TORCH_DTYPES[run.compute_dtype].itemsize
    in_bf16 = config.optimizer.name == "AdamW" and config.optimizer.state_dtype == "bfloat16"
    weights, trained, adapters = (
        _held(run, traces, place, kind) for kind in ("weights", "trained", "adapters")
    )
    copied = weights[1] + _kept_copies(run, traces, place) if size != computes else 0
    parts = [traces.of_layer[name] for name in names_at(run, traces, place)]
    early = config.optimizer.early_step_in_backward
    wider = FP32 - size  # of adapters
    means = sum(trained) * (2 if in_bf16 else size) + sum(adapters) * (0 if in_bf16 else wider)
    return State(
        parameters=sum(weights) * size + sum(adapters) * wider,
        trained=sum(trained) * size + sum(adapters) * wider,
        gradients=0 if early else sum(kept_gradients(run, one) for one in parts),
        optimizer=means * _MEANS[config.optimizer.name],
        copies=copied * computes,
        buffers=0,
        step_peak=0,
    )


def kept_gradients(run: PlannedRun, one: Traced) -> int:
    """Bytes of the gradients of a part's weights, once they are summed over ranks and split."""
    config = run.config
    kept = TORCH_DTYPES[config.training.dtype]
    in_fp32 = run.sums_gradients or config.training.mixed_precision_reduce == "float32"
    of_sums = (dtype_of_gradients(config, in_fp32=in_fp32) or kept).itemsize
    of_others = (dtype_of_gradients(config, in_fp32=run.sums_gradients) or kept).itemsize
    outside = _split(run, one.outside)
    under_fsdp = (_split(run, one.trained) - outside) * kept.itemsize
    under_fsdp += _split(run, one.adapters) * (FP32 - kept.itemsize)
    return under_fsdp + outside * of_sums + one.trained.alone * of_others


def _kept_copies(run: PlannedRun, traces: Traces, place: int) -> int:
    """Elements of copies that a rank keeps of weights that several share without FSDP."""
    copied = 0
    for name in names_at(run, traces, place):
        outside = traces.of_layer[name].outside
        freed = run.freed(outside)
        copied += _split(run, freed) + (outside - freed).gathered
    return copied


def _split(run: PlannedRun, whole: Elements) -> int:
    """Elements of weights that a rank keeps of those that are split between several."""
    dense, experts = (groups(run)[name].size for name in ("fsdp", "expert fsdp"))
    return -(-whole.dense // dense) + -(-whole.experts // experts)


def _held(run: PlannedRun, traces: Traces, place: int, kind: str) -> tuple[int, int]:
    """Elements of weights that a rank keeps.

    kind: a field of `Traced`: "weights", "trained" or "adapters".

    Returns those of weights that FSDP splits, and those of the others.
    """
    split = alone = 0
    for name in names_at(run, traces, place):
        elements: Elements = getattr(traces.of_layer[name], kind)
        split += _split(run, elements)
        alone += elements.alone
    return split, alone
