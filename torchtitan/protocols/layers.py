"""Base classes that declare the attributes of layers that code outside of a model uses."""

from collections.abc import Callable, Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from torchtitan.ops.fp8.linear import Fp8Recipe
from torchtitan.ops.lora import A, Adapted, B, LowRank, Stack, new_adapter


class AttentionLayer(nn.Module):
    """Attention whose keys and values are computed from narrow tensors (B, S, ...).

    attend_with: replaces `attend_here`; both are called with (queries, narrow, mask).
    expand: converts narrow tensors to the keys and values of `ops.attention.attention`.
    """

    softmax_scale: float
    attend_with: Callable[..., Tensor] | None
    attend_here: Callable[..., Tensor]
    expand: Callable[[tuple[Tensor, ...]], tuple[Tensor, Tensor]]


class ExpertWeights(nn.Module):
    """Experts of a layer: w1, w3 (E, F, D), w2 (E, D, F), or a rank's part of them.

    An adapter (ops/lora.py) of w1 has the parameters w1_lora_A and w1_lora_B.

    fp8: how they are computed in FP8; None = in the dtype of the input.
    """

    w1: nn.Parameter
    w2: nn.Parameter
    w3: nn.Parameter
    use_grouped_mm: bool

    def __init__(self) -> None:
        super().__init__()
        self.fp8: Fp8Recipe | None = None
        self.lora_scales: dict[str, float] = {}

    def adapt(self, name: str, rank: int, alpha: float) -> None:
        """Add low-rank adapters, one for each expert.

        name: w1, w2 or w3.
        """
        first, second = new_adapter(self.get_parameter(name), rank)
        self.register_parameter(f"{name}_{A}", first)
        self.register_parameter(f"{name}_{B}", second)
        self.lora_scales[name] = alpha / rank

    def stack(self, name: str) -> Stack:
        """Return w1, w2 or w3, with its adapter where it has one."""
        weight = getattr(self, name)
        if name not in self.lora_scales:
            return weight
        first, second = (getattr(self, f"{name}_{end}") for end in (A, B))
        return Adapted(weight, LowRank(first, second, self.lora_scales[name]))


class MoELayer(nn.Module):
    """Layer of routed experts; `models.moe.MoE` describes its buffers.

    dispatcher: a `models.moe.dispatcher.TokenDispatcher`.
    sequence_group: ranks that hold the other parts of each sequence, if any.
    """

    router: nn.Module
    experts: ExpertWeights
    dispatcher: Any
    sequence_group: dist.ProcessGroup | None
    score_before_experts: bool
    collect_router_stats: bool
    load_balance_coeff: float | None
    expert_bias: Tensor | None
    tokens_per_expert: Tensor
    global_tokens_per_expert: Tensor
    traffic: Tensor
    router_stats: Tensor
    tokens_in_step: Tensor
    overflow: Tensor
    set_coefficients: Callable[[Mapping[str, float]], None]
