"""A run that takes a second: options for a tiny model, and what such a run has written."""

import json
from pathlib import Path
from typing import Any

# Dense and MoE layers, all sizes as small as they go; fp32, so that losses compare exactly.
TINY = {
    "model.args.n_layers": 2,
    "model.args.dim": 64,
    "model.args.n_heads": 2,
    "model.args.inter_dim": 64,
    "model.args.moe_inter_dim": 32,
    "model.args.kv_lora_rank": 32,
    "model.args.qk_nope_head_dim": 16,
    "model.args.qk_rope_head_dim": 8,
    "model.args.v_head_dim": 16,
    "training.dataset": "sample",
    "training.seq_len": 32,
    "training.local_batch_size": 4,
    "training.steps": 4,
    "training.mixed_precision_param": "float32",
    "optimizer.lr": 1e-2,
    "lr_scheduler.warmup_steps": 0,
    "activation_checkpoint.mode": "none",
    "metrics.log_freq": 1,
    "metrics.enable_report": False,
    "debug.seed": 7,
}


def tiny(dump_folder: Path, **changes: Any) -> list[str]:
    """The command line of a tiny run; `training__steps=2` changes training.steps."""
    settings = TINY | {name.replace("__", "."): value for name, value in changes.items()}
    settings["job.dump_folder"] = dump_folder
    return [f"--{key}={value}" for key, value in settings.items()]


def as_option(rows: list[dict[str, Any]], key: str = "schedule.phase") -> str:
    """A list of tables for the command line: phases of the schedule, or others."""
    return f"--{key}={as_toml(rows)}"


def as_toml(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(as_toml, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{k} = {as_toml(v)}' for k, v in value.items())}}}"
    return json.dumps(value)


def records(dump_folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """The lines of a file of a run's metrics."""
    return [json.loads(line) for line in (dump_folder / name).read_text().splitlines()]


def losses(dump_folder: Path) -> list[float]:
    """In full precision: equal means equal bits."""
    return [record["loss"] for record in records(dump_folder)]
