"""FP8 on any device: quantisation is what the format says, and products err as it allows."""

import pytest
import torch
from torch import Tensor

from torchtitan.ops import block_fp8
from torchtitan.ops.expert_ffn import expert_ffn_chain
from torchtitan.ops.fp8 import quantize, wire
from torchtitan.ops.fp8.experts import fp8_expert_ffn
from torchtitan.ops.fp8.feed_forward import fp8_feed_forward
from torchtitan.ops.fp8.linear import (
    Fp8Recipe,
    fp8_grouped_linear,
    fp8_linear,
    why_not_experts,
    why_not_linear,
)
from torchtitan.ops.fp8.quantize import E4M3, E5M2
from torchtitan.ops.fp8.weight import quantised
from torchtitan.ops.linear import Joint, grouped_ffn
from torchtitan.ops.lora import Adapted, LowRank
from torchtitan.ops.permute import counts_of, sort_slots

KINDS = pytest.mark.parametrize("kind", [E4M3, E5M2], ids=["e4m3", "e5m2"])
# Half the distance of two numbers, of the smaller one: 3 and 2 bits of mantissa.
STEP = {E4M3: 2.0**-4, E5M2: 2.0**-3}
# Half the smallest number above zero.
LEAST = {E4M3: 2.0**-10, E5M2: 2.0**-17}


def numbers(rows: int, columns: int) -> Tensor:
    """One channel is 1,000 times the rest, and a block is zero."""
    torch.manual_seed(0)
    x = torch.randn(rows, columns)
    x[:, 3] *= 1000.0
    x[:, 128:256] = 0.0
    return x


# ------------------------------------------------------------------ numbers


