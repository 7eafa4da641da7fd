"""Packed documents in a step that is recorded: their places, and what excludes them."""

import json
import re
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tiny_run import tiny
from torchtitan.config import ConfigManager
from torchtitan.models.deepseek_v3 import deepseekv3_args
from torchtitan.ops import cudnn_documents, packed_documents
from torchtitan.ops.attention import _documents, _documents_of, starts_of, with_places
from torchtitan.tools.errors import UserError
from torchtitan.trainer import Trainer, forward_backward
from torchtitan.trainer.forward_backward import GraphedStep
from torchtitan.trainer.preflight import check_graphed_documents
from torchtitan.trainer.step_log import Interval

CPU = torch.device("cpu")
APART = {"model__args__attn_mask_type": "block_causal"}


class Replayed:
    """A stand-in for `GraphedPass`: from the second call on, inputs come in the same memory."""

    made = 0
    holds_grads = False

    def __init__(self, run):
        self.run, self.static = run, ()
        Replayed.made += 1

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        self.static = self.static or tuple(t.clone() for t in inputs)
        for static, fresh in zip(self.static, inputs, strict=True):
            assert static.shape == fresh.shape, "recorded for another shape"
            static.copy_(fresh)
        return self.run(*self.static)


def test_any_batch_has_its_documents_in_so_many_places():
    apart = torch.tensor([[0, 0, 1, 1], [0, 1, 1, -1]])
    for documents, count in ((apart, 5), (torch.zeros(2, 4, dtype=torch.int64), 2)):
        mask = _documents(documents, CPU)
        assert (mask is None) == (count == 2)
        starts = with_places(starts_of(mask, documents.shape, CPU), 32, documents.numel())
        assert starts.dtype == torch.int32 and starts.shape == (33,)
        lengths = starts.diff()
        assert (lengths[:count] > 0).all() and (lengths[count:] == 0).all()
        assert int(starts[-1]) == documents.numel()
        if mask is not None:
            same = _documents_of(mask._replace(starts=starts), documents.shape)
            assert torch.equal(same, _documents_of(mask, documents.shape))


def short_documents(folder: Path, **changes) -> dict[str, Any]:
    """Write documents of one to six words; return options to train on them, kept apart."""
    path = folder / "text.jsonl"
    texts = [" one two three four five six"[: 5 * n] for n in range(1, 6)] * 1000
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return APART | {"training__dataset": "text", "training__dataset_path": path} | changes


def losses_of(trainer: Trainer, steps: int, whole: int) -> list[float]:
    """Train, for some steps first on sequences of which all but one are one document."""
    found, loader = [], iter(trainer.dataloader)
    for step in range(1, steps + 1):
        batches = [next(loader) for _ in range(trainer.accumulation)]
        for inputs, _ in batches if step <= whole else ():
            tokens = inputs["input"][1:]
            tokens[tokens == trainer.tokenizer.eos_id] = 5
        trainer.step = step
        found.append(trainer.train_step(iter(batches), Interval()).loss)
    return found


def started(folder: Path, **changes) -> Trainer:
    return Trainer(ConfigManager().parse_args(tiny(folder, **changes)))


GROWTH = r"CUDA graph: a batch has more than \d+ documents; it is recorded anew, for up to \d+"


