"""Adam and AdamW in one pass over weights, gradients, states and working copies.

torch's fused kernels want weights, gradients and states of one type. Here gradients may be bf16
beside fp32 weights, the clipping factor is applied on the way, and the new weight is written to its
working copy too. Parameter groups and states are those of torch's AdamW, so that checkpoints don't
tell one from the other.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from torchtitan.components.working_weights import WorkingWeights
from torchtitan.ops.adamw import adamw_update


class FusedAdam(AdamW):
    """grad_factor: scalar tensor that `step` multiplies gradients by; None = 1.

    decoupled: AdamW's weight decay, otherwise Adam's. early_step: each parameter is updated, and
    its gradient freed, as soon as the backward pass has made it; `step` then has nothing to do.
    """

    def __init__(
        self,
        params: Iterable[dict[str, object]],
        *,
        decoupled: bool,
        working: WorkingWeights,
        early_step: bool = False,
        **settings: object,
    ):
        super().__init__(params, fused=False, foreach=False, **settings)
        self.grad_factor: Tensor | None = None
        self._decoupled = decoupled
        self._working = working
        self._early_norms: list[Tensor] = []
        self.early_step = early_step
        if early_step:
            group_of = {p: group for group in self.param_groups for p in group["params"]}
            working.after_grad = lambda p: self._step_early(p, group_of[p])

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._update(param, group)

    def early_grad_norm(self) -> Tensor:
        """Norm of all gradients since the last call; with early_step."""
        norm = torch.linalg.vector_norm(torch.stack(self._early_norms))
        self._early_norms.clear()
        return norm

    @torch.no_grad()
    def _step_early(self, param: nn.Parameter, group: dict[str, object]) -> None:
        self._early_norms.append(torch.linalg.vector_norm(param.grad, dtype=torch.float32))
        self._update(param, group)
        param.grad = None

    def _update(self, param: nn.Parameter, group: dict[str, object]) -> None:
        state = self.state[param]
        if not state:
            state["step"] = torch.tensor(0.0)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(param, memory_format=torch.contiguous_format)
        state["step"] += 1
        adamw_update(
            param,
            param.grad,
            state["exp_avg"],
            state["exp_avg_sq"],
            copy=self._working.copy_of(param),
            factor=self.grad_factor,
            step=int(state["step"]),
            lr=group["lr"],
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            decoupled=self._decoupled,
        )
        self._working.written(param)
