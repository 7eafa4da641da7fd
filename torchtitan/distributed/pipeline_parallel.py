"""Pipeline parallelism: stages of layers on the ranks of the `pp` axis, micro-batches through them.

torch's schedules (`torch.distributed.pipelining`) decide the order of the passes. A rank may hold
several stages. Its model stays one module with the layers of all of them under their usual names,
which initialisation, optimizer and checkpoints use; a *part* is the same module cut to one stage.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch._functorch.config
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    FULL_BACKWARD,
    OVERLAP_F_B,
    PipelineScheduleMulti,
    _Action,
    _PipelineContext,
    _PipelineScheduleRuntime,
    _wait_batch_p2p,
    get_schedule_class,
)

from torchtitan.distributed.overlap import interleave
from torchtitan.distributed.pipeline_plan import ENDS, PipelinePlan
from torchtitan.protocols.model import BaseModel
from torchtitan.tools.logging import logger

# (logits, labels) to the sum of the losses; a third argument has weights of the labels.
LossFn = Callable[..., Tensor]


def cut_into_parts(model: BaseModel, plan: PipelinePlan, pp_rank: int) -> list[BaseModel]:
    """Make one part for each stage of this rank, in order; `model` keeps their modules only.

    Parts share modules and buffers with `model`. Call it on the meta device, before the model is
    changed in any other way.
    """
    stages = plan.stages_of(pp_rank)
    parts = [_part(model, set(plan.stages[stage])) for stage in stages]
    mine = {name for stage in stages for name in plan.stages[stage]}
    kept = _part(model, mine)
    model._modules = kept._modules
    logger.info(
        "Pipeline parallel: %d stages over %d ranks, schedule %s, %d micro-batches; this rank: %s",
        len(plan.stages),
        plan.degree,
        plan.schedule,
        plan.num_microbatches,
        "; ".join(_listing(plan.stages[stage]) for stage in stages),
    )
    return parts


def _part(model: BaseModel, names: set[str]) -> BaseModel:
    part = copy.copy(model)
    for name, value in vars(model).items():  # hooks and modules of its own, the same buffers
        if isinstance(value, dict) and name != "_buffers":
            setattr(part, name, copy.copy(value))
    # Modules beside the main path (multi-token prediction) need the last hidden state: they stay
    # with the output.
    part._modules = {
        name: module if (name if name in ENDS else "output") in names else None
        for name, module in model._modules.items()
    }
    kept = {i: layer for i, layer in model.layers.items() if f"layers.{i}" in names}
    part._modules["layers"] = nn.ModuleDict(kept)
    return part


def _listing(names: Sequence[str]) -> str:
    layers = [int(name.removeprefix("layers.")) for name in names if name.startswith("layers.")]
    others = [name for name in names if not name.startswith("layers.")]
    span = [f"layers {layers[0]}-{layers[-1]}"] if layers else []
    return ", ".join(span + others)


class StepInputs(NamedTuple):
    """Inputs of one step.

    tokens, labels: (B, S) int64, this rank's.
    documents: (B, S) int64, the document of each token of whole sequences; −1 = padding.
    positions: (1, S) int64, None = 0, 1, ….
    token_mask: (B, S) bool, this rank's; False = padding.
    extra: from `BaseModel.extra_inputs`.
    weights: (B, S) fp32, of the labels; None = 1.
    """

    tokens: Tensor
    labels: Tensor
    documents: Tensor
    positions: Tensor | None
    token_mask: Tensor
    extra: dict[str, Any]
    weights: Tensor | None = None


class _Stage(PipelineStage):
    def _get_init_p2p_neighbors_ops(self) -> list[dist.P2POp]:
        # torch 2.11 lets neighbouring stages exchange a message before the first step. Where both
        # are on one rank (V-shaped schedules), gloo fails: "Pair is not connected". Such stages
        # hand over tensors without sending them, so they need no message; torch 2.13 sends none.
        ops = super()._get_init_p2p_neighbors_ops()
        return [op for op in ops if op.group_peer != self.group_rank]


class Pipeline:
    """This rank's stages and their schedule; `step` is a forward and backward pass of all ranks.

    A schedule is made for the shape (B, S) of the inputs at the first pass of that shape.

    parts: from `cut_into_parts`, after parallelisation.
    mesh: the pp axis.
    hidden: channels of a token between stages.
    vocab: entries of the logits on this rank.
    split: ranks that share the tokens of a sequence between stages.
    dtype: of tensors between stages.
    masks_of: makes attention masks from `StepInputs.documents`.
    overlap: interleave pairs of passes (overlap.py).
    """

    def __init__(
        self,
        parts: list[BaseModel],
        plan: PipelinePlan,
        *,
        mesh: DeviceMesh,
        device: torch.device,
        hidden: int,
        vocab: int,
        split: int,
        dtype: torch.dtype,
        loss_fn: LossFn,
        masks_of: Callable[[Tensor], Any],
        overlap: bool,
    ) -> None:
        last = len(plan.stages) - 1
        self._parts, self._plan, self._device = parts, plan, device
        self._own = own = plan.stages_of(mesh.get_local_rank())
        self._hidden, self._vocab, self._split, self._dtype = hidden, vocab, split, dtype
        self.has_first, self.has_last = 0 in own, last in own
        self._loss_fn = loss_fn
        self._masks_of = masks_of
        self._overlap = overlap
        self._divisor = torch.ones((), device=device)  # divides losses; set by each step
        self._group = mesh.get_group()
        self._schedules: dict[torch.Size, tuple[Any, bool]] = {}  # and whether it has trained
        for part in parts:
            part.register_forward_pre_hook(self._make_masks, with_kwargs=True)
        if plan.splits_backward:
            # Compiled layers would reuse memory in the first half that the second half reads.
            torch._functorch.config.donated_buffer = False

    def forget_schedules(self) -> None:
        """Free all schedules and the memory of their stages; for shapes that won't come again."""
        self._schedules.clear()

    def _schedule(self, shape: torch.Size, *, trains: bool) -> Any:
        schedule, has_trained = self._schedules.get(shape, (None, False))
        # The first use makes the stages' buffers: torch 2.11 has none for gradients where that
        # was an evaluation.
        if schedule is None or (trains and not has_trained):
            n = shape[0] // self._plan.microbatch_size
            stages = self._make_stages(tokens=shape[1])
            schedule = _make_schedule(stages, self._plan, n, self._loss)
            if self._overlap and isinstance(schedule, _PipelineScheduleRuntime):
                schedule.register_custom_function(OVERLAP_F_B, _overlap)
            self._schedules[shape] = schedule, trains
        return schedule

    def _make_stages(self, tokens: int) -> list[PipelineStage]:
        # Without example tensors, torch would find the shapes by running the parts, and experts
        # would count tokens and send them.
        B, last, dtype = self._plan.microbatch_size, len(self._plan.stages) - 1, self._dtype
        hidden, logits = (tokens // self._split, self._hidden), (tokens, self._vocab)
        at_first = torch.empty(B, tokens, dtype=torch.int64, device="meta")
        between = torch.empty(B, *hidden, dtype=dtype, device="meta", requires_grad=True)
        at_last = torch.empty(B, *logits, dtype=dtype, device="meta", requires_grad=True)
        return [
            _Stage(
                part,
                index,
                last + 1,
                self._device,
                input_args=at_first if index == 0 else between,
                output_args=at_last if index == last else between,
                group=self._group,
            )
            for part, index in zip(self._parts, self._own, strict=True)
        ]

    def _loss(self, logits: Tensor, target: Tensor) -> Tensor:
        if not target.is_floating_point():
            return self._loss_fn(logits, target) / self._divisor
        labels, weights = target[..., 0].long(), target[..., 1].float()
        return self._loss_fn(logits, labels, weights) / self._divisor

    def _make_masks(self, part: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        # A mask is made per micro-batch, where it is used: torch splits the arguments of stages
        # along the batch dim, which a mask need not have.
        return args, kwargs | {"attention_masks": self._masks_of(kwargs.pop("documents"))}

    def step(self, inputs: StepInputs, divisor: Tensor) -> Tensor:
        """Run forward and backward passes, which add to the gradients.

        Returns this rank's part of the step's loss, a scalar; 0 without the last stage.

        divisor: scalar, of the losses.
        """
        self._divisor = divisor
        return self._run(self._schedule(inputs.tokens.shape, trains=True).step, inputs)

    def evaluate(self, inputs: StepInputs) -> Tensor:
        """Sum this rank's losses, without gradients: a scalar; 0 without the last stage."""
        self._divisor = torch.ones((), device=inputs.labels.device)
        schedule = self._schedule(inputs.tokens.shape, trains=False)
        with _forward_only(schedule):
            return self._run(schedule.eval, inputs)

    def _run(self, run: Callable[..., Any], inputs: StepInputs) -> Tensor:
        kwargs: dict[str, Any] = {"token_mask": inputs.token_mask, "documents": inputs.documents}
        kwargs |= inputs.extra
        if inputs.positions is not None:
            kwargs["positions"] = inputs.positions.expand_as(inputs.tokens).contiguous()
        args = (inputs.tokens,) if self.has_first else ()
        kwargs["return_outputs"] = False  # the logits of all micro-batches
        if not self.has_last:
            run(*args, **kwargs)
            return torch.zeros((), device=inputs.labels.device)
        losses: list[Tensor] = []
        target = inputs.labels
        if inputs.weights is not None:  # torch's schedules split one tensor; fp64 holds any label
            target = torch.stack((target.double(), inputs.weights.double()), dim=-1)
        run(*args, target=target, losses=losses, **kwargs)
        return torch.stack(losses).sum().detach()

    def gather(self, by_layer: tuple[dict[int, Any], ...]) -> tuple[dict[int, Any], ...]:
        """Merge the stages' dictionaries, in the order of the layers; every rank must call this.

        by_layer: dictionaries from layer number to tensor or None, one for each kind of value.
        """
        of_stages: list[Any] = [None] * self._group.size()
        on_cpu = tuple(
            {i: None if t is None else t.cpu() for i, t in layers.items()} for layers in by_layer
        )
        dist.all_gather_object(of_stages, on_cpu, group=self._group)
        merged = []
        for parts in zip(*of_stages, strict=True):
            layers = {i: tensor for part in parts for i, tensor in part.items()}
            merged.append(dict(sorted(layers.items())))
        return tuple(merged)


@contextmanager
def _forward_only(schedule: Any) -> Iterator[None]:
    """Remove the actions of backward passes from a schedule for a while.

    torch's `eval` keeps them where a rank may have several stages, and fails where two of them are
    neighbours (2.11, 2.13).
    """
    order = getattr(schedule, "pipeline_order_with_comms", None)
    if order is None:
        yield
        return
    kept = ("F", "SEND_F", "RECV_F", "UNSHARD", "RESHARD")
    schedule.pipeline_order_with_comms = {
        rank: [
            one
            for action in actions
            for one in action.sub_actions or (action,)
            if one.computation_type.value in kept
        ]
        for rank, actions in order.items()
    }
    try:
        yield
    finally:
        schedule.pipeline_order_with_comms = order


def _make_schedule(
    stages: list[PipelineStage],
    plan: PipelinePlan,
    num_microbatches: int,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
) -> Any:
    # No scale_grads: the loss is already divided by the tokens of the step.
    options = {
        "n_microbatches": num_microbatches,
        "loss_fn": loss_fn,
        "scale_grads": False,
    }
    if plan.file is not None:
        schedule = _PipelineScheduleRuntime(stages, **options)
        schedule.pipeline_order = {
            rank: [_Action.from_str(cell) for cell in cells]
            for rank, cells in enumerate(plan.file.cells)
        }
        schedule._prepare_schedule_with_comms(schedule.pipeline_order)
        return schedule
    cls = get_schedule_class(plan.schedule)
    return cls(stages if issubclass(cls, PipelineScheduleMulti) else stages[0], **options)


def _overlap(action: Any, ctx: _PipelineContext) -> None:
    """Interleave the forward pass of a micro-batch through one stage with the backward pass of
    another micro-batch through another stage."""
    forward, backward = action.sub_actions
    run = partial(_run_forward, forward, ctx), partial(_run_backward, backward, ctx)
    if forward.stage_index == backward.stage_index:  # FSDP allows one pass of a module at a time
        run[0]()
        run[1]()
    else:
        interleave(*run)


# Untyped arguments: torch declares these attributes as optional, or not at all, although each one
# is set whenever a pass runs.
def _run_forward(action: Any, context: Any) -> None:
    """Run a forward pass as torch's schedules do inside of a private method."""
    schedule, microbatch = context.schedule_ref, action.microbatch_index
    stages = {stage.stage_index: stage for stage in schedule._stages}
    stage = stages[action.stage_index]
    schedule._assert_unsharded(stage)
    if not stage.is_first and stage.stage_index - 1 not in stages:
        _wait_batch_p2p(schedule.fwd_recv_ops.pop((stage.stage_index, microbatch)))
    args, kwargs = context.arg_mbs[microbatch], context.kwarg_mbs[microbatch]
    output = stage.forward_one_chunk(microbatch, args, kwargs, save_forward_output=False)
    schedule._maybe_compute_loss(stage, output, context.target_mbs, microbatch)
    if following := stages.get(stage.stage_index + 1):
        following.set_local_fwd_input(output, microbatch)


def _run_backward(action: Any, context: Any) -> None:
    """Run a backward pass as torch's schedules do inside of a private method."""
    schedule, microbatch = context.schedule_ref, action.microbatch_index
    stages = {stage.stage_index: stage for stage in schedule._stages}
    stage = stages[action.stage_index]
    schedule._assert_unsharded(stage)
    if not stage.is_last and stage.stage_index + 1 not in stages:
        _wait_batch_p2p(schedule.bwd_recv_ops.pop((stage.stage_index, microbatch)))
    whole = action.computation_type == FULL_BACKWARD
    schedule.backward_counter[stage.stage_index] += whole
    is_last = schedule.backward_counter[stage.stage_index] == schedule._n_microbatches
    stage.backward_one_chunk(
        microbatch,
        loss=schedule._maybe_get_loss(stage, microbatch),
        full_backward=whole,
        last_backward=whole and is_last,
    )
    if preceding := stages.get(stage.stage_index - 1):
        preceding.set_local_bwd_input(stage.get_local_bwd_output(microbatch), microbatch)
