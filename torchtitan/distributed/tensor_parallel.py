"""Tensor and sequence parallelism: matrices split over a TP group, and between them the sequence.

Between layers each rank holds 1/tp of every sequence, (B, S/tp, D). Norms and small matrices are
replicated and work on that part. Before a matrix whose outputs are split ("column") the parts are
gathered; after one whose inputs are split ("row") the partial sums are reduce-scattered:
Megatron's sequence parallelism (arXiv 2205.05198), which sends no more than its tensor parallelism
and keeps no activation twice.

Weights are DTensors on the tp axis, so FSDP, checkpoints and the gradient norm know which part each
rank holds. In a forward pass a module reads the plain tensor of its rank, and the collectives are
written out. A replicated weight gets its gradient from this rank's tokens (or heads) only, so the
gradient is marked as a partial sum, which FSDP adds up over the group when it takes it. Of a
low-rank adapter, the factor that has the split dim of its weight is split, the other replicated.
"""

from functools import cache
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as fc
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
)

from torchtitan.ops.fp8.linear import why_not_linear
from torchtitan.ops.grouped_mm import local_part
from torchtitan.ops.linear import Linear
from torchtitan.ops.lora import has_dim
from torchtitan.tools.logging import logger
from torchtitan.tools.names import listed


class TensorParallel:
    """Styles in which modules are spread over the one-dimensional `mesh`, in place.

    Every module that has weights of its own gets exactly one of `replicate`, `column`, `row`,
    `embedding` and `output`; `gather_input` and `scatter_output` may be added to these.
    """

    def __init__(self, mesh: DeviceMesh):
        self.mesh = mesh
        self.group = mesh.get_group()
        self.degree, self.rank = mesh.size(), mesh.get_local_rank()

    def overlap_communication(self) -> None:
        """Let the compiler cut a collective next to a matrix product into pieces that overlap with
        pieces of the product, through symmetric memory ("asynchronous TP").
        """
        import torch._inductor.config
        from torch.distributed._symmetric_memory import enable_symm_mem_for_group

        torch._inductor.config._micro_pipeline_tp = True
        enable_symm_mem_for_group(self.group.group_name)

    def replicate(self, *modules: nn.Module) -> None:
        for module in modules:
            self._place(module, Replicate())

    def column(self, *modules: nn.Linear) -> None:
        """Split the outputs: x (…, in), whole, to (…, out/tp)."""
        for module in modules:
            self._place(module, Shard(0))

    def row(self, *modules: nn.Linear) -> None:
        """Split the inputs: x (…, in/tp) to partial sums (…, out)."""
        for module in modules:
            self._place(module, Shard(1))

    def gather_input(self, *modules: nn.Module) -> None:
        """Gather the first argument (…, S/tp, D) over the sequence."""
        for module in modules:
            module.register_forward_pre_hook(
                lambda _, args: (gather(args[0], -2, self.group), *args[1:])
            )

    def gather_output(self, *modules: nn.Module) -> None:
        """Gather the output of a module that works on its part of the sequence."""

        def gathered(_: nn.Module, args: Any, out: Tensor) -> Tensor:
            return gather(out, -2, self.group)

        for module in modules:
            module.register_forward_hook(gathered)

    def scatter_output(self, *modules: nn.Module) -> None:
        """Sum the partial sums (…, S, D); each rank keeps its part of the sequence."""

        def scattered(_: nn.Module, args: Any, out: Tensor) -> Tensor:
            return reduce_scatter(out, -2, self.group)

        for module in modules:
            module.register_forward_hook(scattered)

    def split_mask(self, *modules: nn.Module) -> None:
        """Cut the second argument, a mask (B, S) or None, to this rank's part of the sequence.

        A mask has no gradient, so nothing is communicated.
        """

        def cut(_, args: tuple) -> tuple:
            x, mask, *rest = args
            return x, None if mask is None else mask.chunk(self.degree, dim=1)[self.rank], *rest

        for module in modules:
            module.register_forward_pre_hook(cut)

    def embedding(self, module: nn.Embedding) -> None:
        """Split the rows of the table: tokens (B, S) to (B, S/tp, D)."""
        self._place(module, Shard(0))
        first = self.rank * (module.num_embeddings // self.degree)

        def look_up(input: Tensor) -> Tensor:  # torch's name for tokens (B, S)
            ids_BS, is_local_BS = _local_ids(input, first, module.weight.size(0))
            x_BSD = F.embedding(ids_BS, module.weight).masked_fill(~is_local_BS.unsqueeze(-1), 0)
            return reduce_scatter(x_BSD, -2, self.group)

        module.forward = look_up

    def output(self, module: nn.Linear, *, whole_logits: bool) -> None:
        """Split the rows: (B, S/tp, D) to logits (B, S, V/tp), or gathered to (B, S, V)."""

        def only_logits(_, args: tuple) -> None:
            assert all(arg is None for arg in args[1:]), "build_loss computes split logits' loss"

        module.register_forward_pre_hook(only_logits)
        self.gather_input(module)
        self.column(module)
        if whole_logits:
            module.register_forward_hook(lambda _, args, out: _GatherCopies.apply(out, self.group))

    def _place(self, module: nn.Module, placement: Placement) -> None:
        for name, param in list(module.named_parameters(recurse=False)):
            split = placement.dim if isinstance(placement, Shard) else None
            whole = split is not None and not has_dim(name, split, param.ndim)
            own = Replicate() if whole else placement
            # Meta tensors: nothing to send; each rank fills its own part later.
            local = distribute_tensor(param.data, self.mesh, [own], src_data_rank=None)
            module.register_parameter(name, nn.Parameter(local, param.requires_grad))
        module.__class__ = _with_local_weights(module.__class__)


def keep_odd_parts_out_of_fp8(model: nn.Module) -> None:
    """Let a layer compute without FP8 where its part of the weight has sizes that FP8 can't take;
    log one line for each reason."""
    kept: dict[str, list[str]] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, Linear) and layer.fp8 is not None:
            params = dict(layer.named_parameters(recurse=False))  # layer.weight may be plain
            outputs, inputs = local_part(params["weight"]).shape
            if (reason := why_not_linear(inputs, outputs)) is not None:
                layer.fp8 = None
                kept.setdefault(reason, []).append(name)
    for reason, names in kept.items():
        logger.info("Not in FP8 (split over ranks of TP, %s): %s", reason, listed(names))


