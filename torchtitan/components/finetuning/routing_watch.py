"""How far routing has moved in a run: the share of experts that tokens of a fixed text have now and
did not have at the start.

The text is the beginning of the shipped sample, the same in every run and layout. Its experts at
the start are kept in a file of job.dump_folder, so that a resumed run compares with the same start.

With tensor or context parallelism each rank routes a part of the text, with pipelines each stage
some of the layers; the parts are put together.
"""

import io
import json
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchtitan.config import JobConfig
from torchtitan.data.catalog import SAMPLE
from torchtitan.data.tokenizer import Tokenizer
from torchtitan.distributed.context_parallel import positions_of_this_rank
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.distributed.utils import sum_over_ranks
from torchtitan.ops.cross_entropy import IGNORE_INDEX
from torchtitan.protocols.model import BaseModel
from torchtitan.tools.disk import SideOutput, write_whole
from torchtitan.tools.logging import logger

FILE = "routing_start.npz"
LONGEST = 512  # tokens of the text: with 26 layers of 6 experts, 80,000 choices

Choices = Mapping[int, np.ndarray]  # by layer: experts of each token, (T, K)
ByLayer = dict[int, Tensor]
Gather = Callable[[tuple[dict[int, Any], ...]], tuple[dict[int, Any], ...]]


class RoutingWatch:
    """Measures at steps that are multiples of metrics.routing_moved_freq, and at the last one.

    Every rank must call `begin` and `numbers`; rank 0 compares.

    forward: runs the model over a batch, in the layout of this run, without gradients.
    gather: merges the layers of a pipeline's stages; None without pipelines.
    """

    def __init__(
        self,
        config: JobConfig,
        tokenizer: Tokenizer,
        max_seq_len: int,
        *,
        dims: ParallelDims,
        device: torch.device,
        forward: Callable[[tuple[dict[str, Tensor], Tensor]], Any],
        gather: Gather | None,
    ) -> None:
        self._freq = config.metrics.routing_moved_freq
        self._path = Path(config.job.dump_folder) / FILE
        self._device, self._dims = device, dims
        self._forward, self._gather = forward, gather
        if self._freq:
            self._length, padded = _lengths(max_seq_len, dims)
            # A pipeline needs full batches; the further sequences are the same text.
            rows = 1 if gather is None else config.training.local_batch_size
            text = torch.zeros(padded, dtype=torch.int64)
            text[: self._length] = torch.tensor(_text(tokenizer, self._length))
            documents = torch.where(torch.arange(padded) < self._length, 0, -1)
            inputs = {"input": text.repeat(rows, 1), "documents": documents.repeat(rows, 1)}
            self._batch = inputs, torch.full((rows, padded), IGNORE_INDEX)
            self._here = _positions_here(padded, dims)
        self._start: Choices = {}
        self._start_step = 0

    def begin(self, model: BaseModel, step: int, *, is_first: bool) -> None:
        """Note the experts at the start, or read those that an earlier start of this run noted.

        step: steps that are done.
        is_first: whether this is rank 0.
        """
        if not self._freq:
            return
        now = self._choices(model)
        if not is_first:
            return
        self._start = (_read(self._path, now) if step else None) or now
        if step and self._start is now:
            self._start_step = step
            logger.warning(
                "%s does not have the routing at the start of this run: what has moved is counted "
                "from step %d on",
                self._path,
                step,
            )
        if self._start is now:
            _write(self._path, now)

    def numbers(self, model: BaseModel, step: int, last_step: int) -> dict[str, float]:
        """Measure where it is due, and log it; equal on all ranks."""
        if not self._freq or (step % self._freq and step != last_step):
            return {}
        now = self._choices(model)
        moved = {layer: _share_moved(start, now[layer]) for layer, start in self._start.items()}
        share = sum(moved.values()) / max(1, len(moved))  # 0 on ranks that do not compare
        share = sum_over_ranks(torch.tensor(share, dtype=torch.float64, device=self._device))
        percent = 100 * share.item()  # host sync: seldom
        if moved:
            most = max(moved, key=lambda layer: moved[layer])
            logger.info(
                "Routing at step %d: %.2f %% of the experts of a fixed text are not those of step "
                "%d (mean over %d layers; most in layer %d: %.2f %%)",
                step,
                percent,
                self._start_step,
                len(moved),
                most,
                100 * moved[most],
            )
        return {"routing_moved_percent": percent}

    @torch.no_grad()
    def _choices(self, model: BaseModel) -> Choices:
        """Route the text, without the compiler: it would compile again for this length."""
        found: ByLayer = {}

        def hook(layer: int):
            def note(_module: Any, _inputs: Any, output: tuple[Tensor, ...]) -> None:
                found.setdefault(layer, output[1][: len(self._here)])  # of the first sequence

            return note

        layers = model.moe_layers().items()
        handles = [moe.router.register_forward_hook(hook(layer)) for layer, moe in layers]
        was_training = model.training
        model.eval()
        try:
            with torch.compiler.set_stance("force_eager"):
                self._forward(self._batch)
        finally:
            model.train(was_training)
            for handle in handles:
                handle.remove()
        whole = {layer: self._whole(ids_PK) for layer, ids_PK in sorted(found.items())}
        if self._gather is not None:
            (whole,) = self._gather((whole,))
        return {layer: ids_TK.to("cpu", torch.int16).numpy() for layer, ids_TK in whole.items()}

    def _whole(self, ids_PK: Tensor) -> Tensor:
        """Experts of the whole text, (T, K), from those of the positions of this rank."""
        if self._dims.cp * self._dims.tp > 1:
            ids_SK = ids_PK.new_zeros(self._batch[1].size(1), ids_PK.size(1))
            ids_SK[self._here.to(ids_PK.device)] = ids_PK
            ids_PK = sum_over_ranks(ids_SK, self._dims.sequence_group)
        return ids_PK[: self._length]


