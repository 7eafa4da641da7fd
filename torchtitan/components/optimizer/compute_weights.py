"""Copies of the weights in the compute dtype, made once a step from the master weights.

The parameters of the model don't change: they are kept in fp32, named, saved, loaded, updated by
the optimizer. Each has a bf16 copy, with which the module computes: the copy is in the module's
`__dict__`, where Python looks before it asks nn.Module for the parameter of that name. Without
copies, every forward pass of every micro-batch would cast all weights again.

Of a weight that only FP8's products read the copy is in FP8 (ops/fp8/weight.py), quantised from the
master weight when the optimizer writes it. Where the parameter has the compute dtype itself there
is no copy, and each pass quantises it.

A frozen parameter has a copy, too, where its dtype differs (training.dtype = "bfloat16" saves it),
but no gradient.

Where a module declares a `Joint` of weights (ops/linear.py), their copies are one tensor, so that
one GEMM serves all of them. Parameters that have the compute dtype become views of that tensor.

Used with one process, and for weights that FSDP leaves alone (they are DTensors, of which this
rank's part is copied). Where several ranks share them, copies are gathered from these ranks, and
gradients summed (distributed/gathered_weight.py). Of all other weights FSDP keeps fp32 shards and
gathers them in bf16, with the same result.
"""

import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from torchtitan.distributed.gathered_weight import (
    GatheredWeight,
    GradientSum,
    Sharing,
)
from torchtitan.ops.fp8.linear import Fp8Recipe
from torchtitan.ops.fp8.quantize import BLOCK
from torchtitan.ops.fp8.weight import quantised
from torchtitan.ops.grouped_mm import local_part
from torchtitan.ops.linear import fp8_weights, joints

# Gradients of a layer's experts, of gate and up and of down, are summed over ranks while the layer
# before it computes.
_SUMS_AT_A_TIME = 2


@dataclass
class _Fused:
    """A tensor that the model computes with, and the parameters it consists of.

    params: in order.
    dim: along which they are concatenated.
    sharing: how ranks share them.
    gathered: the weight gathered from several ranks whose `whole` is `tensor`; None = no such one.
    """

    tensor: Tensor
    params: list[nn.Parameter]
    dim: int
    sharing: Sharing
    gathered: GatheredWeight | None = None

    def parts(self, tensor: Tensor) -> tuple[Tensor, ...]:
        if len(self.params) == 1:
            return (tensor,)
        return tensor.split([local_part(p).size(self.dim) for p in self.params], self.dim)


class _Summed(NamedTuple):
    """A gradient whose sum over ranks is on its way.

    begun: number of modules whose backward pass had begun by then.
    """

    fused: _Fused
    travelling: GradientSum
    begun: int


