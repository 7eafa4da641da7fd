"""State of a rank by arithmetic on the sizes of its layers: quick, and a check of the exact count.

It takes rows of a weight to come out even between ranks.
"""

from torchtitan.planning.ranks import PlannedRun
from torchtitan.planning.state import State
from torchtitan.planning.trace import Traces, names_at
from torchtitan.planning.traffic import groups
from torchtitan.tools.utils import TORCH_DTYPES

# Running means that the optimizer keeps of a weight.
_MEANS = {"Adam": 2, "AdamW": 2, "Muon": 1}


def closed_state(run: PlannedRun, traces: Traces, place: int) -> State:
    config = run.config
    size = TORCH_DTYPES[config.training.dtype].itemsize
    computes = TORCH_DTYPES[run.compute_dtype].itemsize
    in_bf16 = config.optimizer.name == "AdamW" and config.optimizer.state_dtype == "bfloat16"
    split = alone = 0
    for name in names_at(run, traces, place):
        one = traces.of_layer[name]
        dense = one.gathered_elements - one.gathered_experts
        split += -(-dense // groups(run)["fsdp"].size)
        split += -(-one.gathered_experts // groups(run)["expert fsdp"].size)
        alone += one.alone_elements
    copied = alone if size != computes else 0
    fp32_grads = run.sums_gradients or in_bf16 or config.optimizer.implementation != "fused"
    early = config.optimizer.early_step_in_backward
    return State(
        parameters=(split + alone) * size,
        gradients=0 if early else split * size + alone * (4 if fp32_grads else computes),
        optimizer=(split + alone) * _MEANS[config.optimizer.name] * (2 if in_bf16 else size),
        copies=copied * computes,
        buffers=0,
        step_peak=0,
    )
