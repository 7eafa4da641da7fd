"""Each long document by a call of its own, rounded up in length, equals dense attention."""

import pytest
import torch

from torchtitan.ops import packed_documents
from torchtitan.ops.document_attention import _document_attention
from torchtitan.ops.packed_documents import Stretch, rounded, stretches

LENGTHS = [65, 1, 69, 67, 65]  # all but 1 are rounded up; the last has no token behind it


def test_long_documents_are_alone_and_neighbouring_short_ones_together():
    lengths = [10, 20, 3072, 9000, 3071, 7, 4000, 5]
    starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
    assert list(stretches(starts)) == [
        Stretch(slice(0, 30), slice(0, 2)),
        Stretch(slice(30, 3102), None),
        Stretch(slice(3102, 12102), None),
        Stretch(slice(12102, 15180), slice(4, 6)),
        Stretch(slice(15180, 19180), None),
        Stretch(slice(19180, 19185), slice(7, 8)),
    ]
    assert list(stretches([0, 50])) == [Stretch(slice(0, 50), slice(0, 1))]
    assert list(stretches([0, 5000])) == [Stretch(slice(0, 5000), None)]


def test_lengths_are_rounded_to_few_and_by_little():
    lengths = range(3072, 131073, 7)
    found = [rounded(length) for length in lengths]
    pairs = zip(found, lengths, strict=True)
    assert all(0 <= more - length <= length / 32 for more, length in pairs)
    assert len(set(found)) <= 32 * 5 + 17
    assert [rounded(length) for length in (1, 64, 65, 70, 4097)] == [1, 64, 66, 70, 4224]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_what_follows_a_document_changes_nothing_in_it(monkeypatch, compiled):
    """Queries behind it have scores so large that a share of theirs would be infinite."""
    monkeypatch.setattr(packed_documents, "LONG", 1)
    torch.manual_seed(0)
    T, starts = sum(LENGTHS), torch.tensor([0, *LENGTHS]).cumsum(0).int()
    q, k, v = (torch.randn(T, 3, c, dtype=torch.float64) for c in (10, 10, 6))
    q[65:] *= 300.0
    leaves = [t.requires_grad_() for t in (q, k, v)]
    document = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
    seen = (document[:, None] == document) & torch.ones(T, T, dtype=torch.bool).tril()
    scores = torch.einsum("qhc,khc->hqk", q, k) * 0.3
    expected = torch.einsum("hqk,khc->qhc", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)
    grad = torch.randn_like(expected)
    theirs = torch.autograd.grad(expected, leaves, grad)

    def function(q, k, v, starts):
        return _document_attention(q, k, v, starts, 99, 0.3, starts)[0]

    run = torch.compile(function, backend="aot_eager", fullgraph=True) if compiled else function
    out = run(*leaves, starts)
    ours = torch.autograd.grad(out, leaves, grad)
    for a, b in zip((out, *ours), (expected, *theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)  # sums are kept in fp32
