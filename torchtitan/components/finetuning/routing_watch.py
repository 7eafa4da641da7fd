"""How far routing has moved in a run: the share of experts that tokens of a fixed text have now and
did not have at the start.

The text is the beginning of the shipped sample, the same in every run and layout. Its experts at
the start are kept in a file of job.dump_folder, so that a resumed run compares with the same start.
"""

import io
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchtitan.config import JobConfig
from torchtitan.data.catalog import SAMPLE
from torchtitan.data.tokenizer import Tokenizer
from torchtitan.distributed.utils import sum_over_ranks
from torchtitan.protocols.model import BaseModel
from torchtitan.tools.disk import SideOutput, write_whole
from torchtitan.tools.logging import logger

FILE = "routing_start.npz"
LONGEST = 512  # tokens of the text: with 26 layers of 6 experts, 80,000 choices

Choices = Mapping[int, np.ndarray]  # by layer: experts of each token, (T, K)


class RoutingWatch:
    """Measures at steps that are multiples of metrics.routing_moved_freq, and at the last one.

    Every rank must call `begin` and `numbers`; rank 0 compares.
    """

    def __init__(
        self, config: JobConfig, tokenizer: Tokenizer, max_seq_len: int, device: torch.device
    ) -> None:
        self._freq = config.metrics.routing_moved_freq
        self._path = Path(config.job.dump_folder) / FILE
        self._device = device
        if self._freq:
            self._tokens = torch.tensor([_text(tokenizer, min(LONGEST, max_seq_len))])
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
        found: dict[int, np.ndarray] = {}

        def note(layer: int, output: tuple[Tensor, ...]) -> None:
            found[layer] = output[1].to("cpu", torch.int16).numpy()

        def hook(layer: int):
            return lambda _module, _inputs, output: note(layer, output)

        layers = model.moe_layers().items()
        handles = [moe.router.register_forward_hook(hook(layer)) for layer, moe in layers]
        was_training = model.training
        model.eval()
        try:
            with torch.compiler.set_stance("force_eager"):
                model(self._tokens.to(self._device))
        finally:
            model.train(was_training)
            for handle in handles:
                handle.remove()
        return found


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
