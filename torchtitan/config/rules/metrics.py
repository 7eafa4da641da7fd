"""Rules for [[metrics.alarm]]."""

import math

from torchtitan.config.job_config import JobConfig
from torchtitan.config.router_stats import ROUTER_STATS
from torchtitan.config.schema import as_text
from torchtitan.tools.errors import UserError, suggest

# Numbers of the log that are the same on all ranks; router statistics are, too.
ALWAYS = (
    "loss grad_norm max_violation mean_max_violation min_load dead_experts load_entropy bias_range "
    "max_group_load cross_node_percent"
).split()


def check_alarms(config: JobConfig) -> None:
    """Raise `UserError` for the first alarm that could never go off, or could not act."""
    for n, alarm in enumerate(config.metrics.alarm, start=1):
        where = f"metrics.alarm {n}"
        if alarm.watch not in (*ALWAYS, *ROUTER_STATS):
            raise UserError(
                f"{where}: watch = {as_text(alarm.watch)} is not a number that an alarm can watch"
                f"{suggest(alarm.watch, [*ALWAYS, *ROUTER_STATS])}"
            )
        if alarm.watch in ROUTER_STATS and not config.metrics.log_routing:
            raise UserError(
                f"{where}: {alarm.watch} is measured only with metrics.log_routing = true; set "
                "that."
            )
        bounds = [bound for bound in (alarm.above, alarm.below) if bound is not None]
        if not bounds or any(math.isnan(bound) for bound in bounds):
            raise UserError(f"{where}: set above, below or both to the bounds of {alarm.watch}.")
        if alarm.times < 1:
            raise UserError(f"{where}: times = {alarm.times} must be 1 or more.")
        saves = config.checkpoint.enable and not config.checkpoint.load_only
        if alarm.action == "checkpoint" and not saves:
            raise UserError(
                f'{where}: action = "checkpoint" needs checkpoint.enable = true (and load_only = '
                'false); set that, or choose "warn" or "stop".'
            )
