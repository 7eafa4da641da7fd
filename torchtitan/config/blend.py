"""The datasets that a run reads, their shares, and the sequences at which the shares change.

The shares of a segment of the run are whole numbers: the weights of [[training.blend]], or of the
phase that changes them, in lowest terms (0.7 and 0.3 are 7 and 3). Where these would add up to more
than LONGEST_PERIOD they are rounded to it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from torchtitan.config.job_config import JobConfig, Training
from torchtitan.config.phases import RunSchedule
from torchtitan.config.schema import as_text
from torchtitan.tools.errors import UserError, suggest

# Sequences after which the order of the datasets repeats: shares are exact to 0.01 %.
LONGEST_PERIOD = 10_000


@dataclass(frozen=True)
class BlendSegment:
    """Part of a run with constant weights: dataset k of the blend gives parts[k] of every
    sum(parts) examples.

    first: number of its first example.
    parts: whole number per dataset, in the order of [[training.blend]].
    tokens: tokens of the run before it, by the schedule.
    """

    first: int
    parts: tuple[int, ...]
    tokens: int = 0


def blend_segments(config: JobConfig, schedule: RunSchedule) -> list[BlendSegment]:
    """Segments of the run in order, the first from example 0; none without a blend. Raises
    `UserError` for impossible weights.

    A phase begins with the first example after all tokens of earlier phases.
    """
    blend, phases = config.training.blend, config.schedule.phase
    if not blend:
        _check_no_phase_blends(config)
        return []
    _check_datasets(config.training)
    names = [dataset.name for dataset in blend]
    weights = {d.name: d.weight for d in blend if d.weight is not None}
    tables = [("training.blend", weights, 0, 0.0)]
    tokens = 0.0
    for n, (phase, first) in enumerate(zip(phases, schedule.first_sequences(), strict=True), 1):
        if phase.blend is not None:
            tables = tables if first else []  # the run begins with this one
            tables.append((f"{phase.title(n)}: blend", phase.blend, first, tokens))
        tokens += phase.tokens
    segments = [
        BlendSegment(first, _parts(names, weights, where), int(tokens))
        for where, weights, first, tokens in tables
    ]
    for k, name in enumerate(names):
        if not any(segment.parts[k] for segment in segments):
            raise UserError(
                f"training.blend: '{name}' is never read; give it a weight, name it in the blend "
                "of a schedule.phase, or leave it out."
            )
    return segments


def _parts(names: list[str], weights: Mapping[str, float], where: str) -> tuple[int, ...]:
    """Compute the parts by dataset; 0 for datasets without a weight."""
    for name, weight in weights.items():
        if name not in names:
            raise UserError(
                f"{where} names '{name}', which [[training.blend]] does not have"
                f"{suggest(name, names)}"
            )
        if not 0 < weight < math.inf:
            raise UserError(
                f"{where}: the weight of '{name}', {as_text(weight)}, must be a finite number "
                "above 0; leave out a dataset that should not be read."
            )
    if not weights:
        raise UserError(f"{where} names no dataset; give at least one a weight.")
    exact = [Fraction(str(weights.get(name, 0))) for name in names]  # the decimal number, exactly
    shares = [weight / sum(exact) for weight in exact]
    period = min(LONGEST_PERIOD, math.lcm(*(share.denominator for share in shares)))
    parts = tuple(round(share * period) for share in shares)
    for name, part in zip(names, parts, strict=True):
        if name in weights and not part:
            raise UserError(
                f"{where}: the weight of '{name}', {as_text(weights[name])}, is less than one "
                f"sequence in {LONGEST_PERIOD:,}; raise it or leave it out."
            )
    return parts


def _check_datasets(training: Training) -> None:
    for key in ("dataset", "dataset_path", "dataset_text_key", "format"):
        value = getattr(training, key)
        if value != getattr(Training(), key):
            raise UserError(
                f"training.{key} = {as_text(value)} and [[training.blend]] both set the data to "
                "read; leave one out (on the command line with --training.blend=[])."
            )
    check_names("training.blend", [dataset.name for dataset in training.blend])


def check_names(key: str, names: list[str]) -> None:
    """Raise `UserError` for a name of a dataset that can't be used, or is used twice.

    key: of the list of tables, for the error message.
    """
    for n, name in enumerate(names, start=1):
        if not name.replace("_", "").replace("-", "").isalnum():
            raise UserError(
                f"{key} {n}: name = {as_text(name)} must be a word of letters, digits, '_' and "
                "'-', for the log."
            )
        if name in names[: n - 1]:
            raise UserError(f"{key} {n}: the name '{name}' is already taken; choose another one.")


def _check_no_phase_blends(config: JobConfig) -> None:
    for n, phase in enumerate(config.schedule.phase, start=1):
        if phase.blend is not None:
            raise UserError(
                f"schedule.phase {n}: blend = {as_text(phase.blend)} sets weights for the datasets "
                "of [[training.blend]], which has none; add them there, or leave it out."
            )
