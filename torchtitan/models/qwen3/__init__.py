"""The Qwen3 family: its flavors, and its description for the trainer.

Numbers are those of the published config.json files (Qwen on the Hugging Face hub). The sizes below
8B share one matrix between embedding and output, which is not supported here.
"""

from typing import Any

from torchtitan.models.moe import MoEArgs
from torchtitan.models.qwen3.args import Qwen3ModelArgs
from torchtitan.models.qwen3.model import Qwen3Model
from torchtitan.models.qwen3.parallelize import parallelize_qwen3
from torchtitan.models.qwen3.state_dict_adapter import Qwen3StateDictAdapter
from torchtitan.protocols.train_spec import TrainSpec

__all__ = [
    "Qwen3Model",
    "Qwen3ModelArgs",
    "Qwen3StateDictAdapter",
    "get_train_spec",
    "parallelize_qwen3",
    "qwen3_args",
]


def _experts(num_experts: int, top_k: int) -> MoEArgs:
    return MoEArgs(
        num_experts=num_experts,
        num_shared_experts=0,
        top_k=top_k,
        score_func="softmax",
        route_norm=True,
        score_before_experts=False,
        load_balance_coeff=None,  # trained with an auxiliary loss instead
    )


_DEBUG: dict[str, Any] = {
    "vocab_size": 2048,
    "dim": 256,
    "n_layers": 6,
    "n_heads": 16,
    "n_kv_heads": 4,
    "head_dim": 16,
    "hidden_dim": 1024,
}

_PUBLISHED: dict[str, Any] = {"context_len": 40960}  # their max_position_embeddings

qwen3_args = {
    "debugmodel": Qwen3ModelArgs(**_DEBUG),
    "debugmodel_moe": Qwen3ModelArgs(
        **_DEBUG, moe_enabled=True, moe_inter_dim=256, moe_args=_experts(8, 3)
    ),
    "8B": Qwen3ModelArgs(**_PUBLISHED, dim=4096, n_layers=36, n_heads=32, hidden_dim=12288),
    "14B": Qwen3ModelArgs(**_PUBLISHED, dim=5120, n_layers=40, n_heads=40, hidden_dim=17408),
    "32B": Qwen3ModelArgs(**_PUBLISHED, dim=5120, n_layers=64, n_heads=64, hidden_dim=25600),
    "30B-A3B": Qwen3ModelArgs(
        **_PUBLISHED,
        dim=2048,
        n_layers=48,
        n_heads=32,
        n_kv_heads=4,
        hidden_dim=6144,
        moe_enabled=True,
        moe_inter_dim=768,
        moe_args=_experts(128, 8),
    ),
    "235B-A22B": Qwen3ModelArgs(
        **_PUBLISHED,
        dim=4096,
        n_layers=94,
        n_heads=64,
        n_kv_heads=4,
        hidden_dim=12288,
        moe_enabled=True,
        moe_inter_dim=1536,
        moe_args=_experts(128, 8),
    ),
}


def get_train_spec() -> TrainSpec:
    return TrainSpec(
        model_cls=Qwen3Model,
        model_args=qwen3_args,
        parallelize_fn=parallelize_qwen3,
        state_dict_adapter=Qwen3StateDictAdapter,
        hf_repos={size: f"Qwen/Qwen3-{size}" for size in qwen3_args if "debug" not in size},
    )
