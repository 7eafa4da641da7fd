"""Official numbers, exact parameter totals, a run's own copy of the arguments, and FLOPs."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from torchtitan.models.decoder import attention as attention_file
from torchtitan.models.deepseek_v3 import DeepSeekV3Model, DeepSeekV3ModelArgs, deepseekv3_args
from torchtitan.models.deepseek_v3.hf_config import make_hf_config
from torchtitan.models.moe import MoEArgs
from torchtitan.ops.rope import Yarn
from torchtitan.protocols.model import BaseModelArgs, override_fields
from torchtitan.protocols.train_spec import get_flavor, get_train_spec
from torchtitan.tools.errors import UserError

# config_16B.json, config_236B.json and config_671B.json of deepseek-ai/DeepSeek-V3
# (inference/configs); score function, normalisation and group rule from the published config.json.
OFFICIAL = {
    "vocab_size": (102400, 102400, 129280),
    "dim": (2048, 5120, 7168),
    "inter_dim": (10944, 12288, 18432),
    "moe_inter_dim": (1408, 1536, 2048),
    "n_layers": (27, 60, 61),
    "n_dense_layers": (1, 1, 3),
    "n_heads": (16, 128, 128),
    "q_lora_rank": (0, 1536, 1536),
    "kv_lora_rank": (512, 512, 512),
    "qk_nope_head_dim": (128, 128, 128),
    "qk_rope_head_dim": (64, 64, 64),
    "v_head_dim": (128, 128, 128),
    "mscale": (0.707, 1.0, 1.0),
    "norm_eps": (1e-6, 1e-6, 1e-6),
    "rope_theta": (10000.0, 10000.0, 10000.0),
    "rope_factor": (40.0, 40.0, 40.0),
    "original_seq_len": (4096, 4096, 4096),
    "beta_fast": (32.0, 32.0, 32.0),
    "beta_slow": (1.0, 1.0, 1.0),
}
OFFICIAL_MOE = {
    "num_experts": (64, 160, 256),
    "num_shared_experts": (2, 2, 1),
    "top_k": (6, 6, 8),
    "num_expert_groups": (None, 8, 8),
    "num_limited_groups": (None, 3, 4),
    "score_func": ("softmax", "softmax", "sigmoid"),
    "route_norm": (False, False, True),
    "route_scale": (1.0, 16.0, 2.5),
    "score_before_experts": (False, False, False),
}
# Of the published config.json files, under their own names: moonshotai/Moonlight-16B-A3B, and
# moonshotai/Kimi-K2-Base (YaRN factor 32; the later Kimi-K2-0905 has 64).
PUBLISHED = {
    "hidden_size": (2048, 7168),
    "intermediate_size": (11264, 18432),
    "moe_intermediate_size": (1408, 2048),
    "num_hidden_layers": (27, 61),
    "first_k_dense_replace": (1, 1),
    "num_attention_heads": (16, 64),
    "num_key_value_heads": (16, 64),
    "q_lora_rank": (None, 1536),
    "kv_lora_rank": (512, 512),
    "qk_nope_head_dim": (128, 128),
    "qk_rope_head_dim": (64, 64),
    "v_head_dim": (128, 128),
    "rms_norm_eps": (1e-5, 1e-6),
    "rope_theta": (50000.0, 50000.0),
    "vocab_size": (163840, 163840),
    "n_routed_experts": (64, 384),
    "n_shared_experts": (2, 1),
    "num_experts_per_tok": (6, 8),
    "n_group": (1, 1),
    "topk_group": (1, 1),
    "norm_topk_prob": (True, True),
    "routed_scaling_factor": (2.446, 2.827),
    "scoring_func": ("sigmoid", "sigmoid"),
    "topk_method": ("noaux_tc", "noaux_tc"),
    "rope_scaling": (
        None,
        {
            "type": "yarn",
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "beta_fast": 1.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
    ),
    "tie_word_embeddings": (False, False),
    "attention_bias": (False, False),
    "moe_layer_freq": (1, 1),
    "num_nextn_predict_layers": (0, 0),
    "max_position_embeddings": (8192, 131072),
    "architectures": (["DeepseekV3ForCausalLM"],) * 2,
}
TINY = DeepSeekV3ModelArgs(
    vocab_size=64,
    max_seq_len=32,
    dim=16,
    inter_dim=24,
    moe_inter_dim=8,
    n_layers=3,
    n_dense_layers=1,
    n_heads=2,
    kv_lora_rank=8,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=6,
    moe_args=MoEArgs(num_experts=4, top_k=2, num_shared_experts=2, use_grouped_mm=False),
)


@pytest.mark.parametrize("column, flavor", [(0, "16B"), (1, "236B"), (2, "671B")])
def test_every_number_is_the_official_one(column, flavor):
    args = deepseekv3_args[flavor]
    assert {n: getattr(args, n) for n in OFFICIAL} == {n: v[column] for n, v in OFFICIAL.items()}
    assert {n: getattr(args.moe_args, n) for n in OFFICIAL_MOE} == {
        n: v[column] for n, v in OFFICIAL_MOE.items()
    }


@pytest.mark.parametrize("column, flavor", [(0, "Moonlight-16B-A3B"), (1, "Kimi-K2")])
def test_every_number_is_the_published_one(column, flavor):
    """Through our own config.json, whose keys are tested against transformers elsewhere."""
    seq_len = PUBLISHED["max_position_embeddings"][column]
    args = deepseekv3_args[flavor].for_run(overrides={}, seq_len=seq_len)
    config = make_hf_config(args)
    assert {n: config[n] for n in PUBLISHED} == {n: v[column] for n, v in PUBLISHED.items()}


def test_group_rule_and_selection_bias_are_the_family_members_own():
    assert deepseekv3_args["236B"].moe_args.group_score_func == "max"
    assert deepseekv3_args["671B"].moe_args.group_score_func == "top2_sum"
    has_bias = {n: a.moe_args.load_balance_coeff is not None for n, a in deepseekv3_args.items()}
    assert (has_bias["16B"], has_bias["236B"], has_bias["671B"]) == (False, False, True)
    assert deepseekv3_args["671B"].moe_args.load_balance_coeff == 0.001


def test_debug_flavors():
    plain, limited = (deepseekv3_args[f"debugmodel{end}"] for end in ("", "_node_limited"))
    routing = limited.moe_args
    assert (routing.num_experts, routing.num_shared_experts, routing.top_k) == (8, 2, 3)
    assert (routing.num_expert_groups, routing.num_limited_groups) == (4, 2)
    groups_off = {"num_expert_groups": None, "num_limited_groups": None}
    assert plain == dataclasses.replace(
        limited, moe_args=dataclasses.replace(routing, **groups_off)
    )


@pytest.mark.parametrize(
    "flavor, total",
    [
        ("16B", 15_706_484_224),
        ("236B", 235_741_434_880),
        ("671B", 671_026_404_352),
        # The hub counts the selection biases too.
        ("Moonlight-16B-A3B", 15_960_110_208 - 26 * 64),
        ("Kimi-K2", 1_026_408_232_448 - 60 * 384),
    ],
)
def test_parameter_totals_are_the_published_models(flavor, total):
    with torch.device("meta"):
        model = DeepSeekV3Model(deepseekv3_args[flavor])
    assert sum(p.numel() for p in model.parameters()) == total


def test_flavors_are_found_by_name_and_near_misses_are_named():
    spec = get_train_spec("deepseek_v3")
    assert get_flavor(spec, "deepseek_v3", "671B") is deepseekv3_args["671B"]
    with pytest.raises(UserError, match=r"^model.flavor '671b' is not .*did you mean '671B'\?$"):
        get_flavor(spec, "deepseek_v3", "671b")
    with pytest.raises(UserError, match=r"'deepseekv3' .*did you mean 'deepseek_v3'\?$"):
        get_train_spec("deepseekv3")


# ---------------------------------------------------------------------------------------------
# A run's own arguments
# ---------------------------------------------------------------------------------------------


def test_overrides_reach_nested_fields_and_leave_the_registry_alone():
    registered = deepseekv3_args["debugmodel"]
    before = dataclasses.asdict(registered)
    overrides = {
        "n_layers": 2,
        "rope_theta": 500,
        "moe_args": {"num_experts": 16, "num_expert_groups": 4, "num_limited_groups": 2},
    }
    args = registered.for_run(overrides=overrides, seq_len=128)
    assert (args.n_layers, args.max_seq_len, args.dim) == (2, 128, 256)
    assert type(args.rope_theta) is float and args.rope_theta == 500.0
    assert (args.moe_args.num_experts, args.moe_args.num_limited_groups) == (16, 2)
    assert args.moe_args.top_k == 3 and args.moe_args.score_func == "sigmoid"
    assert dataclasses.asdict(registered) == before
    with pytest.raises(dataclasses.FrozenInstanceError):
        registered.n_layers = 2


def test_none_unsets_an_optional_field_only():
    limited = deepseekv3_args["debugmodel_node_limited"]
    off = {"num_expert_groups": "none", "num_limited_groups": "none", "load_balance_coeff": "none"}
    args = override_fields(limited, {"moe_args": off}, "model.args")
    assert args.moe_args.num_expert_groups is None and args.moe_args.load_balance_coeff is None
    with pytest.raises(UserError, match=r'^model.args.n_layers = "none" is of the wrong type'):
        override_fields(limited, {"n_layers": "none"}, "model.args")


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"n_layer": 2}, "model.args.n_layer is not a model argument; did you mean 'n_layers'?"),
        (
            {"moe_args": {"topk": 2}},
            "model.args.moe_args.topk is not a model argument; did you mean 'top_k'?",
        ),
        (
            {"n_layers": 2.0},
            "model.args.n_layers = 2.0 is of the wrong type: this model has 6; write a value "
            "of that type.",
        ),
        (
            {"n_layers": True},
            "model.args.n_layers = true is of the wrong type: this model has 6; write a "
            "value of that type.",
        ),
        (
            {"moe_args": {"route_norm": "yes"}},
            'model.args.moe_args.route_norm = "yes" is of the wrong type: this model has true; '
            "write a value of that type.",
        ),
        (
            {"attn_mask_type": "blockcausal"},
            'model.args.attn_mask_type = "blockcausal" is not an allowed value; did you mean '
            "'block_causal'?",
        ),
        (
            {"yarn": True},
            "model.args.yarn = true is not an allowed value; choose one of 'auto', 'off', 'on'.",
        ),
        (
            {"moe_args": {"num_expert_groups": 3, "num_limited_groups": 1}},
            "model.args.moe_args: num_expert_groups (3) must divide num_experts (8); the nearest "
            "that does is 2.",
        ),
        ({"dim": 0}, "model.args: dim (0) must be above 0."),
        (
            {"max_seq_len": 64},
            "model.args.max_seq_len (64) must be at least seq_len (128); leave it out to follow "
            "seq_len.",
        ),
        (
            {"n_dense_layers": 7},
            "model.args: n_dense_layers (7) must lie between 0 and n_layers (6).",
        ),
        ({"q_lora_rank": -1}, "model.args: q_lora_rank (-1) must be 0 (no compression) or more."),
        (
            {"qk_rope_head_dim": 63},
            "model.args: qk_rope_head_dim (63) must be even: RoPE rotates pairs.",
        ),
        ({"rope_factor": 0.5}, "model.args: rope_factor (0.5) must be 1 or more."),
    ],
)
def test_wrong_overrides_are_refused_in_one_sentence(overrides, message):
    with pytest.raises(UserError) as caught:
        deepseekv3_args["debugmodel"].for_run(overrides=overrides, seq_len=128)
    assert str(caught.value) == message


def test_a_table_of_arguments_cannot_be_replaced_by_a_number():
    with pytest.raises(UserError, match=r"^model.args.moe_args = 3 is of the wrong type"):
        override_fields(TINY, {"moe_args": 3}, "model.args")


def test_max_seq_len_follows_the_run_unless_set():
    assert TINY.for_run(overrides={}, seq_len=512).max_seq_len == 512
    assert TINY.for_run(overrides={"max_seq_len": 1024}, seq_len=512).max_seq_len == 1024


def test_forced_balance_is_set_for_the_run_and_refused_without_experts():
    args = TINY.for_run(overrides={}, seq_len=16, force_load_balance=True)
    assert args.moe_args._debug_force_load_balance and not TINY.moe_args._debug_force_load_balance
    dense = BaseModelArgs(vocab_size=8, max_seq_len=16, dim=8, n_layers=1)
    with pytest.raises(
        UserError, match="debug.moe_force_load_balance is true, but this model has no"
    ):
        dense.for_run(overrides={}, seq_len=16, force_load_balance=True)


@pytest.mark.parametrize(
    "yarn, max_seq_len, stretched",
    [
        ("auto", 4096, False),
        ("auto", 4097, True),
        ("off", 8192, False),
        ("on", 1024, True),
    ],
)
def test_yarn_is_on_when_asked_for_or_when_the_context_outgrows_the_original(
    yarn, max_seq_len, stretched
):
    args = dataclasses.replace(deepseekv3_args["671B"], yarn=yarn, max_seq_len=max_seq_len)
    assert args.use_yarn == stretched and (args.yarn_scaling is not None) == stretched
    if stretched:
        assert args.yarn_scaling == Yarn(40.0, 4096, beta_fast=32.0, beta_slow=1.0)
    factor = 1.87385 if stretched else 1.0
    assert args.softmax_scale == pytest.approx(factor * 192**-0.5, rel=1e-5)


def test_yarns_numbers_can_be_set():
    numbers = {"rope_factor": 8.0, "original_seq_len": 64, "beta_fast": 16.0, "beta_slow": 2.0}
    args = override_fields(TINY, {"yarn": "on", "mscale": 0.5, **numbers}, "model.args")
    assert args.yarn_scaling == Yarn(*numbers.values())
    assert args.softmax_scale == pytest.approx(12**-0.5 * (0.05 * math.log(8) + 1) ** 2)


# ---------------------------------------------------------------------------------------------
# FLOPs
# ---------------------------------------------------------------------------------------------


def whole_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask=None) -> Tensor:
    """Causal attention as plain products, which FlopCounterMode can count without any padding."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    scores = scale * q @ k.transpose(2, 3)
    ahead = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return (scores.masked_fill(ahead, -torch.inf).softmax(dim=-1) @ v).transpose(1, 2)


