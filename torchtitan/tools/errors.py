"""Errors that end a run with a sentence instead of a traceback, and suggestions for wrong names."""

import difflib
from collections.abc import Iterable, Sequence


class UserError(ValueError):
    """Wrong config, data, checkpoint or environment.

    The message is one sentence that names the key or file, the value, the rule and the way out.
    `torchtitan.train.main` prints it without a traceback and exits with code 2. A user's text in it
    may be anything: the middle of overlong words is cut, and control characters are escaped.
    """

    def __init__(self, message: str) -> None:
        super().__init__(_readable(message))


class RunError(RuntimeError):
    """Failure of the training itself, such as a loss that is not finite: exit code 1."""


# Longest word and message, in characters; the middle of longer ones is cut.
LONGEST_WORD, LONGEST_SENTENCE = 400, 20_000


def _readable(message: str) -> str:
    printable = "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in _shortened(message, LONGEST_SENTENCE)
    )
    words = printable.split(" ")
    return " ".join(_shortened(word, LONGEST_WORD) for word in words)


def _shortened(text: str, longest: int) -> str:
    half = longest // 2
    return text if len(text) <= longest else f"{text[:half]}...{text[-half:]}"


def some(names: Sequence[str], between: str = "; ", most: int = 5) -> str:
    """Join the first names of a list and the number of others: `a; b; c and 195 others`."""
    shown, others = between.join(names[:most]), len(names) - most
    return f"{shown} and {others} other{'s' if others > 1 else ''}" if others > 0 else shown


def suggest(name: object, candidates: Iterable[str]) -> str:
    """End of a sentence about a wrong name, with the nearest right one: `; did you mean 'steps'?`.

    Without a near one it lists all of them: `; choose one of 'a', 'b'.`
    """
    known = sorted(set(candidates))
    if not known:
        return "."
    folded = {candidate.lower(): candidate for candidate in known}
    near = difflib.get_close_matches(str(name)[:100].lower(), folded, n=1)
    if near:
        return f"; did you mean '{folded[near[0]]}'?"
    return "; choose one of " + ", ".join(f"'{candidate}'" for candidate in known) + "."


def nearest_pattern(pattern: str, names: Iterable[str]) -> str:
    """End of a sentence about a pattern that matches none of `names`, as `suggest` makes it."""
    known = sorted(names)
    near = difflib.get_close_matches(pattern[:100], known, n=1)
    if near:
        return f"; did you mean '{near[0]}'?"
    longest = max(known, key=len)
    return f"; write a whole name, such as '{longest}', in which * stands for anything."
