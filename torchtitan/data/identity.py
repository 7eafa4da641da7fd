"""Check that a checkpoint's data position belongs to the data of this run.

A dataset's `identity` says what the meaning of a position depends on: settings by their keys, and
what is known of the documents. Names of a blend stand before the keys of each of its datasets.
"""

from typing import Any

from torchtitan.tools.errors import UserError
from torchtitan.tools.logging import logger

# A list of [name, bytes, fingerprint] in the order that the files are read in; of a dataset on the
# hub, its commit. Checkpoints of earlier versions have neither.
CONTENTS = "data contents"
REVISION = "data revision"
FINGERPRINTS = (CONTENTS, REVISION)

START_ANEW = (
    "give a new run another job.dump_folder, or begin the data anew with "
    'checkpoint.exclude_from_loading = ["dataloader"] and keep the rest'
)
_SIZES = ("data bytes", "data files", "data documents")


def refuse_other_data(saved: dict[str, Any], ours: dict[str, Any]) -> None:
    """Raise `UserError` that names the first thing (setting, file) in which `ours` differs from the
    identity `saved` with a position."""
    for name in _differing(saved, ours):
        before, now = saved.get(name), ours.get(name)
        if name.endswith(CONTENTS):
            raise _other_files(name.removesuffix(CONTENTS), saved, ours)
        way_out = f"resume with {before}"
        if name.endswith(REVISION):
            way_out = f'resume with {before} by its name, as "organisation/name@{before}"'
        raise UserError(
            f"The checkpoint's data position was saved with {name} = {before}, and this run has "
            f"{now}; {way_out}, {START_ANEW}."
        )
    if any(name.endswith(FINGERPRINTS) for name in ours.keys() - saved.keys()):
        logger.warning(
            "The checkpoint has no fingerprint of its data (earlier versions saved none): that the "
            "documents are the same was checked by their number and size alone"
        )


def _differing(saved: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """Keys by name, but lists of files first, as they name a file. Fingerprints that only one side
    has are none to compare: other keys tell other data."""
    names = [name for name in saved.keys() | ours.keys() if saved.get(name) != ours.get(name)]
    return sorted(
        (n for n in names if not n.endswith(FINGERPRINTS) or (saved.get(n) and ours.get(n))),
        key=lambda name: (not name.endswith(CONTENTS), name),
    )


def _other_files(prefix: str, saved: dict[str, Any], ours: dict[str, Any]) -> UserError:
    """Make the error for files that differ.

    prefix: of the keys; "" except for a dataset of a blend.
    """
    sizes = [prefix + size for size in _SIZES]
    differing = [size for size in sizes if saved.get(size) != ours.get(size)]
    what = f"other files than this run's, {prefix}" if prefix else "other files than this run's, "
    if differing:
        name = differing[0]
        what = f"{name} = {saved.get(name)}, and this run has {ours.get(name)}: "
    difference = first_difference(saved[prefix + CONTENTS], ours[prefix + CONTENTS])
    return UserError(
        f"The checkpoint's data position was saved with {what}{difference}; put the files back as "
        f"they were, {START_ANEW}."
    )


def first_difference(saved: list[list], ours: list[list]) -> str:
    """Part of a sentence that names the first changed file.

    saved, ours: lists of [name, bytes, fingerprint] in the order of reading
    """
    before = {name: content for name, *content in saved}
    now = {name: content for name, *content in ours}
    added = [name for name in now if name not in before]
    for name, content in before.items():
        if name not in now:
            twin = next((other for other in added if now[other] == content), None)
            return f"{name} is named {twin} now" if twin else f"{name} is missing"
    if added:
        return f"{added[0]} is new"
    for name, content in before.items():
        if content != now[name]:
            sizes = f"{content[0]:,} bytes then, {now[name][0]:,} now"
            sizes = "of the same size" if content[0] == now[name][0] else sizes
            return f"{name} has other content ({sizes})"
    index = next(n for n, name in enumerate(before) if name != list(now)[n])
    return f"{list(now)[index]} is read where {list(before)[index]} was (the order has changed)"


def tell_other_validation_data(saved: dict[str, Any], ours: dict[str, Any]) -> None:
    """Warn where the identity `saved` of the validation set isn't `ours`: it has no position, but
    its losses are of other text."""
    names = _differing(saved, ours)
    if not names:
        return
    name = names[0]
    before, now = saved.get(name), ours.get(name)
    what = f"{name.replace('training.', 'validation.')} was {before} and is {now}"
    if name.endswith(CONTENTS):
        what = name.removesuffix(CONTENTS) + first_difference(before or [], now or [])
    logger.warning(
        f"The validation data is not what it was when the checkpoint was saved: {what}; losses "
        "from here on can't be compared with earlier ones"
    )