@pytest.mark.parametrize("q_lora_rank", [0, 8])
@pytest.mark.parametrize("shared", [0, 2])
def test_flops_per_token_are_those_that_torch_counts(monkeypatch, q_lora_rank, shared):
    monkeypatch.setattr(attention_file, "attention", whole_attention)
    moe_args = dataclasses.replace(TINY.moe_args, num_shared_experts=shared)
    args = dataclasses.replace(TINY, q_lora_rank=q_lora_rank, moe_args=moe_args)
    torch.manual_seed(0)
    model = DeepSeekV3Model(args)
    model.init_weights()
    tokens = torch.randint(0, args.vocab_size, (2, 24))
    with FlopCounterMode(display=False) as counter:
        model(tokens).sum().backward()
    counted = counter.get_total_flops() / tokens.numel()
    assert args.train_flops_per_token(24, causal=False) == pytest.approx(counted, rel=1e-9)


def test_causal_flops_leave_out_half_of_the_attention_core():
    seq_len = 100
    core = 3 * 2 * TINY.n_layers * TINY.n_heads * (12 + 6) * seq_len  # q·k 12 channels, v 6
    whole = TINY.train_flops_per_token(seq_len, causal=False)
    assert whole - TINY.train_flops_per_token(seq_len) == core / 2


def test_671b_needs_six_flops_per_activated_weight():
    """36.7 B activated weights, 0.9 B of them embedding (DeepSeek-V3 README)."""
    args = deepseekv3_args["671B"]
    assert args.train_flops_per_token(0) / 6 == pytest.approx(36.7e9 - 0.9e9, rel=0.03)
