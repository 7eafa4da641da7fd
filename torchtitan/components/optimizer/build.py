"""The optimizer over all model parts: Adam, AdamW or Muon, in the implementation of the config."""

from collections.abc import Iterable, Sequence
from typing import Literal

from torch import Tensor, nn
from torch.optim import Optimizer

from torchtitan.components.optimizer.adamw_bf16 import AdamWBf16
from torchtitan.components.optimizer.compute_weights import ComputeWeights
from torchtitan.components.optimizer.fused_adam import FusedAdam
from torchtitan.components.optimizer.local_adam import LocalAdam, LocalAdamW
from torchtitan.components.optimizer.muon import Muon
from torchtitan.components.optimizer.param_groups import GroupRules
from torchtitan.config import Optimizer as OptimizerSettings
from torchtitan.config import ParamGroup
from torchtitan.distributed.grad_norm import clip_grad_norm
from torchtitan.tools.errors import UserError

_OPTIMIZERS = {"Adam": LocalAdam, "AdamW": LocalAdamW}
# Matrices that Muon leaves to AdamW, because each of their rows belongs to one vocabulary token.
_NOT_BY_MUON = ("tok_embeddings.", "output.")


def group_rules(settings: OptimizerSettings) -> GroupRules:
    """Rules for the weight decay and the learning rate of each parameter, from [optimizer]."""
    return GroupRules(
        settings.weight_decay,
        settings.weight_decay_on,
        settings.group,
        _NOT_BY_MUON if settings.name == "Muon" else None,
    )


def clip_gradients(
    optimizer: Optimizer, parameters: Iterable[nn.Parameter], max_norm: float
) -> Tensor:
    """Clip by the norm of all gradients, now or when the optimizer reads them.

    Returns the norm before clipping, over all ranks: a scalar tensor.
    """
    if isinstance(optimizer, FusedAdam):
        return optimizer.clip(parameters, max_norm)
    return clip_grad_norm(parameters, max_norm)


def replay_steps(optimizer: Optimizer, *, grads_stay: bool) -> None:
    """Let steps replay their kernels as a CUDA graph, where the optimizer supports it.

    grads_stay: whether gradients keep their memory between steps, which a graph needs.
    """
    if isinstance(optimizer, FusedAdam):
        optimizer.as_graph = grads_stay


def prepare_step(optimizer: Optimizer) -> None:
    """Prepare the optimizer's next step while the GPU still computes, where it supports that."""
    if isinstance(optimizer, FusedAdam):
        optimizer.prepare()


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
    group: Sequence[ParamGroup] = (),
    compute_weights: ComputeWeights | None = None,
) -> Optimizer:
    """Build the optimizer of this rank: each trainable parameter is in exactly one group.

    Adam adds the decay to the gradient, AdamW subtracts it from the weight. Raises UserError for an
    unknown `name`.

    implementation: `fused` is one kernel per group, `foreach` a kernel per operation, `for-loop`
        one per tensor and operation, which is slowest and takes the least memory; all three compute
        the same update.
    state_dtype: "bfloat16" means adamw_bf16.py, whatever the implementation.
    early_step_in_backward: see `FusedAdam`; needs `fused` and compute_weights.
    group: tables of the config, see param_groups.py.
    compute_weights: of the model; `fused` writes them, after other optimizers they are copied.
    """
    not_by_muon = _NOT_BY_MUON if name == "Muon" else None
    rules = GroupRules(weight_decay, weight_decay_on, group, not_by_muon)
    groups = rules.groups(model_parts, lr)
    settings = {"lr": lr, "betas": (beta1, beta2), "eps": eps}
    # torch's own kernel is the faster one on a CPU; it supports a single dtype only.
    on_gpu = all(p.device.type == "cuda" for group in groups for p in group["params"])
    in_bf16 = name == "AdamW" and state_dtype == "bfloat16"
    own_kernel = implementation == "fused" and (on_gpu or compute_weights is not None)
    if name in _OPTIMIZERS and own_kernel and not in_bf16:
        return FusedAdam(
            groups,
            decoupled=name == "AdamW",
            compute_weights=compute_weights,
            early_step=early_step_in_backward,
            **settings,
        )
    kernels = {"fused": implementation == "fused", "foreach": implementation == "foreach"}
    optimizer: Optimizer
    if name == "Muon":
        adamw = {"betas": (beta1, beta2), "eps": eps} | kernels
        optimizer = Muon(groups, lr=lr, momentum=muon_momentum, adjust=muon_adjust, adamw=adamw)
    elif in_bf16:
        optimizer = AdamWBf16(groups, **settings)
    elif name in _OPTIMIZERS:
        optimizer = _OPTIMIZERS[name](groups, **settings, **kernels)
    else:
        raise UserError(
            f"optimizer.name = {name!r} is not known; choose one of {', '.join(_OPTIMIZERS)}, Muon"
        )
    if compute_weights is not None:
        optimizer.register_step_post_hook(lambda *_: compute_weights.outdate())
    return optimizer
