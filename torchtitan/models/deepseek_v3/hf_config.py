"""A model's Hugging Face `config.json` (DeepSeek-V2 or -V3) from its arguments, and back."""

from collections.abc import Mapping
from typing import Any

from torchtitan.models.decoder.hf_config import expect, refuse_export, rope_settings
from torchtitan.models.deepseek_v3.args import DeepSeekV3ModelArgs
from torchtitan.models.moe import MoEArgs


def make_hf_config(args: DeepSeekV3ModelArgs) -> dict[str, Any]:
    """What transformers and vLLM need to compute what this model computes (`check_export`).

    Sigmoid scores are V3's (`DeepseekV3ForCausalLM`), softmax scores V2's.
    """
    common = {
        "vocab_size": args.vocab_size,
        "hidden_size": args.dim,
        "intermediate_size": args.inter_dim,
        "moe_intermediate_size": args.moe_inter_dim,
        "num_hidden_layers": args.n_layers,
        "first_k_dense_replace": args.n_dense_layers,
        "moe_layer_freq": 1,
        "num_attention_heads": args.n_heads,
        "num_key_value_heads": args.n_heads,
        "q_lora_rank": args.q_lora_rank or None,
        "kv_lora_rank": args.kv_lora_rank,
        "qk_nope_head_dim": args.qk_nope_head_dim,
        "qk_rope_head_dim": args.qk_rope_head_dim,
        "v_head_dim": args.v_head_dim,
        "rms_norm_eps": args.norm_eps,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
        "initializer_range": args.init_std,
    }
    return common | _positions(args) | _routing(args)


def _positions(args: DeepSeekV3ModelArgs) -> dict[str, Any]:
    scaling = None
    if args.use_yarn:
        scaling = {
            "type": "yarn",
            "factor": args.rope_factor,
            "original_max_position_embeddings": args.original_seq_len,
            "beta_fast": args.beta_fast,
            "beta_slow": args.beta_slow,
            "mscale": args.mscale,
            "mscale_all_dim": args.mscale,
        }
    return {
        "max_position_embeddings": args.max_seq_len,
        "rope_theta": args.rope_theta,
        "rope_scaling": scaling,
    }


def _routing(args: DeepSeekV3ModelArgs) -> dict[str, Any]:
    moe = args.moe_args
    is_v3 = moe.score_func == "sigmoid"
    groups = moe.num_expert_groups or 1
    config = {
        "n_routed_experts": moe.num_experts,
        "n_shared_experts": moe.num_shared_experts,
        "num_experts_per_tok": moe.top_k,
        "n_group": groups,
        "topk_group": moe.num_limited_groups or 1,
        "norm_topk_prob": moe.route_norm,
        "routed_scaling_factor": moe.route_scale,
        "scoring_func": moe.score_func,
    }
    if is_v3:
        return config | {
            "architectures": ["DeepseekV3ForCausalLM"],
            "model_type": "deepseek_v3",
            "topk_method": "noaux_tc",
            "num_nextn_predict_layers": args.n_mtp_layers,
        }
    return config | {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "topk_method": "greedy" if groups == 1 else "group_limited_greedy",
    }


def check_export(args: DeepSeekV3ModelArgs) -> None:
    """Raise `UserError` for a model that is neither V2 nor V3 for Hugging Face."""
    moe = args.moe_args
    family = "V3 (score_func 'sigmoid')" if moe.score_func == "sigmoid" else "V2 (softmax)"
    is_v3, has_bias = moe.score_func == "sigmoid", moe.load_balance_coeff is not None
    has_groups = moe.num_expert_groups is not None
    rules = [
        ("score_before_experts", not moe.score_before_experts, "false"),
        (
            "load_balance_coeff",
            has_bias == is_v3,
            "0 or more (V3 has an expert bias)" if is_v3 else '"none" (V2 has no expert bias)',
        ),
        ("route_norm", is_v3 or not moe.route_norm, "false"),
        (
            "group_score_func",
            not has_groups or moe.group_score_func == ("top2_sum" if is_v3 else "max"),
            '"top2_sum"' if is_v3 else '"max"',
        ),
        ("num_shared_experts", moe.num_shared_experts > 0, "1 or more"),
    ]
    for name, holds, needed in rules:
        if args.n_dense_layers < args.n_layers and not holds:
            refuse_export(name, getattr(moe, name), f"DeepSeek-{family}", needed)


