"""Adapters of ours in transformers and PEFT: alone and merged, the same logits as here."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from tests.parity_tests.test_deepseek_hf import batch, v3
from tests.parity_tests.test_hf_export import QWEN, args_of, assert_same_logits
from torchtitan.components.checkpoint.adapters import (
    Merge,
    load_adapters,
    save_adapters,
)
from torchtitan.components.finetuning.lora import adapter_sizes, add_adapters
from torchtitan.components.huggingface.load_save import save_hf
from torchtitan.config import LoRA, LoRAOverride
from torchtitan.models.deepseek_v3 import (
    DeepSeekV3Model,
    DeepSeekV3ModelArgs,
    DeepSeekV3StateDictAdapter,
)
from torchtitan.models.moe import MoEArgs
from torchtitan.models.qwen3 import Qwen3Model, Qwen3StateDictAdapter
from torchtitan.tools.errors import UserError

QWEN_MOE = type(QWEN)(
    **vars(QWEN)
    | {
        "moe_enabled": True,
        "moe_inter_dim": 16,
        "moe_args": MoEArgs(
            num_experts=8,
            num_shared_experts=0,
            top_k=3,
            score_func="softmax",
            route_norm=True,
            score_before_experts=False,
            load_balance_coeff=None,
        ),
    }
)
MODELS = {
    "deepseek": lambda: args_of(v3(yarn=True)),
    "qwen": lambda: QWEN,
    "qwen experts": lambda: QWEN_MOE,
}
LORAS = {
    "all": LoRA(rank=4, alpha=6.0),
    "attention": LoRA(rank=4, alpha=6.0, fqns=["*.attention.*"]),
    "one layer, several sizes": LoRA(
        rank=4,
        alpha=6.0,
        fqns=["layers.1.*"],
        override=[
            LoRAOverride(fqns=["*.w2"], rank=3),
            LoRAOverride(fqns=["*.wo"], rank=2, alpha=5.0),
        ],
    ),
}


def adapted(args, lora: LoRA):
    """A model whose adapters have learned something."""
    kinds = (DeepSeekV3Model, DeepSeekV3StateDictAdapter), (Qwen3Model, Qwen3StateDictAdapter)
    model_cls, adapter_cls = kinds[0 if isinstance(args, DeepSeekV3ModelArgs) else 1]
    torch.manual_seed(0)
    model = model_cls(args)
    model.init_weights()
    add_adapters(model, lora)
    for name, param in model.named_parameters():
        if "lora" in name:
            nn.init.normal_(param, std=0.15)
    return model.eval(), adapter_cls(args), adapter_sizes(model, lora)


def base_folder(model, adapter, folder: Path) -> Path:
    save_hf(model, adapter, folder, dtype=torch.float32)
    return folder


@pytest.mark.parametrize("lora", LORAS)
@pytest.mark.parametrize("kind", MODELS)
def test_peft_computes_our_logits(kind, lora, tmp_path):
    peft = pytest.importorskip("peft", minversion="0.20", reason="PEFT 0.20 is not installed")
    model, adapter, sizes = adapted(MODELS[kind](), LORAS[lora])
    save_hf(model, adapter, tmp_path / "base", dtype=torch.float32)
    save_adapters(model, adapter, sizes, tmp_path / "adapter", dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager")
    plain = base.eval()(batch()).logits
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()(batch()).logits
    assert (theirs - plain).abs().max() > 0.05
    torch.testing.assert_close(model(batch()), theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("lora", LORAS)
@pytest.mark.parametrize("kind", MODELS)
def test_merged_weights_are_base_and_product_to_the_bit(kind, lora, tmp_path):
    model, adapter, sizes = adapted(MODELS[kind](), LORAS[lora])
    save_hf(model, adapter, tmp_path / "base", dtype=torch.float32)
    save_adapters(model, adapter, sizes, tmp_path / "adapter", dtype=torch.float32)
    save_hf(model, adapter, tmp_path / "merged", dtype=torch.float32, merge=Merge(sizes))
    base, merged = (read_all(tmp_path / name) for name in ("base", "merged"))
    factors = read_all(tmp_path / "adapter")
    of_name = {piece.name: piece for piece in adapter.pieces()}
    changed = 0
    for name, weight in base.items():
        a = factors.get(f"base_model.model.{name.removesuffix('.weight')}.lora_A.weight")
        if a is not None:
            b = factors[f"base_model.model.{name.removesuffix('.weight')}.lora_B.weight"]
            size = sizes[of_name[name].ours.removesuffix(".weight")]
            weight = weight + (size.alpha / size.rank) * (b @ a)
            changed += 1
        assert torch.equal(merged[name], weight), name
    assert base.keys() == merged.keys() and 2 * changed == len(factors) > 0
    assert_same_logits(model, tmp_path / "merged")


def read_all(folder: Path) -> dict:
    return {n: t for f in sorted(folder.glob("*.safetensors")) for n, t in load_file(f).items()}


def test_an_adapter_folder_is_loaded_back_and_only_by_such_a_run(tmp_path):
    lora = LoRA(rank=4, alpha=6.0)
    model, adapter, sizes = adapted(MODELS["deepseek"](), lora)
    save_adapters(model, adapter, sizes, tmp_path / "a", dtype=torch.float32)
    expected = {n: t.clone() for n, t in model.state_dict().items()}
    for name, param in model.named_parameters():
        if "lora" in name:
            nn.init.zeros_(param)
    load_adapters(model, adapter, sizes, tmp_path / "a")
    assert all(torch.equal(t, expected[n]) for n, t in model.state_dict().items())
    for other, words in [
        (LoRA(rank=2, alpha=6.0), r"lora_A.weight \(4, 32\) instead of \(2, 32\)"),
        (LoRA(rank=4, alpha=8.0), "lora_alpha 6.0 instead of 8.0"),
        (LoRA(rank=4, alpha=6.0, fqns=["*.attention.*"]), "also has"),
    ]:
        model, adapter, sizes = adapted(MODELS["deepseek"](), other)
        with pytest.raises(UserError, match=words):
            load_adapters(model, adapter, sizes, tmp_path / "a")


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        (LoRA(fqns=["*.experts.w1", "*.experts.w2"]), "w1 and .*w3 must have"),
        (LoRA(override=[LoRAOverride(fqns=["*.experts.w3"], rank=2)]), "one rank and one alpha"),
    ],
)
def test_what_peft_cannot_hold_is_refused(lora, words, tmp_path):
    model, adapter, sizes = adapted(MODELS["deepseek"](), lora)
    with pytest.raises(UserError, match=words):
        save_adapters(model, adapter, sizes, tmp_path / "a", dtype=torch.float32)


def test_the_names_are_those_that_peft_writes(tmp_path):
    model, adapter, sizes = adapted(QWEN, LoRA(rank=4, alpha=6.0))
    save_adapters(model, adapter, sizes, tmp_path / "a", dtype=torch.bfloat16)
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    assert tensors[name].shape == (4, 32) and tensors[name].dtype == torch.bfloat16
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 6.0)
    leaves = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"
    assert sorted(config["target_modules"]) == sorted(leaves.split())
    assert config["target_parameters"] is None
