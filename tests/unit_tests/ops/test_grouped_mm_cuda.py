"""The experts' products on a Hopper GPU against torch's, with groups of every awkward size."""

from threading import Thread

import pytest
import torch
from torch import Tensor

from torchtitan.ops import grouped_mm_torch as plain
from torchtitan.ops.cuda import _tensor_map
from torchtitan.ops.grouped_mm_torch import Gathered

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="needs a Hopper GPU",
)
COUNTS = [0, 1, 63, 64, 65, 127, 128, 129, 300, 0, 700, 5]
E, R, BEHIND = len(COUNTS), sum(COUNTS), 37  # BEHIND: rows behind the last group
D, F, TOP_K = 320, 192, 2
# One to three tiles of columns, of which the last is whole, a half or less; one stage of a product.
of_sizes = pytest.mark.parametrize(("D", "F"), [(320, 192), (640, 320), (512, 384), (64, 128)])


@pytest.fixture(autouse=True)
def on_gpu():
    torch.manual_seed(0)
    torch.set_default_device("cuda")
    yield
    torch.set_default_device(None)


def ours():
    from torchtitan.ops import grouped_mm_cuda

    assert grouped_mm_cuda.applies(randn(1, D), randn(1, D, F)), "the kernel was not built"
    return grouped_mm_cuda


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.bfloat16)


def ends() -> Tensor:
    return torch.tensor(COUNTS).cumsum(0).int()


def gathered(columns: int) -> Gathered:
    """Rows of which those behind the last group are of a token that is NaN."""
    tokens = R // TOP_K + BEHIND
    x = randn(tokens, columns)
    x[-1] = float("nan")
    slots = torch.randperm((tokens - 1) * TOP_K)[:R]
    behind = torch.full((BEHIND,), tokens * TOP_K - 1)
    return Gathered(x, torch.cat((slots, behind)).int(), TOP_K, None)


def rows_of(columns: int) -> Tensor:
    """Rows of which those behind the last group are NaN."""
    rows = randn(R + BEHIND, columns)
    rows[R:] = float("nan")
    return rows


def agree(actual: Tensor, expected: Tensor, *, rows: int | None = None) -> bool:
    """Both are rounded to bf16 once: their difference is at most one rounding of each."""
    a, b = actual[:rows].double(), expected[:rows].double()
    largest = ((a - b).abs() - b.abs() * 2**-7).max()
    return bool((a - b).norm() / b.norm() < 2e-3 and largest < 2e-2)


@of_sizes
def test_gate_up_and_swiglu_of_gathered_rows(D, F):
    from torchtitan.ops import swiglu_triton

    rows, w13, weights = gathered(D), randn(E, 2 * F, D) * 0.1, torch.rand(R + 2 * BEHIND, TOP_K)
    gate_up, hidden = ours().gate_up_swiglu(rows, w13, weights, ends())
    assert agree(gate_up, plain.gate_up_swiglu(rows, w13, weights, ends())[0], rows=R)
    assert agree(hidden, swiglu_triton.forward(gate_up, weights, rows.slot_of_row_R), rows=R)


@of_sizes
def test_products_by_weights(D, F):
    rows, w = rows_of(F), randn(E, D, F)
    assert agree(ours().by_weights(rows, w, ends()), plain.by_weights(rows, w, ends()), rows=R)


@of_sizes
def test_products_by_transposed_weights(D, F):
    rows, w = rows_of(D), randn(E, D, F)
    expected = plain.by_weights_transposed(rows, w, ends())
    assert agree(ours().by_weights_transposed(rows, w, ends()), expected, rows=R)


