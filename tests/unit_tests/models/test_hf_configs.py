"""config.json in: published ones are understood without a word, keys that change the model are
honoured or refused by name."""

import dataclasses
import math

import pytest

from scripts.cards.official import PUBLISHED, QWEN3_MOE, V2, V2_LITE, V3, YARN
from torchtitan.models.deepseek_v3 import DeepSeekV3StateDictAdapter, deepseekv3_args
from torchtitan.models.qwen3 import Qwen3StateDictAdapter, qwen3_args
from torchtitan.tools.errors import UserError

FLAVORS = deepseekv3_args | qwen3_args


def adapter_of(config: dict):
    is_qwen = config["model_type"].startswith("qwen3")
    return Qwen3StateDictAdapter if is_qwen else DeepSeekV3StateDictAdapter


@pytest.mark.parametrize("flavor", PUBLISHED)
def test_published_configs_are_the_flavors_and_nothing_is_noted(flavor):
    config, args = PUBLISHED[flavor], FLAVORS[flavor]
    Adapter = adapter_of(config)
    if config["rope_scaling"]:
        args = dataclasses.replace(args, yarn="on")
    ours = Adapter(args.for_run(overrides={}, seq_len=512)).hf_config()
    theirs = Adapter(Adapter.args_of(config)).hf_config()
    assert ours == theirs | {"initializer_range": ours["initializer_range"]}
    assert ours["max_position_embeddings"] == config["max_position_embeddings"]
    assert Adapter.notes_on(config) == []
    assert bool(Adapter(args).notes()) == (flavor == "Moonlight-16B-A3B")  # of its epsilon


def test_v31s_scales_and_what_transformers_5_writes_are_understood():
    quantization = V3["quantization_config"] | {"scale_fmt": "ue8m0"}
    newer = {key: value for key, value in V3.items() if key not in ("rope_scaling", "rope_theta")}
    newer |= {
        "quantization_config": quantization,
        "head_dim": 64,
        "qk_head_dim": 192,
        "rope_interleave": True,
        "rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, **YARN},
    }
    newer["rope_parameters"].pop("type")
    Adapter = DeepSeekV3StateDictAdapter
    assert Adapter.args_of(newer) == Adapter.args_of(V3) and Adapter.notes_on(newer) == []


REFUSED = [
    ("index_topk", 2048),
    ("attention_bias", True),
    ("mlp_bias", True),
    ("hidden_act", "gelu"),
    ("attn_logit_softcapping", 50.0),
    ("final_logit_softcapping", 30.0),
    ("logit_scale", 0.0625),
    ("residual_multiplier", 0.22),
    ("partial_rotary_factor", 0.5),
    ("use_sliding_window", True),
    ("rope_scaling.type", "linear"),
    ("rope_scaling.type", "longrope"),
    ("rope_scaling.some_new_factor", 2.0),
    ("rope_theta", 10**400),
    ("rms_norm_eps", -(10**400)),
    ("num_hidden_layers", 10**400),
    ("num_hidden_layers", 2**63),
    ("num_hidden_layers", 1e38),
]
REFUSED_MLA = [
    *REFUSED,
    ("sliding_window", 4096),
    ("moe_layer_freq", 2),
    ("moe_layer_freq", [0, 1]),
    ("topk_method", "top2"),
    ("scoring_func", "softmax"),
    ("num_key_value_heads", 8),
    ("head_dim", 32),
    ("qk_layernorm", True),
    ("num_local_experts", 8),
    ("mlp_layer_types", ["sparse"] * 61),
    ("layer_types", ["sliding_attention"] * 61),
    ("norm_topk_prob", "yes"),
    ("n_group", 1.5),
    ("quantization_config.quant_method", "awq"),
    ("quantization_config.weight_block_size", [64, 64]),
    ("quantization_config.fmt", "e5m2"),
    ("rope_scaling.partial_rotary_factor", 0.5),
    ("rope_scaling.attn_factor", 2.0),
    ("rope_scaling.attention_factor", "1.5"),
    ("rope_scaling.truncate", 1),
    ("rope_scaling.factor", 10**400),
    ("first_k_dense_replace", 2**63),
    ("rope_scaling.mscale", 0.0),  # with mscale_all_dim 1: transformers and vLLM disagree
    ("rope_parameters.rope_theta", 5e5),
]
REFUSED_QWEN = [
    *REFUSED,
    ("rope_scaling.rope_type", "yarn"),
    ("rope_parameters.full_attention", {"rope_type": "default"}),
    ("rope_interleave", True),
    ("decoder_sparse_step", 2),
    ("mlp_only_layers", [0]),
    ("n_group", 8),
    ("routed_scaling_factor", 2.5),
    ("scoring_func", "sigmoid"),
    ("num_local_experts", 64),
    ("layer_types", ["sliding_attention"] * 48),
]