@KINDS
@pytest.mark.parametrize("columns", [384, 200], ids=["whole", "ragged"])
def test_each_row_has_its_scale_every_128_elements(columns, kind):
    x = numbers(5, columns)
    values, scales = quantize.by_rows(x, kind)
    limit = torch.finfo(kind).max
    for row in range(5):
        for block in range(-(-columns // 128)):
            part = x[row, block * 128 : block * 128 + 128]
            scale = scales[block, row].item()
            if not part.any():
                assert scale == 1.0
                continue
            assert torch.tensor(scale).log2() % 1 == 0  # a power of two, the least that fits
            assert limit * scale / 2 < part.abs().max() <= limit * scale
            q = values[row, block * 128 : block * 128 + 128].float() * scale
            allowed = (part.abs() * STEP[kind]).clamp(min=scale * LEAST[kind])
            assert bool(((q - part).abs() <= allowed).all())


def test_largest_numbers_stay_what_they_are():
    x = torch.tensor([[448.0, -448.0, 1.0, 2.0**-6, 0.0, 449.0 * 4]])
    values, scales = quantize.by_rows(x[:, :5])
    assert scales.item() == 1.0 and torch.equal(values.float(), x[:, :5])
    assert quantize.by_rows(x).scales.item() == 8.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_none_show_in_their_block_only(bad):
    x = numbers(3, 384)
    x[1, 300] = bad
    by_rows = quantize.rows_to_float(quantize.by_rows(x))
    assert bool(by_rows[1, 256:].isnan().all()) and bool(by_rows[1, :256].isfinite().all())
    assert bool(by_rows[[0, 2]].isfinite().all())
    by_columns = quantize.columns_to_float(quantize.by_columns(x, [3]))
    assert bool(by_columns[:, 300].isnan().all())
    assert bool(by_columns[:, :300].isfinite().all() and by_columns[:, 301:].isfinite().all())
    weight = torch.randn(1, 256, 256)
    weight[0, 5, 5] = bad
    back = quantize.blocks_to_float(quantize.by_blocks(weight))
    assert bool(back[0, 5, :128].isnan().any()) and bool(back[0, 128:].isfinite().all())


@KINDS
def test_columns_come_from_rows_without_a_second_rounding(kind):
    """But for numbers that are too small beside the largest of their 128 rows."""
    x = torch.randn(300, 48)
    rows = quantize.by_rows(x, kind)
    once = quantize.rows_to_float(rows)
    counts = [130, 0, 1, 169]
    columns = quantize.by_columns(once, counts, kind)
    back = quantize.columns_to_float(columns)
    begin = 0
    for count, start in zip(counts, (0, 256, 256, 384), strict=True):
        part = once[begin : begin + count]
        ours = back[start : start + count]
        large = part.abs() > 2.0**-4 * part.abs().amax(0) if count else part.bool()
        assert torch.equal(ours[large], part[large])
        begin += count
    assert back.size(0) == 256 + 128 + 256
    assert not back[130:256].any() and not back[257:384].any()  # padding


def test_weights_are_quantised_as_published_ones():
    w = torch.stack([numbers(300, 200), 3 * numbers(300, 200)])
    made = quantize.by_blocks(w)
    for expert in range(2):
        values, scales = block_fp8.quantize_blocks(w[expert])
        assert torch.equal(made.values[expert].float(), values.float())
        assert torch.equal(made.scales[expert], scales)
    turned = quantize.transposed_blocks(made)
    assert torch.equal(quantize.blocks_to_float(turned), quantize.blocks_to_float(made).mT)


# ------------------------------------------------------------------ products


def allowed(of_x: Tensor, of_w: Tensor, kinds: tuple[torch.dtype, torch.dtype]) -> Tensor:
    """Most that Σ x · w can err where each operand errs by half a step of its format."""
    first, second = (STEP[kind] * 1.01 for kind in kinds)
    return (of_x.abs().double() @ of_w.abs().double()) * (first + second + first * second)


@pytest.mark.parametrize("wide", [False, True], ids=["e4m3", "e5m2"])
@pytest.mark.parametrize("sizes", [(256, 128, 384), (130, 208, 144), (1, 16, 16)], ids=str)
def test_a_layer_and_its_gradients_err_as_the_format_allows(sizes, wide):
    T, K, N = sizes
    torch.manual_seed(1)
    x, w = torch.randn(T, K, requires_grad=True), torch.randn(N, K, requires_grad=True)
    y = fp8_linear(x, w, Fp8Recipe(wide_gradients=wide))
    grad = torch.randn(T, N)
    y.backward(grad)
    of_grad = E5M2 if wide else E4M3
    for ours, a, b, kinds in (
        (y, x, w.t(), (E4M3, E4M3)),
        (x.grad, grad, w, (of_grad, E4M3)),
        (w.grad, grad.t(), x, (of_grad, E4M3)),
    ):
        exact = a.double() @ b.double()
        assert bool(((ours.double() - exact).abs() <= allowed(a, b, kinds) + 1e-6).all())
        assert not torch.allclose(ours, exact.float(), rtol=1e-4, atol=1e-4)  # it is FP8


def test_an_outlier_channel_leaves_other_blocks_precise():
    """One scale for the whole tensor would lose them: 1,000 times smaller, they would round to
    numbers with less than three bits."""
    x, w = numbers(64, 384), torch.zeros(16, 384)
    w[:, 256:] = torch.randn(16, 128)
    exact = x.double() @ w.double().t()
    error = (fp8_linear(x, w, Fp8Recipe()) - exact).norm() / exact.norm()
    assert error < 0.06


def test_groups_of_any_number_of_rows():
    counts = [130, 0, 1, 20]
    R, K, N = sum(counts), 64, 48
    x, w = torch.randn(R, K, requires_grad=True), torch.randn(4, N, K, requires_grad=True)
    ends = torch.tensor(counts).cumsum(0, dtype=torch.int32)
    y = fp8_grouped_linear(x, w, ends, Fp8Recipe())
    grad = torch.randn(R, N)
    y.backward(grad)
    parts = zip(x.split(counts), w, y.split(counts), grad.split(counts), w.grad, strict=True)
    for x_e, w_e, y_e, grad_e, grad_w in parts:
        assert bool(((y_e - x_e @ w_e.t()).abs() <= allowed(x_e, w_e.t(), (E4M3, E4M3))).all())
        exact = grad_e.t() @ x_e
        assert bool(((grad_w - exact).abs() <= allowed(grad_e.t(), x_e, (E4M3, E4M3))).all())


def test_no_rows_at_all_give_gradients_of_zero():
    x, w = torch.randn(0, 32, requires_grad=True), torch.randn(2, 16, 32, requires_grad=True)
    y = fp8_grouped_linear(x, w, torch.zeros(2, dtype=torch.int32), Fp8Recipe())
    y.sum().backward()
    assert y.shape == (0, 16) and not w.grad.any()


@pytest.mark.parametrize("rows", [None, 150, 0], ids=["all slots", "some empty", "no row"])
def test_experts_are_those_of_the_plain_chain_within_rounding(rows):
    torch.manual_seed(2)
    T, D, F, E, K = 60, 96, 128, 5, 2
    ids = torch.stack([torch.randperm(E)[:K] for _ in range(T)])
    if rows is not None:
        ids[ids == 4] = -1
        ids = ids if rows else torch.full_like(ids, -1)
    order = sort_slots(ids, E, num_rows=rows)
    shapes = (T, D), (E, 2 * F, D), (E, D, F)
    inputs = [torch.randn(shape).div(shape[-1] ** 0.25).requires_grad_() for shape in shapes]
    inputs.append(torch.rand(T, K, requires_grad=True))
    grad = torch.randn(T, D)
    results = []
    for out in (
        fp8_expert_ffn(*inputs, order, Fp8Recipe()),
        expert_ffn_chain(*inputs, order) if rows != 0 else inputs[0] * 0.0,
    ):
        gradients = torch.autograd.grad(out, inputs, grad, allow_unused=True)
        pairs = zip(inputs, gradients, strict=True)
        results.append([out, *(0.0 * x if g is None else g for x, g in pairs)])
    for ours, twin in zip(*results, strict=True):
        assert ours.shape == twin.shape
        assert (ours - twin).norm() <= 0.1 * twin.norm()


@KINDS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_rows_arrive_as_they_were_quantised_in_half_the_bytes(dtype, kind):
    """Also where rounding has made the largest of a block smaller than half of what fits."""
    x = numbers(40, 208).to(dtype)
    x[5, :128] = torch.linspace(1e-3, 225.0, 128)
    packed = wire.pack(x, kind, emulate=False)
    assert packed.nbytes == 40 * wire.packed_bytes(208)
    assert wire.packed_bytes(2048) / (2048 * 2) < 0.52
    arrived = wire.unpack(packed, 208, kind, dtype)
    made = quantize.by_rows(x, kind)
    assert torch.equal(arrived.float(), quantize.rows_to_float(made))
    again = quantize.by_rows(arrived, kind)
    assert torch.equal(quantize.rows_to_float(again), quantize.rows_to_float(made))
    assert wire.unpack(wire.pack(x[:0], kind, emulate=False), 208, kind, dtype).shape == (0, 208)


@KINDS
@pytest.mark.parametrize("frozen", [(), (1, 2), (3,), (1,)], ids=["none", "w1, w3", "w2", "w1"])
def test_a_dense_feed_forward_layer_is_a_single_expert_that_has_all_tokens(frozen, kind):
    torch.manual_seed(5)
    x, w1, w3, w2 = (torch.randn(size) for size in ((150, 96), *2 * [(256, 96)], (96, 256)))
    recipe = Fp8Recipe(wide_gradients=kind == E5M2, emulate=True)
    order, ones = sort_slots(torch.zeros(150, 1, dtype=torch.long), 1), torch.ones(150, 1)
    tensors = [t.requires_grad_(i not in frozen) for i, t in enumerate((x, w1, w3, w2))]
    trained, grad = [t for t in tensors if t.requires_grad], torch.randn(150, 96)

    def expert(x, w1, w3, w2):
        w13 = torch.cat((w1, w3)).unsqueeze(0)
        return fp8_expert_ffn(x, w13, w2.unsqueeze(0), ones, order, recipe)

    def joint(x, w1, w3, w2):
        return fp8_feed_forward(x, (torch.cat((w1, w3)),), w2, recipe)

    def separate(x, w1, w3, w2):
        return fp8_feed_forward(x.view(3, 50, 96), (w1, w3), w2, recipe).view(150, 96)

    compiled = torch.compile(separate, backend="aot_eager", fullgraph=True)
    results = []
    for function in (expert, joint, separate, compiled):
        out = function(*tensors)
        results.append([out, *torch.autograd.grad(out, trained, grad)])
    for ours, *twins in zip(*results, strict=True):
        assert all(torch.equal(ours, twin) for twin in twins)


def test_weights_that_come_in_fp8_give_the_same_bits():
    """In linear layers, in parts of a joint one, in experts and dense ones; eager and compiled."""
    torch.manual_seed(3)
    ids = torch.stack([torch.randperm(3)[:2] for _ in range(40)])
    order, ends = sort_slots(ids, 3), torch.tensor([10, 10, 40], dtype=torch.int32)
    factors, recipe = torch.rand(40, 2), Fp8Recipe(emulate=True)

    def linear(x, w):
        first, second = w.split([128, 80])
        return fp8_linear(x, w, recipe), fp8_linear(x, first, recipe), fp8_linear(x, second, recipe)

    def groups(x, w):
        return [fp8_grouped_linear(x, part, ends, recipe) for part in w.chunk(2, dim=1)]

    def experts(x, w1, w3, w2):
        return [fp8_expert_ffn(x, torch.cat([w1, w3], 1), w2, factors, order, recipe)]

    def dense(x, w1, w3, w2):
        return [
            fp8_feed_forward(x, gate_up, w2, recipe)
            for gate_up in ((w1, w3), (torch.cat((w1, w3)),))
        ]

    shapes = {linear: [(208, 96)], groups: [(3, 256, 96)], experts: 2 * [(3, 128, 96)]}
    shapes[experts].append((3, 96, 128))
    shapes[dense] = [*2 * [(128, 96)], (96, 128)]
    for function, sizes in shapes.items():
        x, *whole = (torch.randn(size, requires_grad=True) for size in [(40, 96), *sizes])
        made = [quantised(w.detach(), w.dtype, emulate=True) for w in whole]
        results = []
        for run, weights in (
            (function, whole),
            (function, [w.requires_grad_() for w in made]),
            (torch.compile(function, backend="aot_eager", fullgraph=True), made),
        ):
            outputs = run(x, *weights)
            total = sum(y.square().sum() for y in outputs)
            results.append([*outputs, *torch.autograd.grad(total, (x, *weights))])
        for ours, *twins in zip(*results, strict=True):
            assert all(type(twin) is Tensor and torch.equal(ours, twin) for twin in twins)
        stack = whole[0].detach().view(-1, *whole[0].shape[-2:])
        numbers_of = quantize.blocks_to_float(quantize.by_blocks(stack))
        assert torch.equal(made[0].dense(), numbers_of.view_as(whole[0]))


def test_adapters_of_experts_stay_exact_beside_frozen_weights_in_fp8():
    """The oracle: FP8 products, and the adapters' in fp32, expert by expert."""
    torch.manual_seed(4)
    T, D, F, E, K = 40, 64, 128, 3, 2
    order = sort_slots(torch.stack([torch.randperm(E)[:K] for _ in range(T)]), E)
    x, factors = torch.randn(T, D, requires_grad=True), torch.rand(T, K)
    w1, w3, w2 = (torch.randn(E, *size) / 8 for size in ((F, D), (F, D), (D, F)))
    adapters = [
        LowRank(
            torch.randn(E, 4, w.size(2)).div(8).requires_grad_(),
            torch.randn(E, w.size(1), 4).requires_grad_(),
            0.5,
        )
        for w in (w1, w3, w2)
    ]
    stacks = [Adapted(w, a) for w, a in zip((w1, w3, w2), adapters, strict=True)]
    recipe = Fp8Recipe(emulate=True)
    out = grouped_ffn(x, Joint("w1", "w3", dim=1), stacks[:2], stacks[2], factors, order, recipe)

    def product(rows, e, weight, adapter):
        low = rows @ adapter.A[e].t() @ adapter.B[e].t()
        return fp8_linear(rows, weight[e], recipe) + adapter.scale * low

    expected, begin = torch.zeros(T, D), 0
    for e, count in enumerate(counts_of(order).tolist()):
        slots = order.slot_of_row_R[begin : begin + count].long()
        begin += count
        rows = x[slots // K]
        gate, up = (product(rows, e, *pair) for pair in ((w1, adapters[0]), (w3, adapters[1])))
        hidden = torch.nn.functional.silu(gate) * up * factors.flatten()[slots].unsqueeze(1)
        expected = expected.index_add(0, slots // K, product(hidden, e, w2, adapters[2]))
    trained = [x, *(factor for adapter in adapters for factor in adapter[:2])]
    grad = torch.randn(T, D)
    pairs = [(out, expected)]
    pairs += zip(*(torch.autograd.grad(y, trained, grad) for y in (out, expected)), strict=True)
    for ours, twin in pairs:
        assert (ours - twin).norm() < 1e-2 * twin.norm()  # a tie may round the other way


def test_frozen_weights_get_no_gradient():
    x, w = torch.randn(8, 32, requires_grad=True), torch.randn(16, 32)
    fp8_linear(x, w, Fp8Recipe()).sum().backward()
    assert x.grad is not None and w.grad is None


def test_compiled_layer_computes_the_same():
    x, w = torch.randn(40, 32, requires_grad=True), torch.randn(48, 32, requires_grad=True)

    def layer(x, w):
        return torch.nn.functional.silu(fp8_linear(x * 2.0, w, Fp8Recipe())).sum()

    grads = [
        torch.autograd.grad(function(x, w), (x, w))
        for function in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True))
    ]
    for ours, twin in zip(*grads, strict=True):
        assert torch.equal(ours, twin)


def test_sizes_that_cannot_be_in_fp8_say_why():
    assert why_not_linear(2048, 576) is None
    assert why_not_linear(2048, 10) == "10 is no multiple of 16"
    assert why_not_experts(2048, 1408) is None
    assert why_not_experts(2048, 192) == "their hidden size 192 is no multiple of 128"
