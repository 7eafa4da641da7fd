"""Mixture of experts: routing, dispatch, experts, balancing. Shared by all model families."""

from torchtitan.models.moe.moe import (
    FeedForward,
    GroupedExperts,
    MoE,
    MoEArgs,
    TokenChoiceTopKRouter,
)

__all__ = ["FeedForward", "GroupedExperts", "MoE", "MoEArgs", "TokenChoiceTopKRouter"]
