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
from torchtitan.distributed.last_words import last_words
from torchtitan.distributed.lost_peers import explain_lost_peer
from torchtitan.distributed.meeting_point import refuse
from torchtitan.tools.error_file import leave_error, write_error
from torchtitan.tools.errors import RunError, UserError
from torchtitan.tools.exit_with_parent import exit_with_launcher
from torchtitan.tools.launcher import Launch, planned_processes, read_launch
from torchtitan.tools.out_of_memory import out_of_memory
from torchtitan.tools.script import without_output
from torchtitan.trainer import Trainer
from torchtitan.trainer.preflight import Checked, check_config, describe

__all__ = ["Trainer", "main"]


def main(argv: list[str] | None = None, stop: StopRequest | None = None) -> int:
    """Train. Returns the exit code: 0 done, 1 training failed, 2 user error; for a run that a
    signal has ended, see `torchtitan.tools.signals.stop_code`.

    stop: a listener that receives signals already; None = a new one.
    """
    init_logger()
    with stop or StopRequest() as stop:
        return check_and_run(argv, stop) or stop.exit_code()


def check_and_run(argv: list[str] | None, stop: StopRequest) -> int:
    config = None
    try:
        config = ConfigManager().parse_args(argv)
        if config.job.check_config:  # the run itself logs these lines
            logger.setLevel("WARNING")
        config = without_checkpoints(config)
        checked = check_config(config)
    except UserError as error:
        tell_before_meeting(str(error), config)
        return 2
    if config.job.check_config:
        if os.environ.get("RANK", "0") == "0":
            try:
                print(describe(config, checked), flush=True)
            except OSError as error:
                return without_output(error)
        return 128 + stop.number if stop.number else 0  # run_train.sh must not go on
    return run(config, checked, stop)


def tell_before_meeting(sentence: str, config: JobConfig | None) -> None:
    """Report a mistake found before the ranks have met, also to those that wait for this rank.

    Where rank 0 has found the same one, as is usual, only rank 0 logs it.
    """
    launch = Launch()
    if config is None or not (config.job.check_config or config.comm.mode == "fake_backend"):
        with contextlib.suppress(UserError):  # without a valid launch no rank can be waiting
            launch = read_launch()
    if leave_error(sentence, 2):
        refuse(launch, sentence)
        return
    if launch.rank == 0:
        logger.error("%s", sentence)
    if not refuse(launch, sentence):
        tell(sentence)


def tell(sentence: str) -> None:
    """Log an error message with which this rank ends, once for all that end so."""
    if words := last_words(sentence):
        logger.error("%s", words)


def run(config: JobConfig, checked: Checked, stop: StopRequest) -> int:
    exit_with_launcher()
    trainer = None
    try:
        trainer = Trainer(config, checked, stop)
        if config.checkpoint.create_seed_checkpoint:
            trainer.save_seed()
        else:
            trainer.train()
    except (UserError, RunError) as error:  # perhaps of this rank alone
        stop.end_steps()
        exit_code = 2 if isinstance(error, UserError) else 1
        # Before the trainer closes: then the other ranks fail, and the launcher ends this one too.
        if isinstance(error, RefusedElsewhere) or not leave_error(str(error), exit_code):
            tell(str(error))
        return exit_code
    except Exception as error:
        stop.end_steps()
        no_memory = out_of_memory(error)
        lost = None if no_memory else explain_lost_peer(error, trainer.step if trainer else 0)
        sentence = no_memory or lost
        if sentence is None:
            if planned_processes()[0] == 1:
                raise
            first_line = str(error).partition("\n")[0]
            sentence = f"{type(error).__name__}: {first_line}"
            logger.exception("This rank failed")
        else:
            logger.error("%s", sentence)
        write_error(sentence, 1, follows=lost is not None)
        if trainer is not None:
            trainer.metrics.event(trainer.step, "end", how=f"failed: {sentence}")
        logging.shutdown()
        # Groups can't be closed any more: that would wait for ranks that wait for this one. So
        # would threads that are saving.
        os._exit(1)
    finally:
        if trainer is not None:
            trainer.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(stop=STOP))