@pytest.mark.skipif(torch.cuda.is_available(), reason="plays graphs on a CPU")
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_graphed_steps_follow_their_documents(tmp_path, monkeypatch, caplog, micro_batches):
    """On a CPU, in fp32: attention reads `Documents` there, too."""
    monkeypatch.setattr(forward_backward, "GraphedPass", Replayed)
    monkeypatch.setattr(Replayed, "made", 0)
    sizes = {"training__global_batch_size": 4 * micro_batches, "training__seq_len": 64}
    options = short_documents(tmp_path, **sizes)
    with closing(started(tmp_path / "run", **options)) as trainer:
        expected = losses_of(trainer, 8, whole=4)
    with closing(started(tmp_path / "graph", **options)) as trainer, caplog.at_level("INFO"):
        monkeypatch.setattr(trainer.passes, "masks", partial(_documents, device=CPU))
        trainer.graphed = GraphedStep(trainer.passes, trainer.optimizer, None, trainer._clip)
        assert losses_of(trainer, 8, whole=4) == pytest.approx(expected, rel=1e-5)
    assert len(re.findall(GROWTH, caplog.text)) == 1
    assert Replayed.made == 2 * 3, "at the beginning, of the first batch, of the one with more"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_replayed_steps_have_the_losses_of_the_run(
    tmp_path, monkeypatch, caplog, micro_batches, compiled
):
    if cudnn_documents.package() is None:
        pytest.skip("needs nvidia-cudnn-frontend")
    for name in ("attend", "attend_backward"):
        monkeypatch.setattr(packed_documents, name, lambda *_: pytest.fail("cuDNN refused"))
    options = short_documents(tmp_path, compile__enable=compiled, training__seq_len=256)
    options |= {"training__global_batch_size": 4 * micro_batches}
    options |= {"training__mixed_precision_param": "bfloat16"}
    heads = {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
    options |= {f"model__args__{name}": size for name, size in heads.items()}
    with closing(started(tmp_path / "run", **options)) as trainer:
        expected = losses_of(trainer, 30, whole=12)
    options["compile__cuda_graph"] = True
    with closing(started(tmp_path / "graph", **options)) as trainer, caplog.at_level("INFO"):
        found, graphed = losses_of(trainer, 30, whole=12), trainer.graphed
        assert graphed._whole_step.holds_grads or graphed._one_pass.holds_grads
    assert found == pytest.approx(expected, rel=1e-4)
    assert len(re.findall(GROWTH, caplog.text)) == 1


def test_all_ranks_make_room_for_the_one_with_most_documents(monkeypatch):
    monkeypatch.setattr(
        forward_backward, "gather_from_ranks", lambda own: [own, torch.tensor(100), own]
    )
    step = GraphedStep.__new__(GraphedStep)
    step._places, forgotten = 32, []
    step.forget = lambda: forgotten.append(step._places)
    for documents in (16, 100, 16):
        step._make_room(documents)
    assert forgotten == [256]


@pytest.mark.parametrize(
    "changes, installed, sentence",
    [
        ({}, False, "`pip install nvidia-cudnn-frontend`, or set compile.cuda_graph to false"),
        ({"debug__deterministic": "true"}, True, "debug.deterministic excludes it"),
        ({"parallelism__context_parallel_degree": 2}, True, "context_parallel_degree = 2 excludes"),
        ({"training__mixed_precision_param": "float32"}, True, '= "float32" excludes it'),
        ({"model__args__v_head_dim": 64}, True, "heads of 192 and 64 channels have another"),
        ({}, True, None),
        ({"compile__cuda_graph": "false"}, False, None),
        ({"model__args__attn_mask_type": "causal"}, False, None),
    ],
)
def test_a_graph_takes_documents_where_cudnn_computes_them(
    tmp_path, monkeypatch, changes, installed, sentence
):
    monkeypatch.setattr(cudnn_documents, "package", lambda: object() if installed else None)
    heads = {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
    heads = {f"model__args__{name}": size for name, size in heads.items()}
    given = {"compile__cuda_graph": "true", "training__mixed_precision_param": "bfloat16"}
    changes = APART | given | heads | changes
    config = ConfigManager().parse_args(tiny(tmp_path, **changes))
    prefix = "model__args__"
    given = {k.removeprefix(prefix): v for k, v in changes.items() if k.startswith(prefix)}
    args = deepseekv3_args["debugmodel"].for_run(overrides=given, seq_len=32)
    if sentence is None:
        return check_graphed_documents(config, args)
    with pytest.raises(UserError) as raised:
        check_graphed_documents(config, args)
    assert sentence in str(raised.value) and "'block_causal'" in str(raised.value)
