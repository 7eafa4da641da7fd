"""One Adam or AdamW over all model parts, with weight decay where it belongs.

Weight decay pulls weights towards zero; a norm's scale or a bias has no reason to be there, so by
default only tensors with two or more dimensions decay. The token embedding, the output projection,
the router's gate and the stacked expert weights (E, F, D) count as matrices.
`weight_decay_on = "all"` is torchtitan v0.2's rule.
"""

from collections.abc import Iterable
from typing import Literal

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Adam, AdamW, Optimizer

from torchtitan.components.fused_adam import FusedAdam
from torchtitan.components.working_weights import WorkingWeights
from torchtitan.tools.errors import UserError

_OPTIMIZERS = {"Adam": Adam, "AdamW": AdamW}


def build_optimizer(
    model_parts: list[nn.Module],
    *,
    name: str,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    weight_decay_on: Literal["matrices", "all"],
    implementation: Literal["fused", "foreach", "for-loop"],
    early_step_in_backward: bool = False,
    working: WorkingWeights | None = None,
) -> Optimizer:
    """The optimizer of this rank: every trainable parameter of `model_parts` in exactly one group.

    Two groups, matrices first, also where one is empty or both decay: the layout of the optimizer
    state then does not depend on the config. (Four where plain tensors stand beside DTensors.)
    `fused` is one kernel per group, `foreach` a kernel per operation, `for-loop` one per tensor and
    operation, the slowest and the leanest; all three compute the same update. Adam adds the decay
    to the gradient, AdamW takes it off the weight. Raises UserError for an unknown `name`.

    working: the model's working weights; `fused` writes them too. early_step_in_backward: see
    `FusedAdam`, needs both.
    """
    if name not in _OPTIMIZERS:
        raise UserError(
            f"optimizer.name = {name!r} is not known; choose one of {', '.join(_OPTIMIZERS)}"
        )
    groups = _param_groups(_trainable(model_parts), weight_decay, weight_decay_on)
    settings = {"lr": lr, "betas": (beta1, beta2), "eps": eps}
    if working is not None and implementation == "fused":
        return FusedAdam(
            groups,
            decoupled=name == "AdamW",
            working=working,
            early_step=early_step_in_backward,
            **settings,
        )
    return _OPTIMIZERS[name](
        groups,
        **settings,
        fused=implementation == "fused",
        foreach=implementation == "foreach",
    )


def _trainable(model_parts: list[nn.Module]) -> list[nn.Parameter]:
    # A dict keeps the order and drops the second sight of a parameter that two modules share.
    return list(
        dict.fromkeys(p for part in model_parts for p in part.parameters() if p.requires_grad)
    )


def _param_groups(
    params: list[nn.Parameter], weight_decay: float, weight_decay_on: str
) -> list[dict[str, object]]:
    # A DTensor's ndim is that of the whole tensor, so sharding never changes a parameter's group.
    matrices = [p for p in params if p.ndim >= 2]
    others = [p for p in params if p.ndim < 2]
    decay_of_others = weight_decay if weight_decay_on == "all" else 0.0
    return [
        {"params": same_kind, "weight_decay": decay}
        for group, decay in ((matrices, weight_decay), (others, decay_of_others))
        for same_kind in _split_by_kind(group, params)
    ]


def _split_by_kind(
    group: list[nn.Parameter], all_params: Iterable[nn.Parameter]
) -> list[list[nn.Parameter]]:
    """Plain tensors and DTensors apart: torch's fused and foreach kernels refuse a list of both."""
    kinds = sorted({_is_dtensor(p) for p in all_params})
    return [[p for p in group if _is_dtensor(p) == kind] for kind in kinds]


def _is_dtensor(param: torch.Tensor) -> bool:
    return isinstance(param, DTensor)
