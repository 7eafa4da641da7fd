"""Every Triton kernel against its plain twin or fp64, on the CPU in Triton's interpreter.

Not collected by name: Triton decides at its import whether it interprets, so that
test_triton_interpreted.py runs this file in a process of its own.
"""

import importlib
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from torchtitan.models.moe import TokenChoiceTopKRouter
from torchtitan.models.moe.load import count_tokens
from torchtitan.ops import permute
from torchtitan.ops.adamw import adamw_update, step_numbers
from torchtitan.ops.fp8 import emulation
from torchtitan.ops.fp8.quantize import E4M3, E5M2
from torchtitan.ops.rope import apply_rope, rope_table


def kernels(name: str):
    return importlib.import_module(f"torchtitan.ops.{name}_triton")


def relative_error(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape and actual.isfinite().all()
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def sorted_slots(T: int = 150, K: int = 3, E: int = 6) -> tuple[Tensor, permute.RowOrder]:
    ids_TK = torch.randint(0, E, (T, K))
    ids_TK[ids_TK == 4] = 2  # an expert without tokens
    return ids_TK, permute.sort_slots(ids_TK, E)


def test_counting_sort_is_the_stable_sort():
    ids_TK, order = sorted_slots(T=400)  # more than one program's slots
    slot_of_row, row_of_slot, ends = kernels("permute").sort_slots(ids_TK, 6, ids_TK.numel())
    assert torch.equal(slot_of_row.long(), order.slot_of_row_R)
    assert torch.equal(row_of_slot.long(), order.row_of_slot_PK)
    assert torch.equal(ends, order.ends) and permute.counts_of(order)[4] == 0


@pytest.mark.parametrize("num_rows", [1200, 700, 300, 1, 0])
def test_counting_sort_leaves_out_empty_slots_and_rows_beyond_its_list(num_rows):
    """A list that is longer than the copies (about 800), shorter, of one row, and of none."""
    ids_TK, _ = sorted_slots(T=400)
    ids_TK[torch.rand(400, 3) > 0.66] = -1
    order = permute.sort_slots(ids_TK, 6, num_rows)
    slot_of_row, row_of_slot, ends = kernels("permute").sort_slots(ids_TK, 6, num_rows)
    assert torch.equal(row_of_slot.long(), order.row_of_slot_PK)
    assert torch.equal(ends, order.ends)
    kept = int(ends[-1])
    assert torch.equal(slot_of_row[:kept].long(), order.slot_of_row_R[:kept])


def test_counting_sort_of_no_tokens_ends_each_group_at_zero():
    *_, ends = kernels("permute").sort_slots(torch.zeros(0, 3, dtype=torch.int64), 6, 16)
    assert ends.tolist() == [0] * 6


@pytest.mark.parametrize("masked", [False, True])
def test_token_counts_leave_out_padding(masked):
    ids_TK, _ = sorted_slots(T=400)
    mask_T = torch.rand(400) > 0.5 if masked else None
    counts = kernels("permute").count_tokens(ids_TK, 6, mask_T)
    assert torch.equal(counts, count_tokens(ids_TK, 6, mask_T))


@pytest.mark.parametrize("some_empty", [False, True])
def test_rows_are_summed(some_empty):
    _, order = sorted_slots()
    rows, row_of_slot = torch.randn(450, 40), order.row_of_slot_PK.clone()
    if some_empty:
        row_of_slot[torch.rand(150, 3) > 0.7] = -1
    taken = (row_of_slot >= 0).unsqueeze(-1)
    expected = (rows.double()[row_of_slot] * taken).sum(dim=1)
    assert relative_error(kernels("permute").reduce_rows(rows, row_of_slot), expected) < 1e-6


def test_tokens_are_copied_to_as_many_rows_as_the_device_says():
    _, order = sorted_slots()
    x, num_rows = torch.randn(150, 40), torch.tensor([300], dtype=torch.int32)
    rows = kernels("permute").expand_rows(x, order.slot_of_row_R, num_rows, 3)
    assert rows.shape == (450, 40)
    assert torch.equal(rows[:300], x[order.slot_of_row_R[:300] // 3])


@pytest.mark.parametrize("rows", [450, 300])
def test_swiglu_with_routing_weights_forward_and_backward(rows):
    """Compare all rows, and the first 300, behind which none may count."""
    _, (slots, *_) = sorted_slots()
    gate_up, weights = torch.randn(450, 96), torch.rand(150, 3)
    num_rows = None if rows == 450 else torch.tensor([rows], dtype=torch.int32)
    exact = [t.double().requires_grad_() for t in (gate_up[:rows], weights)]
    gate, up = exact[0].chunk(2, dim=1)
    expected = F.silu(gate) * up * exact[1].flatten()[slots[:rows]].unsqueeze(1)
    actual = kernels("swiglu").forward(gate_up, weights, slots, num_rows)[:rows]
    assert relative_error(actual, expected) < 1e-6
    grad = torch.randn(450, 48)
    expected.backward(grad[:rows].double())
    grads = kernels("swiglu").backward(grad, gate_up, weights, slots, num_rows)
    grads = (grads[0][:rows], grads[1][:rows], grads[2])
    for actual, exact_value in zip(
        grads, (exact[0].grad, expected.detach(), exact[1].grad), strict=True
    ):
        assert relative_error(actual, exact_value) < 1e-6


@pytest.mark.parametrize("V", [1000, 9001])  # less and more than one block
def test_cross_entropy_and_its_gradient_in_place(V):
    logits, labels = torch.randn(5, V) * 3, torch.randint(0, V, (5,))
    labels[2] = -100
    exact = logits.double().requires_grad_()
    expected = F.cross_entropy(exact, labels, reduction="none")
    expected.sum().backward()
    losses = kernels("cross_entropy").cross_entropy_(logits, labels, -100, True)
    assert relative_error(losses, expected) < 1e-6
    assert relative_error(logits, exact.grad) < 1e-6 and not logits[2].any()


@pytest.fixture
def gpu_rounding(monkeypatch):
    """Numbers converted as on a GPU: the interpreter cuts bits off and loses carries."""
    interpreter = importlib.import_module("triton.runtime.interpreter")
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8e4nv": E4M3, "fp8e5": E5M2}
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}

    def convert(data, source, target, _):
        numbers = torch.from_numpy(data.copy()).view(dtypes[source.name]).to(dtypes[target.name])
        return numbers.view(bits[numbers.element_size()]).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", convert)


@pytest.mark.parametrize("kind", [E4M3, E5M2], ids=["e4m3", "e5m2"])
def test_cross_entropy_with_its_gradient_in_fp8_is_the_two_steps_to_the_bit(gpu_rounding, kind):
    """Ragged tiles, ignored tokens, outliers, and NaN, which its blocks become."""
    N, V = 150, 208
    logits, labels = torch.randn(N, V) * 4, torch.randint(0, V, (N,))
    logits[3, 200], logits[5], logits[141, 7] = 60.0, logits[5] * 40, float("nan")
    labels[::7], logits[7] = -100, float("nan")
    logits = logits.bfloat16()
    before = logits.clone()
    actual = kernels("fp8.cross_entropy").cross_entropy(logits, labels, -100, kind)
    assert torch.equal(logits.nan_to_num(), before.nan_to_num())
    losses = kernels("cross_entropy").cross_entropy_(logits, labels, -100, True)
    ends = torch.tensor([N]), torch.tensor([256])
    expected = emulation.by_both(logits, *ends, kind)
    assert torch.equal(actual[0].nan_to_num(7.0), losses.nan_to_num(7.0))
    for (values, scales), twin in zip(actual[1:], expected, strict=True):
        assert torch.equal(values.float().nan_to_num(7.0), twin.values.float().nan_to_num(7.0))
        assert values.float().isnan().any() and not values.float().isnan().all()
        made = twin.scales != 0.0  # elsewhere: columns that there are not
        assert torch.equal(scales[made].nan_to_num(7.0), twin.scales[made].nan_to_num(7.0))


def test_scaling_in_place():
    x = torch.randn(70, 90)
    expected = x * 0.3
    assert torch.equal(kernels("cross_entropy").scale_(x, torch.tensor(0.3)), expected)


def test_adamw_of_a_part_of_a_fused_weight_is_its_twin():
    numbers, settings = step_numbers(3, 0.01, (0.9, 0.95), 0.1), {"betas": (0.9, 0.95), "eps": 1e-8}
    param, mean, square = torch.randn(3, 5, 8), torch.rand(3, 5, 8), torch.rand(3, 5, 8)
    grads, copies = torch.randn(3, 10, 8), torch.randn(3, 10, 8)
    twin = [t.clone() for t in (param, grads[:, 5:], mean, square)]
    twin_copy, untouched = torch.empty(3, 5, 8), copies[:, :5].clone()
    factor = torch.tensor(0.5)
    adamw_update(*twin, numbers, copy=twin_copy, factor=factor, l2=0.01, **settings)
    tensors = (param, grads[:, 5:], mean, square, numbers, copies[:, 5:], factor)
    kernels("adamw").update(*tensors, l2=0.01, **settings)
    for actual, expected in zip((param, mean, square), (twin[0], *twin[2:]), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)
    assert torch.equal(copies[:, 5:], param) and torch.equal(copies[:, :5], untouched)


def test_norm_of_whole_and_cut_tensors(monkeypatch):
    norms = kernels("grad_norm")
    monkeypatch.setattr(norms, "_BLOCK", 64)  # several programs for small tensors
    tensors = [torch.randn(2500), torch.randn(3, 10, 8)[:, 5:], torch.randn(5, 3)]
    expected = sum(t.double().square().sum() for t in tensors)
    assert relative_error(norms.sum_of_squares(tensors), expected) < 1e-6


ROUTERS = list(itertools.product(("sigmoid", "softmax"), (True, False), (None, "top2_sum", "max")))


@pytest.mark.parametrize("score_func, norm, group_score", ROUTERS)
def test_routing_is_the_router_written_out(score_func, norm, group_score):
    T, E, K = 48, 16, 3
    groups = {"num_expert_groups": 4, "num_limited_groups": 2, "group_score_func": group_score}
    router = TokenChoiceTopKRouter(
        dim=E, num_experts=E, top_k=K, score_func=score_func, route_norm=norm, route_scale=2.5,
        **(groups if group_score else {}),
    )  # fmt: skip
    router.gate.weight = torch.nn.Parameter(torch.eye(E, dtype=torch.float64))
    logits, bias = torch.randn(T, E), torch.randn(E) * 0.3
    exact = logits.double().requires_grad_()
    expected, expected_ids, _ = router(exact, bias)
    weights, ids = kernels("routing").route(logits, bias, **router.kernel_rule._asdict())
    order, expected_order = ids.argsort(1), expected_ids.argsort(1)  # neither promises an order
    assert torch.equal(ids.gather(1, order), expected_ids.gather(1, expected_order))
    expected = expected.gather(1, expected_order)
    assert relative_error(weights.gather(1, order), expected) < 1e-6
    grad = torch.randn(T, K)
    expected.backward(grad.double())
    grad_by_slot = torch.empty_like(grad).scatter_(1, order, grad)
    rule = {"sigmoid": score_func == "sigmoid", "norm": norm, "scale": 2.5}
    actual = kernels("routing").route_backward(grad_by_slot, logits, ids, **rule)
    assert relative_error(actual, exact.grad) < 1e-5


@pytest.mark.parametrize("heads", [3, 20])  # less than, and not a multiple of, a program's 16
@pytest.mark.parametrize("given_positions", [False, True])
def test_mla_is_assembled_and_taken_apart(heads, given_positions):
    B, S, NOPE, ROPE, V = 2, 5, 16, 8, 16
    table = rope_table(ROPE, 32, 10000.0)
    positions = torch.randint(0, 32, (B, S)) if given_positions else None
    projected = torch.randn(B, S, heads * (NOPE + ROPE) + 4 + ROPE)  # as one GEMM leaves it
    q, k_rope = projected[..., : heads * (NOPE + ROPE)].unflatten(-1, (heads, -1)), projected
    k_rope, kv = k_rope[..., -ROPE:], torch.randn(B, S, heads, NOPE + V)
    exact = [t.double().detach().requires_grad_() for t in (q, kv, k_rope)]
    turned = apply_rope(exact[0][..., NOPE:], table.double(), positions)
    shared = apply_rope(exact[2].unsqueeze(2), table.double(), positions)
    expected = (
        torch.cat((exact[0][..., :NOPE], turned), -1),
        torch.cat((exact[1][..., :NOPE], shared.expand(-1, -1, heads, -1)), -1),
        exact[1][..., NOPE:],
    )
    mla = kernels("mla")
    actual = mla.assemble(q, kv, k_rope, table, positions, V)
    for ours, theirs in zip(actual, expected, strict=True):
        assert relative_error(ours, theirs) < 1e-6
    grads = [torch.randn(t.shape) for t in expected]
    torch.autograd.backward(expected, [grad.double() for grad in grads])
    back = mla.take_apart(*grads, table, positions, ROPE, V)
    for ours, theirs in zip(back, exact, strict=True):
        assert relative_error(ours, theirs.grad) < 1e-6
