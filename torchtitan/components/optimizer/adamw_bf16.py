"""AdamW whose running means are kept in bf16: half the memory, as DeepSeek-V3 was trained (arXiv
2412.19437, section 3.3). Weights and gradients keep their dtype; all arithmetic is in fp32.

Rounding to nearest is enough: a step moves the means by 1 − beta of the way, 5 to 10 %, and bf16
resolves 0.4 %. (With beta2 = 0.999 it would not be enough: config/rules/values.py refuses that.)
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer


class AdamWBf16(Optimizer):
    """AdamW with decoupled weight decay.

    State: exp_avg, exp_avg_sq (bf16, shape and placement of the parameter), step (fp32).
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
    ):
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, p.grad, group)

    def _update(self, p: nn.Parameter, grad: Tensor, group: dict[str, Any]) -> None:
        state, (beta1, beta2) = self.state[p], group["betas"]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(p, dtype=torch.bfloat16)
        state["step"] += 1
        step = state["step"].item()  # no host sync: it is on the CPU
        weight, grad = _local(p), _local(grad).float()
        mean, square = _local(state["exp_avg"]), _local(state["exp_avg_sq"])
        new_mean = torch.lerp(mean.float(), grad, 1 - beta1)
        new_square = torch.lerp(square.float(), grad * grad, 1 - beta2)
        mean.copy_(new_mean)
        square.copy_(new_square)
        denominator = (new_square / (1 - beta2**step)).sqrt_().add_(group["eps"])
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.addcdiv_(new_mean, denominator, value=-group["lr"] / (1 - beta1**step))


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
