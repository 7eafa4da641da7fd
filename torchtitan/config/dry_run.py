"""Settings that a dry run of one rank (comm.mode "fake_backend") switches off by itself."""

from dataclasses import replace

from torchtitan.config.job_config import JobConfig
from torchtitan.tools.logging import logger

# Policies that load an earlier checkpoint, and their replacements.
_INSTEAD_OF_REWIND = {"non_finite_loss": "skip_step", "loss_spike": "warn"}


def without_checkpoints(config: JobConfig) -> JobConfig:
    """Switch off checkpoints and rewinds in the config of a dry run; logs what changes.

    A dry run trains nothing, so it saves, loads and exports nothing. Other configs are unchanged.
    """
    if config.comm.mode != "fake_backend":
        return config
    checkpoint, training = config.checkpoint, config.training
    rewinds = {
        name: instead
        for name, instead in _INSTEAD_OF_REWIND.items()
        if getattr(training, name) == "rewind"
    }
    if not (checkpoint.enable or checkpoint.create_seed_checkpoint or rewinds):
        return config
    logger.info(
        "comm.mode fake_backend: checkpoints are off, nothing is loaded, saved or exported%s",
        "".join(f"; training.{name} is {value}" for name, value in rewinds.items()),
    )
    off = replace(checkpoint, enable=False, create_seed_checkpoint=False)
    return replace(config, checkpoint=off, training=replace(training, **rewinds))
