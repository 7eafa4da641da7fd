"""Tables of the config about what a run records of itself: numbers, traces, memory snapshots."""

from dataclasses import dataclass, field

from torchtitan.config.schedule_tables import Alarm


@dataclass(frozen=True)
class Profiling:
    """torch.profiler traces and CUDA memory snapshots."""

    enable_profiling: bool = False
    """Write a trace every profile_freq steps."""
    save_traces_folder: str = "profile_traces"
    """Folder for traces, inside job.dump_folder."""
    profile_freq: int = 10
    """Steps from one trace (or snapshot) to the next; at least warmup + active steps."""
    profiler_active: int = 1
    """Steps that one trace covers."""
    profiler_warmup: int = 3
    """Steps that the profiler runs before each trace without recording."""
    enable_memory_snapshot: bool = False
    """Write a CUDA memory snapshot every profile_freq steps and when memory runs out."""
    save_memory_snapshot_folder: str = "memory_snapshot"
    """Folder for memory snapshots, inside job.dump_folder."""


@dataclass(frozen=True)
class Metrics:
    """Numbers of the run: which are written, where and how often."""

    log_freq: int = 10
    """Steps from one log line to the next; the first and the last step are always logged."""
    enable_tensorboard: bool = False
    """Write TensorBoard files."""
    disable_color_printing: bool = False
    """Print console lines without colours."""
    save_tb_folder: str = "tb"
    """Folder for TensorBoard files, inside job.dump_folder."""
    save_for_all_ranks: bool = False
    """Write metrics on every rank instead of on rank 0 only."""
    log_traffic: bool = False
    """With expert parallelism, log the traffic between ranks in a second console line (ours)."""
    log_routing: bool = False
    """Also log router statistics: entropy, effect of the group limit, load by expert (ours)."""
    routing_moved_freq: int = 0
    """Steps between measurements of how far routing has moved since the start; 0: none (ours)."""
    waiting_freq: int = 1000
    """Steps from one search for the rank that others wait for to the next (ours; 0 = none)."""
    alarm: list[Alarm] = field(default_factory=list)
    """Alarms on numbers of the log, [[metrics.alarm]]; keys of each: docs/config.md (ours)."""
    enable_wandb: bool = False
    """Send metrics to Weights & Biases."""
    enable_report: bool = True
    """Record what report.html shows, and write it at the end of the run (ours)."""
