"""Routing skew from a run's metrics.jsonl."""

import json
from pathlib import Path
from statistics import median

from torchtitan.tools.errors import UserError

_NAME = "mean_max_violation"
# The last records: a router's first steps differ (docs/moe.md).
_RECORDS = 20


def read_skew(file: str) -> float:
    """Return the largest load of an expert over the mean, averaged over layers.

    Raises `UserError`.
    """
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
        records = [json.loads(line) for line in lines if line.strip()]
        found = [float(record[_NAME]) for record in records if _NAME in record]
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"--routing-skew-from {file} can't be read ({error}); name the metrics.jsonl of a run."
        ) from None
    if not found:
        raise UserError(
            f"--routing-skew-from {file} has no {_NAME}: name the metrics.jsonl of a run with "
            "experts."
        )
    return 1 + median(found[-_RECORDS:])
