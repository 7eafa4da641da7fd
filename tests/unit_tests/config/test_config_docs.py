"""docs/config.md is what scripts/write_config_docs.py writes, and marks the keys that are ours."""

import re

from tests.scripts import SCRIPTS, script
from tests.unit_tests.config.test_config_v02_files import OURS
from torchtitan.config.schema import KEYS

PAGE = SCRIPTS.parent / "docs/config.md"


def rows() -> dict[str, str]:
    """The page's rows of a config's keys, by key."""
    found, table = {}, ""
    for line in PAGE.read_text().splitlines():
        if heading := re.fullmatch(r"##+ \[(\S+)\]", line):
            table = heading[1]
        if row := re.match(r"\| `(\w+)` \|", line):
            found[f"{table}.{row[1]}"] = line
    return found


def test_the_page_is_written_from_the_dataclasses():
    written = script("write_config_docs.py").page()
    assert PAGE.read_text() == written, "stale; run: python scripts/write_config_docs.py"


def test_every_key_has_a_row_and_ours_are_marked():
    found = rows()
    assert [key for key in KEYS if key not in found] == []
    assert {key for key in KEYS if re.search(r"\(ours\b[^)]*\)\. \|$", found[key])} == OURS
