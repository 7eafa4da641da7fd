"""Entry point: `torchrun -m torchtitan.train --job.config_file X.toml [--section.key value]`."""

import logging
import os
import sys

from torchtitan.check_config import Checked, check_config
from torchtitan.config import ConfigManager, JobConfig
from torchtitan.config.played_run import without_checkpoints
from torchtitan.distributed.lost_peers import explain_lost_peer
from torchtitan.tools.errors import RunError, UserError
from torchtitan.tools.last_words import leave_last_words
from torchtitan.tools.logging import init_logger, logger
from torchtitan.tools.orphans import end_with_the_launcher
from torchtitan.trainer import Trainer

__all__ = ["Trainer", "main"]


def main(argv: list[str] | None = None) -> int:
    """Train. Returns the exit code: 0 done, 1 training failed, 2 the user can mend it."""
    init_logger()
    try:
        config = ConfigManager().parse_args(argv)
        if config.job.check_config:  # the run itself will tell what it found
            logger.setLevel("WARNING")
        config = without_checkpoints(config)
        checked = check_config(config)
    except UserError as error:  # every rank finds the same mistake: one of them tells it
        if int(os.environ.get("RANK", 0)) == 0:
            logger.error("%s", error)
        return 2
    if config.job.check_config:
        return 0
    return run(config, checked)


def run(config: JobConfig, checked: Checked) -> int:
    end_with_the_launcher()
    trainer = None
    try:
        trainer = Trainer(config, checked)
        if config.checkpoint.create_seed_checkpoint:
            trainer.save_seed()
        else:
            trainer.train()
    except (UserError, RunError) as error:  # perhaps this rank's own
        exit_code = 2 if isinstance(error, UserError) else 1
        logger.error("%s", error)
        # Before the trainer closes: then the other ranks fail, and the launcher ends this one too.
        leave_last_words(str(error), exit_code)
        return exit_code
    except Exception as error:
        sentence = explain_lost_peer(error, trainer.step if trainer else 0)
        if sentence is None:
            if int(os.environ.get("WORLD_SIZE", 1)) == 1:
                raise
            first_line = str(error).partition("\n")[0]
            sentence = f"{type(error).__name__}: {first_line}"
            logger.exception("This rank has failed")
        else:
            logger.error("%s", sentence)
        leave_last_words(sentence, 1)
        logging.shutdown()
        # Groups can't be closed any more: that waits for ranks which wait for this one. Threads
        # that save would wait in them, too.
        os._exit(1)
    finally:
        if trainer is not None:
            trainer.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
