"""The DeepSeek family: its flavors, and its description for the trainer.

Numbers of 16B (V2-Lite), 236B (V2) and 671B (V3) are those of the official inference configurations
(config_16B/236B/671B.json of deepseek-ai/DeepSeek-V3); Moonlight-16B-A3B and Kimi-K2 are the V3
architecture with the numbers of their published config.json (moonshotai on the Hugging Face hub).
Released weights of all but Moonlight went through YaRN, which stays on when a run loads them.
"""

from typing import Any

from torchtitan.models.deepseek_v3.args import DeepSeekV3ModelArgs
from torchtitan.models.deepseek_v3.model import DeepSeekV3Model
from torchtitan.models.deepseek_v3.parallelize import parallelize_deepseekv3
from torchtitan.models.deepseek_v3.state_dict_adapter import DeepSeekV3StateDictAdapter
from torchtitan.models.moe import MoEArgs
from torchtitan.protocols.train_spec import TrainSpec

__all__ = [
    "DeepSeekV3Model",
    "DeepSeekV3ModelArgs",
    "DeepSeekV3StateDictAdapter",
    "deepseekv3_args",
    "get_train_spec",
    "parallelize_deepseekv3",
]


def _v3_experts(**sizes: Any) -> MoEArgs:
    """Experts of V3 and models like it: normalised sigmoid scores, and a bias that balances."""
    return MoEArgs(score_func="sigmoid", route_norm=True, score_before_experts=False, **sizes)


def _v2_experts(**sizes: Any) -> MoEArgs:
    """Experts of V2: softmax scores, not normalised, and no bias."""
    return MoEArgs(
        score_func="softmax",
        route_norm=False,
        score_before_experts=False,
        load_balance_coeff=None,
        **sizes,
    )


def _debug_args(**groups: int) -> DeepSeekV3ModelArgs:
    # torchtitan's debug sizes (33 M parameters), with V3's sigmoid routing.
    return DeepSeekV3ModelArgs(
        vocab_size=2048,
        dim=256,
        inter_dim=1024,
        moe_inter_dim=256,
        n_layers=6,
        n_dense_layers=1,
        n_heads=16,
        init_std=0.02,  # 0.006 is for widths of thousands
        moe_args=_v3_experts(num_experts=8, num_shared_experts=2, top_k=3, **groups),
    )


deepseekv3_args = {
    "debugmodel": _debug_args(),
    "debugmodel_node_limited": _debug_args(num_expert_groups=4, num_limited_groups=2),
    "16B": DeepSeekV3ModelArgs(
        vocab_size=102400,
        dim=2048,
        inter_dim=10944,
        moe_inter_dim=1408,
        n_layers=27,
        n_dense_layers=1,
        n_heads=16,
        moe_args=_v2_experts(num_experts=64, num_shared_experts=2, top_k=6),
        q_lora_rank=0,
        mscale=0.707,
        context_len=4096,
    ),
    "236B": DeepSeekV3ModelArgs(
        vocab_size=102400,
        dim=5120,
        inter_dim=12288,
        moe_inter_dim=1536,
        n_layers=60,
        n_dense_layers=1,
        n_heads=128,
        moe_args=_v2_experts(
            num_experts=160,
            num_shared_experts=2,
            top_k=6,
            num_expert_groups=8,
            num_limited_groups=3,
            group_score_func="max",
            route_scale=16.0,
        ),
        q_lora_rank=1536,
        context_len=4096,
    ),
    "671B": DeepSeekV3ModelArgs(
        vocab_size=129280,
        dim=7168,
        inter_dim=18432,
        moe_inter_dim=2048,
        n_layers=61,
        n_dense_layers=3,
        n_heads=128,
        moe_args=_v3_experts(
            num_experts=256,
            num_shared_experts=1,
            top_k=8,
            num_expert_groups=8,
            num_limited_groups=4,
            route_scale=2.5,
        ),
        q_lora_rank=1536,
        context_len=4096,
    ),
    "Moonlight-16B-A3B": DeepSeekV3ModelArgs(
        vocab_size=163840,
        dim=2048,
        inter_dim=11264,
        moe_inter_dim=1408,
        n_layers=27,
        n_dense_layers=1,
        n_heads=16,
        norm_eps=1e-5,
        moe_args=_v3_experts(num_experts=64, num_shared_experts=2, top_k=6, route_scale=2.446),
        q_lora_rank=0,
        rope_theta=50000.0,
        yarn="off",  # trained at 8192 without it
        context_len=8192,
    ),
    "Kimi-K2": DeepSeekV3ModelArgs(
        vocab_size=163840,
        dim=7168,
        inter_dim=18432,
        moe_inter_dim=2048,
        n_layers=61,
        n_dense_layers=1,
        n_heads=64,
        moe_args=_v3_experts(num_experts=384, num_shared_experts=1, top_k=8, route_scale=2.827),
        q_lora_rank=1536,
        rope_theta=50000.0,
        rope_factor=32.0,
        beta_fast=1.0,
        context_len=4096,
    ),
}


_HF_REPOS = {
    "16B": "deepseek-ai/DeepSeek-V2-Lite",
    "236B": "deepseek-ai/DeepSeek-V2",
    "671B": "deepseek-ai/DeepSeek-V3",
    "Moonlight-16B-A3B": "moonshotai/Moonlight-16B-A3B",
    "Kimi-K2": "moonshotai/Kimi-K2-Instruct",
}


def get_train_spec() -> TrainSpec:
    return TrainSpec(
        model_cls=DeepSeekV3Model,
        model_args=deepseekv3_args,
        parallelize_fn=parallelize_deepseekv3,
        state_dict_adapter=DeepSeekV3StateDictAdapter,
        hf_repos=_HF_REPOS,
    )
