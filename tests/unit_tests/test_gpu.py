"""What only a GPU can show: its kernels against fp64, and that the CPU never waits for it."""

import pytest
import torch
from torch import Tensor

from tests.tiny_run import losses, tiny
from torchtitan.components.loss import cross_entropy_sum
from torchtitan.models.deepseek_v3 import DeepSeekV3Model, deepseekv3_args
from torchtitan.models.moe import MoE, MoEArgs
from torchtitan.ops.attention import attention, document_mask
from torchtitan.ops.grouped_mm import grouped_mm, grouped_mm_loop
from torchtitan.train import main

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def relative_error(actual: Tensor, expected: Tensor) -> float:
    assert actual.isfinite().all()
    return (
        (actual.double().cpu() - expected.double().cpu()).norm() / expected.double().norm()
    ).item()


def leaves(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [
        torch.randn(shape, device="cuda", dtype=torch.bfloat16).requires_grad_() for shape in shapes
    ]


def doubles(tensors: list[Tensor]) -> list[Tensor]:
    return [t.detach().double().requires_grad_() for t in tensors]


@pytest.mark.parametrize("documents", [False, True], ids=["causal", "documents"])
def test_attention_at_mla_sizes_equals_fp64(documents: bool) -> None:
    B, S, H, scale = 2, 256, 4, 192**-0.5
    inputs = leaves((B, S, H, 192), (B, S, H, 192), (B, S, H, 128))
    exact = doubles(inputs)
    tokens = torch.randint(0, 20, (B, S), device="cuda")
    visible = torch.ones(S, S, dtype=torch.bool, device="cuda").tril().expand(B, 1, S, S)
    mask = None
    if documents:
        mask = document_mask(tokens, eos_id=3)
        visible = document_mask(tokens.cpu(), eos_id=3).cuda()  # the CPU's form: a plain matrix
    out = attention(*inputs, scale=scale, mask=mask)
    q, k, v = (t.transpose(1, 2) for t in exact)
    scores = (q @ k.mT * scale).masked_fill(~visible, float("-inf"))
    expected = (scores.softmax(-1) @ v).transpose(1, 2)
    assert relative_error(out, expected) < 1e-2
    grad = torch.randn_like(out)
    out.backward(grad)
    expected.backward(grad.double())
    for ours, theirs in zip(inputs, exact, strict=True):
        assert relative_error(ours.grad, theirs.grad) < 1e-2


@pytest.mark.parametrize("counts", [[5, 0, 100, 23], [0, 0, 128, 0], [1, 1, 1, 125]], ids=str)
def test_grouped_mm_equals_the_loop_in_fp64(counts: list[int]) -> None:
    rows, weights = leaves((128, 64), (4, 96, 64))
    exact = doubles([rows, weights])
    counts_E = torch.tensor(counts, device="cuda")
    out = grouped_mm(rows, weights.transpose(1, 2), counts_E)
    expected = grouped_mm_loop(exact[0], exact[1].transpose(1, 2), counts_E)
    assert relative_error(out, expected) < 1e-2
    grad = torch.randn_like(out)
    out.backward(grad)
    expected.backward(grad.double())
    assert relative_error(rows.grad, exact[0].grad) < 1e-2
    assert relative_error(weights.grad, exact[1].grad) < 1e-2


def moe_layer(**changes) -> MoE:
    torch.manual_seed(0)
    args = {"num_experts": 8, "top_k": 3, "num_expert_groups": 4, "num_limited_groups": 2}
    layer = MoE(MoEArgs(**args | {"score_before_experts": False} | changes), dim=64, hidden_dim=32)
    layer.init_weights(0.1)
    return layer


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_moe_layer_equals_the_loop_in_fp64(compiled: bool) -> None:
    layer = moe_layer().bfloat16()
    exact = moe_layer(use_grouped_mm=False).double()
    exact.load_state_dict({name: value.double() for name, value in layer.state_dict().items()})
    layer = layer.cuda()
    forward = torch.compile(layer.forward) if compiled else layer.forward
    x = torch.randn(2, 32, 64, dtype=torch.bfloat16)
    out, load = forward(x.cuda(), return_load=True)
    expected, expected_load = exact(x.double(), return_load=True)
    assert load.tokens_E.tolist() == expected_load.tokens_E.tolist(), "another choice of experts"
    assert relative_error(out, expected) < 2e-2
    out.float().square().sum().backward()
    expected.square().sum().backward()
    pairs = zip(layer.named_parameters(), exact.parameters(), strict=True)
    for (name, ours), theirs in pairs:
        assert relative_error(ours.grad, theirs.grad) < 3e-2, name


def test_the_cpu_never_waits_for_the_gpu_in_forward_and_backward() -> None:
    overrides = {"n_layers": 2, "dim": 64, "n_heads": 2, "inter_dim": 64, "moe_inter_dim": 32}
    args = deepseekv3_args["debugmodel_node_limited"].for_run(overrides=overrides, seq_len=64)
    model = DeepSeekV3Model(args)
    model.init_weights()
    model = model.to("cuda", torch.bfloat16)
    tokens = torch.randint(0, 2048, (2, 64), device="cuda")

    def step() -> None:
        cross_entropy_sum(model(tokens, token_mask=tokens != 1), tokens).backward()

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert model.layers["1"].moe.tokens_per_expert.sum() > 0


def test_the_tiny_model_trains_in_bf16_and_compiled(tmp_path) -> None:
    changes = {"training__mixed_precision_param": "bfloat16", "training__steps": 6}
    assert main(tiny(tmp_path / "eager", **changes)) == 0
    assert main(tiny(tmp_path / "compiled", **changes, compile__enable=True)) == 0
    eager, compiled = losses(tmp_path / "eager"), losses(tmp_path / "compiled")
    assert eager[-1] < eager[0] - 0.3
    assert compiled == pytest.approx(eager, rel=5e-3)


def test_a_deterministic_run_repeats_bit_for_bit(tmp_path) -> None:
    changes = {"training__mixed_precision_param": "bfloat16", "debug__deterministic": True}
    assert main(tiny(tmp_path / "first", **changes)) == 0
    assert main(tiny(tmp_path / "again", **changes)) == 0
    assert losses(tmp_path / "first") == losses(tmp_path / "again")
