"""The router's logits: hidden states times the gate's weight, to fp32 precision.

A product of two bf16 numbers is exact in fp32, so bf16 tensor cores with fp32 sums give the fp32
product of bf16 operands. In the backward pass the fp32 gradient of the logits is split into two
bf16 numbers, a high and a low part, which keep 16 of its 24 bits: the results are rounded to bf16
(8 bits) anyway.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def router_logits(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """Compute the logits (T, E), at least fp32 (fp64 stays fp64)."""
    if x_TD.is_cuda and x_TD.dtype == weight_ED.dtype == torch.bfloat16:
        return _RouterLogits.apply(x_TD, weight_ED)
    dtype = torch.promote_types(x_TD.dtype, torch.float32)
    return F.linear(x_TD.to(dtype), weight_ED.to(dtype))


class _RouterLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, weight_ED):
        ctx.save_for_backward(x_TD, weight_ED)
        return torch.mm(x_TD, weight_ED.t(), out_dtype=torch.float32)

    @staticmethod
    def backward(ctx, grad_TE):
        x_TD, weight_ED = ctx.saved_tensors
        high = grad_TE.bfloat16()
        low = (grad_TE - high.float()).bfloat16()
        both_T2E = torch.cat((high, low), dim=1)
        grad_x_TD = both_T2E @ torch.cat((weight_ED, weight_ED))
        parts_2ED = torch.mm(both_T2E.t(), x_TD, out_dtype=torch.float32)
        return grad_x_TD, parts_2ED.unflatten(0, (2, -1)).sum(dim=0).to(weight_ED.dtype)
