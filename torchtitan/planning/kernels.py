"""FLOPs of each kernel, and its workspace, from the shapes of its arguments.

A multiply-add has two FLOPs. Attention counts the causal half only; its backward pass has five
products where forward has two, since the scores are computed again.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from torchtitan.ops.fp8.weight import Fp8Weight

# "gemm", "grouped", each with "fp8 " before it, "attention", or "" for everything else.
Kind = str


def flops_of(name: str, args: Any, outputs: list[Tensor]) -> tuple[Kind, int]:
    """Return kind and FLOPs of an operation.

    name: as registered.
    args: its arguments.
    """
    entry = _FLOPS.get(name.partition(".")[0])
    if entry is None:
        return "", 0
    kind, count = entry
    return kind, int(count(args, outputs))


def workspace_of(name: str, args: Any) -> int:
    """Return the bytes that live inside of a kernel beside its arguments and results."""
    count = _WORKSPACE.get(name.partition(".")[0])
    return int(count(args)) if count else 0


def moved_by(name: str, args: Any) -> int:
    """Return the bytes that a fused operator reads and writes outside of its matrix products."""
    count = _MOVED.get(name.partition(".")[0])
    return int(count(args)) if count else 0


def _mm(args: Any, outputs: list[Tensor]) -> int:
    return 2 * args[0].numel() * args[1].size(-1)


def _addmm(args: Any, outputs: list[Tensor]) -> int:
    return 2 * args[1].numel() * args[2].size(-1)


def _grouped_mm(args: Any, outputs: list[Tensor]) -> int:
    """Each row meets one group's matrix; a weight's gradient is a sum over rows."""
    return 2 * args[0].numel() * args[1].size(-1)


def _grouped_mm_backward(args: Any, outputs: list[Tensor]) -> int:
    grad, x, *_, needs_x, needs_w = args
    return 2 * grad.numel() * x.size(1) * (needs_x + needs_w)


def _scaled_mm(args: Any, outputs: list[Tensor]) -> int:
    return 2 * args[0].numel() * args[1].size(1)


def _fp8_linear(args: Any, outputs: list[Tensor]) -> int:
    x_RK, w_ENK = args[:2]
    return 2 * x_RK.numel() * w_ENK.size(1)


def _fp8_linear_backward(args: Any, outputs: list[Tensor]) -> int:
    grad_RN, w_ENK, (needs_x, needs_w) = args[0], args[3], args[7:9]
    return 2 * grad_RN.numel() * w_ENK.size(2) * (needs_x + needs_w)


def _fp8_linear_gradients(args: Any, outputs: list[Tensor]) -> int:
    grad, places = args[0], [place for place in args[8:10] if place is not None]
    return sum(2 * grad.numel() * place.size(1) for place in places)


def _core(q_rows: int, keys: int, heads: int, channels: int) -> float:
    """Return the FLOPs of causal scores and of their sum over values."""
    return 2 * q_rows * keys / 2 * heads * channels


def _attention(args: Any, outputs: list[Tensor]) -> float:
    q, k, v = args[:3]  # (B, H, S, C)
    return _core(q.size(0) * q.size(2), k.size(2), q.size(1), q.size(3) + v.size(3))


def _attention_backward(args: Any, outputs: list[Tensor]) -> float:
    _, q, k, v = args[:4]
    channels = 3 * q.size(3) + 2 * v.size(3)
    return _core(q.size(0) * q.size(2), k.size(2), q.size(1), channels)


def _latent(args: Any, outputs: list[Tensor]) -> float:
    (B, S, H, C), v = args[0].shape, args[7]
    return _core(B * S, S, H, C + v)


def _latent_backward(args: Any, outputs: list[Tensor]) -> float:
    (B, S, H, C), v = args[2].shape, args[0].size(-1)
    return _core(B * S, S, H, 3 * C + 2 * v)


def _documents(args: Any, outputs: list[Tensor]) -> float:
    (T, H, C), v, longest = args[0].shape, args[2].size(2), args[4]
    return _core(T, longest, H, C + v)


def _documents_backward(args: Any, outputs: list[Tensor]) -> float:
    (T, H, C), v, longest = args[1].shape, args[3].size(2), args[7]
    return _core(T, longest, H, 3 * C + 2 * v)


def _experts(args: Any, outputs: list[Tensor]) -> float:
    R, w13, w2 = args[4].size(0), args[1], args[2]
    return 2 * R * (w13.size(1) * w13.size(2) + w2.size(1) * w2.size(2))


def _experts_backward(args: Any, outputs: list[Tensor]) -> float:
    R, w13, w2 = args[6].size(0), args[3], args[4]
    return 2 * 2 * R * (w13.size(1) * w13.size(2) + w2.size(1) * w2.size(2))


def _fp8_experts_backward(args: Any, outputs: list[Tensor]) -> float:
    R, w13, w2 = args[7].size(0), args[4], args[5]
    return 2 * 2 * R * (w13.size(1) * w13.size(2) + w2.size(1) * w2.size(2))


def _fp8_feed_forward(args: Any, outputs: list[Tensor]) -> int:
    x, w2 = args[0], args[3]
    return 2 * 3 * x.size(0) * w2.numel()


def _fp8_feed_forward_backward(args: Any, outputs: list[Tensor]) -> int:
    grad, w2, (trains_w13, trains_w2) = args[0], args[7], args[10:12]
    return 2 * grad.size(0) * w2.numel() * (3 + 2 * trains_w13 + trains_w2)


_FLOPS: dict[str, tuple[Kind, Callable[[Any, list[Tensor]], float]]] = {
    "aten::mm": ("gemm", _mm),
    "aten::bmm": ("gemm", _mm),
    "aten::addmm": ("gemm", _addmm),
    "aten::addmm_": ("gemm", _addmm),
    "aten::_grouped_mm": ("grouped", _grouped_mm),
    "aten::_scaled_dot_product_cudnn_attention": ("attention", _attention),
    "aten::_scaled_dot_product_cudnn_attention_backward": ("attention", _attention_backward),
    "torchtitan::mla_attention": ("attention", _latent),
    "torchtitan::mla_attention_backward": ("attention", _latent_backward),
    "torchtitan::document_attention": ("attention", _documents),
    "torchtitan::document_attention_backward": ("attention", _documents_backward),
    "torchtitan::expert_ffn": ("grouped", _experts),
    "torchtitan::expert_ffn_backward": ("grouped", _experts_backward),
    "torchtitan::grouped_mm_backward": ("grouped", _grouped_mm_backward),
    "aten::_scaled_mm": ("fp8 gemm", _scaled_mm),
    "torchtitan::fp8_linear": ("fp8 gemm", _fp8_linear),
    "torchtitan::fp8_linear_backward": ("fp8 gemm", _fp8_linear_backward),
    "torchtitan::fp8_linear_gradients_": ("fp8 gemm", _fp8_linear_gradients),
    "torchtitan::fp8_feed_forward": ("fp8 gemm", _fp8_feed_forward),
    "torchtitan::fp8_feed_forward_backward": ("fp8 gemm", _fp8_feed_forward_backward),
    "torchtitan::fp8_expert_ffn": ("fp8 grouped", _experts),
    "torchtitan::fp8_expert_ffn_backward": ("fp8 grouped", _fp8_experts_backward),
}


def _inside_experts(args: Any) -> int:
    """Gathered rows, then the activation and the rows of the outputs."""
    x, R, F = args[0], args[4].size(0), args[2].size(2)
    return R * (x.size(1) + F) * x.element_size()


def _inside_experts_backward(args: Any) -> int:
    """Rows of the sums' gradient, the gradient of gate and up, and the activation; beside them the
    activation's gradient, then the rows of the tokens' gradient. Weights' gradients, results, are
    not there yet; in the end they are, with the tokens' rows. Of torch's products: our own, on
    Hopper, need no rows of sums' gradients and of tokens, some R x D less."""
    x, w13, w2, R = args[1], args[3], args[4], args[6].size(0)
    D, F, weights = x.size(1), w2.size(2), w13.numel() + w2.numel()
    first = R * (D + 4 * F) - weights - x.numel()
    second = R * (2 * D + 3 * F) - weights
    last = R * (D + 2 * F)
    return max(first, second, last) * x.element_size()


