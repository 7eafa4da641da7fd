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

from torchtitan.components.adamw_bf16 import AdamWBf16
from torchtitan.components.fused_adam import FusedAdam
from torchtitan.components.muon import Muon
from torchtitan.components.working_weights import WorkingWeights
from torchtitan.tools.errors import UserError

_OPTIMIZERS = {"Adam": Adam, "AdamW": AdamW}
# Matrices that Muon leaves to AdamW: a row of them belongs to one token of the vocabulary.
_NOT_BY_MUON = ("tok_embeddings.", "output.")


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
    state_dtype: Literal["float32", "bfloat16"] = "float32",
    muon_momentum: float = 0.95,
    muon_adjust: Literal["match_rms_adamw", "original"] = "match_rms_adamw",
    early_step_in_backward: bool = False,
    working: WorkingWeights | None = None,
) -> Optimizer:
    """The optimizer of this rank: every trainable parameter of `model_parts` in exactly one group.

    Two groups, matrices first, also where one is empty or both decay: the layout of the optimizer
    state then does not depend on the config. (Four where plain tensors stand beside DTensors.)
    `fused` is one kernel per group, `foreach` a kernel per operation, `for-loop` one per tensor and
    operation, the slowest and the leanest; all three compute the same update. Adam adds the decay
    to the gradient, AdamW takes it off the weight. state_dtype "bfloat16": adamw_bf16.py, whatever
    the implementation. Raises UserError for an unknown `name`.

    working: the model's working weights; `fused` writes them too. early_step_in_backward: see
    `FusedAdam`, needs both.
    """
    if name == "Muon":
        return Muon(
            _muon_groups(model_parts, weight_decay, weight_decay_on),
            lr=lr,
            momentum=muon_momentum,
            adjust=muon_adjust,
            adamw={
                "betas": (beta1, beta2),
                "eps": eps,
                "fused": implementation == "fused",
                "foreach": implementation == "foreach",
            },
        )
    if name == "AdamW" and state_dtype == "bfloat16":
        groups = _param_groups(_trainable(model_parts), weight_decay, weight_decay_on)
        return AdamWBf16(groups, lr=lr, betas=(beta1, beta2), eps=eps)
    if name not in _OPTIMIZERS:
        raise UserError(
            f"optimizer.name = {name!r} is not known; choose one of {', '.join(_OPTIMIZERS)}, Muon"
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


def _muon_groups(
    model_parts: list[nn.Module], weight_decay: float, weight_decay_on: str
) -> list[dict[str, object]]:
    named = [pair for part in model_parts for pair in part.named_parameters()]
    left = {p for name, p in named if name.startswith(_NOT_BY_MUON)}
    params = _trainable(model_parts)
    matrices = [p for p in params if p.ndim >= 2 and p not in left]
    chosen = set(matrices)
    others = [p for p in params if p not in chosen]
    by_muon = {"params": matrices, "weight_decay": weight_decay, "muon": True}
    return [by_muon, *_param_groups(others, weight_decay, weight_decay_on)]


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
