"""The Hugging Face `config.json` of a model, from its arguments: DeepSeek-V2 or -V3."""

from typing import Any

from torchtitan.models.deepseek_v3.args import DeepSeekV3ModelArgs
from torchtitan.tools.errors import UserError


def make_hf_config(args: DeepSeekV3ModelArgs) -> dict[str, Any]:
    """What transformers and vLLM need to compute what this model computes.

    Sigmoid scores are V3's (`DeepseekV3ForCausalLM`), softmax scores V2's. Raises `UserError` for
    a model that is neither; `args` then name the field.
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
    _check_routing(args)
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
            "num_nextn_predict_layers": 0,
        }
    return config | {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "topk_method": "greedy" if groups == 1 else "group_limited_greedy",
    }


def _check_routing(args: DeepSeekV3ModelArgs) -> None:
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
            raise UserError(
                f"no Hugging Face model computes this one: with model.args.moe_args.{name} = "
                f"{getattr(moe, name)!r} it is not a DeepSeek-{family}, which has {needed} there; "
                "train with that, or keep the checkpoint in our own format "
                "(checkpoint.last_save_in_hf = false)."
            )
