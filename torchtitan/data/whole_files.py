"""Files that are wrong as a whole: of another format than their suffix, without the text key.

A document that can't be used is skipped and counted. A file of which that is true of every document
is a mistake in the config or in the file, and ends the run before it begins.
"""

import itertools
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from pyarrow import types

from torchtitan.data.documents import keys_there
from torchtitan.data.files import DocumentFile, ParquetFile, TextFile
from torchtitan.data.settings import DatasetSettings
from torchtitan.tools.errors import UserError

# When this many documents in a row are unusable, none will come.
PROBED_DOCUMENTS = 10_000
# First bytes of formats that are often met under another name.
FORMATS = {
    b"\x1f\x8b": "gzip",
    b"PAR1": "parquet",
    b"\x28\xb5\x2f\xfd": "zstandard",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"PK\x03\x04": "zip",
    b"ARROW1": "Arrow",
    b"%PDF": "PDF",
}
NOT_STRINGS = (
    types.is_nested,
    types.is_integer,
    types.is_floating,
    types.is_decimal,
    types.is_boolean,
    types.is_temporal,
    types.is_binary,
    types.is_large_binary,
    types.is_null,
)


def refuse_wrong_files(settings: DatasetSettings, files: Iterable[DocumentFile]) -> None:
    """Raise `UserError` that names the first file of which nothing can be used. Costs the reading
    of one document a file where all is well.

    settings: dataset that the files belong to
    files: all of them
    """
    text = settings.format == "text"
    set_key = f"set {settings.toml_key(settings.rows_key)}"
    for file in files:
        problem = format_problem(file.path)
        if problem is None and isinstance(file, ParquetFile):
            problem = _parquet_problem(file, set_key)
        elif problem is None and isinstance(file, TextFile):
            problem = None if text else f"it is plain text, no rows of conversations; {set_key}"
        elif problem is None:
            problem = _problem_of_documents(file, set_key)
        if problem is not None:
            raise UserError(
                f"{file.path}: {problem}, or leave the file out of "
                f"{settings.toml_key('dataset_path')}."
            )


def format_problem(path: Path) -> str | None:
    """Sentence about a wrong format, with the way out, or None. Raises `UserError` where the file
    is unreadable."""
    try:
        with path.open("rb") as file:
            head = file.read(4096)
    except OSError as error:
        raise UserError(f"{path} can't be read ({error.strerror}); give access to it.") from None
    suffix = ".jsonl.gz" if path.name.endswith(".gz") else path.suffix
    expected = {".jsonl.gz": "gzip", ".parquet": "parquet"}.get(suffix)
    found = next((name for begin, name in FORMATS.items() if head.startswith(begin)), None)
    if found != expected:
        what = f"a {found} file" if found else f"no {expected} file"
        return f"it is {what}, though its name ends in {suffix}; convert or rename it"
    if suffix == ".json" and head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        return "it is one JSON array; write one object a line (JSON lines)"
    return None


def _parquet_problem(file: ParquetFile, set_key: str) -> str | None:
    key, columns = file.rows.key, file.rows.columns
    if columns is None:  # rows of many columns are looked at one by one
        return _problem_of_documents(file, set_key)
    if key not in file.schema.names:
        return (
            f"none of its {file.length:,} records has '{key}' "
            f"({keys_there(file.schema.names)}); {set_key}"
        )
    kind = file.schema.field(key).type
    if any(is_kind(kind) for is_kind in NOT_STRINGS):
        return f"'{key}' is a column of {kind}, not of strings; {set_key}"
    return None


def _problem_of_documents(file: DocumentFile, set_key: str) -> str | None:
    """An empty text counts as one: the file has the right form."""
    key, problems = file.rows.key, Counter[str]()
    first = None
    for _, record in itertools.islice(file.records(0, lambda index: True), PROBED_DOCUMENTS):
        if record.problem in ("", "empty text"):
            return None
        if record.problem != "empty line":
            problems[record.problem] += 1
            first = first or record
    if first is None:
        return None
    number = problems.total()
    which = f"its first {number:,}" if number >= PROBED_DOCUMENTS else f"its {number:,}"
    if len(problems) == 1 and first.problem == f"no '{key}' key":
        return f"none of {which} records has '{key}' ({first.found}); {set_key}"
    if len(problems) == 1 and first.found:
        return f"'{key}' is a string in none of {which} records ({first.found}); {set_key}"
    reasons = ", ".join(f"{count:,} {problem}" for problem, count in problems.most_common())
    return (
        f"none of {which} records can be used ({reasons}; first {first.where}: {first.details}); "
        f"write one JSON object a line, {set_key}"
    )
