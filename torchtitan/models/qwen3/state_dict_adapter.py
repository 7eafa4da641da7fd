"""Hugging Face's names and `config.json` for Qwen3, dense and with experts."""

from typing import Any

from torchtitan.models.decoder.hf_config import (
    ConfigReader,
    check_aliases,
    check_layer_types,
    refuse_export,
    rope_settings,
)
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
            "max_position_embeddings": args.max_positions,
            "rope_theta": args.rope_theta,
            "rope_scaling": None,
            "use_sliding_window": False,
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
            "_debug_force_load_balance": False,
        }
        for name, value in needed.items():
            if self.model_args.moe_enabled and getattr(moe, name) != value:
                refuse_export(f"moe_args.{name}", getattr(moe, name), "Qwen3", repr(value))

    @classmethod
    def read_config(cls, config: ConfigReader) -> Qwen3ModelArgs:
        is_moe = config.get("model_type") == "qwen3_moe"
        n_layers = config.integer("num_hidden_layers")
        check_layer_types(config, n_layers, 0 if is_moe else n_layers)
        # Has no effect without use_sliding_window, which is false in published files.
        config.get("sliding_window")
        config.only("rope_interleave", False)
        _, rope_theta, _ = rope_settings(config, None)
        sizes = _read_experts(config) if is_moe else {}
        return Qwen3ModelArgs(
            vocab_size=config.integer("vocab_size"),
            max_seq_len=config.integer("max_position_embeddings"),
            dim=config.integer("hidden_size"),
            n_layers=n_layers,
            n_heads=config.integer("num_attention_heads"),
            n_kv_heads=config.integer("num_key_value_heads"),
            head_dim=config.integer("head_dim"),
            hidden_dim=config.integer("intermediate_size"),
            norm_eps=config.number("rms_norm_eps"),
            rope_theta=rope_theta,
            moe_enabled=is_moe,
            **sizes,
        )


def _read_experts(config: ConfigReader) -> dict[str, Any]:
    config.only("decoder_sparse_step", 1)
    config.only("mlp_only_layers", [])
    config.only("scoring_func", "softmax")
    for key in ("n_group", "topk_group", "routed_scaling_factor"):
        config.only(key, 1)
    config.only("n_shared_experts", 0)
    name = "num_experts" if "num_experts" in config else "num_local_experts"
    num_experts = config.integer(name)
    check_aliases(config, num_experts, "num_experts", "num_local_experts", "n_routed_experts")
    moe_args = MoEArgs(
        num_experts=num_experts,
        num_shared_experts=0,
        top_k=config.integer("num_experts_per_tok"),
        score_func="softmax",
        route_norm=config.flag("norm_topk_prob"),
        score_before_experts=False,
        load_balance_coeff=None,
    )
    return {"moe_inter_dim": config.integer("moe_intermediate_size"), "moe_args": moe_args}
