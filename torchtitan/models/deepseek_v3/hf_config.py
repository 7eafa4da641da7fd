"""Conversion of a model's arguments to and from Hugging Face's `config.json` (DeepSeek-V2, -V3)."""

import math
from typing import Any

from torchtitan.models.decoder.hf_config import (
    ConfigReader,
    check_aliases,
    check_layer_types,
    expect,
    refuse_export,
    rope_settings,
)
from torchtitan.models.deepseek_v3.args import DeepSeekV3ModelArgs
from torchtitan.models.moe import MoEArgs
from torchtitan.ops.rope import yarn_magnitude
from torchtitan.tools.errors import UserError

# The epsilon of the norms of MLA's latents that is fixed in transformers and DeepSeek's own code.
LATENT_EPS = 1e-6


def make_hf_config(args: DeepSeekV3ModelArgs) -> dict[str, Any]:
    """Make the config with which transformers and vLLM compute the same as this model, as far as
    `check_export` allows.

    Sigmoid scores mean V3 (`DeepseekV3ForCausalLM`), softmax scores V2.
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
    return {
        "max_position_embeddings": args.max_positions,
        "rope_theta": args.rope_theta,
        "rope_scaling": _yarn(args) if args.use_yarn else None,
    }


def _yarn(args: DeepSeekV3ModelArgs) -> dict[str, Any]:
    """Make YaRN's table with numbers that all readers interpret alike.

    transformers multiplies the rotary channels by attention_factor; other readers multiply by the
    quotient of the magnitudes of mscale and mscale_all_dim. transformers does the same where the
    factor is missing, except that it treats an mscale of 0 as missing.
    """
    scaling = {
        "type": "yarn",
        "factor": args.rope_factor,
        "original_max_position_embeddings": args.original_seq_len,
        "beta_fast": args.beta_fast,
        "beta_slow": args.beta_slow,
        "mscale": args.mscale,
        "mscale_all_dim": args.mscale,
    }
    if args.attention_factor != 1 or args.mscale == 0:
        scaling["attention_factor"] = args.attention_factor
    if args.attention_factor != 1 and args.rope_factor > 1:
        magnitude = args.attention_factor * yarn_magnitude(args.rope_factor, args.mscale)
        scaling["mscale"] = (magnitude - 1) / (0.1 * math.log(args.rope_factor))
    if not args.yarn_truncate:
        scaling["truncate"] = False
    return scaling


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
    """Raise `UserError` for a model that is neither V2 nor V3 in Hugging Face's classes."""
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
        ("num_experts", not is_v3 or moe.num_experts > 1, "2 or more"),
        ("_debug_force_load_balance", not moe._debug_force_load_balance, "false"),
    ]
    for name, holds, needed in rules:
        if args.n_dense_layers < args.n_layers and not holds:
            refuse_export(f"moe_args.{name}", getattr(moe, name), f"DeepSeek-{family}", needed)
    if not is_v3 and args.n_mtp_layers:
        refuse_export("n_mtp_layers", args.n_mtp_layers, f"DeepSeek-{family}", "0")
    if not is_v3 and args.dim % args.n_heads:
        refuse_export(
            "dim", args.dim, f"DeepSeek-{family}", f"a multiple of n_heads {args.n_heads}"
        )
    _check_lengths(args)


def _check_lengths(args: DeepSeekV3ModelArgs) -> None:
    """Check the factor, for which transformers 4.5x uses max_position_embeddings over the original
    length."""
    quotient = round(args.rope_factor * args.original_seq_len) / args.original_seq_len
    if args.yarn != "off" and not math.isclose(quotient, args.rope_factor, rel_tol=1e-9):
        raise UserError(
            f"model.args.rope_factor ({args.rope_factor}) times original_seq_len "
            f"({args.original_seq_len}) must be a whole number of positions for a config.json that "
            f"all readers understand: set rope_factor to {quotient}, or keep the checkpoint in our "
            "own format (checkpoint.last_save_in_hf = false)."
        )


