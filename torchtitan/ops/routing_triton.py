"""The router's choice and its backward pass, one program a token, in Triton.

Reference: `TokenChoiceTopKRouter.forward` (models/moe/router.py).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _scores(x, SIGMOID: tl.constexpr):
    if SIGMOID:
        return tl.sigmoid(x)
    e = tl.exp(x - tl.max(x, axis=0))
    return e / tl.sum(e, axis=0)


@triton.jit
def _route(
    logits,
    bias,
    weights,
    ids,
    scale,
    E: tl.constexpr,
    K: tl.constexpr,
    K_PADDED: tl.constexpr,
    GROUPS: tl.constexpr,
    LIMITED: tl.constexpr,
    TOP2: tl.constexpr,
    SIGMOID: tl.constexpr,
    NORM: tl.constexpr,
    BIASED: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    experts = tl.arange(0, E)
    scores = _scores(tl.load(logits + token * E + experts), SIGMOID)
    choice = scores
    if BIASED:
        choice += tl.load(bias + experts)
    if GROUPS > 0:
        groups, members = tl.arange(0, GROUPS), tl.arange(0, E // GROUPS)
        by_group = tl.reshape(choice, (GROUPS, E // GROUPS))
        value = tl.max(by_group, axis=1)
        if TOP2:
            first = tl.argmax(by_group, axis=1)
            others = tl.where(members[None, :] == first[:, None], float("-inf"), by_group)
            value += tl.max(others, axis=1)
        kept = groups < 0
        for _ in tl.static_range(LIMITED):
            best = tl.argmax(value, axis=0)
            kept = kept | (groups == best)
            value = tl.where(groups == best, float("-inf"), value)
        choice = tl.reshape(tl.where(kept[:, None], by_group, float("-inf")), (E,))
    slots = tl.arange(0, K_PADDED)
    chosen = tl.zeros((K_PADDED,), tl.float32)
    chosen_ids = tl.zeros((K_PADDED,), tl.int64)
    for k in tl.static_range(K):
        best = tl.argmax(choice, axis=0)
        chosen = tl.where(
            slots == k, tl.sum(tl.where(experts == best, scores, 0.0), axis=0), chosen
        )
        chosen_ids = tl.where(slots == k, best.to(tl.int64), chosen_ids)
        choice = tl.where(experts == best, float("-inf"), choice)
    if NORM:
        chosen = chosen / (tl.sum(chosen, axis=0) + 1e-20)
    tl.store(weights + token * K + slots, chosen * scale, mask=slots < K)
    tl.store(ids + token * K + slots, chosen_ids, mask=slots < K)


@triton.jit
def _route_backward(
    grad_weights,
    logits,
    ids,
    grad_logits,
    scale,
    E: tl.constexpr,
    K: tl.constexpr,
    SIGMOID: tl.constexpr,
    NORM: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    experts = tl.arange(0, E)
    scores = _scores(tl.load(logits + token * E + experts), SIGMOID)
    taken = tl.zeros((E,), tl.float32)  # 1 where chosen
    grad = tl.zeros((E,), tl.float32)  # by the chosen scores
    for k in tl.static_range(K):
        here = experts == tl.load(ids + token * K + k)
        taken += tl.where(here, 1.0, 0.0)
        grad += tl.where(here, tl.load(grad_weights + token * K + k) * scale, 0.0)
    if NORM:
        total = tl.sum(taken * scores, axis=0) + 1e-20
        mean = tl.sum(grad * scores, axis=0) / total
        grad = taken * (grad - mean) / total
    if SIGMOID:
        grad = grad * scores * (1.0 - scores)
    else:
        grad = scores * (grad - tl.sum(grad * scores, axis=0))
    tl.store(grad_logits + token * E + experts, grad)


def route(
    logits_TE: Tensor,
    bias_E: Tensor | None,
    *,
    top_k: int,
    groups: int,
    limited: int,
    top2: bool,
    sigmoid: bool,
    norm: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return weights (T, K) fp32 and ids (T, K) int64; the fields of `Rule` as arguments."""
    T, E = logits_TE.shape
    weights_TK = logits_TE.new_empty(T, top_k)
    ids_TK = torch.empty(T, top_k, dtype=torch.int64, device=logits_TE.device)
    if T:
        _route[(T,)](
            logits_TE,
            bias_E,
            weights_TK,
            ids_TK,
            scale,
            E=E,
            K=top_k,
            K_PADDED=triton.next_power_of_2(top_k),
            GROUPS=groups,
            LIMITED=limited,
            TOP2=top2,
            SIGMOID=sigmoid,
            NORM=norm,
            BIASED=bias_E is not None,
            num_warps=1,
        )
    return weights_TK, ids_TK


def route_backward(
    grad_TK: Tensor, logits_TE: Tensor, ids_TK: Tensor, *, sigmoid: bool, norm: bool, scale: float
) -> Tensor:
    """Return the gradient of the logits, (T, E) fp32.

    grad_TK: gradient of the weights.
    """
    (T, E), K = logits_TE.shape, ids_TK.size(1)
    grad_TE = torch.empty_like(logits_TE)
    if T:
        _route_backward[(T,)](
            grad_TK, logits_TE, ids_TK, grad_TE, scale, E=E, K=K, SIGMOID=sigmoid, NORM=norm,
            num_warps=1,
        )  # fmt: skip
    return grad_TE
