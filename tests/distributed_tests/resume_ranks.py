"""What the ranks of the resume tests do: tiny runs, and all that such a run has become."""

import multiprocessing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.tensor import DTensor

from tests.tiny_run import losses, tiny
from torchtitan.config import ConfigManager
from torchtitan.trainer import Trainer

# A run's own checkpoints, complete at its end.
SAVES = {"checkpoint__enable": True, "checkpoint__last_save_model_only": False}
# Experts in groups, compressed queries, sigmoid with bias; sizes that 8 ranks can split.
MODEL = {
    "model__flavor": "debugmodel_node_limited",
    "model__args.dim": 32,
    "model__args.q_lora_rank": 16,
    # Its loads are those of the step before.
    "model__args.moe_args.global_balance_coeff": 1.0,
    "debug__seed": None,  # drawn by the first run, taken over by the next ones
}


def options(folder: Path, changes: dict[str, Any]) -> list[str]:
    settings = MODEL | changes
    told = tiny(folder, **{name: value for name, value in settings.items() if value is not None})
    return [option for option in told if option != "--debug.seed=7" or settings["debug__seed"]]


def train(folder: Path, changes: dict[str, Any]) -> dict[str, Any]:
    """Train to the end. Returns all state, and this rank's random numbers."""
    # The pool's processes are daemons, which may not have children; these end with the loader.
    multiprocessing.current_process()._config["daemon"] = False
    trainer = Trainer(ConfigManager().parse_args(options(folder, changes)))
    trainer.train()
    state = whole_state(trainer)
    numbers = trainer.progress.state_dict()
    trainer.close()
    return {"state": state, "numbers": numbers, "losses": losses(folder)}


def whole_state(trainer: Trainer) -> dict[str, Tensor]:
    """Weights, expert bias and optimizer state of all ranks, by name; this rank's random state."""
    names = {param: name for name, param in trainer.model.named_parameters()}
    state = dict(get_model_state_dict(trainer.model)) | {
        f"{names[param]}.{slot}": value
        for param, slots in trainer.optimizer.state.items()
        for slot, value in slots.items()
    }
    state["rng"] = torch.get_rng_state()
    return {
        name: value.full_tensor() if isinstance(value, DTensor) else value.clone()
        for name, value in state.items()
    }


def losses_after_loading(
    folder: Path, changes: dict[str, Any], step: int, out: Path
) -> list[float]:
    """Losses of a run of another layout that begins from folder's checkpoint of a step."""
    changes = changes | {
        "checkpoint__initial_load_path": folder / f"checkpoint/step-{step}",
        "checkpoint__initial_load_model_only": False,
        "checkpoint__load_only": True,  # a save at its end would tell nothing
    }
    trainer = Trainer(ConfigManager().parse_args(options(out, changes)))
    trainer.train()
    trainer.close()
    return losses(out)
