"""FP8's kernels on a Hopper GPU against their definition in plain torch: to the bit."""

import pytest
import torch
from torch import Tensor

from torchtitan.ops import linear_cross_entropy
from torchtitan.ops.fp8 import quantize as plain
from torchtitan.ops.fp8.experts import fp8_expert_ffn
from torchtitan.ops.fp8.linear import Fp8Recipe, fp8_linear
from torchtitan.ops.fp8.quantize import E4M3, E5M2, Fp8
from torchtitan.ops.permute import RowOrder, sort_slots

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="needs a Hopper GPU",
)
COUNTS = [130, 0, 1, 257]


@pytest.fixture(autouse=True)
def on_gpu():
    torch.set_default_device("cuda")
    yield
    torch.set_default_device(None)  # "cpu" would leave a mode on that torch.compile stumbles over


def kernels():
    from torchtitan.ops.fp8 import kernels

    return kernels


@pytest.fixture(params=[False, True], ids=["a tile a block", "tiles in turn"])
def in_turn(request, monkeypatch):
    """A tile for every thread block, and, as of large matrices, one block for a tile's columns."""
    if request.param:
        monkeypatch.setattr(kernels(), "_parts", lambda *_: 1)


def numbers(rows: int, columns: int) -> Tensor:
    """bf16 numbers with outliers, a block of zeros, tiny ones down to subnormal ones, NaN and
    infinity."""
    torch.manual_seed(0)
    x = torch.randn(rows, columns)
    x[:, 3] *= 1000.0
    x[:, 128:256] = 0.0
    x[0] *= 1e-30
    x[1] *= 1e30
    x[3:4] *= 1e-36
    x[6:7] *= 1e-39
    x[2, 5], x[4, 7] = float("nan"), float("inf")
    return x.bfloat16()


def same(ours: tuple[Tensor, ...], expected: Fp8) -> bool:
    values, scales = ours
    nan = expected.values.float().isnan()
    equal = torch.equal(values.float().nan_to_num(7.0), expected.values.float().nan_to_num(7.0))
    finite = scales.isfinite()
    return (
        equal
        and torch.equal(values.float().isnan(), nan)
        and torch.equal(scales[finite], expected.scales[finite])
        and bool((~expected.scales[~finite].isfinite()).all())
    )