def reader_notes(args: DeepSeekV3ModelArgs) -> list[str]:
    """Notes on exports, see `StateDictAdapter.notes`."""
    yarn, moe = args.use_yarn, args.moe_args
    notes = []
    if args.norm_eps != LATENT_EPS:
        notes.append(
            f"the norms of MLA's latents (q_norm, kv_norm) have rms_norm_eps ({args.norm_eps:g}) "
            f"here, in vLLM and in SGLang; transformers and DeepSeek's code use {LATENT_EPS:g}, so "
            "their logits differ a little"
        )
    if moe.top_k == 1 and moe.route_norm:
        notes.append(
            "with num_experts_per_tok 1 and norm_topk_prob an expert's weight is 1 here and in "
            "transformers; DeepSeek's code does not normalise it"
        )
    if yarn and not args.yarn_truncate:
        notes.append(
            "rope_scaling.truncate = false is read by transformers (from 4.55 on), not by vLLM and "
            "SGLang, which round YaRN's range to whole channels"
        )
    if yarn and args.attention_factor != 1 and args.rope_factor == 1:
        notes.append(
            f"rope_scaling.attention_factor ({args.attention_factor:g}) with a factor of 1 is read "
            "by transformers, not by vLLM and SGLang"
        )
    if args.max_seq_len > args.max_positions:
        notes.append(
            f"sequences are longer here ({args.max_seq_len}) than YaRN's factor times the original "
            f"length ({args.max_positions}), which readers take for the maximum"
        )
    return notes


# ------------------------------------------------------------------ reading


def read_hf_config(config: ConfigReader) -> DeepSeekV3ModelArgs:
    """Read the arguments of the model that a published `config.json` describes.

    Multi-token prediction is left out (n_mtp_layers 0: it is for training). Raises `UserError` for
    the first key with an unsupported value, KeyError for a missing one.
    """
    is_v3 = config.get("model_type") != "deepseek_v2"
    n_layers, n_heads = config.integer("num_hidden_layers"), config.integer("num_attention_heads")
    n_dense = config.integer("first_k_dense_replace")
    nope, rope = config.integer("qk_nope_head_dim"), config.integer("qk_rope_head_dim")
    check_layer_types(config, n_layers, n_dense)
    config.only("moe_layer_freq", 1)
    config.only("num_key_value_heads", n_heads)
    config.only("head_dim", rope)
    config.only("qk_head_dim", nope + rope)
    config.only("sliding_window", 0)
    config.only("rope_interleave", *([True, False] if is_v3 else [True]))
    for key in ("qk_layernorm", "use_qk_norm"):
        config.only(key, False)
    if "q_lora_rank" not in config:
        raise KeyError("q_lora_rank")
    return DeepSeekV3ModelArgs(
        vocab_size=config.integer("vocab_size"),
        max_seq_len=config.integer("max_position_embeddings"),
        dim=config.integer("hidden_size"),
        inter_dim=config.integer("intermediate_size"),
        moe_inter_dim=config.integer("moe_intermediate_size"),
        n_layers=n_layers,
        n_dense_layers=n_dense,
        n_heads=n_heads,
        norm_eps=config.number("rms_norm_eps"),
        q_lora_rank=config.integer("q_lora_rank", 0),
        kv_lora_rank=config.integer("kv_lora_rank"),
        qk_nope_head_dim=nope,
        qk_rope_head_dim=rope,
        v_head_dim=config.integer("v_head_dim"),
        moe_args=_read_routing(config, is_v3=is_v3),
        **_read_positions(config),
    )


def _read_positions(config: ConfigReader) -> dict[str, Any]:
    kind, theta, scaling = rope_settings(config, 10000.0, "yarn")
    if kind == "default":
        return {"rope_theta": theta, "yarn": "off"}
    factor = scaling.number("factor")
    numbers = {
        "rope_factor": factor,
        "original_seq_len": scaling.integer("original_max_position_embeddings"),
        "beta_fast": scaling.number("beta_fast", 32.0),
        "beta_slow": scaling.number("beta_slow", 1.0),
        "mscale": scaling.number("mscale_all_dim", 0.0),
        "attention_factor": _attention_factor(scaling, factor),
        "yarn_truncate": scaling.flag("truncate", True),
    }
    for key in ("attn_factor", "extrapolation_factor"):  # vLLM's
        scaling.only(key, 1)
    scaling.refuse_unread()
    return {"rope_theta": theta, "yarn": "on"} | numbers