def _inside_latent_backward(args: Any) -> int:
    """Gradients of assembled queries, keys and values, and an fp32 sum of the queries' inside of
    the kernel."""
    grad, q = args[0], args[2]
    return (2 * q.numel() + grad.numel()) * q.element_size() + 4 * q.numel()


def _inside_fp8_experts(args: Any) -> int:
    """Weights, unless they come in FP8, and rows in FP8, gate and up, then the activation and the
    rows of the outputs."""
    x, w13, w2, R = args[0], args[1], args[2], args[4].size(0)
    D, F, size = x.size(1), w2.size(2), x.element_size()
    first = _made_in_fp8(w13) + R * D + R * 2 * F * size
    return max(first, _made_in_fp8(w2) + R * F + R * D * size)


def _inside_fp8_experts_backward(args: Any) -> int:
    """The gradient of gate and up by rows and by columns, and the activation; beside them the
    activation's gradient, then transposed weights in FP8 and the rows of the tokens' gradient,
    while the weights' gradients, results, are not there yet."""
    x, w13, w2, R, F = args[1], args[4], args[5], args[7].size(0), args[2].size(1) // 2
    D, size = x.size(1), x.element_size()
    results = (w13.numel() + w2.numel()) * size
    return R * 5 * F + max(R * F * size, w13.numel() + R * D * size - results, R * D)


