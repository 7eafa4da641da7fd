"""Where packed documents lie, told to cuDNN, and what computes them where it doesn't."""

import sys
from types import SimpleNamespace

import pytest
import torch

from torchtitan.ops import cudnn_documents, document_attention
from torchtitan.ops.attention import _documents, _documents_of
from torchtitan.ops.cudnn_documents import Call, places, places_for
from torchtitan.ops.document_attention import _document_attention

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def forget_the_package():
    """Ask anew whether the package is there."""
    cudnn_documents.package.cache_clear()
    cudnn_documents._tell_refusal.cache_clear()
    yield
    cudnn_documents.package.cache_clear()


def call(**changes) -> Call:
    values = {"device": torch.device("cuda"), "dtype": torch.bfloat16, "tokens": 4096, "heads": 3}
    values |= {"qk": 192, "v": 128, "v_step": 256, "documents": 16, "longest": 1024, "scale": 0.1}
    return Call(**values | {"forward": True} | changes)


def test_each_document_begins_at_its_first_tokens_element():
    starts = torch.tensor([0, 5, 6, 20, 20, 20], dtype=torch.int32)
    found = places(starts, call().steps)
    assert found.pop(cudnn_documents.LENGTHS).tolist() == [5, 1, 14, 0, 0]
    names = ("AT_QK", "AT_V", "AT_OUT", "AT_SUMS")
    widths = zip(names, (3 * 192, 3 * 256, 3 * 128, 1), strict=True)
    expected = {
        getattr(cudnn_documents, name): [start * width for start in starts.tolist()]
        for name, width in widths
    }
    assert {name: row.tolist() for name, row in found.items()} == expected
    assert all(row.dtype == torch.int64 and row.data_ptr() % 16 == 0 for row in found.values())
    odd = places(starts[:-1], call().steps)
    assert all(odd[name].data_ptr() % 16 == 0 for name in cudnn_documents.BEGINS)


def test_offsets_of_large_batches_do_not_overflow():
    starts = torch.tensor([0, 2**20], dtype=torch.int32)
    row = places(starts, call(heads=128).steps)[cudnn_documents.AT_QK]
    assert row.tolist() == [0, 2**20 * 128 * 192]


def test_few_numbers_of_places_serve_all_batches():
    assert [places_for(n) for n in (1, 16, 17, 64, 65, 1000)] == [16, 16, 32, 64, 128, 1024]


@pytest.mark.parametrize("mean", [1, 3, 40])
def test_places_that_are_left_have_no_tokens(mean):
    B, S = 3, 50
    numbers = (torch.rand(B, S) < 1 / mean).cumsum(dim=1)
    mask = _documents(numbers, CPU)
    assert mask is not None
    lengths = mask.starts.diff()
    count = int((lengths > 0).sum())
    assert lengths.numel() == places_for(count) and (lengths[count:] == 0).all()
    assert int(mask.starts[-1]) == B * S and mask.longest >= int(lengths.max())
    same = _documents_of(mask, numbers.shape)
    pairs = [(t[:, 1:] == t[:, :-1]).tolist() for t in (numbers, same)]
    assert pairs[0] == pairs[1]
    assert (same[1:, 0] > same[:-1, -1]).all()


def test_calls_are_the_same_for_batches_that_are_alike():
    q, v = torch.empty(4096, 3, 192), torch.empty(4096, 3, 128)

    def made(longest: int, T: int = 4096) -> Call:
        starts = torch.empty(17, dtype=torch.int32)
        return cudnn_documents._call(q[:T], v[:T], 128, starts, longest, 0.1, forward=True)

    assert made(1) == made(256) != made(257) == made(512)
    assert made(4000).longest == 4096 and made(4096).documents == 16
    assert made(200, T=200).longest == 200  # not more than there are tokens


def test_values_in_wider_heads_are_not_copied():
    wide = torch.ones(10, 3, 256, dtype=torch.bfloat16)
    v, step = cudnn_documents._heads_apart(wide[..., 128:])
    assert step == 256 and v.data_ptr() == wide[..., 128:].data_ptr()
    for odd in (wide[..., 4:132], wide.transpose(0, 1)[..., :128]):  # unaligned; other order
        v, step = cudnn_documents._heads_apart(odd)
        assert step == 128 and v.is_contiguous() and torch.equal(v, odd)


