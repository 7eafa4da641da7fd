"""The user's model with every size as small as its layout allows; its computation stays the same.

Kept: attention masks, scores and losses of the router, group limit, shared experts, multi-token
prediction, YaRN. A coefficient that is on is raised to where its effect exceeds rounding.
"""

from dataclasses import asdict
from math import lcm, sqrt
from typing import Any

from torchtitan.config import Parallelism
from torchtitan.config.schedule_tables import EXPERT_COEFFICIENTS
from torchtitan.models.decoder import DecoderArgs
from torchtitan.models.moe import MoEArgs
from torchtitan.proof.worlds import World

# Channels, whatever the family calls them. 16 is the least that every attention kernel takes.
CHANNELS = {
    "dim": 32,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "head_dim": 16,
}
# Hidden channels, which tensor parallelism splits.
HIDDEN = {"inter_dim": 48, "hidden_dim": 48, "moe_inter_dim": 16}
HEADS, EXPERTS, GROUPS, TOP_K = 4, 8, 4, 3
# Of every matrix; more would saturate the router.
LARGEST_STD = 0.1
# A balance loss below 5 % of the main one hides in the tolerance of gradients; a bias that moves by
# less than the distance of two scores changes no choice in three steps.
LEAST_COEFFICIENT = {"load_balance_coeff": 0.02}
LEAST_OTHER_COEFFICIENT = 0.05


def up(value: int, unit: int) -> int:
    """Return the first multiple of `unit` from `value` on."""
    return -(-value // unit) * unit


def raised(name: str, value: float | None) -> float | None:
    """Return a coefficient that shows within three steps; None and 0 stay."""
    if not value or name not in EXPERT_COEFFICIENTS:
        return value
    return max(value, LEAST_COEFFICIENT.get(name, LEAST_OTHER_COEFFICIENT))


def small_model(
    args: DecoderArgs, parallelism: Parallelism, world: World, vocab: int, n_layers: int
) -> dict[str, Any]:
    """Return `[model.args]` of the small model.

    args: of the user's run.
    parallelism: of the user's run.
    world: the one to start.
    vocab: entries of the tokenizer.
    n_layers: number of layers in the pipeline's stages.
    """
    known, tp = asdict(args), world.degrees.tp
    sizes = {name: min(known[name], size) for name, size in CHANNELS.items() if name in known}
    sizes |= {name: min(known[name], up(n, tp)) for name, n in HIDDEN.items() if name in known}
    sizes |= _heads(args, parallelism, world)
    sizes["vocab_size"] = up(vocab, tp)
    sizes["n_layers"] = n_layers
    if "n_dense_layers" in known:
        dense = known["n_dense_layers"]
        sizes["n_dense_layers"] = n_layers if dense == args.n_layers else min(dense, 1)
    # Products keep their variance, so that activations and scores stay of the order of 1.
    sizes["init_std"] = min(LARGEST_STD, args.init_std * sqrt(args.dim / sizes["dim"]))
    if args.has_experts:
        sizes["moe_args"] = _experts(args.moe_args, world)
    return sizes


def _heads(args: DecoderArgs, parallelism: Parallelism, world: World) -> dict[str, int]:
    """Return numbers of heads that the layout can split whole."""
    by_heads = parallelism.context_parallel_rotate_method == "alltoall"
    unit = world.degrees.tp * (world.degrees.cp if by_heads else 1)
    name, shared = args.split_heads
    if name == "n_heads" or shared == args.n_heads:
        return {each: min(shared, up(HEADS, unit)) for each in {name, "n_heads"}}
    groups = min(shared, up(HEADS // 2, unit))
    return {name: groups, "n_heads": groups * min(2, args.n_heads // shared)}


def _experts(args: MoEArgs, world: World) -> dict[str, Any]:
    """Return sizes of the experts: two a rank and a group, at least eight; the group limit still
    leaves some out."""
    groups, limited = args.num_expert_groups, args.num_limited_groups
    sizes: dict[str, Any] = {}
    if groups is not None and limited is not None and groups > GROUPS:
        few = GROUPS - 1 if limited < groups else GROUPS
        limited = max(1, min(few, round(limited * GROUPS / groups)))
        groups = GROUPS
        sizes |= {"num_expert_groups": groups, "num_limited_groups": limited}
    unit = lcm(world.degrees.ep, groups or 1)
    experts = up(max(EXPERTS, 2 * world.degrees.ep, 2 * (groups or 1)), unit)
    if experts >= args.num_experts:
        experts, sizes = args.num_experts, {}
        groups, limited = args.num_expert_groups, args.num_limited_groups
    sizes["num_experts"] = experts
    reachable = experts if groups is None else experts // groups * (limited or groups)
    sizes["top_k"] = min(args.top_k, TOP_K, reachable)
    for name in EXPERT_COEFFICIENTS:
        sizes[name] = raised(name, getattr(args, name))
    return {name: "none" if value is None else value for name, value in sizes.items()}
