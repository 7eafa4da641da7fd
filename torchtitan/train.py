"""Entry point: `torchrun -m torchtitan.train --job.config_file X.toml [--section.key value]`."""

import contextlib
import logging
import os
import sys

from torchtitan.tools.logging import init_logger, logger
from torchtitan.tools.signals import StopRequest

if __name__ == "__main__":  # signals count from here on: the imports below take seconds
    init_logger()
    STOP = StopRequest().__enter__()

from torchtitan.config import ConfigManager, JobConfig
from torchtitan.config.dry_run import without_checkpoints
from torchtitan.distributed.agreement import RefusedElsewhere
from torchtitan.distributed.lost_peers import explain_lost_peer
from torchtitan.distributed.meeting_point import refuse
from torchtitan.tools.errors import RunError, UserError
from torchtitan.tools.last_words import leave_last_words
from torchtitan.tools.launcher import Launch, planned_processes, read_launch
from torchtitan.tools.orphans import end_with_the_launcher
from torchtitan.tools.out_of_memory import out_of_memory
from torchtitan.trainer import Trainer
from torchtitan.trainer.preflight import Checked, check_config, describe

__all__ = ["Trainer", "main"]


def main(argv: list[str] | None = None, stop: StopRequest | None = None) -> int:
    """Train. Returns the exit code: 0 done, 1 training failed, 2 the user can mend it; for a run
    that a signal has ended, see `torchtitan.tools.signals.stop_code`.

    stop: what hears signals already.
    """
    init_logger()
    with stop or StopRequest() as stop:
        return check_and_run(argv, stop) or stop.exit_code()


def check_and_run(argv: list[str] | None, stop: StopRequest) -> int:
    config = None
    try:
        config = ConfigManager().parse_args(argv)
        if config.job.check_config:  # the run itself will tell what it found
            logger.setLevel("WARNING")
        config = without_checkpoints(config)
        checked = check_config(config)
    except UserError as error:
        tell_before_meeting(str(error), config)
        return 2
    if config.job.check_config:
        if os.environ.get("RANK", "0") == "0":
            print(describe(config, checked))
        return 0
    return run(config, checked, stop)


def tell_before_meeting(sentence: str, config: JobConfig | None) -> None:
    """Tell the other ranks, who wait for this one, of a mistake found before all have met. Where
    rank 0 has found the same one, as it mostly has, it tells the user for all."""
    launch = Launch()
    if config is None or not (config.job.check_config or config.comm.mode == "fake_backend"):
        with contextlib.suppress(UserError):  # then there is nobody to meet
            launch = read_launch()
    leave_last_words(sentence, 2)
    if launch.rank == 0:
        logger.error("%s", sentence)
    if not refuse(launch, sentence):
        logger.error("%s", sentence)


def run(config: JobConfig, checked: Checked, stop: StopRequest) -> int:
    end_with_the_launcher()
    trainer = None
    try:
        trainer = Trainer(config, checked, stop)
        if config.checkpoint.create_seed_checkpoint:
            trainer.save_seed()
        else:
            trainer.train()
    except (UserError, RunError) as error:  # perhaps this rank's own
        stop.end_steps()
        exit_code = 2 if isinstance(error, UserError) else 1
        logger.error("%s", error)
        # Before the trainer closes: then the other ranks fail, and the launcher ends this one too.
        if not isinstance(error, RefusedElsewhere):
            leave_last_words(str(error), exit_code)
        return exit_code
    except Exception as error:
        stop.end_steps()
        sentence = out_of_memory(error) or explain_lost_peer(error, trainer.step if trainer else 0)
        if sentence is None:
            if planned_processes()[0] == 1:
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
    sys.exit(main(stop=STOP))
