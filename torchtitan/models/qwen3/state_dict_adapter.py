"""Hugging Face's names and `config.json` for Qwen3, dense and with experts."""

from collections.abc import Mapping
from typing import Any

from torchtitan.models.decoder.hf_config import expect, refuse_export, rope_settings
from torchtitan.models.decoder.state_dict_adapter import (
    BLOCK_ROWS,
    END_ROWS,
    Row,
    TableAdapter,
    in_layers,
)
from torchtitan.models.moe import MoEArgs
from torchtitan.models.qwen3.args import Qwen3ModelArgs
from torchtitan.models.qwen3.model import Qwen3Model

_BLOCK = BLOCK_ROWS | {
    "attention.wq.weight": Row("self_attn.q_proj.weight", fp8=True),
    "attention.wk.weight": Row("self_attn.k_proj.weight", fp8=True),
    "attention.wv.weight": Row("self_attn.v_proj.weight", fp8=True),
    "attention.q_norm.weight": Row("self_attn.q_norm.weight"),
    "attention.k_norm.weight": Row("self_attn.k_norm.weight"),
}


class Qwen3StateDictAdapter(TableAdapter):
    model_args: Qwen3ModelArgs
    model_cls = Qwen3Model
    model_types = ("qwen3", "qwen3_moe")
    table = END_ROWS | in_layers("layers.{}", _BLOCK)

    def sizes(self, model_args: Qwen3ModelArgs) -> dict[str, Any]:
        names = "vocab_size dim n_layers n_heads n_kv_heads head_dim moe_enabled".split()
        sizes = {name: getattr(model_args, name) for name in names} | model_args.dense_widths
        if model_args.moe_enabled:
            sizes["moe_inter_dim"] = model_args.moe_inter_dim
            sizes["moe_args.num_experts"] = model_args.moe_args.num_experts
        return sizes

    def hf_config(self) -> dict[str, Any]:
        args, moe = self.model_args, self.model_args.moe_args
        config = {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "vocab_size": args.vocab_size,
            "hidden_size": args.dim,
            "intermediate_size": args.hidden_dim,
            "num_hidden_layers": args.n_layers,
            "num_attention_heads": args.n_heads,
            "num_key_value_heads": args.n_kv_heads,
            "head_dim": args.head_dim,
            "max_position_embeddings": args.max_seq_len,
            "rope_theta": args.rope_theta,
            "rms_norm_eps": args.norm_eps,
            "hidden_act": "silu",
            "attention_bias": False,
            "tie_word_embeddings": False,
            "initializer_range": args.init_std,
        }
        if args.moe_enabled:
            config |= {
                "architectures": ["Qwen3MoeForCausalLM"],
                "model_type": "qwen3_moe",
                "moe_intermediate_size": args.moe_inter_dim,
                "num_experts": moe.num_experts,
                "num_experts_per_tok": moe.top_k,
                "norm_topk_prob": moe.route_norm,
                "decoder_sparse_step": 1,
                "mlp_only_layers": [],
            }
        return config

    def check_export(self) -> None:
        moe = self.model_args.moe_args
        needed = {
            "score_func": "softmax",
            "score_before_experts": False,
            "load_balance_coeff": None,
            "num_shared_experts": 0,
            "num_expert_groups": None,
            "route_scale": 1.0,
        }
        for name, value in needed.items():
            if self.model_args.moe_enabled and getattr(moe, name) != value:
                refuse_export(name, getattr(moe, name), "Qwen3", repr(value))

    @classmethod
    def read_config(cls, hf_config: Mapping[str, Any]) -> Qwen3ModelArgs:
        return _read_config(hf_config)


def _read_config(config: Mapping[str, Any]) -> Qwen3ModelArgs:
    rope_type, rope_theta, _ = rope_settings(config, 1e6)
    fixed = {
        "hidden_act": (config.get("hidden_act", "silu"), "silu"),
        "attention_bias": (config.get("attention_bias", False), False),
        "tie_word_embeddings": (config.get("tie_word_embeddings", False), False),
        "use_sliding_window": (config.get("use_sliding_window", False), False),
        "rope_type": (rope_type, "default"),
        "decoder_sparse_step": (config.get("decoder_sparse_step", 1), 1),
        "mlp_only_layers": (config.get("mlp_only_layers") or [], []),
    }
    for key, (value, *allowed) in fixed.items():
        expect(key, value, *allowed)
    is_moe = config["model_type"] == "qwen3_moe"
    sizes: dict[str, Any] = {}
    if is_moe:
        experts = config.get("num_experts", config.get("num_local_experts"))
        sizes["moe_inter_dim"] = config["moe_intermediate_size"]
        sizes["moe_args"] = MoEArgs(
            num_experts=experts,
            num_shared_experts=0,
            top_k=config["num_experts_per_tok"],
            score_func="softmax",
            route_norm=config["norm_topk_prob"],
            score_before_experts=False,
            load_balance_coeff=None,
        )
    return Qwen3ModelArgs(
        vocab_size=config["vocab_size"],
        max_seq_len=config["max_position_embeddings"],
        dim=config["hidden_size"],
        n_layers=config["num_hidden_layers"],
        n_heads=config["num_attention_heads"],
        n_kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
        hidden_dim=config["intermediate_size"],
        norm_eps=config["rms_norm_eps"],
        rope_theta=rope_theta,
        moe_enabled=is_moe,
        **sizes,
    )
