"""Whole folders between us and transformers: config.json, files, FP8, both directions."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.integrations import finegrained_fp8

from tests.parity_tests.test_deepseek_hf import CASES, Case, batch, needs_v2_mscale, v2, v2_lite, v3
from torchtitan.components.checkpoint.convert import checkpoint_to_hf, hf_to_checkpoint
from torchtitan.components.huggingface.folder import HFFolder
from torchtitan.components.huggingface.load_save import load_hf, save_hf
from torchtitan.models.deepseek_v3 import DeepSeekV3Model, DeepSeekV3StateDictAdapter
from torchtitan.ops.block_fp8 import FP8

FAMILIES = [
    pytest.param(v3(yarn=False), id="V3"),
    pytest.param(v3(yarn=True), id="V3 with YaRN"),
    pytest.param(v2_lite(yarn=False), id="V2-Lite"),
    pytest.param(v2(), id="V2", marks=needs_v2_mscale),
]


def ours(case: Case) -> DeepSeekV3Model:
    model = DeepSeekV3Model(case.args())
    model.init_weights()
    with torch.no_grad():
        for param in model.parameters():
            if param.ndim > 1:
                param.normal_(std=0.15)
        for moe in model.moe_layers().values():
            if moe.expert_bias is not None:
                moe.expert_bias.normal_(std=0.3).add_(7)
    return model


def to_hf(case: Case, model: DeepSeekV3Model, folder: Path, dtype=torch.float32) -> Path:
    save_hf(model, DeepSeekV3StateDictAdapter(case.args()), folder, dtype=dtype)
    return folder


@pytest.mark.parametrize("case", FAMILIES)
def test_transformers_opens_our_folder_and_gives_our_logits(case, tmp_path):
    """Its config.json is ours too: nothing but the folder is given."""
    model = ours(case)
    folder = to_hf(case, model, tmp_path / "hf")
    theirs = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    tokens = batch()
    expected = theirs(tokens).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(model(tokens), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_their_config_says_the_arguments_that_we_had_by_hand(case, tmp_path):
    case.hf_model().config.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    args = DeepSeekV3StateDictAdapter.args_of(config)
    free = {} if case.yarn else {"original_seq_len": ORIGINAL}
    mscale = {"mscale": args.mscale if case.yarn else case.mscale}
    assert dataclasses.replace(args, **free, **mscale) == case.args()


ORIGINAL = v3(yarn=False).args().original_seq_len


@pytest.fixture(scope="module")
def v3_bf16(tmp_path_factory) -> Path:
    """transformers' own folder of a toy V3: bf16, and fp32 biases that begin at 0."""
    model = v3(yarn=True).hf_model().to(torch.bfloat16)
    for layer in model.model.layers[1:]:
        bias = torch.randn(8)
        layer.mlp.gate.e_score_correction_bias = bias - bias.min()
    folder = tmp_path_factory.mktemp("v3") / "hf"
    model.save_pretrained(folder)
    return folder


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name


def test_through_a_model_and_back_is_bitwise(v3_bf16, tmp_path):
    case = v3(yarn=True)
    model = DeepSeekV3Model(case.args())
    load_hf(model, DeepSeekV3StateDictAdapter(case.args()), v3_bf16)
    folder = to_hf(case, model, tmp_path / "hf", torch.bfloat16)
    assert_same(tensors_of(folder), tensors_of(v3_bf16))


def test_through_a_checkpoint_and_back_is_bitwise(v3_bf16, tmp_path):
    folder = HFFolder(v3_bf16)
    adapter = DeepSeekV3StateDictAdapter(DeepSeekV3StateDictAdapter.args_of(folder.config))
    hf_to_checkpoint(folder, tmp_path / "ours", adapter, model="deepseek_v3", flavor="toy")
    checkpoint_to_hf(tmp_path / "ours", tmp_path / "back", adapter, dtype=torch.bfloat16)
    assert_same(tensors_of(tmp_path / "back"), tensors_of(v3_bf16))


# ---------------------------------------------------------------------------------------------
# FP8
# ---------------------------------------------------------------------------------------------


