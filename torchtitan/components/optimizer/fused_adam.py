"""Adam and AdamW in one pass over weights, gradients, states and copies in the compute dtype.

torch's fused kernels need weights, gradients and states of one dtype. Here gradients may be bf16
with fp32 weights, the clipping factor is applied in the same pass, and the new weight is also
written to its copy in the compute dtype. Of DTensors each rank updates its own part. Parameter
groups and states are those of torch's AdamW, so checkpoints of both are the same.
"""

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from torchtitan.components.optimizer.compute_weights import ComputeWeights
from torchtitan.distributed.grad_norm import clip_factor
from torchtitan.ops.adamw import adamw_update, step_numbers
from torchtitan.ops.grouped_mm import local_part


class FusedAdam(AdamW):
    """Adam or AdamW.

    decoupled: AdamW's weight decay, otherwise Adam's.
    compute_weights: copies to write new weights to, or None.
    early_step: update each parameter, and free its gradient, as soon as the backward pass has
        computed the gradient; `step` then has nothing to do.

    grad_factor: scalar tensor that `step` multiplies gradients by; None = 1.
    as_graph: set it while gradients and grad_factor keep their memory: `step` then replays its
        kernels as a CUDA graph.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        *,
        decoupled: bool,
        compute_weights: ComputeWeights | None = None,
        early_step: bool = False,
        **settings: Any,
    ):
        super().__init__(params, fused=False, foreach=False, **settings)
        self.grad_factor: Tensor | None = None
        self.early_step = early_step
        self.as_graph = False
        self._decoupled = decoupled
        self._compute_weights = compute_weights
        self._early_norms: list[Tensor] = []
        self._graph: torch.cuda.CUDAGraph | None = None
        self._recorded: list[nn.Parameter] = []
        # Groups by index, because loading a state dict makes new ones.
        self._group_of = {p: i for i, g in enumerate(self.param_groups) for p in g["params"]}
        # Numbers that change from step to step (`step_numbers`): a row for each parameter.
        self._row_of = {p: i for i, p in enumerate(self._group_of)}
        self._numbers: Tensor | None = None
        self._prepared = False
        # Made now: torch's state dict functions would otherwise create the state by a step on
        # gradients of another dtype.
        for p in self._group_of:
            self.state[p]["step"] = torch.tensor(0.0)
            for name in ("exp_avg", "exp_avg_sq"):
                self.state[p][name] = torch.zeros_like(p, memory_format=torch.contiguous_format)
        if early_step and compute_weights is not None:
            compute_weights.after_grad = self._step_early

    def prepare(self) -> None:
        """Copy the next step's numbers to the GPU early, so that `step` only launches; optional.

        Call it right before `step`: learning rates must not change between. If that step is not
        taken, call it again before the next one.
        """
        if self._group_of and not self.early_step:
            self._send_numbers()
            self._prepared = True

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        prepared, self._prepared = self._prepared, False
        if not self.as_graph:
            self._graph, self._recorded = None, []
        params = self._recorded or [p for p in self._group_of if p.grad is not None]
        if not params:
            return
        if not prepared:
            self._send_numbers()
        if self.as_graph:
            self._replay(params)
        else:
            self._update_all(params)
        torch._foreach_add_([self.state[p]["step"] for p in params], 1)

    def _replay(self, params: list[nn.Parameter]) -> None:
        if self._graph is None:
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._update_all(params)
            self._recorded = params
        self._graph.replay()
        if self._compute_weights is not None:
            for p in params:
                self._compute_weights.written(p)

    def clip(self, parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
        """Let `step` scale the gradients as it reads them.

        Returns their norm before clipping, over all ranks: a scalar tensor. With early_step it is
        the norm of the gradients since the last call, which are freed already.
        """
        if self.early_step:
            norm = torch.linalg.vector_norm(torch.stack(self._early_norms))
            self._early_norms.clear()
            return norm
        norm, factor = clip_factor(parameters, max_norm)
        if self.grad_factor is None:
            self.grad_factor = torch.empty_like(factor)
        self.grad_factor.copy_(factor)  # a recorded `step` reads this memory
        return norm

    @torch.no_grad()
    def _step_early(self, param: nn.Parameter) -> None:
        grad = cast(Tensor, param.grad)  # set just before this hook
        self._early_norms.append(torch.linalg.vector_norm(grad, dtype=torch.float32))
        numbers = self._static_numbers(param.device)[self._row_of[param]]
        numbers.copy_(self._numbers_of([param])[0], non_blocking=True)
        self._update(param, grad)
        self.state[param]["step"] += 1
        param.grad = None

    def _static_numbers(self, device: torch.device) -> Tensor:
        if self._numbers is None:
            self._numbers = torch.zeros(len(self._row_of), 4, device=device)
        return self._numbers

    def _send_numbers(self) -> None:
        """Copy the `step_numbers` of all parameters' next step to the device."""
        rows = torch.stack(self._numbers_of(list(self._group_of)))
        device = next(iter(self._group_of)).device
        self._static_numbers(device).copy_(rows, non_blocking=True)

    def _numbers_of(self, params: list[nn.Parameter]) -> list[Tensor]:
        """Return the `step_numbers` of these parameters' next step.

        They are made once for all parameters of a group that have taken as many steps.
        """
        made: dict[tuple[int, int], Tensor] = {}
        keys = [(self._group_of[p], int(self.state[p]["step"]) + 1) for p in params]
        for index, step in set(keys):
            group = self.param_groups[index]
            decay = group["weight_decay"] if self._decoupled else 0.0
            made[index, step] = step_numbers(step, group["lr"], group["betas"], decay)
        return [made[key] for key in keys]

    def _update_all(self, params: list[nn.Parameter]) -> None:
        for p in params:
            if p.grad is not None:
                self._update(p, p.grad)

    def _update(self, param: nn.Parameter, grad: Tensor) -> None:
        state, group = self.state[param], self.param_groups[self._group_of[param]]
        weights = self._compute_weights
        adamw_update(
            local_part(param),
            local_part(grad),
            local_part(state["exp_avg"]),
            local_part(state["exp_avg_sq"]),
            self._static_numbers(param.device)[self._row_of[param]],
            copy=None if weights is None else weights.copy_of(param),
            factor=self.grad_factor,
            betas=group["betas"],
            eps=group["eps"],
            l2=0.0 if self._decoupled else group["weight_decay"],
        )
        if weights is not None:
            weights.written(param)
