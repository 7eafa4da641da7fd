"""Time of one step by parts that sum to it, from torch.profiler.

What is timed: on a GPU every kernel, on a CPU every operator (less the operators that it calls).
How each finds its part, the first rule that fits:

1. By name: attention kernels, optimizer kernels, grouped GEMMs.
2. Outside of the trainer's `forward_backward`: optimizer (zero_grad, clipping, update, balancing).
3. A GEMM by its sizes: the two that are not the number of tokens are those of a weight, and the
   weight's name says the part. This also works inside of compiled layers, where modules are gone.
4. By the module in whose forward pass it was started (a backward operator: its forward operator's,
   found by the autograd sequence number). Only the head and the loss where layers are compiled.
5. By words in its name: sort, gather, index, ... are dispatch/combine, GEMMs
   are "other GEMMs"; the rest is elementwise. Kernels of a CUDA graph have no operator, so rules 1
   and 5 alone hold there.

Communication between GPUs runs beside computing: its part is the time when nothing else ran. Of
several ranks it is that of the rank with the least, the wire; what another has more is `waiting`
for that rank.
Idle is the rest of the step. On a GPU kernels count as they are and idle fills up to the median
step without profiler, which slows the host only. On a CPU the profiler slows every operator, so the
parts of the profiled step are scaled to the median step.
"""

import itertools
import re
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from torchtitan.ops.linear import joints
from torchtitan.tools.kernel_times import COMMUNICATION, device_time
from torchtitan.trainer import Trainer

PARTS = (
    "attention GEMMs",
    "core attention",
    "router",
    "dispatch/combine",
    "expert GEMMs",
    "shared experts",
    "dense FFN",
    "other GEMMs",
    "elementwise",
    "head + loss",
    "optimizer",
    "communication",
    "waiting",
    "idle",
)
RANGE = "bench/"
# Ends of module names -> the scope that their forward passes open.
SCOPES = {
    "attention": "attention",
    "moe": "moe",
    "moe.router": "router",
    "moe.experts": "experts",
    "moe.shared_experts": "shared experts",
    "feed_forward": "dense FFN",
    "output": "head + loss",
}
WHOLE_SCOPES = ("router", "shared experts", "head + loss")  # all that happens there is theirs
GEMM_OF_SCOPE = {
    "attention": "attention GEMMs",
    "experts": "expert GEMMs",
    "dense FFN": "dense FFN",
}

_GEMM = re.compile(r"aten::(mm|addmm|bmm|matmul|linear|_addmm)|mkldnn|gemm|cutlass|nvjet")
_ATTENTION = re.compile(r"attention|flash|fmha|sdpa|flex|causal_blocks", re.I)
_FUSED = re.compile(r"triton_(poi|red|per)_")  # inductor's, named after all that they replace
_OPTIMIZER = re.compile(r"adam|multi_tensor|^_update$", re.I)
_GROUPED = re.compile(r"grouped|GroupProblem", re.I)
_LOSS = re.compile(r"nll_loss|cross_entropy", re.I)
_ROUTER = re.compile(r"topk|sigmoid|bitonic|gatherTopK|router", re.I)
_MOVING = re.compile(
    r"sort|gather|scatter|index|searchsorted|expand_rows|reduce|_place|_count", re.I
)


class StepProfile:
    """Marks a trainer's modules now; `measure` profiles one step later."""

    def __init__(self, trainer: Trainer, tokens: int):
        self.tokens = tokens
        self.part_of_sizes = weight_sizes(trainer.model)
        compiled = trainer.config.compile
        inside_too = not (compiled.enable and "model" in compiled.components)
        for name, module in trainer.model.named_modules():
            for ending, scope in SCOPES.items():
                inside = name.startswith("layers.")
                if (name == ending or name.endswith(f".{ending}")) and (inside_too or not inside):
                    _mark(module, scope)
        passes = trainer.passes
        passes.loss_fn = _in_range("head + loss", passes.loss_fn)
        trainer.forward_backward = _in_range("forward_backward", trainer.forward_backward)

    def measure(self, step: Callable[[], None], step_seconds: float) -> dict[str, Any]:
        """Milliseconds by part, which sum to `step_seconds`; and what the profiler saw itself."""
        on_gpu = torch.cuda.is_available()
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
        with profile(activities=activities, record_shapes=True) as profiler:
            start = time.perf_counter()
            step()
            if on_gpu:
                torch.cuda.synchronize()
            wall_ms = (time.perf_counter() - start) * 1e3
        busy = self._by_part(list(profiler.events() or []), on_gpu=on_gpu)
        parts = fill_up(busy, wall_ms, step_seconds * 1e3, on_gpu=on_gpu)
        return {"ms": parts, "profiled_step_ms": wall_ms, "profiled_busy_ms": sum(busy.values())}

    def _by_part(self, events: list[FunctionEvent], *, on_gpu: bool) -> dict[str, float]:
        host = [e for e in events if e.device_type == DeviceType.CPU]
        scope_of_forward = {
            (e.thread, e.sequence_nr): scope_of(e)
            for e in host
            if e.sequence_nr >= 0 and not _is_backward(e)
        }
        self._scope_of_sequence = {number: s for (_, number), s in scope_of_forward.items() if s}
        busy: dict[str, float] = defaultdict(float)
        seen: dict[str, float] = defaultdict(float)
        ranges = {e.name for e in events if e.is_user_annotation or e.name.startswith(RANGE)}
        for event in host:
            if on_gpu:
                for kernel in event.kernels:
                    if kernel.name in ranges:  # the shadow that a range throws on the device
                        continue
                    busy[self.part(event, kernel.name)] += kernel.duration / 1e3
                    seen[kernel.name] += kernel.duration / 1e3
            elif not event.name.startswith(RANGE):
                busy[self.part(event, event.name)] += event.self_cpu_time_total / 1e3
        if on_gpu:
            kernels = [
                e for e in events if e.device_type == DeviceType.CUDA and e.name not in ranges
            ]
            _add_unlinked(busy, seen, kernels)
            spans = [(e.name, e.time_range.start, e.time_range.end) for e in kernels]
            exposed = device_time(spans, step_ms=0.0).exposed
            busy["communication"], busy["waiting"] = wire_and_waiting(exposed)
        return busy

    def part(self, event: FunctionEvent, name: str) -> str:
        """Find the part of a kernel (on a CPU, an operator) of this name, started by `event`."""
        chain = list(_ancestors(event))
        backward = any(_is_backward(e) for e in chain)
        scope = scope_of(event)
        if backward:
            numbers = (e.sequence_nr for e in chain if _is_backward(e) and e.sequence_nr >= 0)
            scope = next(map(self._scope_of_sequence.get, numbers), None)
        ops = [e.name for e in chain[:3] if not e.name.startswith(RANGE)]
        names = " ".join([name, *ops])
        by_name = _named_part(name, names, scope)
        if by_name:
            return by_name
        inside = any(e.name == f"{RANGE}forward_backward" for e in chain)
        if not inside and not backward:
            return "optimizer"
        if scope in WHOLE_SCOPES:
            return scope
        if _GEMM.search(names):
            sized = next(filter(None, map(self._part_of_gemm, chain[:4])), None)
            return sized or GEMM_OF_SCOPE.get(scope or "", "other GEMMs")
        if scope in GEMM_OF_SCOPE:
            return "elementwise"
        if "embedding" in names:
            return "elementwise"
        if _ROUTER.search(name) and scope is None:
            return "router"
        return _kind(names)

    def _part_of_gemm(self, event: FunctionEvent) -> str | None:
        all_shapes: Any = event.input_shapes  # declared as a number
        sizes = gemm_sizes(all_shapes or [])
        if self.tokens in sizes:
            sizes.remove(self.tokens)
        pairs = itertools.combinations(sizes, 2)
        found = {self.part_of_sizes.get(frozenset(pair)) for pair in pairs} - {None}
        return found.pop() if len(found) == 1 else None


def gemm_sizes(shapes: list[list[int]]) -> list[int]:
    """Return rows, reduced size and columns of a product, from the shapes of an operator's inputs;
    nothing where no two of them can be multiplied.

    Beside the factors there may be a bias before them, and the output behind. A stack of one weight
    (FP8 products) counts as a matrix.
    """
    matrices = [s[1:] if len(s) == 3 and s[0] == 1 else s for s in shapes]
    matrices = [s for s in matrices if len(s) == 2]
    for (rows, inner), (first, second) in itertools.pairwise(matrices):
        if inner == first:
            return [rows, inner, second]
        if inner == second:  # linear's weight
            return [rows, inner, first]
    return []