# ------------------------------------------------------------------ the other way


def read_hf_config(config: Mapping[str, Any]) -> DeepSeekV3ModelArgs:
    """The arguments of the model that a published `config.json` describes, multi-token prediction
    left out (n_mtp_layers 0: it is for training).

    Raises `UserError` naming the first key whose value this architecture has not, KeyError for a
    missing one.
    """
    fixed = {
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
        "moe_layer_freq": 1,
    }
    for key, value in fixed.items():
        expect(key, config.get(key, value), value)
    return DeepSeekV3ModelArgs(
        vocab_size=config["vocab_size"],
        max_seq_len=config["max_position_embeddings"],
        dim=config["hidden_size"],
        inter_dim=config["intermediate_size"],
        moe_inter_dim=config["moe_intermediate_size"],
        n_layers=config["num_hidden_layers"],
        n_dense_layers=config["first_k_dense_replace"],
        n_heads=config["num_attention_heads"],
        norm_eps=config["rms_norm_eps"],
        q_lora_rank=config["q_lora_rank"] or 0,
        kv_lora_rank=config["kv_lora_rank"],
        qk_nope_head_dim=config["qk_nope_head_dim"],
        qk_rope_head_dim=config["qk_rope_head_dim"],
        v_head_dim=config["v_head_dim"],
        moe_args=_read_routing(config, is_v3=config["model_type"] != "deepseek_v2"),
        **_read_positions(config),
    )


def _read_positions(config: Mapping[str, Any]) -> dict[str, Any]:
    kind, theta, scaling = rope_settings(config, 10000.0)
    if kind == "default":
        return {"rope_theta": theta, "yarn": "off"}
    expect("rope_scaling.type", kind, "yarn")
    mscale = scaling.get("mscale_all_dim", 0.0)
    expect("rope_scaling.mscale", scaling.get("mscale", 1.0), mscale)
    return {
        "rope_theta": theta,
        "yarn": "on",
        "rope_factor": float(scaling["factor"]),
        "original_seq_len": scaling["original_max_position_embeddings"],
        "beta_fast": float(scaling.get("beta_fast", 32)),
        "beta_slow": float(scaling.get("beta_slow", 1)),
        "mscale": float(mscale),
    }


def _read_routing(config: Mapping[str, Any], *, is_v3: bool) -> MoEArgs:
    expect("scoring_func", config.get("scoring_func"), None, "sigmoid" if is_v3 else "softmax")
    methods = ["noaux_tc"] if is_v3 else ["greedy", "group_limited_greedy"]
    method = config.get("topk_method") or methods[0]
    expect("topk_method", method, *methods)
    groups = config.get("n_group") or 1
    grouped = groups > 1 and method != "greedy"
    return MoEArgs(
        num_experts=config["n_routed_experts"],
        num_shared_experts=config.get("n_shared_experts") or 0,
        score_func="sigmoid" if is_v3 else "softmax",
        route_norm=is_v3 and config["norm_topk_prob"],
        route_scale=float(config["routed_scaling_factor"]),
        score_before_experts=False,
        top_k=config["num_experts_per_tok"],
        num_expert_groups=groups if grouped else None,
        num_limited_groups=config["topk_group"] if grouped else None,
        group_score_func="max" if grouped and not is_v3 else "top2_sum",
        load_balance_coeff=1e-3 if is_v3 else None,
    )