def _lengths(max_seq_len: int, dims: ParallelDims) -> tuple[int, int]:
    """Tokens of the text, and of the sequence that holds it: a multiple of what the ranks split."""
    parts = 2 * dims.cp * dims.tp if dims.cp > 1 else dims.tp
    length = min(LONGEST, max_seq_len)
    padded = -(-length // parts) * parts
    if padded > max_seq_len:
        length = padded = max_seq_len // parts * parts
    return length, padded


def _positions_here(seq_len: int, dims: ParallelDims) -> Tensor:
    """Positions of a sequence that this rank routes."""
    here = positions_of_this_rank(dims, seq_len, torch.device("cpu"))
    here = torch.arange(seq_len) if here is None else here
    return here.chunk(dims.tp)[dims.data_mesh["tp"].get_local_rank()] if dims.tp > 1 else here


def _text(tokenizer: Tokenizer, length: int) -> list[int]:
    ids: list[int] = []
    with SAMPLE.open(encoding="utf-8") as lines:
        while len(ids) < length:
            ids += tokenizer.encode(json.loads(next(lines))["text"])
    return ids[:length]


def _share_moved(start_TK: np.ndarray, now_TK: np.ndarray) -> float:
    """Share of a token's experts that it did not have at the start, whatever their order."""
    kept = (now_TK[:, :, None] == start_TK[:, None, :]).any(axis=-1)
    return 1.0 - float(kept.mean())


def _write(path: Path, choices: Choices) -> None:
    buffer = io.BytesIO()
    arrays: dict[str, Any] = {str(layer): ids for layer, ids in choices.items()}
    np.savez_compressed(buffer, **arrays)
    lost = "after a restart, what has moved is counted from there"
    with SideOutput(FILE, path, lost).attempt():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, buffer.getvalue())


def _read(path: Path, now: Choices) -> Choices | None:
    """Read the experts at the start; None where there are none, or those of another model."""
    try:
        with np.load(path, allow_pickle=False) as file:
            start = {int(name): file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return None
    same = start.keys() == now.keys() and all(start[n].shape == now[n].shape for n in now)
    return start if same else None