def test_without_the_package_nothing_is_built(monkeypatch):
    monkeypatch.setitem(sys.modules, "cudnn", None)
    assert cudnn_documents.package() is None
    assert cudnn_documents._built(call()) is None


def test_another_package_of_that_name_is_none_of_ours(monkeypatch):
    monkeypatch.setitem(sys.modules, "cudnn", SimpleNamespace())
    assert cudnn_documents.package() is None


def test_a_deterministic_run_has_other_kernels(monkeypatch):
    monkeypatch.setitem(sys.modules, "cudnn", SimpleNamespace(pygraph=None))
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    monkeypatch.setattr(cudnn_documents, "build", lambda call: pytest.fail("built"))
    assert cudnn_documents._built(call()) is None
    assert "deterministic" in cudnn_documents.way(192, 128)


def test_sizes_that_no_gpu_has_proven_are_left_to_flash_attention(monkeypatch):
    monkeypatch.setitem(sys.modules, "cudnn", SimpleNamespace(pygraph=None))
    monkeypatch.setattr(cudnn_documents, "build", lambda call: pytest.fail("built"))
    assert cudnn_documents._built(call(qk=64)) is None


def test_a_refusal_is_remembered_and_told_once(monkeypatch, caplog):
    tried = []

    def refuse(call: Call):
        tried.append(call)
        raise RuntimeError("no engine for\n  this head")

    monkeypatch.setitem(sys.modules, "cudnn", SimpleNamespace(pygraph=None))
    monkeypatch.setattr(cudnn_documents, "build", refuse)
    monkeypatch.setattr(cudnn_documents, "_of_thread", cudnn_documents._OfThread())
    monkeypatch.setattr(cudnn_documents, "PROVEN", {(24, 128)})
    monkeypatch.setattr(cudnn_documents, "_is_hopper", lambda: True)
    calls = [call(qk=24), call(qk=24), call(qk=24, forward=False)]
    assert [cudnn_documents._built(each) for each in calls] == [None] * 3
    assert tried == calls[1:]
    assert caplog.text.count("no engine for this head") == 1
    assert "heads of 24 and 128 channels" in caplog.text


@pytest.mark.parametrize(
    "installed, capability, words",
    [
        (True, 9, "one call for all (nvidia-cudnn-frontend 1.2)"),
        (False, 9, "pip install nvidia-cudnn-frontend"),
        (False, 8, "flash attention, and cuDNN's kernel once for each long one"),
    ],
)
def test_the_log_says_what_computes_documents(monkeypatch, installed, capability, words):
    package = SimpleNamespace(pygraph=None, __version__="1.2") if installed else None
    monkeypatch.setitem(sys.modules, "cudnn", package)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (capability, 0))
    said = cudnn_documents.way(192, 128)
    assert words in said and ("pip install" in said) == words.startswith("pip install")


@pytest.mark.parametrize("ours", ["cuDNN", "the others"])
def test_the_operator_asks_cudnn_first(monkeypatch, ours):
    """Both passes, each for itself: one may be refused."""
    asked = []

    def answer(name, result):
        def function(*args):
            asked.append(name)
            return result

        return function

    q, k, v = (torch.randn(6, 2, c).requires_grad_() for c in (8, 8, 4))
    starts = torch.tensor([0, 4, 6], dtype=torch.int32)
    out = torch.zeros(6, 2, 4), torch.zeros(2, 6)
    grads = torch.ones(6, 2, 8), torch.ones(6, 2, 8), torch.ones(6, 2, 4)
    theirs = None if ours == "the others" else [(out, grads)]
    first, second = document_attention.cudnn_documents, document_attention.packed_documents
    monkeypatch.setattr(first, "attend", answer("cudnn", theirs and out))
    monkeypatch.setattr(first, "attend_backward", answer("cudnn backward", theirs and grads))
    monkeypatch.setattr(second, "attend", answer("other", out))
    monkeypatch.setattr(second, "attend_backward", answer("other backward", grads))
    _document_attention(q, k, v, starts, 4, 0.3)[0].sum().backward()
    both = ["cudnn", "other", "cudnn backward", "other backward"]
    assert asked == (both if theirs is None else ["cudnn", "cudnn backward"])
    assert torch.equal(q.grad, grads[0]) and torch.equal(v.grad, grads[2])