def ends_of(counts: list[int]) -> tuple[Tensor, Tensor]:
    ends = torch.tensor(counts, dtype=torch.int32).cumsum(0, dtype=torch.int32)
    padded = torch.tensor([-(-c // 128) * 128 for c in counts]).cumsum(0, dtype=torch.int32)
    return ends, padded


@pytest.mark.parametrize("kind", [E4M3, E5M2], ids=["e4m3", "e5m2"])
@pytest.mark.parametrize("shape", [(70, 384), (5, 208)], ids=["whole", "ragged"])
def test_rows_are_quantised_to_the_bit(shape, kind):
    x = numbers(*shape)
    assert same(kernels().by_rows(x, kind), plain.by_rows(x, kind))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_are_quantised_by_blocks_and_transposed(dtype):
    w = torch.stack([numbers(304, 208), numbers(304, 208) * 3]).to(dtype)
    if dtype == torch.float32:
        w[1] *= 1.000123
    expected = plain.by_blocks(w)
    assert same(kernels().by_blocks(w), expected)
    transposed = plain.transposed_blocks(expected)
    assert same(kernels().by_blocks(w, transposed=True), transposed)
    assert same(kernels().transposed_blocks(expected), transposed)


def without_margin(x: Fp8, rows: int, columns: int) -> Fp8:
    """Keep the tiles and columns that exist, of a matrix by columns."""
    tiles = -(-rows // 128)
    return Fp8(x.values[:, : tiles * 128], x.scales[:tiles, :columns])


def order_of(counts: list[int], tokens: int, top_k: int) -> RowOrder:
    rows = sum(counts)
    ids = torch.full((tokens, top_k), -1)
    experts = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    ids.view(-1)[torch.randperm(tokens * top_k)[:rows]] = experts
    return sort_slots(ids, len(counts), num_rows=rows + 20)


@pytest.mark.parametrize("gathered", [False, True])
def test_transposing_pads_each_group_and_keeps_what_fits(gathered, in_turn):
    tokens, top_k, rows = 194, 2, sum(COUNTS)
    order = order_of(COUNTS, tokens, top_k)
    source = order.slot_of_row_R[:rows] // top_k
    x = plain.by_rows(numbers(tokens if gathered else rows + 20, 1104))
    ends, padded = ends_of(COUNTS)
    slots = order.slot_of_row_R if gathered else None
    ours = kernels().by_columns(x, ends, padded, rows + 20, slots, top_k)
    as_rows = plain.rows_to_float(x)
    expected = plain.by_columns(as_rows[source] if gathered else as_rows, COUNTS)
    P = expected.values.size(1)
    assert same(without_margin(ours, P, 1104), without_margin(expected, P, 1104))
    if gathered:
        values, scales = kernels().gather(x, order.slot_of_row_R, ends, top_k)
        expected = Fp8(x.values[source], x.scales[:, source])
        assert same(Fp8(values[:rows], scales[:, :rows]), expected)


@pytest.mark.parametrize("kind", [E4M3, E5M2], ids=["e4m3", "e5m2"])
def test_one_pass_quantises_by_rows_and_by_columns(kind, in_turn):
    rows = sum(COUNTS)
    x, (ends, padded) = numbers(rows + 20, 400), ends_of(COUNTS)
    (values, scales), columns = kernels().by_both(x, ends, padded, kind)
    expected = plain.by_rows(x[:rows], kind)
    assert same(Fp8(values[:rows], scales[:, :rows]), expected)
    expected = plain.by_columns(plain.rows_to_float(expected), COUNTS, kind)
    P = expected.values.size(1)
    assert same(without_margin(columns, P, 400), without_margin(expected, P, 400))


@pytest.mark.parametrize("weighted", [True, False], ids=["weighted", "without weights"])
@pytest.mark.parametrize("kind", [E4M3, E5M2], ids=["e4m3", "e5m2"])
def test_swiglu_writes_what_the_definition_says(kind, weighted, in_turn):
    rows, hidden = sum(COUNTS), 512
    gate_up = numbers(rows, 2 * hidden).nan_to_num(0.0, 1.0)
    gate_up[1] = 1.0
    weights = torch.rand(2 * rows) if weighted else None
    slots = torch.randperm(2 * rows)[:rows].int() if weighted else None
    of_rows = weights[slots] if weighted else None
    ends, padded = ends_of(COUNTS)
    of_hidden, kept = kernels().swiglu(gate_up, weights, slots, ends)
    expected, expected_kept = plain.swiglu(gate_up, of_rows)
    assert same(kept, expected_kept)
    assert close(plain.rows_to_float(of_hidden), plain.rows_to_float(expected))
    grad = numbers(rows, hidden).nan_to_num(0.0, 1.0)
    grad[1] = 1.0
    ours = kernels().swiglu_backward(grad, kept, weights, slots, ends, padded, kind)
    expected = plain.swiglu_backward(grad, kept, of_rows, COUNTS, kind)
    P = int(padded[-1])
    assert close(plain.rows_to_float(ours[0]), plain.rows_to_float(expected[0]))
    for x, twin in zip(ours[1:3], expected[1:3], strict=True):
        columns = plain.columns_to_float(Fp8(x.values[:, :P], x.scales[: P // 128]))
        assert close(columns, plain.columns_to_float(twin))
    torch.testing.assert_close(ours[3], expected[3], rtol=1e-4, atol=1e-4)


def close(ours: Tensor, expected: Tensor) -> bool:
    """Compare numbers but for some roundings: sigmoids differ in the last bits."""
    differ = ours != expected
    error = (ours.double() - expected.double()).norm() / expected.double().norm()
    return bool(differ.float().mean() < 0.02) and float(error) < 0.01


@pytest.mark.parametrize("kind", [E4M3, E5M2], ids=["e4m3", "e5m2"])
@pytest.mark.parametrize("sizes", [(256, 384), (208, 144)], ids=["whole", "ragged"])
def test_products_are_those_of_the_dequantised_numbers(sizes, kind):
    """Within the rounding to bf16, for groups of 0, 1 and ragged numbers of rows."""
    N, K = sizes
    R, E = sum(COUNTS), len(COUNTS)
    x, w = plain.by_rows(torch.randn(R + 9, K), kind), plain.by_blocks(torch.randn(E, N, K))
    ends, padded = ends_of(COUNTS)
    out = kernels().rows_by_blocks(x, w, ends, torch.bfloat16)[:R]
    pairs = zip(plain.rows_to_float(x).split([*COUNTS, 9]), plain.blocks_to_float(w), strict=False)
    truth = torch.cat([a.double() @ b.double().t() for a, b in pairs])
    assert relative_error(out, truth) < 3e-3

    a, b = torch.randn(R, N), torch.randn(R, K)
    of_a, of_b = plain.by_columns(a, COUNTS, kind), plain.by_columns(b, COUNTS)
    out = kernels().rows_by_rows(of_a, of_b, padded, torch.bfloat16)
    sizes = padded.diff(prepend=padded.new_zeros(1)).tolist()
    parts = [plain.columns_to_float(each).double().split(sizes) for each in (of_a, of_b)]
    truth = torch.stack([x.t() @ y for x, y in zip(*parts, strict=True)])
    assert relative_error(out, truth) < 3e-3


def test_products_of_many_tiles_a_block_repeat_to_the_bit():
    """Results leave while the next tile is multiplied, from boxes of rows and row by row."""
    counts, N, K = [5000, 3, 4111, 0, 4096, 6500, 290], 4096, 256
    R, E = sum(counts), len(counts)
    x, w = plain.by_rows(torch.randn(R, K)), plain.by_blocks(torch.randn(E, N, K))
    ends, _ = ends_of(counts)
    out = kernels().rows_by_blocks(x, w, ends, torch.bfloat16)
    pairs = zip(plain.rows_to_float(x).split(counts), plain.blocks_to_float(w), strict=True)
    truth = torch.cat([a @ b.t() for a, b in pairs])
    wrong = (out.float() - truth).abs() > 0.01 * truth.abs() + 0.05
    assert not bool(wrong.any())
    for _ in range(10):
        assert torch.equal(kernels().rows_by_blocks(x, w, ends, torch.bfloat16), out)


def test_products_of_the_heads_sizes_have_no_wrong_element():
    """A race of stages would show in a few among millions, and not the same ones each time."""
    M, N, K = 102400, 2048, 5248
    ends, padded = ends_of([K])
    of_a, of_b = (kernels().by_both(torch.randn(K, n).bfloat16(), ends, padded)[1] for n in (M, N))
    first, again = (kernels().rows_by_rows(of_a, of_b, padded, torch.bfloat16) for _ in range(2))
    assert torch.equal(first, again)
    b = plain.columns_to_float(of_b)
    for columns in range(0, M, 12800):
        a = plain.columns_to_float(Fp8(of_a.values[columns:][:12800], of_a.scales[:, columns:]))
        truth = a.t() @ b
        error = (first[0, columns : columns + 12800].float() - truth).abs()
        assert (error / (truth.abs() + K**0.5)).max() < 1e-2


def test_weight_gradients_of_many_experts_repeat_to_the_bit():
    """A stage that was fetched anew before all had read it made one of 20 products differ."""
    E, M, N, tokens = 32, 4096, 7168, 2000
    ends, padded = ends_of([tokens] * E)
    # Scales that differ from block to block, so that another one's shows.
    sizes = (torch.rand(E * tokens, 1) * 6).exp2()
    of_a, of_b = (
        kernels().by_both((torch.randn(E * tokens, n) * sizes).bfloat16(), ends, padded)[1]
        for n in (M, N)
    )
    first = kernels().rows_by_rows(of_a, of_b, padded, torch.bfloat16)
    again = torch.empty_like(first)
    for _ in range(40):
        kernels().rows_by_rows(of_a, of_b, padded, torch.bfloat16, again)
        assert torch.equal(first, again)


def test_products_fill_the_places_that_are_given():
    M, N = 304, 208
    ends, padded = ends_of([257])
    a, b = torch.randint(-2, 3, (257, M)).float(), torch.randint(-2, 3, (257, N)).float()
    of_a, of_b = plain.by_columns(a, [257]), plain.by_columns(b, [257])
    place = torch.full((1, M, N), torch.nan, dtype=torch.bfloat16)
    kernels().rows_by_rows(of_a, of_b, padded, torch.bfloat16, place)
    assert torch.equal(place[0], (a.t() @ b).bfloat16())

    x, w = plain.by_rows(torch.randn(257, N)), plain.by_blocks(torch.randn(1, M, N))
    wider = torch.zeros(300, M, dtype=torch.bfloat16)
    kernels().rows_by_blocks(x, w, ends, torch.bfloat16, wider[20:277])
    assert torch.equal(wider[20:277], kernels().rows_by_blocks(x, w, ends, torch.bfloat16))
    assert not wider[:20].any() and not wider[277:].any()


@pytest.mark.parametrize("kind", [E4M3, E5M2], ids=["e4m3", "e5m2"])
@pytest.mark.parametrize("shape", [(300, 208), (1500, 9104), (4096, 102400)], ids=str)
def test_the_logits_gradient_is_quantised_as_in_two_steps_to_the_bit(shape, kind):
    """Ignored tokens, sure ones, and NaN, which its blocks become."""
    from torchtitan.ops import cross_entropy_triton as two_steps
    from torchtitan.ops.fp8 import cross_entropy_triton as one

    torch.manual_seed(0)
    (N, V), bf16 = shape, torch.bfloat16
    logits, labels = torch.randn(N, V, dtype=bf16).mul_(4), torch.randint(V, (N,))
    labels[::7], logits[3, 200], logits[14], logits[150, 7] = -100, 90.0, float("nan"), float("nan")
    logits[5] *= 40
    losses, *ours = one.cross_entropy(logits, labels, -100, kind)
    expected_losses = two_steps.cross_entropy_(logits, labels, -100, True)
    assert torch.equal(losses.nan_to_num(7.0), expected_losses.nan_to_num(7.0))
    rows, columns = kernels().by_both(logits, *ends_of([N]), kind)
    assert same(ours[0], rows)
    assert same(without_margin(ours[1], N, V), without_margin(columns, N, V))


@pytest.mark.parametrize("blocks", [1, 3])
def test_the_head_computes_what_the_emulation_does(monkeypatch, blocks):
    monkeypatch.setattr(
        linear_cross_entropy, "_MAX_LOGITS", 300 * 208 if blocks == 1 else 128 * 208
    )
    x, weight, labels = torch.randn(300, 160), torch.randn(208, 160), torch.randint(208, (300,))
    leaves = [x.bfloat16().requires_grad_(), weight.bfloat16().requires_grad_()]
    results = []
    for emulate in (False, True):
        recipe = Fp8Recipe(emulate=emulate)
        loss = linear_cross_entropy.linear_cross_entropy(*leaves, labels, recipe)
        results.append((loss, *torch.autograd.grad(loss / 7, leaves)))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-3, atol=0)
    for ours, expected in zip(results[0][1:], results[1][1:], strict=True):
        assert relative_error(ours, expected.double()) < 1e-2


@pytest.mark.parametrize("wide", [False, True], ids=["e4m3", "e5m2"])
def test_layers_compute_what_the_emulation_does(wide):
    """A product, and experts some of whose slots are empty: outputs and all gradients."""
    T, D, F, E, K = 300, 208, 256, 5, 2
    order = order_of([130, 0, 1, 257, 40], T, K)
    inputs = [torch.randn(s) for s in ((T, D), (E, 2 * F, D), (E, D, F))]
    inputs = [x.bfloat16().requires_grad_() for x in inputs]
    inputs.append(torch.rand(T, K).requires_grad_())
    pair = [torch.randn(3, 50, 144).bfloat16(), torch.randn(208, 144).bfloat16()]
    for x in pair:
        x.requires_grad_()
    runs = []
    for emulate in (False, True):
        recipe = Fp8Recipe(wide, emulate)
        results = []
        for leaves, out in (
            (inputs, fp8_expert_ffn(*inputs, order, recipe)),
            (pair, fp8_linear(*pair, recipe)),
        ):
            torch.manual_seed(1)
            results += [out, *torch.autograd.grad(out, leaves, torch.randn_like(out))]
        runs.append(results)
    for ours, emulated in zip(*runs, strict=True):
        assert relative_error(ours, emulated.double()) < 6e-3


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(384, 128), (304, 208)], ids=["whole", "ragged"])
def test_adamw_writes_its_weight_in_fp8_as_well(sizes, dtype):
    """A part of a wider tensor, with blocks of zeros, NaN, infinity and an outlier; a matrix,
    clipped, with L2, where the gradient is fp32, and a stack where it is bf16."""
    from torchtitan.ops.adamw import adamw_update, step_numbers
    from torchtitan.ops.fp8.weight import quantised

    N, K = sizes
    stack, clipped = (() if dtype == torch.float32 else (3,)), dtype == torch.float32
    numbers = step_numbers(3, 0.01, (0.9, 0.95), 0.1)
    settings = {"betas": (0.9, 0.95), "eps": 1e-8, "l2": 0.01 * clipped}
    param, mean, square = (make(*stack, N, K) for make in (torch.randn, torch.randn, torch.rand))
    grads = torch.randn(*stack, 128 + N, K, dtype=dtype)
    for each in (param, mean, grads):
        each[..., -N:, :][..., :128, :128] = 0.0
    param[..., 130, 5], param[..., 200, K - 9] = float("nan"), float("inf")
    param[..., 300, 1:] *= 1e4
    grad, factor = grads[..., 128:, :], torch.tensor(0.5) if clipped else None
    twin = [t.clone() for t in (param, grad, mean, square)]
    wide = quantised(torch.ones_like(grads, dtype=torch.float32), torch.bfloat16, emulate=False)
    copy = wide.split([128, N], len(stack))[1]
    adamw_update(*twin, numbers, factor=factor, **settings)
    adamw_update(param, grad, mean, square, numbers, copy=copy, factor=factor, **settings)
    for ours, expected in zip((param, mean, square), (twin[0], *twin[2:]), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-7, equal_nan=True)
    values, scales = copy.by_blocks()
    expected = plain.by_blocks(param if stack else param.unsqueeze(0))
    assert same((values, scales) if stack else (values[None], scales[None]), expected)
    assert bool((wide.dense()[..., :128, :] == 1.0).all())