def changed(config: dict, key: str, value) -> dict:
    table, _, inner = key.rpartition(".")
    return config | ({table: (config.get(table) or {}) | {inner: value}} if table else {key: value})


@pytest.mark.parametrize(
    "config, key, value",
    [(V3, *pair) for pair in REFUSED_MLA] + [(QWEN3_MOE, *pair) for pair in REFUSED_QWEN],
)
def test_what_changes_the_model_and_is_not_built_is_refused_by_name(config, key, value):
    with pytest.raises(UserError, match=key.replace(".", r"\.")):
        adapter_of(config).args_of(changed(config, key, value))


def test_v2_refuses_what_its_readers_disagree_about():
    Adapter = DeepSeekV3StateDictAdapter
    with pytest.raises(UserError, match="routed_scaling_factor = 16.0"):
        Adapter.args_of(V2 | {"norm_topk_prob": True})
    with pytest.raises(UserError, match="rope_interleave = False"):
        Adapter.args_of(V2 | {"rope_interleave": False})


def test_what_takes_a_few_lines_is_honoured():
    Adapter = DeepSeekV3StateDictAdapter
    lite = Adapter.args_of(V2_LITE | {"norm_topk_prob": True})
    assert lite.moe_args.route_norm
    assert "transformers' DeepSeek-V2" in Adapter.notes_on(V2_LITE | {"norm_topk_prob": True})[0]
    for key, name, value in [
        ("attention_factor", "attention_factor", 1.5),
        ("truncate", "yarn_truncate", False),
    ]:
        args = Adapter.args_of(changed(V3, f"rope_scaling.{key}", value))
        assert getattr(args, name) == value
    halves = Adapter.args_of(changed(V3, "rope_scaling.mscale", 0.5))
    log = 0.1 * math.log(40)
    assert halves.attention_factor == pytest.approx((0.5 * log + 1) / (log + 1))
    bare = {key: value for key, value in YARN.items() if "mscale" not in key}
    args = Adapter.args_of(V3 | {"rope_scaling": bare})
    assert (args.mscale, args.attention_factor) == (0.0, pytest.approx(log + 1))


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"some_new_key": 3}, "some_new_key: unknown here"),
        (changed(V3, "rope_scaling.attention_factor", 1.5), "vLLM and SGLang use the quotient"),
        ({"max_position_embeddings": 81920}, "the original length, 20"),
    ],
)
def test_what_is_read_otherwise_elsewhere_is_noted(changes, sentence):
    (note,) = DeepSeekV3StateDictAdapter.notes_on(V3 | changes)
    assert sentence in note


def test_two_tables_that_contradict_each_other_are_refused():
    both = V3 | {"rope_parameters": {"rope_type": "yarn", **YARN, "factor": 4.0}}
    with pytest.raises(UserError, match="rope_parameters .* and rope_scaling"):
        DeepSeekV3StateDictAdapter.args_of(both)


@pytest.mark.parametrize(
    "argument, value",
    [
        ("mscale", -1.0),
        ("beta_slow", 0.0),
        ("attention_factor", 0.0),
        ("rope_factor", 0.5),
        ("context_len", 0),
    ],
)
def test_numbers_of_positions_that_mean_nothing_are_refused(argument, value):
    with pytest.raises(UserError, match=argument):
        dataclasses.replace(deepseekv3_args["671B"], **{argument: value})


@pytest.mark.parametrize(
    "flavor, changes, sentence",
    [
        ("671B", {"rope_factor": 1.0001}, "set rope_factor to 1.0"),
        ("16B", {"dim": 2040}, "a multiple of n_heads"),
        ("16B", {"n_mtp_layers": 1}, "n_mtp_layers = 1"),
        ("671B", {"moe_args": {"_debug_force_load_balance": True}}, "_debug_force_load_balance"),
    ],
)
def test_what_no_reader_would_compute_is_not_exported(flavor, changes, sentence):
    args = deepseekv3_args[flavor].for_run(overrides=changes, seq_len=64)
    with pytest.raises(UserError, match=sentence):
        DeepSeekV3StateDictAdapter(args).check_export()
