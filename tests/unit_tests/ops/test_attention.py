"""Attention is an explicit softmax; packed documents don't see each other."""

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from tests.reference.mla import attend
from torchtitan.ops.attention import (
    _block_mask,
    _may_see,
    attention,
    document_mask,
    number_documents,
)

B, S, H = 2, 11, 3


def inputs(dtype: torch.dtype, qk: int, v: int) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    return tuple(torch.randn(B, S, H, channels).to(dtype) for channels in (qk, qk, v))


def slow(q, k, v, scale: float, may_see: torch.Tensor) -> torch.Tensor:
    """may_see: (B, S, S)."""
    rows = [
        torch.stack(
            [attend(q[b, :, h], k[b, :, h], v[b, :, h], scale, may_see[b]) for h in range(H)]
        )
        for b in range(B)
    ]
    return torch.stack(rows).transpose(1, 2)


def masks(name: str) -> tuple[torch.Tensor | None, torch.Tensor]:
    """The mask for `attention`, and the same as an explicit (B, S, S) matrix."""
    if name == "causal":
        return None, torch.ones(B, S, S, dtype=torch.bool).tril()
    tokens = torch.tensor([[1, 1, 0, 1, 1, 1, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0]])
    mask = document_mask(number_documents(tokens, 0))
    return mask, mask[:, 0]


@pytest.mark.parametrize("mask_name", ["causal", "documents"])
@pytest.mark.parametrize("qk, v", [(16, 16), (24, 16), (12, 5)])
@pytest.mark.parametrize(
    "dtype, tolerance",
    [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)],
    ids=["fp64", "fp32", "bf16"],
)
def test_attention_and_its_gradients_are_the_explicit_softmaxs(dtype, tolerance, qk, v, mask_name):
    mask, may_see = masks(mask_name)
    tensors = [t.requires_grad_() for t in inputs(dtype, qk, v)]
    exact = [t.detach().double().requires_grad_() for t in tensors]
    torch.manual_seed(1)
    weights = torch.randn(B, S, H, v).to(dtype)

    out = attention(*tensors, scale=0.3, mask=mask)
    expected = slow(*exact, 0.3, may_see)
    assert out.shape == (B, S, H, v) and out.dtype == dtype
    out.backward(weights)
    expected.backward(weights.double())
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    for ours, twin in zip(tensors, exact, strict=True):
        scale = max(1.0, twin.grad.abs().max().item())
        torch.testing.assert_close(ours.grad.double(), twin.grad, rtol=0, atol=tolerance * scale)


def test_nothing_looks_ahead():
    q, k, v = inputs(torch.float32, 24, 16)
    before = attention(q, k, v, scale=0.2)
    k[:, 6:], v[:, 6:] = 100.0, -100.0
    after = attention(q, k, v, scale=0.2)
    assert torch.equal(after[:, :6], before[:, :6]) and not torch.equal(after[:, 6:], before[:, 6:])


def test_document_mask_by_hand():
    # Documents: "5 9", "9" (empty but for its end), "7 8 9", and an unfinished "6".
    mask = document_mask(number_documents(torch.tensor([[5, 9, 9, 7, 8, 9, 6]]), 9))
    expected = """
        1 0 0 0 0 0 0
        1 1 0 0 0 0 0
        0 0 1 0 0 0 0
        0 0 0 1 0 0 0
        0 0 0 1 1 0 0
        0 0 0 1 1 1 0
        0 0 0 0 0 0 1
    """
    rows = [[bool(int(cell)) for cell in line.split()] for line in expected.strip().splitlines()]
    assert mask.shape == (1, 1, 7, 7) and mask.dtype == torch.bool
    assert mask[0, 0].tolist() == rows


def test_without_an_end_of_text_the_document_mask_is_causal():
    mask = document_mask(number_documents(torch.ones(B, S, dtype=torch.int64), 0))
    assert torch.equal(mask, torch.ones(B, 1, S, S, dtype=torch.bool).tril())


@pytest.mark.parametrize(
    "queries",
    [
        torch.arange(700),
        torch.cat((torch.arange(128, 256), torch.arange(640, 768))),  # a rank of two, balanced
        torch.cat((torch.arange(40, 100), torch.arange(500, 560))),  # a jump inside of a block
        torch.arange(300, 301),
    ],
    ids=["all", "two chunks", "a jump in a block", "one query"],
)
@pytest.mark.parametrize("mean", [None, 17, 300], ids=["causal", "short documents", "long ones"])
def test_a_mask_by_blocks_is_the_dense_one(queries, mean):
    """Blocks told to be whole are, others hide nothing; no more are looked at than torch looks at
    (where positions have no jump inside of a block)."""
    torch.manual_seed(1)
    K = int(queries[-1]) + 1
    ends = torch.zeros(2, K) if mean is None else (torch.rand(2, K) < 1 / mean)
    documents = ends.long().cumsum(1)
    mask = _block_mask(queries, documents)
    dense = _may_see(queries, documents)[:, 0]
    ranges = torch.arange(2), torch.arange(len(queries)), torch.arange(K)
    b, q, k = torch.meshgrid(*ranges, indexing="ij")
    assert torch.equal(mask.mask_mod(b, None, q, k), dense)
    padded = torch.nn.functional.pad(dense, (0, -K % 128, 0, -len(queries) % 128))
    blocks = padded.unflatten(2, (-1, 128)).unflatten(1, (-1, 128)).permute(0, 1, 3, 2, 4)
    seen, whole = blocks.any(-1).any(-1), blocks.all(-1).all(-1)
    listed = []
    for counts, indices in (
        (mask.kv_num_blocks, mask.kv_indices),
        (mask.full_kv_num_blocks, mask.full_kv_indices),
    ):
        marked = torch.arange(indices.size(-1)) < counts.unsqueeze(-1)
        listed.append(torch.zeros_like(marked).scatter(-1, indices.long(), marked)[:, 0])
    some, all_of_it = listed
    assert not (some & all_of_it).any() and (all_of_it <= whole).all()
    assert (seen <= (some | all_of_it)).all()
    if len(queries) == 120:
        return  # a few more are looked at
    theirs = create_block_mask(
        lambda b, h, q, k: dense[b, q, k], 2, None, len(queries), K, device="cpu"
    )
    assert torch.equal(all_of_it, whole) and torch.equal(mask.to_dense(), theirs.to_dense())
    for ours, its in zip(
        (mask.kv_num_blocks, mask.full_kv_num_blocks, mask.q_num_blocks, mask.full_q_num_blocks),
        (
            theirs.kv_num_blocks,
            theirs.full_kv_num_blocks,
            theirs.q_num_blocks,
            theirs.full_q_num_blocks,
        ),
        strict=True,
    ):
        assert torch.equal(ours, its)
