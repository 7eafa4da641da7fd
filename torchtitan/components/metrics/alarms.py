"""Alarms: numbers of the log that must stay within bounds.

They check numbers that are the same on every rank, so an alarm that ends the run ends it on all.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torchtitan.config import Alarm
from torchtitan.tools.logging import logger

Action = Literal["none", "warn", "checkpoint", "stop"]
_STRENGTH: tuple[Action, ...] = ("none", "warn", "checkpoint", "stop")


class Alarms:
    """Checks the numbers of logged steps. A restart resets the counts."""

    def __init__(self, alarms: Sequence[Alarm]):
        self.alarms = list(alarms)
        self._in_a_row = [0] * len(self.alarms)
        self.reason = ""  # of the strongest action of the last check
        self.reasons: list[str] = []  # of all alarms of the last check

    def check(self, step: int, numbers: Mapping[str, Any]) -> Action:
        """Return the strongest action that this logged step requires, and log the reason.

        An alarm goes off when its number has been out of bounds for `times` logged steps in a row,
        and again after as many more.
        """
        strongest: Action = "none"
        self.reasons = []
        for n, alarm in enumerate(self.alarms):
            value = numbers.get(alarm.watch)
            if value is None or not _out_of_bounds(alarm, value):
                self._in_a_row[n] = 0
                continue
            self._in_a_row[n] += 1
            if self._in_a_row[n] < alarm.times:
                continue
            self._in_a_row[n] = 0
            reason = _reason(step, alarm, value)
            self.reasons.append(reason)
            logger.warning("%s", reason)
            if _STRENGTH.index(alarm.action) > _STRENGTH.index(strongest):
                strongest, self.reason = alarm.action, reason
        return strongest


def _out_of_bounds(alarm: Alarm, value: float) -> bool:
    too_high = alarm.above is not None and value > alarm.above
    return too_high or (alarm.below is not None and value < alarm.below)


def _reason(step: int, alarm: Alarm, value: float) -> str:
    high = alarm.above is not None and value > alarm.above
    bound = f"above {alarm.above:g}" if high else f"below {alarm.below:g}"
    times = f" {alarm.times} times in a row" if alarm.times > 1 else ""
    return f"step {step}: alarm: {alarm.watch} = {value:.4g} is {bound}{times}"
