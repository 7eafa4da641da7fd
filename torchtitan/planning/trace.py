"""Forward and backward pass of each kind of layer, as a GPU would run it, on meta tensors.

The layers are the model's own, with their tensor, expert and context parallelism and their
recomputation; FSDP is left out (memory.py adds it), so that a layer has the weights that FSDP would
have gathered. Equal layers are traced once.
"""

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from torchtitan.components.loss import build_loss
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.context_parallel import positions_of_this_rank
from torchtitan.distributed.float8_gather import choose_float8_gathers
from torchtitan.ops.attention import AttentionMask, Documents
from torchtitan.ops.fp8.weight import parts_of
from torchtitan.ops.grouped_mm import local_part
from torchtitan.ops.lora import is_adapter
from torchtitan.planning.elements import Elements, count_elements, saved_in_fp8
from torchtitan.planning.ledger import Ledger, Work
from torchtitan.planning.ranks import BuiltRank, PlannedRun, built_rank
from torchtitan.planning.routing import Routing, copies, planned_routing
from torchtitan.planning.stand_ins import compiled_loss, gpu_kernels, without_data_parallel
from torchtitan.planning.state import (
    bytes_of,
    make_compute_weights,
    weights_outside_fsdp,
    weights_that_travel,
    weights_under_fsdp,
)
from torchtitan.protocols.model import BaseModel
from torchtitan.tools.utils import TORCH_DTYPES

# The ends of the model, traced without any layer between them.
FIRST, LAST = "embedding", "head and loss"


@dataclass(frozen=True)
class Traced:
    """Costs of one part of the model for one micro-batch, in bytes, without its input.

    kept: alive after the forward pass, the output included.
    forward_peak: most at a time in the forward pass, `kept` included.
    backward_peak: the same in the backward pass, gradients of its weights included.
    gathered: weights that are gathered for it, but for those that stay from step to step.
    gathered_again: those that are gathered anew for the backward pass where weights are freed.
    saved: bytes of `gathered` that gathering in FP8 saves.
    saved_sums: bytes of gradients that are saved where they travel in bf16 and are summed in fp32.
    outside: weights that FSDP leaves alone though other ranks have them, too.
    gathered_gradients: their gradients, before they are summed over ranks; frozen ones have none.
    weights: all of them.
    trained: those that are trained.
    adapters: those of LoRA among them, which are kept in fp32 whatever the others are.
    output: hidden state that it hands on.
    """

    kept: int
    forward_peak: int
    backward_peak: int
    gathered: int
    gathered_again: Elements
    saved: Elements
    saved_sums: Elements
    outside: Elements
    gathered_gradients: int
    weights: Elements
    trained: Elements
    adapters: Elements
    output: int
    forward: Work
    backward: Work

    def between(self, least: "Traced", budget: float) -> "Traced":
        """Return a mixture of two traces.

        budget: 0.0 is `least`, 1.0 is this one.
        """

        def mix(most: int, least: int) -> int:
            return round(least + budget * (most - least))

        return replace(
            self,
            kept=mix(self.kept, least.kept),
            forward_peak=mix(self.forward_peak, least.forward_peak),
            backward_peak=mix(self.backward_peak, least.backward_peak),
            backward=least.backward.times(1 - budget) + self.backward.times(budget),
        )

    def after_compiling(self, between: int) -> "Traced":
        """Return the trace of the compiled part.

        between: bytes kept that a compiler doesn't keep, see `Ledger.between`.
        """
        moved = [
            replace(work, bytes_moved=round(work.bytes_moved * MOVED_COMPILED))
            for work in (self.forward, self.backward)
        ]
        return replace(
            self,
            kept=self.kept - between,
            forward_peak=self.forward_peak - between,
            backward_peak=self.backward_peak - between,
            forward=moved[0],
            backward=moved[1],
        )


# Part of the bytes that eager layers move outside of matrix products.
MOVED_COMPILED = 0.5


@dataclass(frozen=True)
class Traces:
    """Traces of a run.

    of_layer: by the layer's name; FIRST and LAST are the ends.
    routing: None without experts.
    axis_of_group: axis of each process group, by the group's name.
    """

    of_layer: dict[str, Traced]
    routing: Routing | None
    axis_of_group: dict[str, str]


def trace_run(run: PlannedRun, skew: float) -> Traces:
    """Trace every kind of layer of the run, each on the first rank that has it.

    With a memory budget the compiler chooses what it keeps, between nothing and all.
    """
    recompute = run.config.activation_checkpoint
    if recompute.mode != "memory_budget":
        return _trace(run, skew)
    most, least = (
        _trace(
            replace(
                run,
                config=replace(run.config, activation_checkpoint=replace(recompute, mode=mode)),
            ),
            skew,
        )
        for mode in ("none", "full")
    )
    mixed = {
        name: one.between(least.of_layer[name], recompute.memory_budget)
        for name, one in most.of_layer.items()
    }
    return replace(most, of_layer=mixed)


def _trace(run: PlannedRun, skew: float) -> Traces:
    plain = replace(
        run, config=replace(run.config, compile=replace(run.config.compile, enable=False))
    )
    if run.world_size > 1:  # what FSDP gathers has the compute dtype
        training = replace(plain.config.training, dtype=run.compute_dtype)
        plain = replace(plain, config=replace(plain.config, training=training))
    routing = planned_routing(run, skew)
    found: dict[str, Traced] = {}
    kinds: dict[Any, Traced] = {}
    axes: dict[str, str] = {}
    for place in run.places():
        with without_data_parallel(), built_rank(plain, place * run.stage_size) as built:
            axes |= _axes(built.dims)
            with _gpu(run, routing):
                found |= _Tracer(run, built).trace(kinds)
    return Traces(_of_all_layers(run, found), routing, axes)


def _of_all_layers(run: PlannedRun, found: dict[str, Traced]) -> dict[str, Traced]:
    """Add layers of places that were not traced: they are like those of one that was, in order."""
    if run.pipeline is None:
        return found
    for place, alike in run.places().items():
        for other in alike:
            pairs = zip(_layers(run, place), _layers(run, other), strict=True)
            found |= {there: found[here] for here, there in pairs}
    return found


def _layers(run: PlannedRun, place: int) -> list[str]:
    assert run.pipeline is not None
    names = [n for stage in run.pipeline.stages_of(place) for n in names_of(run, stage)]
    return [name for name in names if name.isdecimal()]


def names_at(run: PlannedRun, traces: Traces, place: int) -> list[str]:
    """List the traced parts of the model at a place of the pipeline, in order."""
    if run.pipeline is None:
        return [FIRST, *(name for name in traces.of_layer if name.isdecimal()), LAST]
    return [n for stage in run.pipeline.stages_of(place) for n in names_of(run, stage)]


def names_of(run: PlannedRun, stage: int) -> list[str]:
    """List the traced parts of a stage, in order."""
    assert run.pipeline is not None
    modules = run.pipeline.stages[stage]
    layers = [name.removeprefix("layers.") for name in modules if name.startswith("layers.")]
    return [FIRST] * ("tok_embeddings" in modules) + layers + [LAST] * ("output" in modules)


@contextmanager
def _gpu(run: PlannedRun, routing: Routing | None) -> Iterator[None]:
    sizes = routing.split_sizes[copies(run)] if routing else ()
    with gpu_kernels(sizes), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of names that torch 2.11 needs
        yield


def _axes(dims: ParallelDims) -> dict[str, str]:
    """Return the axis of each process group that layers use, by the group's name."""
    groups = {"tp": dims.mesh["tp"].get_group(), "cp": dims.data_mesh["cp"].get_group()}
    if dims.expert_mesh is not None:
        groups["etp"] = dims.expert_mesh["etp"].get_group()
        groups["ep"] = dims.expert_mesh["ep"].get_group()
    found = {str(group.group_name): axis for axis, group in groups.items()}
    if dims.ep > 1 and dims.nodes_per_ep_group > 1:
        found |= {str(group.group_name): "ep" for group in dims.node_groups}
    return found