def wide() -> Case:
    """Sizes that leave ragged blocks, and more than one a row."""
    case = v3(yarn=False)
    theirs = case.theirs | {"intermediate_size": 200}
    return dataclasses.replace(case, theirs=theirs, ours=case.ours | {"inter_dim": 200})


@pytest.fixture(scope="module")
def fp8(tmp_path_factory) -> tuple[Path, Path]:
    """A checkpoint and the FP8 folder that was made of it."""
    base = tmp_path_factory.mktemp("fp8")
    adapter = wide_adapter()
    torch.manual_seed(3)
    model = wide_model()
    save_hf(model, adapter, base / "fp32", dtype=torch.float32)
    source = HFFolder(base / "fp32")
    hf_to_checkpoint(source, base / "ours", adapter, model="deepseek_v3", flavor="toy")
    checkpoint_to_hf(base / "ours", base / "fp8", adapter, dtype=torch.bfloat16, fp8=True)
    return base / "ours", base / "fp8"


def wide_args():
    return dataclasses.replace(v3(yarn=False).args(), inter_dim=200)


def wide_adapter() -> DeepSeekV3StateDictAdapter:
    return DeepSeekV3StateDictAdapter(wide_args())


def wide_model() -> DeepSeekV3Model:
    model = DeepSeekV3Model(wide_args())
    model.init_weights()
    return model