class ComputeWeights:
    """Gives every parameter of `modules` a copy in `dtype`. Make it last, after weights are filled.

    root: module whose forward pass refreshes the copies.
    grad_dtype: see `Sharing`; of the modules that aren't in `sharing`.
    sharing: how ranks share weights, by module; without those that no other rank has.

    sums_replicas: set it while a pass is the last of a step: gradients are summed over replicas.
    """

    def __init__(
        self,
        modules: Iterable[nn.Module],
        dtype: torch.dtype,
        *,
        root: nn.Module,
        grad_dtype: torch.dtype | None,
        sharing: Mapping[nn.Module, Sharing] | None = None,
    ):
        self._sums: deque[_Summed] = deque()
        self._begun = 0
        self.sums_replicas = True
        self._replica_sums: list[tuple[Tensor, Tensor]] = []  # a gradient, and what is summed
        self.after_grad: Callable[[nn.Parameter], None] | None = None
        self._fused: list[_Fused] = []
        self._copy_of: dict[nn.Parameter, Tensor] = {}
        self._gathered_of: dict[nn.Parameter, GatheredWeight | None] = {}
        self._seen_version: dict[nn.Parameter, int] = {}
        modules = list(modules)
        self._fp8_of: dict[nn.Parameter, Fp8Recipe] = {
            param: cast(Any, module).fp8
            for module in modules
            for param in map(module.get_parameter, fp8_weights(module))
            # A GPU that emulates may have no FP8 to write: there each pass quantises.
            if param.dtype != dtype and not (param.is_cuda and cast(Any, module).fp8.emulate)
        }
        alone, sharing = Sharing(grad_dtype=grad_dtype), sharing or {}
        for module in modules:
            for joint in joints(module):
                params = [module.get_parameter(name) for name in joint.names]
                if self._can_join(params, joint.dim):
                    how = sharing.get(module, alone)
                    joint.tensor = self._add(params, joint.dim, dtype, how)
        for module in modules:
            for name, param in module.named_parameters(recurse=False):
                self._add_single(module, name, param, dtype, sharing.get(module, alone))
        root.register_forward_pre_hook(lambda *_: self._begin())

    def _begin(self) -> None:
        """Prepare a forward pass."""
        # What a pass that raised has left: the next one would take it for its own.
        self._sums.clear()
        self._replica_sums.clear()
        for weight in self._gathered():
            weight.wait()
        self.refresh()

    def _can_join(self, params: list[nn.Parameter], dim: int) -> bool:
        """Tell whether the copies are all in FP8, in blocks of their own, or none is."""
        in_fp8 = [p in self._fp8_of for p in params]
        fits = not any(local_part(p).size(dim) % BLOCK for p in params[:-1])
        return not any(in_fp8) or (all(in_fp8) and fits)

    def _copied(self, param: nn.Parameter, dtype: torch.dtype) -> Tensor:
        """Return a fresh copy of a parameter's local part."""
        local, recipe = local_part(param.detach()), self._fp8_of.get(param)
        if recipe is None:
            return local.to(dtype)
        return quantised(local, dtype, emulate=recipe.emulate)

    def _add(
        self, params: list[nn.Parameter], dim: int, dtype: torch.dtype, sharing: Sharing
    ) -> Tensor:
        copies = [self._copied(p, dtype) for p in params]
        tensor = local = torch.cat(copies, dim) if len(copies) > 1 else copies[0]
        gathered = None
        if sharing.shards is not None:
            gathered = GatheredWeight(local, sharing)
            tensor, local = gathered.whole, gathered.part
        trained = any(p.requires_grad for p in params)
        fused = _Fused(tensor.requires_grad_(trained), params, dim, sharing, gathered)
        for p, part in zip(params, fused.parts(local.detach()), strict=True):
            if p.dtype == dtype:
                p.data = part  # the parameter itself is the copy
            self._copy_of[p] = part
            self._seen_version[p] = _version(p)
            self._gathered_of[p] = gathered
            if p.requires_grad:
                p.grad_dtype = sharing.grad_dtype or p.dtype
        if trained:
            tensor.register_post_accumulate_grad_hook(self._hook(len(self._fused)))
        self._fused.append(fused)
        return tensor

    def _add_single(
        self,
        module: nn.Module,
        name: str,
        param: nn.Parameter,
        dtype: torch.dtype,
        sharing: Sharing,
    ) -> None:
        if param in self._copy_of:
            return
        if param.dtype != dtype:
            module.__dict__[name] = self._add([param], 0, dtype, sharing)
            return
        if not param.requires_grad:
            return
        param.grad_dtype = sharing.grad_dtype or param.dtype
        param.register_post_accumulate_grad_hook(self._hook(None))

    def _hook(self, index: int | None) -> Callable[[Tensor], None]:
        # Weak: Python's collector can't see through a tensor's hooks, so a cycle through them would
        # keep all weights for ever. The object lives as long as the model, whose forward hook
        # holds it.
        me = weakref.ref(self)
        if index is None:
            return lambda param: cast(Any, me())._call_after_grad(param)
        return lambda _: cast(Any, me())._hand_over(index)

    def _hand_over(self, index: int) -> None:
        """Pass on a fresh gradient; of one that is to be summed over ranks, start the sum."""
        fused = self._fused[index]
        grad = cast(Tensor, fused.tensor.grad)  # set just before this hook
        fused.tensor.grad = None
        sums_replicas = fused.sharing.replicas is not None and self.sums_replicas
        if not self._sums and not self._replica_sums and (fused.gathered or sums_replicas):
            torch.autograd.Variable._execution_engine.queue_callback(self._finish)
        if fused.gathered is None:
            self._distribute(fused, grad)
            return
        fused.gathered.free()
        self._sums.append(_Summed(fused, fused.gathered.start_sum(grad), self._begun))
        self._finish_sums(but=_SUMS_AT_A_TIME)

    def _finish(self) -> None:
        """Wait for all sums over ranks, at the end of a backward pass."""
        self._finish_sums()
        for grad, travelling in self._replica_sums:
            torch.ops._c10d_functional.wait_tensor(travelling)
            if travelling is not grad:
                grad.copy_(travelling)
        self._replica_sums.clear()

    def _finish_sums(self, but: int = 0) -> None:
        """Wait for sums over shards and distribute them, except the latest ones.

        but: how many may go on.
        """
        while len(self._sums) > but:
            one = self._sums.popleft()
            self._distribute(one.fused, one.travelling.wait())

    def begin_backward(self) -> None:
        """Finish sums that have had a whole module's backward pass to travel.

        Without it the head's gradient would stay until the end in a dense model, where no sums of
        experts follow.
        """
        self._begun += 1
        old = sum(one.begun < self._begun - 1 for one in self._sums)
        self._finish_sums(but=len(self._sums) - old)

    def _distribute(self, fused: _Fused, grad: Tensor) -> None:
        """Give a gradient to the parameters that it belongs to."""
        sharing = fused.sharing
        for p, part in zip(fused.params, fused.parts(grad), strict=True):
            if not p.requires_grad:
                continue
            if sharing.replicas is not None:
                part = part.contiguous()  # to be sent
            if p.grad is None:
                p.grad = _placed_as(p, part.to(sharing.grad_dtype or p.dtype))
            else:
                local_part(p.grad).add_(part)
            if self.sums_replicas:
                self._start_replica_sum(local_part(p.grad), sharing)
            self._call_after_grad(p)

    def sum_over_replicas(self) -> None:
        """Sum the gradients that passes have left as they were."""
        for fused in self._fused:
            for p in fused.params:
                if p.grad is not None:
                    self._start_replica_sum(local_part(p.grad), fused.sharing)
        self._finish()

    def _start_replica_sum(self, grad: Tensor, sharing: Sharing) -> None:
        if sharing.replicas is None:
            return
        travelling = grad.to(sharing.reduce_dtype)
        torch.ops._c10d_functional.all_reduce_(travelling, "sum", sharing.replicas.group_name)
        self._replica_sums.append((grad, travelling))

    def _call_after_grad(self, param: nn.Parameter) -> None:
        if self.after_grad is not None:
            self.after_grad(param)

    def copy_of(self, param: nn.Parameter) -> Tensor | None:
        """The copy to which an optimizer should write the new weight as well; None = none."""
        copy = self._copy_of.get(param)
        is_copy = copy is not None and copy.dtype != param.dtype
        return copy if is_copy else None

    def written(self, param: nn.Parameter) -> None:
        """Mark the copy of a parameter, if it has one, as up to date on this rank."""
        if param in self._copy_of:
            self._seen_version[param] = _version(param)
            if (gathered := self._gathered_of[param]) is not None:
                gathered.outdate()

    def outdate(self) -> None:
        """Mark every copy as stale: some torch optimizers update DTensors without bumping
        `_version`. The next `refresh` writes them."""
        self._seen_version = dict.fromkeys(self._copy_of, -1)

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy weights that have changed: by loading, or by an optimizer that writes no copies."""
        for param, seen in self._seen_version.items():
            if _version(param) == seen:
                continue
            copy = self.copy_of(param)
            if copy is not None:
                copy.copy_(local_part(param))
            self.written(param)

    def gathered_in(self, module: nn.Module) -> list[GatheredWeight]:
        """List the copies in a module of which each rank writes a part."""
        found = [self._gathered_of.get(param) for param in module.parameters()]
        return list(dict.fromkeys(each for each in found if each is not None))

    def gather(self) -> None:
        """Gather the outdated copies that stay whole over several passes, and wait for them."""
        self.refresh()
        weights = [weight for weight in self._gathered() if not weight.is_freed]
        for weight in weights:
            weight.start()
        for weight in weights:
            weight.wait()

    def gather_in_pass(self) -> None:
        """Outdate all copies, so that the next forward pass gathers them."""
        self.refresh()
        for weight in self._gathered():
            weight.outdate()

    def _gathered(self) -> list[GatheredWeight]:
        return [fused.gathered for fused in self._fused if fused.gathered is not None]


def _version(param: Tensor) -> int:
    """Version number that grows with in-place changes, also of a DTensor's local part alone."""
    local = param._local_tensor._version if isinstance(param, DTensor) else 0
    return param._version + local


def _placed_as(param: Tensor, local: Tensor) -> Tensor:
    if not isinstance(param, DTensor):
        return local
    return DTensor.from_local(
        local,
        param.device_mesh,
        param.placements,
        run_check=False,
        shape=param.shape,
        stride=param.stride(),
    )
