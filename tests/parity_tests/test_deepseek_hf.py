"""Our model with Hugging Face's weights is Hugging Face's model: logits, loss, gradients, training.

Weights pass through files (`save_pretrained`), so names and layouts are those that people download.
"""

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    PreTrainedModel,
)
from transformers.models.deepseek_v2 import modeling_deepseek_v2

from torchtitan.models.deepseek_v3 import (
    DeepSeekV3Model,
    DeepSeekV3ModelArgs,
    DeepSeekV3StateDictAdapter,
)
from torchtitan.models.moe import MoEArgs
from torchtitan.tools.errors import UserError

VOCAB, BATCH, SEQ = 96, 2, 48
ORIGINAL_SEQ = 32  # YaRN's 4096, scaled down, so that SEQ lies beyond it

# Sizes under our names and theirs.
OUR_SIZES = {
    "vocab_size": VOCAB,
    "max_seq_len": 64,
    "dim": 32,
    "inter_dim": 48,
    "moe_inter_dim": 16,
    "n_layers": 3,
    "n_dense_layers": 1,
    "n_heads": 4,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "original_seq_len": ORIGINAL_SEQ,
}
THEIR_SIZES = {
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "rms_norm_eps": 1e-6,
    "pad_token_id": None,
    "tie_word_embeddings": False,
    "attn_implementation": "eager",
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One architecture, described twice."""

    config: type
    model: type
    theirs: dict
    ours: dict
    moe: dict
    yarn: bool
    mscale: float = 1.0

    def hf_model(self) -> PreTrainedModel:
        rope = {"rope_type": "default", "rope_theta": 10000.0}
        if self.yarn:
            rope |= {
                "rope_type": "yarn",
                "factor": 40.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "mscale": self.mscale,
                "mscale_all_dim": self.mscale,
                "original_max_position_embeddings": ORIGINAL_SEQ,
            }
        torch.manual_seed(0)
        model = self.model(self.config(**THEIR_SIZES, **self.theirs, rope_parameters=rope))
        for name, param in model.named_parameters():
            # Large enough for scores, gates and attention to differ much from token to token.
            nn.init.normal_(param, mean=1.0 if "norm" in name else 0.0, std=0.15)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                nn.init.normal_(buffer, std=0.3)
        return model

    def args(self) -> DeepSeekV3ModelArgs:
        return DeepSeekV3ModelArgs(
            **OUR_SIZES,
            **self.ours,
            yarn="on" if self.yarn else "off",
            mscale=self.mscale,
            moe_args=MoEArgs(score_before_experts=False, **self.moe),
        )


def v3(*, yarn: bool) -> Case:
    theirs = {
        "q_lora_rank": 24,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 3,
        "n_group": 4,
        "topk_group": 2,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "num_nextn_predict_layers": 0,
    }
    moe = {
        "num_experts": 8,
        "num_shared_experts": 1,
        "top_k": 3,
        "num_expert_groups": 4,
        "num_limited_groups": 2,
        "score_func": "sigmoid",
        "route_norm": True,
        "route_scale": 2.5,
    }
    ours = {"q_lora_rank": 24}
    return Case(DeepseekV3Config, DeepseekV3ForCausalLM, theirs, ours, moe, yarn)


def v2_lite(*, yarn: bool, mscale: float = 0.707) -> Case:
    theirs = {
        "q_lora_rank": None,
        "n_routed_experts": 8,
        "n_shared_experts": 2,
        "num_experts_per_tok": 3,
        "topk_method": "greedy",
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
    }
    moe = {
        "num_experts": 8,
        "num_shared_experts": 2,
        "top_k": 3,
        "score_func": "softmax",
        "load_balance_coeff": None,
    }
    return Case(DeepseekV2Config, DeepseekV2ForCausalLM, theirs, {}, moe, yarn, mscale)


def v2() -> Case:
    lite = v2_lite(yarn=True, mscale=1.0)
    groups = {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}
    theirs = groups | {"q_lora_rank": 24, "routed_scaling_factor": 16.0}
    limits = {"num_expert_groups": 4, "num_limited_groups": 2, "group_score_func": "max"}
    return dataclasses.replace(
        lite,
        theirs=lite.theirs | theirs,
        ours={"q_lora_rank": 24},
        moe=lite.moe | limits | {"route_scale": 16.0},
    )


# transformers' V2 left the mscale² out of its softmax scale until huggingface/transformers#47435.
# Our factor is tested against the formula in unit_tests/ops/test_rope.py as well.
needs_v2_mscale = pytest.mark.skipif(
    not hasattr(modeling_deepseek_v2, "yarn_apply_mscale"),
    reason="this transformers has DeepSeek-V2 without YaRN's softmax factor (transformers#47435)",
)
CASES = [
    pytest.param(v3(yarn=False), id="V3"),
    pytest.param(v3(yarn=True), id="V3 with YaRN"),
    pytest.param(v2_lite(yarn=False), id="V2-Lite"),
    pytest.param(v2_lite(yarn=True), id="V2-Lite with YaRN", marks=needs_v2_mscale),
    # With mscale near 0 the factor is 1, fixed or not: YaRN's frequencies on their own.
    # (transformers takes an mscale of exactly 0 for "not given".)
    pytest.param(v2_lite(yarn=True, mscale=1e-9), id="V2-Lite with YaRN, factor neutral"),
    pytest.param(v2(), id="V2", marks=needs_v2_mscale),
]


def on_disk(model: PreTrainedModel, folder: Path) -> dict[str, Tensor]:
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def converted(case: Case, hf_model: PreTrainedModel, folder: Path) -> DeepSeekV3Model:
    model = DeepSeekV3Model(case.args())
    adapter = DeepSeekV3StateDictAdapter(case.args(), str(folder))
    model.load_state_dict(adapter.from_hf(on_disk(hf_model, folder)), strict=True)
    return model


def gradients_of(case: Case, hf_model: PreTrainedModel, folder: Path) -> dict[str, Tensor]:
    """Hugging Face's gradients under our names: saved and converted as if they were weights."""
    holder = copy.deepcopy(hf_model)
    for slot, param in zip(holder.parameters(), hf_model.parameters(), strict=True):
        slot.data = param.grad.clone()
    return DeepSeekV3StateDictAdapter(case.args()).from_hf(on_disk(holder, folder))


def batch(step: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randint(0, VOCAB, (BATCH, SEQ), generator=generator)


def next_token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


@pytest.mark.parametrize("case", CASES)
def test_logits_loss_and_gradients_are_hugging_faces(case, tmp_path):
    theirs = case.hf_model()
    ours, tokens = converted(case, theirs, tmp_path), batch()
    expected = theirs(input_ids=tokens, labels=tokens)
    logits = ours(tokens)
    assert expected.logits.std() > 0.1  # differences mean something
    torch.testing.assert_close(logits, expected.logits, rtol=0, atol=1e-5)
    loss = next_token_loss(logits, tokens)
    torch.testing.assert_close(loss, expected.loss, rtol=0, atol=1e-5)

    loss.backward()
    expected.loss.backward()
    gradients = gradients_of(case, theirs, tmp_path / "gradients")
    named = dict(ours.named_parameters())
    assert set(named) == {name for name in gradients if not name.endswith("expert_bias")}
    for name, param in named.items():
        assert param.grad.any(), name
        torch.testing.assert_close(
            param.grad, gradients[name], rtol=0, atol=1e-5, msg=lambda t, n=name: f"{n}: {t}"
        )


@pytest.mark.parametrize("case", CASES)
def test_ten_adamw_steps_stay_together(case, tmp_path):
    theirs = case.hf_model()
    ours = converted(case, theirs, tmp_path)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-3) for m in (theirs, ours)]
    losses = []
    for step in range(10):
        tokens = batch(step % 2)
        pair = theirs(input_ids=tokens, labels=tokens).loss, next_token_loss(ours(tokens), tokens)
        for optimizer, loss in zip(optimizers, pair, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append([loss.item() for loss in pair])
    for expected, loss in losses:
        assert loss == pytest.approx(expected, abs=1e-4)
    assert losses[-1][0] < losses[0][0] - 0.1  # they have moved


@pytest.mark.parametrize("case", CASES[:1] + CASES[2:3])
def test_conversion_there_and_back_changes_no_bit_and_no_name(case, tmp_path):
    state = on_disk(case.hf_model(), tmp_path)
    adapter = DeepSeekV3StateDictAdapter(case.args())
    back = adapter.to_hf(adapter.from_hf(state))
    assert sorted(back) == sorted(state)
    for name, tensor in state.items():
        assert back[name].dtype == tensor.dtype and torch.equal(back[name], tensor)


def test_hugging_face_loads_what_we_export(tmp_path):
    case = v3(yarn=True)
    ours = DeepSeekV3Model(case.args())
    ours.init_weights()
    for moe in ours.moe_layers().values():
        moe.expert_bias.normal_()
    case.hf_model().save_pretrained(tmp_path)  # for its config.json
    exported = DeepSeekV3StateDictAdapter(case.args()).to_hf(ours.state_dict())
    save_file(exported, tmp_path / "model.safetensors", metadata={"format": "pt"})
    theirs = DeepseekV3ForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    tokens = batch()
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=0, atol=1e-5)