def weight_sizes(model: nn.Module) -> dict[frozenset[int], str]:
    """The two sizes of every matrix -> its part; sizes that two parts share are left out.

    Weights of a `Joint` (ops/linear.py) may be multiplied as one.
    """
    found: dict[frozenset[int], set[str]] = defaultdict(set)
    # Not `get_parameter`: it finds the copy in the compute dtype, where there is one.
    params = dict(model.named_parameters())
    for name, param in params.items():
        if param.ndim == 2 and not name.startswith("tok_embeddings"):
            found[frozenset(param.shape)].add(_part_of_weight(name))
    for prefix, module in model.named_modules():
        for joint in joints(module):
            names = [f"{prefix}.{name}" for name in joint.names]
            shapes = [params[name].shape for name in names]
            if len(shapes[0]) == 2:
                sizes = frozenset((sum(s[joint.dim] for s in shapes), shapes[0][1 - joint.dim]))
                found[sizes].add(_part_of_weight(names[0]))
    return {sizes: parts.pop() for sizes, parts in found.items() if len(parts) == 1}


def _part_of_weight(name: str) -> str:
    words = {
        ".attention.": "attention GEMMs",
        ".router.": "router",
        ".shared_experts.": "shared experts",
        ".feed_forward.": "dense FFN",
        "output.": "head + loss",
    }
    return next((part for word, part in words.items() if word in name), "other GEMMs")


def fill_up(
    busy: dict[str, float], wall_ms: float, step_ms: float, *, on_gpu: bool
) -> dict[str, float]:
    """All of `PARTS`, in ms, with idle so that they sum to `step_ms`: see the file's docstring."""
    total = step_ms if on_gpu else wall_ms
    parts = {part: busy.get(part, 0.0) for part in PARTS}
    parts["idle"] = max(0.0, total - sum(parts.values()))
    factor = step_ms / sum(parts.values())
    return {part: ms * factor for part, ms in parts.items()}


def wire_and_waiting(exposed: float) -> tuple[float, float]:
    """Split this rank's exposed communication, in ms: what also the latest rank has, for which
    nobody waits, is the wire; the rest is waiting for that rank."""
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return exposed, 0.0
    by_rank = [0.0] * dist.get_world_size()
    dist.all_gather_object(by_rank, exposed)
    return min(by_rank), exposed - min(by_rank)


def scope_of(event: FunctionEvent) -> str | None:
    """The innermost marked module around an event."""
    marks = (e.name.removeprefix(RANGE) for e in _ancestors(event) if e.name.startswith(RANGE))
    return next((mark for mark in marks if mark != "forward_backward"), None)


def _named_part(name: str, names: str, scope: str | None) -> str | None:
    if COMMUNICATION.search(name):
        return "communication"
    if _OPTIMIZER.search(names):
        return "optimizer"
    if _LOSS.search(names) and "attention" not in names:
        return "head + loss"
    if _GROUPED.search(names) or (name == "fp8_gemm" and "expert" in names):
        return "expert GEMMs"
    core = _ATTENTION.search(names) and not _FUSED.match(name)
    if core and scope in (None, "attention"):
        return "core attention"
    return None


def _kind(names: str) -> str:
    if _GEMM.search(names):
        return "other GEMMs"
    return "dispatch/combine" if _MOVING.search(names) else "elementwise"


def _ancestors(event: FunctionEvent | None):
    while event is not None:
        yield event
        event = event.cpu_parent


def _is_backward(event: FunctionEvent) -> bool:
    return event.name.startswith("autograd::engine::evaluate_function")


def _add_unlinked(
    busy: dict[str, float], seen: dict[str, float], events: list[FunctionEvent]
) -> None:
    """Kernels that the profiler could not link to an operator, by their names alone."""
    total: dict[str, float] = defaultdict(float)
    for event in events:
        total[event.name] += event.time_range.elapsed_us() / 1e3
    for name, ms in total.items():
        rest = ms - seen.get(name, 0.0)
        if rest > 1e-3:
            router = "router" if _ROUTER.search(name) else None
            busy[_named_part(name, name, None) or router or _kind(name)] += rest


def _mark(module: nn.Module, scope: str) -> None:
    """Open a profiler range around every forward pass of `module`."""
    ranges = []

    def enter(*_: object) -> None:
        ranges.append(record_function(f"{RANGE}{scope}"))
        ranges[-1].__enter__()

    def leave(*_: object) -> None:
        ranges.pop().__exit__(None, None, None)

    module.register_forward_pre_hook(enter)
    module.register_forward_hook(leave, always_call=True)


def _in_range(scope: str, function: Callable) -> Callable:
    def marked(*args, **kwargs):
        with record_function(f"{RANGE}{scope}"):
            return function(*args, **kwargs)

    return marked