@of_sizes
@pytest.mark.parametrize("counted", [False, True])
def test_gradients_of_swiglu_of_gathered_rows(counted, D, F):
    grads, w2, gate_up = gathered(D), randn(E, D, F) * 0.1, rows_of(2 * F)
    weights, num_rows = torch.rand(R + 2 * BEHIND, TOP_K), ends()[-1:] if counted else None
    others = w2, gate_up, weights, grads.slot_of_row_R, num_rows, ends()
    torch.full((weights.numel() * 3,), float("nan"))  # left where the weights' gradients will be
    grad_gate_up, hidden, grad_weights = ours().swiglu_backward(grads, *others)
    expected = plain.swiglu_backward(plain.gather(grads), *others)
    assert agree(grad_gate_up, expected[0], rows=R) and agree(hidden, expected[1], rows=R)
    with_row = grads.slot_of_row_R[:R].long()
    actual, expected_weights = grad_weights.flatten(), expected[2].flatten()
    torch.testing.assert_close(actual[with_row], expected_weights[with_row], rtol=1e-3, atol=1e-3)
    if counted:
        actual[with_row] = 0
        assert not actual.any()


@of_sizes
@pytest.mark.parametrize("which", ["none", "first", "second"])
def test_products_over_rows_leave_empty_groups_zero(which, D, F):
    a = gathered(D) if which == "first" else rows_of(D)
    b = gathered(F) if which == "second" else rows_of(F)
    out = ours().over_rows(a, b, ends())
    a, b = (plain.gather(each) if isinstance(each, Gathered) else each for each in (a, b))
    parts = zip(a[:R].double().split(COUNTS), b[:R].double().split(COUNTS), strict=True)
    assert agree(out, torch.stack([x.t() @ y for x, y in parts]))
    assert not out[0].any() and not out[9].any()


@pytest.mark.parametrize("which", ["first", "second"])
def test_products_over_no_rows_are_zero(which):
    a = gathered(D) if which == "first" else rows_of(D)
    b = gathered(F) if which == "second" else rows_of(F)
    torch.full((E, D, F), float("nan"), dtype=torch.bfloat16)  # left where the result will be
    assert not ours().over_rows(a, b, torch.zeros_like(ends())).any()


def test_rows_behind_the_last_group_are_not_written():
    """Undefined by contract; a box of results that crosses the last border would show here."""
    products, rows, w2 = ours(), gathered(D), randn(E, D, F)
    weights = torch.rand(R + 2 * BEHIND, TOP_K)
    out_2F, hidden, out_D, out_F, again, grad_2F = (
        torch.full((R + BEHIND, width), 7.0, dtype=torch.bfloat16)
        for width in (2 * F, F, D, F, F, 2 * F)
    )
    of_outputs, of_inputs = products._BY_WEIGHTS, products._BY_WEIGHTS_TRANSPOSED
    swiglu = products._SwiGLU(weights, hidden)
    products._launch(of_outputs, rows, randn(E, 2 * F, D), ends(), out_2F, N=F, swiglu=swiglu)
    products._launch(of_outputs, rows_of(F), w2, ends(), out_D, N=D)
    products._launch(of_inputs, rows_of(D), w2, ends(), out_F, N=F)
    swiglu = products._SwiGLU(weights, again, out_2F, torch.empty_like(weights))
    products._launch(of_inputs, rows, w2, ends(), grad_2F, N=F, swiglu=swiglu)
    for out in (out_2F, hidden, out_D, out_F, again, grad_2F):
        assert (out[R:] == 7).all() and out[:R].isfinite().all() and not (out[:R] == 7).all(0).any()


def test_more_experts_than_fit_into_shared_memory_are_left_to_torch():
    x, w2 = randn(1, 64), randn(481, 64, 64)
    assert ours().applies(x, w2[:480]) and not ours().applies(x, w2)
    counts = torch.full((480,), 3)
    rows, order = randn(480 * 3, 64), counts.cumsum(0).int()
    assert agree(ours().by_weights(rows, w2[:480], order), plain.by_weights(rows, w2[:480], order))


def test_nan_stays_in_its_group():
    a, b = rows_of(D), rows_of(F)
    group = COUNTS.index(65)
    begin = sum(COUNTS[:group])
    a[begin : begin + COUNTS[group], 0] = float("nan")
    for out in (ours().over_rows(a, b, ends()), ours().over_rows(b, a, ends())):
        assert out.isnan().flatten(1).any(1).nonzero().flatten().tolist() == [group]