# ---------------------------------------------------------------------------------------------
# What the adapter refuses, and what it leaves out
# ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def v3_state(tmp_path_factory) -> dict[str, Tensor]:
    return on_disk(v3(yarn=False).hf_model(), tmp_path_factory.mktemp("v3"))


def adapter() -> DeepSeekV3StateDictAdapter:
    return DeepSeekV3StateDictAdapter(v3(yarn=False).args())


WAY_OUT = (
    ", unlike the model of these model.args: make them match its config.json "
    "(with model.args.moe_args.load_balance_coeff experts have a bias)."
)


def refusal(state: dict[str, Tensor], **moe) -> str:
    args = v3(yarn=False).args()
    args = dataclasses.replace(args, moe_args=dataclasses.replace(args.moe_args, **moe))
    with pytest.raises(UserError) as caught:
        DeepSeekV3StateDictAdapter(args).from_hf(state)
    sentence = str(caught.value)
    assert sentence.endswith(WAY_OUT)
    return sentence.removesuffix(WAY_OUT).removeprefix("the Hugging Face state dict ")


def test_tensors_that_the_model_has_not_are_refused_by_name(v3_state):
    unknown = {"model.layers.0.mlp.wi.weight": torch.zeros(1), "extra": torch.zeros(1)}
    assert refusal(v3_state | unknown) == "has extra (and 1 other names)"
    name = "model.layers.1.mlp.experts.{}.up_proj.weight"
    state = v3_state | {name.format(8): v3_state[name.format(7)]}
    assert refusal(state) == f"has {name.format(8)} (and 0 other names)"
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert refusal(v3_state, load_balance_coeff=None) == f"has {bias} (and 1 other names)"