@cache
def _with_local_weights(cls: type[nn.Module]) -> type[nn.Module]:
    return type(cls.__name__, (_LocalWeights, cls), {"__module__": cls.__module__})


class _LocalWeights(nn.Module):
    """Mixin: reading a weight in a forward pass gives the plain tensor that this rank holds."""

    def __getattr__(self, name: str):
        value = super().__getattr__(name)
        # While FSDP holds a weight sharded, its mesh has FSDP's axes too, and only FSDP reads it.
        if isinstance(value, DTensor) and value.device_mesh.ndim == 1:
            replicated = value.placements[0].is_replicate()
            return value.to_local(grad_placements=[Partial()] if replicated else None)
        return value


# ---------------------------------------------------------------------------------------------
# Collectives with gradients
# ---------------------------------------------------------------------------------------------


def gather(x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    """All-gather the ranks' parts along `dim`. Backward: reduce-scatter, which sums the gradients
    of all ranks' uses."""
    return _Gather.apply(x, dim % x.ndim, group)


def reduce_scatter(x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    """Sum over the ranks; each keeps its part along `dim`. Backward: all-gather."""
    return _ReduceScatter.apply(x, dim % x.ndim, group)


def _gather(x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    return fc.wait_tensor(fc.all_gather_tensor(x.contiguous(), dim, group))


def _reduce_scatter(x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    return fc.wait_tensor(fc.reduce_scatter_tensor(x.contiguous(), "sum", dim, group))


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dim, group):
        ctx.dim, ctx.group = dim, group
        return _gather(x, dim, group)

    @staticmethod
    def backward(ctx, grad):
        return _reduce_scatter(grad, ctx.dim, ctx.group), None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dim, group):
        ctx.dim, ctx.group = dim, group
        return _reduce_scatter(x, dim, group)

    @staticmethod
    def backward(ctx, grad):
        return _gather(grad, ctx.dim, ctx.group), None, None


class _GatherCopies(torch.autograd.Function):
    """All-gather over the last dim for a computation that every rank repeats.

    Backward needs no communication: each rank has the whole gradient and takes its part.
    """

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return _gather(x, x.ndim - 1, group)

    @staticmethod
    def backward(ctx, grad):
        return grad.chunk(ctx.group.size(), dim=-1)[ctx.group.rank()], None


# ---------------------------------------------------------------------------------------------
# Loss on split logits
# ---------------------------------------------------------------------------------------------


def vocab_parallel_cross_entropy_sum(
    logits: Tensor,
    labels: Tensor,
    weights: Tensor | None = None,
    *,
    group: dist.ProcessGroup,
    ignore_index: int,
) -> Tensor:
    """Sum of −log p(label), from logits split over the vocabulary: a scalar, equal on all ranks.

    Communicates two numbers a token and its maximum, in at least fp32.

    logits: (…, V/tp), this rank's part of the vocabulary.
    labels: (…), int64; those equal to `ignore_index` don't count.
    weights: (…), fp32, of the labels; None = 1.
    """
    counts = labels != ignore_index
    weights = counts if weights is None else weights * counts
    return _CrossEntropy.apply(logits.flatten(0, -2), labels.flatten(), weights.flatten(), group)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_TV, labels_T, weights_T, group):
        x_TV = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))
        size = logits_TV.size(1)
        ids_T, is_local_T = _local_ids(labels_T, group.rank() * size, size)
        top_T = fc.wait_tensor(fc.all_reduce(x_TV.amax(dim=1), "max", group))
        sum_T = (x_TV - top_T.unsqueeze(1)).exp().sum(dim=1)
        chosen_T = x_TV.gather(1, ids_T.unsqueeze(1)).squeeze(1).masked_fill(~is_local_T, 0)
        both = torch.stack((sum_T, chosen_T))
        sum_T, chosen_T = fc.wait_tensor(fc.all_reduce(both, "sum", group)).unbind()
        log_sum_T = sum_T.log() + top_T
        ctx.save_for_backward(logits_TV, log_sum_T, ids_T, is_local_T, weights_T)
        return (log_sum_T - chosen_T).mul(weights_T).sum()

    @staticmethod
    def backward(ctx, grad):
        logits_TV, log_sum_T, ids_T, is_local_T, weights_T = ctx.saved_tensors
        grad_TV = (logits_TV.to(log_sum_T.dtype) - log_sum_T.unsqueeze(1)).exp_()
        grad_TV.scatter_add_(1, ids_T.unsqueeze(1), -is_local_T.to(grad_TV.dtype).unsqueeze(1))
        grad_TV *= (grad * weights_T).unsqueeze(1)
        return grad_TV.to(logits_TV.dtype), None, None, None


def _local_ids(ids: Tensor, first: int, size: int) -> tuple[Tensor, Tensor]:
    """Ids counted from this rank's first one (0 for ids of other ranks), and which are its own."""
    ids = ids - first
    is_local = (ids >= 0) & (ids < size)
    return ids.masked_fill(~is_local, 0), is_local