def test_fp8_files_hold_what_deepseeks_hold(fp8):
    tensors = tensors_of(fp8[1])
    for name, tensor in tensors.items():
        if name.endswith("_scale_inv"):
            assert tensor.dtype == torch.float32
            weight = tensors[name.removesuffix("_scale_inv")]
            assert tuple(tensor.shape) == tuple(-(-n // 128) for n in weight.shape)
        elif name.endswith("bias"):
            assert tensor.dtype == torch.float32
        elif "proj" in name:
            assert tensor.dtype == FP8 and name + "_scale_inv" in tensors
        else:  # embedding, head, norms, gate
            assert tensor.dtype == torch.bfloat16
    config = json.loads((fp8[1] / "config.json").read_text())
    assert config["quantization_config"] == {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    }


def test_what_we_dequantise_is_what_transformers_does(fp8):
    tensors = tensors_of(fp8[1])
    model = wide_model()
    load_hf(model, wide_adapter(), fp8[1], quantized=True)
    exported = wide_adapter().to_hf(model.state_dict())
    dequantize = finegrained_fp8.Fp8Dequantize._dequantize_one
    compared = 0
    for name, scale in tensors.items():
        if name.endswith("_scale_inv"):
            name = name.removesuffix("_scale_inv")
            if any(n > 128 and n % 128 for n in tensors[name].shape):
                continue  # transformers stretches ragged grids; unit_tests/ops has the formula
            expected = dequantize(object(), tensors[name], scale, output_dtype=torch.float32)
            assert torch.equal(exported[name], expected), name
            compared += 1
    assert compared > 50


def test_fp8_goes_back_to_the_same_fp8_and_scales(fp8, tmp_path):
    """Also: what comes back differs from the weights by the format's rounding only."""
    source = HFFolder(fp8[1])
    args = (tmp_path / "again", wide_adapter())
    hf_to_checkpoint(source, *args, model="deepseek_v3", flavor="toy", dtype=torch.float32)
    options = {"dtype": torch.bfloat16, "fp8": True}
    checkpoint_to_hf(tmp_path / "again", tmp_path / "fp8", wide_adapter(), **options)
    again, before = tensors_of(tmp_path / "fp8"), tensors_of(fp8[1])
    for name, tensor in before.items():
        if tensor.dtype == FP8:
            assert torch.equal(again[name].float(), tensor.float()), name
        elif name.endswith("_scale_inv"):
            torch.testing.assert_close(again[name], tensor, rtol=2e-7, atol=0)
    checkpoint_to_hf(fp8[0], tmp_path / "twice", wide_adapter(), **options)
    assert_same(
        {n: t.view(torch.uint8) for n, t in tensors_of(tmp_path / "twice").items()},
        {n: t.view(torch.uint8) for n, t in before.items()},
    )


# ---------------------------------------------------------------------------------------------
# The bias
# ---------------------------------------------------------------------------------------------


def test_a_bias_near_7_keeps_its_digits_and_its_choices(tmp_path, caplog):
    case = v3(yarn=False)
    model = ours(case)
    before = {n: b.clone() for n, b in model.named_buffers() if n.endswith("expert_bias")}
    with caplog.at_level("INFO"):
        folder = to_hf(case, model, tmp_path / "hf", torch.bfloat16)
    assert "of tokens get other experts" in caplog.text
    written = {n: t for n, t in tensors_of(folder).items() if n.endswith("correction_bias")}
    assert len(written) == len(before)
    for bias, tensor in zip(before.values(), written.values(), strict=True):
        assert tensor.dtype == torch.float32
        assert tensor.min() == 0
        torch.testing.assert_close(tensor - tensor[0], bias - bias[0], rtol=0, atol=1e-6)


def test_the_report_counts_the_tokens_that_change_experts():
    """Against a router that is rounded and applied by hand."""
    case = v3(yarn=False)
    model, adapter = ours(case), DeepSeekV3StateDictAdapter(case.args())
    state = {n: t for n, t in model.state_dict().items() if n in adapter.router_names()}
    coarse = {n: t.to(torch.float8_e4m3fn).float() if "gate" in n else t for n, t in state.items()}
    shares = adapter.routing_changes(state, coarse)
    assert shares.keys() == {"layers.1", "layers.2"}
    assert all(0.005 < share < 0.9 for share in shares.values()), shares
    assert set(adapter.routing_changes(state, state).values()) == {0.0}
    # The same choice by hand for one layer, in fp64.
    norm, gate = state["layers.1.ffn_norm.weight"], "layers.1.moe.router.gate.weight"
    x = torch.randn(2048, case.args().dim, generator=torch.Generator().manual_seed(0)).double()
    x = x / (x.square().mean(-1, keepdim=True) + 1e-15).sqrt() * norm.double()
    chosen = []
    for each in (state, coarse):
        biased = (x @ each[gate].double().T).sigmoid() + each["layers.1.moe.expert_bias"].double()
        groups = biased.unflatten(1, (4, 2))
        left_out = groups.sum(-1).argsort(descending=True)[:, 2:]
        groups = groups.scatter(1, left_out[..., None].expand(-1, -1, 2), -100.0)
        chosen.append(groups.flatten(1).argsort(descending=True)[:, :3].sort().values)
    expected = (chosen[0] != chosen[1]).any(-1).double().mean().item()
    assert shares["layers.1"] == pytest.approx(expected, abs=2e-3)


# ---------------------------------------------------------------------------------------------
# RoPE's other layout
# ---------------------------------------------------------------------------------------------


def test_rotary_halves_are_put_in_pairs_on_loading(tmp_path):
    """transformers computes with either layout, as config.json says."""
    case = v3(yarn=False)
    theirs = case.hf_model()
    halves = copy_with_halves(case, theirs)
    halves.save_pretrained(tmp_path)
    model = DeepSeekV3Model(case.args())
    load_hf(model, DeepSeekV3StateDictAdapter(case.args()), tmp_path)
    tokens = batch()
    torch.testing.assert_close(model(tokens), halves(tokens).logits, rtol=0, atol=1e-5)


def copy_with_halves(case: Case, model):
    """The same function with `rope_interleave: false`: even rotary rows first, then odd ones."""
    config = model.config.to_dict() | {"rope_interleave": False}
    other = case.model(case.config(**config))
    state = model.state_dict()
    args = case.args()
    evens_first = torch.arange(args.qk_rope_head_dim).view(-1, 2).T.flatten()
    for name, tensor in state.items():
        if name.endswith("q_b_proj.weight"):
            heads = tensor.unflatten(0, (args.n_heads, -1)).clone()
        elif name.endswith("kv_a_proj_with_mqa.weight"):
            heads = tensor[None].clone()
        else:
            continue
        rope = heads[:, -args.qk_rope_head_dim :]
        heads[:, -args.qk_rope_head_dim :] = rope[:, evens_first]
        state[name] = heads.flatten(0, 1)
    other.load_state_dict(state)
    return other
