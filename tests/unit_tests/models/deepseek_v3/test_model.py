"""Attention equals its slow twin, packed documents stay apart, and names are pinned."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.reference.mla import frequencies, mla
from torchtitan.models.deepseek_v3 import DeepSeekV3Model, DeepSeekV3ModelArgs, deepseekv3_args
from torchtitan.models.deepseek_v3.model import Attention
from torchtitan.models.moe import MoEArgs
from torchtitan.ops.attention import document_mask, number_documents
from torchtitan.ops.rope import rope_table
from torchtitan.tools.errors import UserError

KEYS = Path(__file__).parents[3] / "assets" / "keys" / "deepseek_v3_debugmodel.txt"
EOS = 0
TINY = DeepSeekV3ModelArgs(
    vocab_size=40,
    max_seq_len=32,
    dim=16,
    inter_dim=24,
    moe_inter_dim=8,
    n_layers=3,
    n_dense_layers=1,
    n_heads=2,
    q_lora_rank=12,
    kv_lora_rank=8,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=6,
    init_std=0.3,
    moe_args=MoEArgs(num_experts=4, top_k=2, route_norm=True, score_before_experts=False),
)


def make_model(**changes) -> DeepSeekV3Model:
    torch.manual_seed(0)
    model = DeepSeekV3Model(dataclasses.replace(TINY, **changes))
    model.init_weights()
    return model


@pytest.mark.parametrize("q_lora_rank", [0, 12])
@pytest.mark.parametrize("yarn", ["off", "on"])
@pytest.mark.parametrize("masked", [False, True], ids=["causal", "documents"])
def test_mla_and_its_gradients_are_the_slow_twins(q_lora_rank, yarn, masked):
    yarn_numbers = {"rope_factor": 4.0, "original_seq_len": 64, "mscale": 0.7}
    args = dataclasses.replace(TINY, q_lora_rank=q_lora_rank, yarn=yarn, **yarn_numbers)
    torch.manual_seed(0)
    layer = Attention(args).double()
    for param in layer.parameters():  # norm weights other than one
        nn.init.normal_(param, mean=0.3 if param.ndim == 1 else 0.0, std=0.3)
    options = {"factor": 4.0, "original": 64, "beta_fast": 32.0, "beta_slow": 1.0}
    freqs = frequencies(4, 10000.0, options if yarn == "on" else None)
    scale = 12**-0.5 * ((0.1 * 0.7 * 1.3862943611198906 + 1) ** 2 if yarn == "on" else 1.0)

    x = torch.randn(2, 9, 16, dtype=torch.float64, requires_grad=True)
    tokens = torch.tensor([[5, 5, EOS, 5, 5, 5, EOS, 5, 5], [5] * 9])
    mask = document_mask(number_documents(tokens, EOS)) if masked else None
    table = rope_table(4, 32, 10000.0, args.yarn_scaling)
    state = {n: p.detach().clone().requires_grad_() for n, p in layer.named_parameters()}
    x_twin = x.detach().clone().requires_grad_()
    sizes = {"n_heads": 2, "nope": 8, "v_channels": 6, "freqs": freqs, "scale": scale}
    sees = [mask[b, 0] if masked else None for b in range(2)]
    expected = torch.stack([mla(x_twin[b], state, **sizes, may_see_SS=sees[b]) for b in range(2)])
    out = layer(x, table, mask)
    weights = torch.randn(out.shape, dtype=torch.float64)
    out.backward(weights)
    expected.backward(weights)
    close = {"rtol": 1e-5, "atol": 1e-5}  # the rotary table is fp32
    torch.testing.assert_close(out, expected, **close)
    torch.testing.assert_close(x.grad, x_twin.grad, **close)
    for name, param in layer.named_parameters():
        torch.testing.assert_close(param.grad, state[name].grad, **close)


def test_packed_documents_have_the_logits_they_have_alone():
    model = make_model(attn_mask_type="block_causal")
    first, second = torch.tensor([[7, 3, 9, EOS]]), torch.tensor([[4, 8, 2, 6, 30]])
    packed = torch.cat((first, second), dim=1)
    positions = torch.cat((torch.arange(4), torch.arange(5)))[None]
    mask = model.get_attention_masks(number_documents(packed, EOS))
    alone = model(second)
    # RoPE sees distances only, so the documents' positions may go on counting.
    for at in (positions, None):
        torch.testing.assert_close(model(packed, mask, at)[:, 4:], alone, rtol=1e-4, atol=1e-5)
    causal = make_model()
    assert causal.get_attention_masks(number_documents(packed, EOS)) is None
    assert not torch.allclose(causal(packed)[:, 4:], alone, atol=1e-2)


def test_document_mask_without_an_end_of_text_token_is_refused():
    make_model().model_args.check_tokenizer(None)
    with pytest.raises(
        UserError, match=r"model.args.attn_mask_type 'block_causal' needs a tokenizer"
    ):
        make_model(attn_mask_type="block_causal").model_args.check_tokenizer(None)


def test_no_token_sees_the_next_one():
    model, tokens = make_model(), torch.arange(1, 13)[None]
    changed = tokens.clone()
    changed[0, 8:] = 39
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :8], after[:, :8])
    assert not torch.allclose(before[:, 8], after[:, 8])


def test_first_layers_are_dense_and_the_others_have_experts():
    model = make_model(n_dense_layers=2)
    kinds = ["moe" if hasattr(layer, "moe") else "dense" for layer in model.layers.values()]
    assert kinds == ["dense", "dense", "moe"]
    assert list(model.moe_layers()) == [2] and model.moe_layers()[2] is model.layers["2"].moe


def test_every_norm_has_eps_1e_6():
    for flavor in ("debugmodel", "16B", "236B", "671B"):
        with torch.device("meta"):
            model = DeepSeekV3Model(dataclasses.replace(deepseekv3_args[flavor], n_layers=4))
        norms = {n: m for n, m in model.named_modules() if isinstance(m, nn.RMSNorm)}
        assert "norm" in norms and {norm.eps for norm in norms.values()} == {1e-6}
        assert not any(isinstance(m, nn.LayerNorm) for m in model.modules())


def test_parameter_names_are_a_file_format():
    """A rename breaks everybody's checkpoints; the file is changed by decision only."""
    with torch.device("meta"):
        model = DeepSeekV3Model(deepseekv3_args["debugmodel"])
    state = model.state_dict()
    lines = [f"{name} {tuple(tensor.shape)} {tensor.dtype}" for name, tensor in state.items()]
    assert sorted(lines) == KEYS.read_text().splitlines()
    bias_names = {f"layers.{i}.moe.expert_bias" for i in range(1, 6)}
    assert set(state) - {name for name, _ in model.named_parameters()} == bias_names


