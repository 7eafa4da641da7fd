"""L2 norm of many tensors together, in fp32 whatever their dtype."""

import torch
from torch import Tensor


def total_norm(tensors: list[Tensor]) -> Tensor:
    """Root of the sum of all squares: scalar, at least fp32.

    tensors: dense, or parts of a dense tensor cut along one dim.
    """
    first = tensors[0]
    tensors = [t for t in tensors if t.numel()]
    if not tensors:
        return first.new_zeros((), dtype=torch.promote_types(first.dtype, torch.float32))
    if first.is_cuda and first.dtype != torch.float64:
        from torchtitan.ops import grad_norm_triton

        return grad_norm_triton.sum_of_squares(tensors).sqrt()
    dtype = torch.promote_types(first.dtype, torch.float32)
    norms = torch._foreach_norm(tensors, 2.0, dtype=dtype)
    return torch.linalg.vector_norm(torch.stack(norms))