def test_results_repeat_to_the_bit_at_full_size():
    counts = torch.full((16,), 1536)
    counts[3], counts[4] = 1, 3071
    rows, order = int(counts.sum()), counts.cumsum(0).int()
    x, w13, weights = randn(rows // 6, 2048), randn(16, 2 * 1408, 2048), torch.rand(rows // 6, 6)
    of = Gathered(x, torch.randperm(rows).int(), 6, None)
    first = ours().gate_up_swiglu(of, w13, weights, order)
    for _ in range(3):
        again = ours().gate_up_swiglu(of, w13, weights, order)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert agree(first[0], plain.gate_up_swiglu(of, w13, weights, order)[0])
    w2, others = randn(16, 2048, 1408), (first[0], weights, of.slot_of_row_R, None, order)
    grads = ours().swiglu_backward(of, w2, *others)
    for _ in range(3):
        again = ours().swiglu_backward(of, w2, *others)
        assert all(torch.equal(a, b) for a, b in zip(grads, again, strict=True))
    assert agree(grads[0], plain.swiglu_backward(plain.gather(of), w2, *others)[0])
    for pair in ((first[0], of), (first[0], first[1])):  # 2816 columns are 11 pairs of tiles
        grads = ours().over_rows(*pair, order)
        assert torch.equal(grads, ours().over_rows(*pair, order))
        assert agree(grads, plain.over_rows(*pair, order))


def test_each_product_finds_its_counter_at_zero():
    """After one without rows, on two streams at once, and replayed by a graph."""
    products, rows, w = ours(), randn(E * 640, 1024), randn(E, 1024, 1024)
    whole = torch.full((E,), 640).cumsum(0).int()
    expected = products.by_weights(rows, w, whole)
    for _ in range(3):
        products.by_weights(rows, w, torch.zeros_like(whole))
        assert torch.equal(products.by_weights(rows, w, whole), expected)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    here, there = [], []
    for _ in range(20):
        here.append(products.by_weights(rows, w, whole))
        with torch.cuda.stream(side):
            there.append(products.by_weights(rows, w, whole))
    torch.cuda.synchronize()
    assert all(torch.equal(out, expected) for out in here + there)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = [products.by_weights(rows, w, each) for each in (whole, torch.zeros_like(whole))]
        outs.append(products.by_weights(rows, w, whole))
    for _ in range(3):
        outs[0].zero_()
        graph.replay()
        assert torch.equal(outs[0], expected) and torch.equal(outs[2], expected)


def test_a_graph_is_right_beside_products_of_the_stream_it_was_recorded_on():
    products, rows, w = ours(), randn(E * 640, 1024), randn(E, 1024, 1024)
    whole = torch.full((E,), 640).cumsum(0).int()
    expected = products.by_weights(rows, w, whole)
    recorded_on, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=recorded_on):
        out = products.by_weights(rows, w, whole)
    for _ in range(20):
        out.zero_()
        recorded_on.wait_stream(torch.cuda.current_stream())
        graph.replay()
        with torch.cuda.stream(recorded_on):
            beside = products.by_weights(rows, w, whole)
        torch.cuda.current_stream().wait_stream(recorded_on)
        assert torch.equal(out, expected) and torch.equal(beside, expected)


def test_a_thread_whose_first_call_of_cuda_is_ours_has_its_results():
    """Threads of autograd may be such: the allocator's cache needs no call."""
    products, rows, w = ours(), rows_of(D), randn(E, F, D)
    expected = products.by_weights(rows, w, ends())
    ends_E, answers = ends(), []
    torch.empty_like(expected)  # leaves memory for the thread's result in the allocator's cache
    _tensor_map.cache_clear()
    thread = Thread(target=lambda: answers.append(products.by_weights(rows, w, ends_E)))
    thread.start()
    thread.join()
    assert torch.equal(answers[0][:R], expected[:R])