def test_initial_weights_follow_the_seed_and_start_without_a_bias():
    model = make_model()
    again = make_model()
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)
    )
    assert torch.equal(model.norm.weight, torch.ones(16))
    assert model.output.weight.std().item() == pytest.approx(0.3, rel=0.1)
    model.layers["1"].moe.expert_bias.fill_(3.0)
    model.layers["1"].moe.tokens_per_expert.fill_(3)
    model.init_weights()
    assert not model.layers["1"].moe.expert_bias.any()
    assert not model.layers["1"].moe.tokens_per_expert.any()


def test_a_model_from_the_meta_device_is_the_plain_one():
    with torch.device("meta"):
        model = DeepSeekV3Model(dataclasses.replace(TINY, yarn="on", original_seq_len=16))
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    model.init_weights(buffer_device=torch.device("cpu"))
    plain = make_model(yarn="on", original_seq_len=16)
    torch.manual_seed(0)
    plain.init_weights()
    tokens = torch.arange(1, 13)[None]
    assert torch.equal(model(tokens), plain(tokens))


def test_a_cast_rounds_weights_but_neither_rotary_table_nor_bias():
    model = make_model()
    model.layers["1"].moe.expert_bias.fill_(7.001)
    table, bias = model.rope.clone(), model.layers["1"].moe.expert_bias.clone()
    model.bfloat16()
    assert model.output.weight.dtype == torch.bfloat16
    assert torch.equal(model.rope, table) and torch.equal(model.layers["1"].moe.expert_bias, bias)
    assert model(torch.arange(1, 13)[None]).dtype == torch.bfloat16


def test_bf16_logits_stay_near_the_fp32_ones():
    tokens = torch.arange(1, 13)[None]
    model = make_model(init_std=0.1)
    exact = model(tokens)
    rounded = model.bfloat16()(tokens).float()
    assert (rounded - exact).abs().max() < 0.05 * exact.abs().max()


def test_forced_balance_loads_every_expert_alike_in_training():
    model = DeepSeekV3Model(TINY.with_forced_load_balance())
    model.init_weights()
    model(torch.randint(0, 40, (2, 8)))
    for moe in model.moe_layers().values():
        assert moe.tokens_per_expert.tolist() == [8] * 4
