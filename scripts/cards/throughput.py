"""Rows of docs/performance.md that name a size."""

import re
from typing import Any


def rows_of(page: str, names: list[str]) -> list[dict[str, Any]]:
    """Return the tables with only the rows of a model, by section.

    page: the text of the page.
    names: words that name the model in a row's first cell, such as "16B". A row that begins with
        "same" belongs to the row above it.
    """
    found: list[dict[str, Any]] = []
    section = ""
    columns: list[str] = []
    ours = False
    word = re.compile("|".join(rf"(?<![\w-]){re.escape(name)}(?![\w-])" for name in names))
    for line in page.splitlines():
        if line.startswith("## "):
            section = line.removeprefix("## ")
        if not line.startswith("|"):
            columns = []
            continue
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if not columns:
            columns, ours = cells, False
            continue
        if re.fullmatch(r"[|:\- ]+", line):
            continue
        first = cells[0].strip("*")
        ours = bool(word.search(first)) or (ours and first.startswith("same"))
        if not ours:
            continue
        if not found or found[-1]["section"] != section or found[-1]["columns"] != columns:
            found.append({"section": section, "columns": columns, "rows": []})
        found[-1]["rows"].append(cells)
    return found
