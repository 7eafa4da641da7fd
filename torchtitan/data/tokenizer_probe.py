"""Probe what a tokenizer does to single characters; and errors of its Rust code."""

import contextlib
import os
import sys
import tempfile
import unicodedata
from collections.abc import Callable, Iterator


class RustError(Exception):
    """Error of tokenizers or tiktoken. panicked: whether an assumption of theirs failed."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(" ".join(str(error).split())[:200])
        self.panicked = not isinstance(error, Exception)


@contextlib.contextmanager
def rust_errors() -> Iterator[None]:
    """Raise any error of the block as `RustError`; panics pass by `except Exception`."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise RustError(error) from error


@contextlib.contextmanager
def no_panic_report() -> Iterator[None]:
    """Keep what Rust writes to standard error about a panic away from the user, who gets the
    sentence. Keep the block short: other threads' standard error is lost too."""
    try:
        saved = os.dup(2)
    except OSError:  # there is no standard error
        yield
        return
    try:
        sys.stderr.flush()
        with tempfile.TemporaryFile() as sink:
            os.dup2(sink.fileno(), 2)
            yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def _probe() -> list[str]:
    """Printable ASCII, and characters that need the other bytes of UTF-8: each byte that goes on,
    and a character for nearly every one that begins."""
    ascii_part = [chr(n) for n in range(128)]
    continuing = [chr(0x100 + n) for n in range(64)]
    two = [chr((n << 6) + 0x31) for n in range(2, 32)]
    three = [chr((n << 12) + 0x921) for n in range(13)] + ["\ufb01", "\U0001f600"]
    kinds = {"L", "N", "P", "S"}  # no controls, no marks: normalisers may take them out
    printable = [c for c in ascii_part + continuing + two + three if _kind(c) in kinds]
    return [" ", "\n", *printable]


def _kind(character: str) -> str:
    return unicodedata.category(character)[0]


PROBE = _probe()


def lost_characters(encode: Callable[[str], list[int]]) -> dict[str, list[str]]:
    """Characters of `PROBE` that a tokenizer drops or can't encode, by what happens to them.
    Raises `RustError` where it panics."""
    lost: dict[str, list[str]] = {}
    with no_panic_report():
        for character in PROBE:
            what = "give no token and vanish from every text"
            try:
                if encode(character):
                    continue
            except RustError as error:
                if error.panicked:
                    raise
                what = f"can't be encoded ({error}) and end the run"
            lost.setdefault(what, []).append(ascii(character))
    return lost
