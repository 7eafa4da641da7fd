"""The contents of a checkpoint's meta.json."""

import hashlib
import json
import platform
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import torch

import torchtitan
from torchtitan.config import JobConfig, to_dict
from torchtitan.protocols.model import BaseModelArgs

# Values of "content" in meta.json.
EVERYTHING, WEIGHTS = "everything", "weights"


@dataclass(frozen=True)
class Identity:
    """Model and settings of a run, for meta.json.

    model: name of the family.
    flavor: name of the size.
    model_args: arguments that must not differ between saving and loading.
    all_args: all arguments of the model, from which others rebuild it.
    layout: degrees of parallelism, by name.
    config_hash: of all settings.
    lora: the table [lora] of a run with adapters; None = it has none.
    """

    model: str
    flavor: str
    model_args: dict[str, Any]
    all_args: dict[str, Any]
    layout: dict[str, Any]
    config_hash: str
    lora: dict[str, Any] | None = None


def make_identity(config: JobConfig, model_args: BaseModelArgs, layout: dict[str, Any]) -> Identity:
    """Make the identity of a run.

    layout: degrees of parallelism, by name.
    """
    settings = to_dict(config)
    settings.pop("job")  # the run's folders do not change what it computes
    text = json.dumps(settings, sort_keys=True)
    # Arguments go through JSON, because they are compared with those read from disk.
    return Identity(
        model=config.model.name,
        flavor=config.model.flavor,
        model_args=json.loads(json.dumps(model_args.weights_identity())),
        all_args=asdict(model_args),
        layout=layout,
        config_hash=hashlib.sha256(text.encode()).hexdigest()[:16],
        lora=asdict(config.lora) if "lora" in config.model.converters else None,
    )


def make_meta(
    identity: Identity, *, step: int, content: str, tokens_seen: int, seed: int
) -> dict[str, Any]:
    """Make the contents of meta.json.

    content: EVERYTHING or WEIGHTS.
    """
    return {
        "step": step,
        "content": content,
        "tokens_seen": tokens_seen,
        "saved_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": seed,
        "layout": identity.layout,
        "model": {
            "name": identity.model,
            "flavor": identity.flavor,
            "args": identity.model_args,
            "all_args": identity.all_args,
            **({} if identity.lora is None else {"lora": identity.lora}),
        },
        "config_hash": identity.config_hash,
        "versions": {
            "torchtitan": torchtitan.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }
