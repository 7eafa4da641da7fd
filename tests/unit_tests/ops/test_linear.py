"""Products with weights: the same one by one and as one, and none beside the door."""

import ast
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from torchtitan.models.deepseek_v3 import DeepSeekV3Model, deepseekv3_args
from torchtitan.models.qwen3 import Qwen3Model, qwen3_args
from torchtitan.ops.linear import (
    Gate,
    Joint,
    Linear,
    Output,
    grouped_linear,
    grouped_linear_joint,
    joints,
    linear_joint,
)

MODELS = Path(__file__).parents[3] / "torchtitan/models"


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Linear(6, 4), Linear(6, 3)
        self.both = Joint("a.weight", "b.weight", dim=0)


def gradients(outputs: tuple[Tensor, ...], leaves: list[Tensor]) -> tuple[Tensor, ...]:
    factors = [torch.arange(out.numel()).view(out.shape).to(out) for out in outputs]
    loss = sum((out * factor).sum() for out, factor in zip(outputs, factors, strict=True))
    return torch.autograd.grad(loss, leaves)


def test_layers_on_one_input_give_the_same_as_one_product() -> None:
    layers, x = TwoLayers().double(), torch.randn(2, 5, 6).double().requires_grad_()
    apart = linear_joint(x, layers.both, (layers.a, layers.b))
    grad_x, grad_a, grad_b = gradients(apart, [x, layers.a.weight, layers.b.weight])
    assert joints(layers) == [layers.both]

    joined = torch.cat((layers.a.weight, layers.b.weight)).detach().requires_grad_()
    layers.both.tensor = joined
    together = linear_joint(x, layers.both, (layers.a, layers.b))
    assert [out.shape for out in together] == [(2, 5, 4), (2, 5, 3)]
    torch.testing.assert_close(together, apart)
    torch.testing.assert_close(
        gradients(together, [x, joined]), (grad_x, torch.cat((grad_a, grad_b)))
    )


@pytest.mark.parametrize("loop", [False, True])
def test_experts_weights_give_the_same_as_one_product(loop: bool) -> None:
    rows, counts = torch.randn(9, 16), torch.tensor([4, 0, 5])
    gate, up = torch.randn(3, 8, 16), torch.randn(3, 8, 16)
    joint = Joint("w1", "w3", dim=1)
    apart = grouped_linear_joint(rows, joint, (gate, up), counts, loop=loop)
    for out, weight in zip(apart, (gate, up), strict=True):
        expected = [rows[:4] @ weight[0].t(), rows[4:] @ weight[2].t()]
        torch.testing.assert_close(out, torch.cat(expected))
    joint.tensor = torch.cat((gate, up), dim=1)
    together = grouped_linear_joint(rows, joint, (gate, up), counts, loop=loop)
    torch.testing.assert_close(together, apart)
    assert grouped_linear(rows, gate, counts, loop=loop).shape == (9, 8)


def test_a_weight_for_other_products_is_that_of_the_layer_in_the_dtype_asked_for() -> None:
    layer = Linear(6, 4)
    weight = layer.dense_weight(torch.bfloat16)
    assert weight.dtype == torch.bfloat16
    assert torch.equal(weight, layer.weight.bfloat16())


def model_of(family: str) -> nn.Module:
    with torch.device("meta"):
        if family == "qwen3":
            return Qwen3Model(qwen3_args["debugmodel"])
        return DeepSeekV3Model(deepseekv3_args[family])


@pytest.mark.parametrize("family", ["debugmodel", "236B", "qwen3"])
def test_every_matrix_of_a_model_is_multiplied_behind_the_door(family: str) -> None:
    """Modules that own matrices are layers of the door, stacked experts, or the embedding."""
    model = model_of(family)
    owners = {
        type(module)
        for module in model.modules()
        if any(param.ndim > 1 for param in module.parameters(recurse=False))
    }
    names = {kind.__name__ for kind in owners - {Linear, Gate, Output}}
    assert names <= {"Embedding", "GroupedExperts"}


# Beside the door, a weight could be multiplied by these.
BESIDE = {
    "ops.expert_ffn.expert_ffn",
    "ops.grouped_mm.grouped_linear",
    "ops.grouped_mm.grouped_mm_loop",
    "ops.linear_cross_entropy",
    "ops.router_logits",
}


@pytest.mark.parametrize("path", MODELS.rglob("*.py"), ids=lambda path: path.name)
def test_no_model_file_multiplies_by_weights_itself(path: Path) -> None:
    source = path.read_text()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            assert not any(beside in name for beside in BESIDE for name in names), names
        if isinstance(node, ast.Attribute):
            assert ast.unparse(node) not in ("F.linear", "nn.Linear")
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult):
            assert "weight" not in ast.unparse(node)
