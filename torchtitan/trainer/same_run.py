"""Settings that must be equal on all ranks of a run, which compare them before they train."""

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch

import torchtitan
from torchtitan.components.checkpoint.folder import MARKER
from torchtitan.components.huggingface.folder import CONFIG, INDEX
from torchtitan.config import JobConfig, to_dict
from torchtitan.distributed.agreement import Settings
from torchtitan.tools.launcher import planned_processes
from torchtitan.tools.utils import device_type
from torchtitan.trainer.build import resolve_node_size
from torchtitan.trainer.preflight import Checked, pipeline_plan

# Keys that may differ by rank or machine: what is only printed, and paths whose content is compared
# instead (tokenizer, data). Of tables in a list the key without a number.
MAY_DIFFER = {
    "job.config_file",
    "job.description",
    "job.print_config",
    "metrics.disable_color_printing",
    "model.hf_assets_path",
    "training.dataset_path",
    "training.blend.dataset_path",
    "validation.dataset_path",
    "validation.sets.dataset_path",
    "parallelism.pipeline_parallel_schedule_csv",
}
# Where nothing is saved, ranks share no folder (and benchmarks give each its own).
MAY_DIFFER_WITHOUT_CHECKPOINTS = {"job.dump_folder"}
# Variables of the environment that change numbers, or which kernels and collectives run.
VARIABLES = (
    "CUBLAS_WORKSPACE_CONFIG",
    "DNNL_DEFAULT_FPMATH_MODE",
    "NCCL_ALGO",
    "NCCL_PROTO",
    "NVIDIA_TF32_OVERRIDE",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "TORCH_COMPILE_DISABLE",
    "TORCHDYNAMO_DISABLE",
    "TRITON_INTERPRET",
)


def settings_of_run(config: JobConfig, checked: Checked) -> Settings:
    """Collect the settings that are known before the process groups are made, by name; a cause
    comes before its consequences."""
    _, model_args, tokenizer = checked
    world_size, _ = planned_processes()
    tables = to_dict(config)
    del tables["model"]["args"]  # the arguments that follow from it are below
    plan = pipeline_plan(config, model_args)
    few = config.parallelism.expert_parallel_degree == 1
    return {
        "WORLD_SIZE": world_size,
        "torch's version": torch.__version__,
        "torchtitan's version": torchtitan.__version__,
        "the device": device_type(),
        "checkpoint.enable": config.checkpoint.enable,  # it decides which folders are compared
        **_comparable(tables, saves=config.checkpoint.enable),
        **dict(_flat(asdict(model_args), "model.args")),
        **tokenizer.identity(),
        "the pipeline schedule's file": plan and plan.file and _digest(repr(plan.file.cells)),
        "processes of a node": None if few else resolve_node_size(config.parallelism, world_size),
        **{f"the variable {name}": os.environ.get(name) for name in VARIABLES},
        **{f"the code in {name}": digest for name, digest in source_digests().items()},
    }


def _comparable(tables: Mapping[str, Any], *, saves: bool) -> dict[str, Any]:
    leave_out = MAY_DIFFER | (set() if saves else MAY_DIFFER_WITHOUT_CHECKPOINTS)
    return {
        key: value
        for key, value in _flat(tables)
        if ".".join(part for part in key.split(".") if not part.isdecimal()) not in leave_out
    }


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """`training.blend.1.weight` and the like; lists of plain values stay whole."""
    if isinstance(value, Mapping):
        parts = value.items()
    elif isinstance(value, list | tuple) and any(isinstance(part, Mapping) for part in value):
        parts = enumerate(value, start=1)
    else:
        yield key, value
        return
    for name, part in parts:
        yield from _flat(part, f"{key}.{name}" if key else str(name))


@cache
def source_digests() -> dict[str, str]:
    """Digests of the package's source files, by path: they differ even where versions and commits
    are equal."""
    root = Path(torchtitan.__file__).parent
    return {
        path.relative_to(root.parent).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()[:12]
        for path in sorted(root.rglob("*.*"))
        if path.suffix in (".py", ".cu", ".cuh")
    }


def identity_of_start(path: Path | None) -> dict[str, Any]:
    """Digests of the checkpoint or Hugging Face folder that a run begins from, as this machine sees
    it."""
    if path is None:
        return {}
    texts = {}
    for name in (MARKER, CONFIG, INDEX):  # what each of the two has
        file = path / name
        texts[f"{path}/{name}"] = _digest(file.read_bytes()) if file.is_file() else None
    weights = sorted(path.glob("*.safetensors"))
    sizes = {file.name: file.stat().st_size for file in weights}
    return texts | {f"{path}/*.safetensors": _digest(repr(sizes))}


def _digest(content: str | bytes) -> str:
    raw = content.encode() if isinstance(content, str) else content
    return hashlib.sha256(raw).hexdigest()[:12]
