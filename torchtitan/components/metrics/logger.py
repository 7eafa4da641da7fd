"""One record per logged step, on the console and on disk.

The trainer measures and reduces (loss, gradient norm, tokens, seconds, expert loads); this file
derives the rest (throughput, MFU, memory, load balance) and passes the record to the console and to
the writers. Nothing here communicates, so each rank may log or not.
"""

import os
import platform
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from torchtitan.components.metrics.expert_load import load_balance, relative_load
from torchtitan.components.metrics.heatmap import labelled_heatmap
from torchtitan.components.metrics.history import History
from torchtitan.components.metrics.wandb_writer import WandbWriter
from torchtitan.components.metrics.writers import JsonlWriter, Record, TensorBoardWriter
from torchtitan.tools.logging import logger

_GIB = 2**30


class MetricsLogger:
    """Logs at step 1, at each multiple of `log_freq` and at the last step.

    Rank 0 writes the console line, `dump_folder/metrics.jsonl` and, with `enable_tensorboard`,
    event files in a dated folder of this run in `dump_folder/save_tb_folder`. With
    `save_for_all_ranks` rank k > 0 writes `metrics.rank_k.jsonl` and `save_tb_folder/rank_k` too,
    else nothing. Weights & Biases gets the same as TensorBoard.

    peak_flops: of the device (tools/flops.py); None leaves MFU out.
    enable_report: write the records that the report needs beside metrics.jsonl (rank 0).
    wandb_config: settings of the run, for Weights & Biases; None = don't use it.
    world_size: number of devices.
    start_step: steps done before. A resumed run continues the files of the newest run; a new one
        (0) keeps those of older runs beside its own.
    """

    def __init__(
        self,
        *,
        dump_folder: str | os.PathLike,
        log_freq: int,
        total_steps: int,
        enable_tensorboard: bool,
        save_tb_folder: str,
        save_for_all_ranks: bool,
        disable_color_printing: bool,
        device: torch.device,
        peak_flops: float | None,
        rank: int = 0,
        world_size: int = 1,
        start_step: int = 0,
        enable_report: bool = False,
        wandb_config: dict[str, Any] | None = None,
    ) -> None:
        self.log_freq = log_freq
        self.total_steps = total_steps
        self.device = device
        self.peak_flops = peak_flops
        self.rank = rank
        self.world_size = world_size
        self.colour = not disable_color_printing and _terminal_has_colour()
        self.alloc_retries = 0
        self.jsonl: JsonlWriter | None = None
        self.tensorboard: TensorBoardWriter | None = None
        self.wandb: WandbWriter | None = None
        self.history: History | None = None
        if rank == 0 and enable_report:
            self.history = History(Path(dump_folder), start_step, total_steps)
        if rank == 0 or save_for_all_ranks:
            suffix = "" if rank == 0 else f"rank_{rank}"
            name = f"metrics.{suffix}.jsonl" if suffix else "metrics.jsonl"
            self.jsonl = JsonlWriter(Path(dump_folder, name), start_step)
            if enable_tensorboard:
                parent = Path(dump_folder, save_tb_folder, suffix)
                self.tensorboard = TensorBoardWriter(parent, start_step)
            if wandb_config is not None:
                folder = Path(dump_folder, save_tb_folder, suffix)
                self.wandb = WandbWriter(folder, start_step, wandb_config, suffix)
            if rank == 0:
                self._log_setup(self.jsonl.path)

    def _log_setup(self, records: Path) -> None:
        peak = "peak unknown, so no MFU"
        if self.peak_flops is not None:
            peak = f"peak {self.peak_flops / 1e12:,.0f} TFLOP/s dense"
        logger.info(
            f"metrics: {self.world_size} x {device_name(self.device)} ({peak}); records in "
            f"{records}"
        )
        if self.tensorboard is not None:
            folder = self.tensorboard.folder
            logger.info(
                f"metrics: this run's curves in {folder}; tensorboard --logdir {folder.parent}"
            )

    def should_log(self, step: int) -> bool:
        """Tell whether step (from 1) is logged; the same on every rank."""
        return step == 1 or step % self.log_freq == 0 or step == self.total_steps

    def log(
        self,
        *,
        step: int,
        loss: float,
        max_loss: float,
        grad_norm: float,
        lr: float,
        tokens: int,
        tokens_seen: int,
        flops: float,
        step_seconds: Sequence[float],
        data_seconds: float,
        expert_loads: Mapping[int, torch.Tensor] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        """Log one step; every rank must call this where `should_log(step)`.

        Of this step:
        loss: mean over all tokens of all ranks.
        max_loss: largest mean of a rank.
        grad_norm: before clipping.
        expert_loads: tokens per expert (E,), summed over ranks, by layer.
        tokens_seen: since the start of training.
        extra: further numbers, under names that are still free.

        Since the last logged step:
        tokens: processed by all ranks together (padding included, it costs the same).
        flops: that these tokens need (recomputation not counted).
        step_seconds: duration of each step, waiting for data included.
        data_seconds: sum of the waiting for data on this rank.
        """
        memory = self._read_memory()  # On all ranks: one short of memory slows all the others.
        if self.jsonl is None:
            return
        record: dict[str, Any] = {
            "step": step,
            "time": time.time(),
            "loss": loss,
            "max_loss": max_loss,
            "grad_norm": grad_norm,
            "lr": lr,
            "tokens_seen": tokens_seen,
        }
        record |= self._throughput(tokens, flops, step_seconds, data_seconds) | memory
        relative: dict[int, torch.Tensor] = {}
        if expert_loads:
            loads = relative_load(torch.stack(list(expert_loads.values())).cpu())
            record |= load_balance(list(expert_loads), loads)
            relative = dict(zip(expert_loads, loads, strict=True))
        for name, value in (extra or {}).items():
            assert name not in record, f"the name {name!r} is taken"
            record[name] = value
        self._write(record, relative)
        if self.rank == 0:
            logger.info(console_line(record, self.total_steps, colour=self.colour))

    def _write(self, record: Record, relative: Mapping[int, torch.Tensor]) -> None:
        """relative: each expert's load over the mean, by layer."""
        assert self.jsonl is not None
        self.jsonl.write(record)
        heatmap = None
        if relative and (self.tensorboard is not None or self.wandb is not None):
            heatmap = labelled_heatmap(relative)
        for writer in (self.tensorboard, self.wandb):
            if writer is not None:
                writer.write(record, heatmap)
        if relative and self.history is not None:
            self.history.loads(record["step"], relative)

    def log_texts(self, texts: Mapping[str, str], step: int) -> None:
        """Write sample texts.

        texts: generated text by prompt.
        """
        for writer in (self.tensorboard, self.wandb):
            if writer is not None:
                writer.write_texts(texts, step)
        for prompt, text in texts.items():
            self.event(step, "sample", prompt=prompt, text=text)

    def event(self, step: int, kind: str, **facts: Any) -> None:
        """Record an event for the report; see `History.event`."""
        if self.history is not None:
            self.history.event(step, kind, **facts)

    def rewind(self, step: int) -> None:
        """Remove the records of steps after `step`, which are done again."""
        for writer in self._writers():
            writer.rewind(step)

    def _writers(self) -> list[Any]:
        writers = (self.jsonl, self.tensorboard, self.wandb, self.history)
        return [writer for writer in writers if writer is not None]

    def _throughput(
        self, tokens: int, flops: float, step_seconds: Sequence[float], data_seconds: float
    ) -> dict[str, float]:
        seconds = sum(step_seconds)
        per_second = flops / seconds / self.world_size
        numbers = {
            "tps": tokens / seconds / self.world_size,
            "tflops": per_second / 1e12,
            "step_seconds": seconds / len(step_seconds),
            "max_step_seconds": max(step_seconds),
            "data_seconds": data_seconds / len(step_seconds),
            "data_percent": 100 * data_seconds / seconds,
        }
        if self.peak_flops is not None:
            numbers["mfu_percent"] = 100 * per_second / self.peak_flops
        return numbers

    def _read_memory(self) -> dict[str, float]:
        """Read the peaks since the last logged step (CPU: since the start), in GiB and %."""
        if self.device.type != "cuda":
            resident, total = _peak_resident_bytes(), _physical_memory_bytes()
            return {"memory_gib": resident / _GIB, "memory_percent": 100 * resident / total}
        stats = torch.cuda.memory_stats(self.device)
        total = torch.cuda.get_device_properties(self.device).total_memory
        torch.cuda.reset_peak_memory_stats(self.device)
        retries = stats["num_alloc_retries"]
        if retries > self.alloc_retries:
            logger.warning(
                f"rank {self.rank} is short of memory: the CUDA allocator had to flush its cache "
                f"{retries - self.alloc_retries} times since the last log, which is slow"
            )
            self.alloc_retries = retries
        reserved = stats["reserved_bytes.all.peak"]
        return {
            "memory_gib": reserved / _GIB,
            "memory_percent": 100 * reserved / total,
            "memory_active_gib": stats["active_bytes.all.peak"] / _GIB,
        }

    def close(self) -> None:
        for writer in self._writers():
            writer.close()


# -----------------------------------------------------------------------------
# The console line

_RESET = "\033[0m"
_COLOUR_CODES = {  # ANSI codes; a field without one keeps the terminal's own colour.
    "step": "\033[31m",
    "loss": "\033[32m",
    "grad_norm": "\033[33m",
    "memory": "\033[36m",
    "tps": "\033[34m",
    "tflops": "\033[36m",
    "mfu": "\033[35m",
}


def console_line(record: Record, total_steps: int, *, colour: bool) -> str:
    width = len(str(total_steps))
    fields = {
        "step": f"{record['step']:{width}d}/{total_steps}",
        "loss": f"{record['loss']:8.5f}",
        "grad_norm": f"{record['grad_norm']:7.4f}",
        "lr": f"{record['lr']:.2e}",
        **({"phase": str(record["phase"])} if "phase" in record else {}),
        "memory": f"{record['memory_gib']:5.2f}GiB({record['memory_percent']:.1f}%)",
        "tps": f"{record['tps']:,.0f}",
        "tflops": f"{record['tflops']:,.2f}",
    }
    if "mfu_percent" in record:
        fields["mfu"] = f"{record['mfu_percent']:.2f}%"
    fields["data"] = f"{record['data_percent']:.1f}%"
    return "  ".join(
        f"{_COLOUR_CODES[name]}{name}: {text}{_RESET}"
        if colour and name in _COLOUR_CODES
        else f"{name}: {text}"
        for name, text in fields.items()
    )


def _terminal_has_colour() -> bool:
    # The logger writes to stderr. https://no-color.org: any non-empty value switches colours off.
    return sys.stderr.isatty() and not os.environ.get("NO_COLOR")


# -----------------------------------------------------------------------------
# The machine


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine() or device.type


def _peak_resident_bytes() -> int:
    # getrusage counts in KiB on Linux and in bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _physical_memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