def _attention_factor(scaling: ConfigReader, factor: float) -> float:
    """Read the factor of the rotary channels. Raises `UserError` where readers disagree."""
    given = scaling.number("attention_factor", None)
    mscale, of_all = scaling.number("mscale", None), scaling.number("mscale_all_dim", None)
    if given is not None or factor <= 1:
        return 1.0 if given is None else given
    in_transformers = yarn_magnitude(factor, 1)
    if mscale and of_all:
        in_transformers = yarn_magnitude(factor, mscale) / yarn_magnitude(factor, of_all)
    elsewhere = _others_attention_factor(scaling, factor)
    if not math.isclose(in_transformers, elsewhere):
        raise UserError(
            f"config.json has rope_scaling.mscale = {mscale} with mscale_all_dim = {of_all}, which "
            f"readers understand differently: transformers multiplies the rotary channels by "
            f"{in_transformers:.6g}, DeepSeek's code and vLLM by {elsewhere:.6g}; add "
            "rope_scaling.attention_factor with the value that the model was trained with."
        )
    return in_transformers


def _others_attention_factor(scaling: ConfigReader, factor: float) -> float:
    """Factor in DeepSeek's own code, vLLM and SGLang, which don't read attention_factor."""
    magnitudes = [
        yarn_magnitude(factor, scaling.number(key, default))
        for key, default in (("mscale", 1.0), ("mscale_all_dim", 0.0))
    ]
    return magnitudes[0] / magnitudes[1]


def _read_routing(config: ConfigReader, *, is_v3: bool) -> MoEArgs:
    config.only("scoring_func", "sigmoid" if is_v3 else "softmax")
    methods = ["noaux_tc"] if is_v3 else ["greedy", "group_limited_greedy"]
    method = config.only("topk_method", *methods, default=methods[0])
    groups = config.integer("n_group", 1)
    limit = config.integer("topk_group", 1)
    grouped = groups > 1 and method != "greedy"
    num_experts = config.integer("n_routed_experts")
    check_aliases(config, num_experts, "num_experts", "num_local_experts")
    route_norm = config.flag("norm_topk_prob") if is_v3 else config.flag("norm_topk_prob", False)
    route_scale = config.number("routed_scaling_factor")
    if not is_v3 and route_norm:
        # DeepSeek-V2's code does not apply the factor where it normalises, vLLM applies both.
        expect("routed_scaling_factor", route_scale, 1)
    return MoEArgs(
        num_experts=num_experts,
        num_shared_experts=config.integer("n_shared_experts", 0),
        score_func="sigmoid" if is_v3 else "softmax",
        route_norm=route_norm,
        route_scale=route_scale,
        score_before_experts=False,
        top_k=config.integer("num_experts_per_tok"),
        num_expert_groups=groups if grouped else None,
        num_limited_groups=limit if grouped else None,
        group_score_func="max" if grouped and not is_v3 else "top2_sum",
        load_balance_coeff=1e-3 if is_v3 else None,
    )


def config_notes(config: ConfigReader) -> list[str]:
    """Notes on a config, see `StateDictAdapter.notes_on`."""
    is_v2, notes = config.get("model_type") == "deepseek_v2", []
    if is_v2 and config.flag("norm_topk_prob", False):
        notes.append("norm_topk_prob = true is not read by transformers' DeepSeek-V2")
    if is_v2 and config.get("topk_method") == "greedy" and config.integer("n_group", 1) > 1:
        notes.append(
            'topk_method "greedy" leaves n_group unused here and in transformers; vLLM and SGLang '
            "choose by groups nevertheless"
        )
    kind, _, scaling = rope_settings(config, 10000.0, "yarn")
    if kind == "default":
        return notes
    factor, positions = scaling.number("factor"), config.integer("max_position_embeddings")
    quotient = positions / scaling.integer("original_max_position_embeddings")
    if not math.isclose(quotient, factor):
        notes.append(
            f"rope_scaling.factor is {factor:g}, which is used here; transformers 4.5x uses "
            f"max_position_embeddings over the original length, {quotient:g}"
        )
    used = _attention_factor(scaling, factor)
    elsewhere = _others_attention_factor(scaling, factor)
    if not math.isclose(used, elsewhere, rel_tol=1e-6):
        notes.append(
            f"rope_scaling.attention_factor ({used:g}) is used here and in transformers; vLLM and "
            f"SGLang use the quotient of mscale and mscale_all_dim, {elsewhere:g}"
        )
    return notes
