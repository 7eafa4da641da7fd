"""Errors that end a run with a sentence instead of a traceback, and the words for a wrong name."""

import difflib
from collections.abc import Iterable, Sequence


class UserError(ValueError):
    """Wrong config, data, checkpoint or environment.

    The message is one sentence that names the key or file, the value, the rule and the way out.
    `torchtitan.train.main` prints it without a traceback and exits with code 2. What a user wrote
    may be anything: of overlong words the middle is left out, and control characters are escaped.
    """

    def __init__(self, message: str) -> None:
        super().__init__(_readable(message))


class RunError(RuntimeError):
    """Training itself has failed (a loss that is not finite, say): one sentence, exit code 1."""


# Letters of a word, then of a sentence, of which the middle is left out.
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
    """The first names of a list, and how many others there are: `a; b; c and 195 others`."""
    shown, others = between.join(names[:most]), len(names) - most
    return f"{shown} and {others} other{'s' if others > 1 else ''}" if others > 0 else shown


def suggest(name: str, candidates: Iterable[str]) -> str:
    """The way out after a wrong name, to end a sentence with: `; did you mean 'steps'?`.

    Without a near name it lists all of them: `; choose one of 'a', 'b'.`
    """
    known = sorted(set(candidates))
    if not known:
        return "."
    folded = {candidate.lower(): candidate for candidate in known}
    near = difflib.get_close_matches(name[:100].lower(), folded, n=1)
    if near:
        return f"; did you mean '{folded[near[0]]}'?"
    return "; choose one of " + ", ".join(f"'{candidate}'" for candidate in known) + "."