def test_missing_tensors_are_refused_by_name(v3_state):
    def without(part: str) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in v3_state.items() if part not in name}

    for part, name, others in (
        ("model.norm.", "model.norm.weight", 0),
        ("2.mlp.experts.5.down", "model.layers.2.mlp.experts.5.down_proj.weight", 0),
        ("2.mlp.experts", "model.layers.2.mlp.experts.0.down_proj.weight", 23),
        ("correction_bias", "model.layers.1.mlp.gate.e_score_correction_bias", 1),
    ):
        assert refusal(without(part)) == f"lacks {name} (and {others} other names)"


def test_the_multi_token_prediction_layer_is_left_out(v3_state):
    expected = adapter().from_hf(v3_state)
    extra = {
        "model.layers.3.eh_proj.weight": torch.zeros(1),
        "model.layers.3.enorm.weight": torch.zeros(1),
        "model.layers.3.mlp.experts.0.up_proj.weight": torch.zeros(1),
    }
    assert adapter().from_hf(v3_state | extra).keys() == expected.keys()


def test_exported_tensors_share_no_memory_that_safetensors_refuses():
    model = DeepSeekV3Model(v3(yarn=False).args())
    exported = adapter().to_hf(model.state_dict())
    storages = [tensor.untyped_storage().data_ptr() for tensor in exported.values()]
    assert len(set(storages)) == len(storages)