def _made_in_fp8(weight: Tensor) -> int:
    """Bytes of a weight that the operator quantises."""
    return 0 if isinstance(weight, Fp8Weight) else weight.numel()


def _inside_fp8_feed_forward(args: Any) -> int:
    """Weights, unless they come in FP8, the input in FP8, gate and up, then the activation."""
    x, w2 = args[0], args[3]
    T, (D, F) = x.size(0), w2.shape
    first = 2 * _made_in_fp8(w2) + T * D + T * 2 * F * x.element_size()
    return max(first, _made_in_fp8(w2) + T * F)


def _inside_fp8_feed_forward_backward(args: Any) -> int:
    """The gradient of outputs by columns, that of gate and up by rows and by columns, the
    activation, and its gradient; or, at the end, transposed weights."""
    grad, w2 = args[0], args[7]
    T, (D, F) = grad.size(0), w2.shape
    return max(T * (D + 2 * F * 2 + F + F * grad.element_size()), T * 2 * F + 2 * w2.numel())


_WORKSPACE: dict[str, Callable[[Any], float]] = {
    "torchtitan::expert_ffn": _inside_experts,
    "torchtitan::expert_ffn_backward": _inside_experts_backward,
    "torchtitan::fp8_feed_forward": _inside_fp8_feed_forward,
    "torchtitan::fp8_feed_forward_backward": _inside_fp8_feed_forward_backward,
    "torchtitan::fp8_expert_ffn": _inside_fp8_experts,
    "torchtitan::fp8_expert_ffn_backward": _inside_fp8_experts_backward,
    "torchtitan::mla_attention_backward": _inside_latent_backward,
    "aten::_scaled_dot_product_cudnn_attention_backward": lambda args: 4 * args[1].numel(),
    "torchtitan::document_attention_backward": lambda args: 4 * args[1].numel(),
}


def _moved_by_experts(args: Any) -> int:
    """Rows gathered, SwiGLU, rows summed."""
    x, R, F = args[0], args[4].size(0), args[2].size(2)
    return 3 * R * (x.size(1) + F) * x.element_size()


def _moved_by_experts_backward(args: Any) -> int:
    """Both kinds of rows gathered, SwiGLU's backward pass, rows summed."""
    x, R, F = args[1], args[6].size(0), args[4].size(2)
    return R * (5 * x.size(1) + 6 * F) * x.element_size()


_MOVED: dict[str, Callable[[Any], float]] = {
    "torchtitan::expert_ffn": _moved_by_experts,
    "torchtitan::expert_ffn_backward": _moved_by_experts_backward,
    # Queries and keys, read and written.
    "torchtitan::mla_attention": lambda args: 4 * args[0].nbytes,
    "torchtitan::mla_attention_backward": lambda args: 4 * args[2].nbytes + 2 * args[0].nbytes,
}
