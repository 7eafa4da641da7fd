"""FP8 with a scale for each row or each tensor, against fp64 and formulas written down here."""

import pytest
import torch
from torch import Tensor

from torchtitan.ops.fp8.linear import Fp8Recipe
from torchtitan.ops.fp8.scaled import quantise, scaled_linear
from torchtitan.ops.linear import Linear

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
RECIPES = {
    "tensorwise": Fp8Recipe(wide_gradients=True, emulate=True, scales="tensorwise"),
    "rowwise": Fp8Recipe(emulate=True, scales="rowwise"),
    "rowwise_with_gw_hp": Fp8Recipe(emulate=True, scales="rowwise_with_gw_hp"),
}
# Each factor is off by at most half a step of 3 digits (e4m3) or of 2 (e5m2), relative; a sum of
# products of independent errors is off by less than both together.
E4M3_STEP, E5M2_STEP = 2**-4, 2**-3


def inputs(rows: int = 40, outputs: int = 48, size: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(rows, size), torch.randn(outputs, size) / 8, torch.randn(rows, outputs)


def off(actual: Tensor, exact: Tensor) -> float:
    return ((actual.double() - exact).norm() / exact.norm()).item()


def results(x: Tensor, w: Tensor, grad: Tensor, recipe: Fp8Recipe) -> tuple[Tensor, ...]:
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    y = scaled_linear(x, w, recipe)
    return y.detach(), *torch.autograd.grad(y, (x, w), grad)


@pytest.mark.parametrize("scales", RECIPES)
@pytest.mark.parametrize("rows", [40, 1, 37])
def test_product_and_gradients_are_those_of_fp64_within_the_formats_steps(scales, rows) -> None:
    x, w, grad = inputs(rows)
    recipe = RECIPES[scales]
    y, grad_x, grad_w = results(x, w, grad, recipe)
    step = E5M2_STEP if recipe.wide_gradients else E4M3_STEP
    assert 0 < off(y, x.double() @ w.double().t()) < 2 * E4M3_STEP
    assert 0 < off(grad_x, grad.double() @ w.double()) < E4M3_STEP + step
    exact = grad.double().t() @ x.double()
    if scales == "rowwise_with_gw_hp":
        assert off(grad_w, exact) < 1e-6
    else:
        assert 0 < off(grad_w, exact) < E4M3_STEP + step


def by_hand(x: Tensor, *, by_row: bool, kind: torch.dtype = E4M3) -> Tensor:
    """The numbers that x becomes, row by row in fp64."""
    limit, found = torch.finfo(kind).max, []
    whole = x.abs().max().item()
    for row in x:
        largest = row.abs().max().item()
        if by_row:
            scale = 1.0
            while largest / scale > limit:
                scale *= 2
            while scale > 2.0**-126 and largest / (scale / 2) <= limit:
                scale /= 2
        else:
            scale = (torch.tensor(whole) / torch.tensor(limit)).item()
        found.append((row / torch.tensor(scale)).to(kind).double() * scale)
    return torch.stack(found)


@pytest.mark.parametrize("scales", RECIPES)
def test_each_product_reads_its_factors_with_the_scales_of_the_recipe(scales) -> None:
    x, w, grad = inputs()
    x[3] *= 1e4  # a row that needs another scale
    w[:, 5] *= 1e-3
    recipe, by_row = RECIPES[scales], scales != "tensorwise"
    kind = E5M2 if recipe.wide_gradients else E4M3
    y, grad_x, grad_w = results(x, w, grad, recipe)
    assert off(y, by_hand(x, by_row=by_row) @ by_hand(w, by_row=by_row).t()) < 1e-6
    of_inputs = by_hand(w.t(), by_row=scales == "rowwise")
    assert off(grad_x, by_hand(grad, by_row=by_row, kind=kind) @ of_inputs.t()) < 1e-6
    if scales != "rowwise_with_gw_hp":
        rows = by_hand(grad.t(), by_row=by_row, kind=kind)
        assert off(grad_w, rows @ by_hand(x.t(), by_row=by_row).t()) < 1e-6


def test_zeros_have_scale_1_and_what_is_not_finite_spoils_what_shares_its_scale() -> None:
    x = torch.randn(4, 16)
    x[1], x[2, 3], x[3, 7] = 0, torch.inf, torch.nan
    rows = quantise(x, by_row=True)
    assert rows.scales[1] == 1 and rows.values[1].float().abs().max() == 0
    whole = rows.values.float() * rows.scales
    assert whole[:2].isfinite().all() and whole[2:].isnan().all()
    one = quantise(x, by_row=False)
    assert (one.values.float() * one.scales).isnan().all()
    assert quantise(torch.zeros(2, 16), by_row=False).scales == 1


def test_an_outlier_costs_its_row_and_with_one_scale_all_rows() -> None:
    x = torch.randn(64, 64)
    x[0, 0] = 1e5
    errors = {
        by_row: off((q.values.float() * q.scales)[1:], x[1:].double())
        for by_row in (True, False)
        for q in [quantise(x, by_row=by_row)]
    }
    assert errors[True] < E4M3_STEP < errors[False] / 1.5


@pytest.mark.parametrize("scales", RECIPES)
def test_compiled_layers_compute_the_same(scales) -> None:
    layer = Linear(64, 48)
    layer.fp8 = RECIPES[scales]
    x = torch.randn(2, 8, 64, requires_grad=True)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    grads = []
    for run in (layer, compiled):
        y = run(x)
        grads.append([y, *torch.autograd.grad(y.square().sum(), (x, layer.weight))])
    for ours, expected in zip(*grads, strict=True):
        assert torch.equal(ours, expected)


def test_what_is_frozen_has_no_gradient_and_keeps_nothing() -> None:
    x, w, grad = inputs()
    for recipe in RECIPES.values():
        alone = w.clone().requires_grad_()
        (of_w,) = torch.autograd.grad(scaled_linear(x, alone, recipe), alone, grad)
        moving = x.clone().requires_grad_()
        y = scaled_linear(moving, w, recipe)
        assert len(y.grad_fn.next_functions[0][0].saved_tensors) == 1, "the weight alone"
        (of_x,) = torch.autograd.grad(y, moving, grad)
        _, grad_x, grad_w = results(x, w, grad, recipe)
        assert torch.equal(of_w, grad_w) and torch.equal(of_x, grad_x)


@pytest.mark.parametrize("scales", RECIPES)
def test_a_plan_sees_the_kernels_shapes(scales) -> None:
    """On the meta device, where plans are made, torch's own product is called and checks sizes."""
    x = torch.empty(37, 64, device="meta", dtype=torch.bfloat16, requires_grad=True)
    w = torch.empty(48, 64, device="meta", dtype=torch.bfloat16, requires_grad=True)
    y = scaled_linear(x, w, RECIPES[scales]._replace(emulate=False))
    grad_x, grad_w = torch.autograd.grad(y.sum(), (x, w))
    assert y.shape == (37, 48) and grad_x.shape == x.shape and grad_w.shape == w.shape


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("scales", RECIPES)
@pytest.mark.parametrize("rows", [256, 37])
def test_kernels_compute_what_the_emulation_does(scales, rows) -> None:
    x, w, grad = (t.cuda().bfloat16() for t in inputs(rows, 512, 1024))
    ours = results(x, w, grad, RECIPES[scales]._replace(emulate=False))
    expected = results(x, w, grad, RECIPES[scales])
    for actual, exact in zip(ours, expected, strict=True):
        assert off(actual, exact.double()) < 4e-3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("scales", RECIPES)
def test_compiled_kernels_compute_what_the_eager_ones_do(scales) -> None:
    layer = Linear(512, 1024).cuda().bfloat16()
    layer.fp8 = RECIPES[scales]._replace(emulate=False)
    x = torch.randn(256, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    grads = []
    for run in (layer, torch.compile(layer, fullgraph=True)):
        y = run(x)
        grads.append([y, *torch.autograd.grad(y.float().square().sum(), (x, layer.weight))])
    for eager, ours in zip(*grads, strict=True):
        assert off(ours, eager.double()) < 1e-2