class _Tracer:
    def __init__(self, run: PlannedRun, built: BuiltRank) -> None:
        self.run, self.built, self.model = run, built, built.model.train()
        self.dtype = TORCH_DTYPES[run.compute_dtype]
        self._give_copies()
        degrees = run.degrees
        self.tokens = (run.microbatch, run.now.seq_len // degrees.cp)
        positions = positions_of_this_rank(built.dims, run.now.seq_len, torch.device("meta"))
        self.positions = None if positions is None else positions.unsqueeze(0)

    def _give_copies(self) -> None:
        """Make the copies of weights that a run computes with.

        Weights that FSDP gathers are copies already; those that it leaves alone have the dtype that
        the run keeps.
        """
        run, built = self.run, self.built
        choose_float8_gathers(built.model, built.dims)
        if run.world_size > 1:
            kept = TORCH_DTYPES[run.config.training.dtype]
            outside = weights_outside_fsdp(run, built)
            for module in built.model.modules():
                for name, param in list(module.named_parameters(recurse=False)):
                    if param in outside:
                        _cast(module, name, torch.float32 if is_adapter(name) else kept)
                    elif is_adapter(name):
                        _cast(module, name, self.dtype)
        self.weights = make_compute_weights(run, built, split=False)

    def trace(self, kinds: dict[Any, Traced]) -> dict[str, Traced]:
        """Trace all layers and ends of this rank's model.

        kinds: traces of layers so far; added to.
        """
        found = {}
        parts = self.built.parts or [self.model]
        for part in parts:
            if part.tok_embeddings is not None:
                found[FIRST] = self._trace_end(part, ("tok_embeddings",))
            for name, layer in part.layers.items():
                kind = _kind(layer)
                if kind not in kinds:
                    kinds[kind] = self._trace_layer(layer)
                found[name] = kinds[kind]
            if part.output is not None:
                found[LAST] = self._trace_end(part, ("norm", "output", "mtp"))
        return found

    def _hidden(self, channels: int) -> Tensor:
        (B, S), tp = self.tokens, self.run.degrees.tp
        return torch.empty(
            B, S // tp, channels, dtype=self.dtype, device="meta", requires_grad=True
        )

    def _ids(self) -> Tensor:
        return torch.empty(self.tokens, dtype=torch.int64, device="meta")

    def _mask(self) -> AttentionMask:
        if self.run.model_args.attn_mask_type == "causal" or self.run.degrees.cp > 1:
            return None
        (B, S) = self.tokens
        return Documents(torch.empty(B + 1, dtype=torch.int32, device="meta"), S)

    def _trace_layer(self, layer: nn.Module) -> Traced:
        valid = torch.empty(self.tokens, dtype=torch.bool, device="meta")
        x = self._hidden(self.run.model_args.dim)
        others = (self.model.rope, self._mask(), self.positions, valid)

        def forward() -> Tensor:
            out, load = layer(x, *others)
            del load
            return out

        return self._measure(layer, forward, [x, valid])

    def _trace_end(self, part: BaseModel, names: tuple[str, ...]) -> Traced:
        end = copy.copy(part)
        end._modules = {
            name: module if name in names else None for name, module in part._modules.items()
        }
        end._modules["layers"] = nn.ModuleDict()
        args, tokens, labels = self.run.model_args, self._ids(), self._ids()
        extra = part.extra_inputs(tokens, labels, tokens) if self._has_side_losses else {}
        first = "tok_embeddings" in names
        x = tokens if first else self._hidden(args.stage_channels)
        how = {"attention_masks": self._mask(), "positions": self.positions, **extra}
        how |= {"labels": labels} if self._model_has_loss(part) and not first else {}
        loss_fn = self._loss_fn()

        def forward() -> Tensor:
            out = end(x, token_mask=labels != -100, **how)
            return out if first or "labels" in how else loss_fn(out, labels)

        return self._measure(end, forward, [x, tokens, labels])

    @property
    def _has_side_losses(self) -> bool:
        return self.run.model_args.has_side_losses

    def _model_has_loss(self, part: BaseModel) -> bool:
        """Return whether the model computes its loss itself, as `ForwardBackward` decides."""
        whole = self.run.degrees.tp == 1 and self.run.pipeline is None
        return part.computes_loss and whole and not self._has_side_losses

    def _loss_fn(self) -> Callable[..., Tensor]:
        compile, parallelism = self.run.config.compile, self.run.config.parallelism
        whole = parallelism.disable_loss_parallel or self.run.degrees.tp == 1
        if compile.enable and "loss" in compile.components and whole:
            return lambda logits, *_: compiled_loss(logits)
        return build_loss(self.built.dims, disable_loss_parallel=parallelism.disable_loss_parallel)

    def _measure(
        self, module: nn.Module, forward: Callable[[], Tensor], inputs: list[Tensor]
    ) -> Traced:
        ledger = Ledger()
        ledger.ignore(inputs)
        ledger.ignore(self.model.buffers())
        ledger.ignore(local_part(p) for p in module.parameters())
        if self.weights is not None:
            ledger.ignore(part for each in self.weights._fused for part in parts_of(each.tensor))
        with ledger:
            ledger.start()
            out = forward()
            forward_peak, forward_work, kept = ledger.peak, ledger.work, ledger.now
            ledger.between.pop(out.untyped_storage()._cdata, None)
            between = sum(ledger.between.values())
            ledger.start()
            output = out.nbytes
            if out.requires_grad:  # a frozen embedding's does not
                out.backward(torch.empty_like(out) if out.dim() else None)
            backward_peak, backward_work = ledger.peak, ledger.work
        traced = Traced(
            kept=kept,
            forward_peak=forward_peak,
            backward_peak=backward_peak,
            output=output if out.dim() else 0,
            forward=forward_work,
            backward=backward_work,
            **self._count_weights(module),
        )
        for p in module.parameters():
            p.grad = None
        return traced.after_compiling(between) if self.run.compiles else traced

    def _count_weights(self, module: nn.Module) -> dict[str, Any]:
        """Count the fields of `Traced` about weights: those that FSDP gathers, those outside of it
        that several ranks share, and their gradients."""
        run, size, kinds = self.run, self.dtype.itemsize, ("dense", "experts")
        gathered = weights_under_fsdp(run, self.built, module)
        travelling = weights_that_travel(run, self.built, module)
        under_fsdp = set(gathered)
        alone = [p for p in travelling if p not in under_fsdp]
        outside = count_elements(module, alone)["weights"].only(kinds)
        read_once = self._read_once(module, under_fsdp)
        again = [p for p in travelling if p not in read_once]
        bytes_again = count_elements(module, again)["weights"].only(kinds).times(size)
        saved = saved_in_fp8(module, gathered)
        narrower = max(0, run.bytes_of_sums - size)
        return {
            "gathered": bytes_of(gathered) - saved.gathered + size * run.freed(outside).gathered,
            "gathered_again": bytes_again - saved_in_fp8(module, again),
            "saved": saved,
            "saved_sums": run.narrow(outside).times(narrower),
            "outside": outside,
            "gathered_gradients": size
            * sum(local_part(p).numel() for p in travelling if p.requires_grad),
            **count_elements(module, travelling),
        }

    def _read_once(self, module: nn.Module, under_fsdp: set[nn.Parameter]) -> set[nn.Parameter]:
        """Return the weights that are gathered once for both passes: those of the head and its
        norm, which stay, and the embedding's outside of FSDP, which its backward pass doesn't read.
        """
        if not isinstance(module, BaseModel):
            return set()
        ends = [end for end in (module.norm, module.output) if end is not None]
        found = {p for end in ends for p in end.parameters()}
        if module.tok_embeddings is not None:
            found |= {p for p in module.tok_embeddings.parameters() if p not in under_fsdp}
        return found


def _cast(module: nn.Module, name: str, dtype: torch.dtype) -> None:
    param = module.get_parameter(name)
    cast = nn.Parameter(param.detach().to(dtype), requires_grad=param.requires_grad)
    module.register_parameter(name, cast)


def _kind(layer: nn.Module) -> tuple:
    """Return what is equal for equal layers: their weights' sizes, which of them are trained, and
    how they are recomputed."""
    shapes = tuple((n, tuple(p.shape), p.requires_grad) for n, p in layer.named_parameters())
    return shapes, getattr(layer.forward, "__func__", layer.forward).__qualname__
