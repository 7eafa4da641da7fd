"""Pages that scripts write are what the scripts write now, and have all that they are for."""

import pytest

from tests.scripts import SCRIPTS, script
from torchtitan.config.schema import KEYS

DOCS = SCRIPTS.parent / "docs"


@pytest.mark.parametrize(
    ("page", "writer"),
    [("commands.md", "write_command_docs.py"), ("code_index.md", "write_code_index.py")],
)
def test_the_page_is_written_from_the_code(page, writer):
    written = script(writer).page()
    assert (DOCS / page).read_text() == written, f"stale; run: python scripts/{writer}"


def test_every_script_and_each_of_its_options_is_there():
    text = (DOCS / "commands.md").read_text()
    called = [p for p in SCRIPTS.rglob("*.py") if '__name__ == "__main__"' in p.read_text()]
    names = {str(path.relative_to(SCRIPTS)) for path in called}
    internal = script("write_command_docs.py").INTERNAL
    assert {name for name in names if f"### scripts/{name}\n" not in text} == internal
    for option in ("--world-size WORLD_SIZE", "--max_new_tokens", "--preset NAME ...", "--fp8"):
        assert f"| `{option}" in text
    assert "| |" not in text.replace("|  |", "| |"), "an option without a sentence"


def test_every_key_and_file_is_in_the_index():
    text = (DOCS / "code_index.md").read_text()
    assert [key for key in KEYS if f"\n| `{key}` |" not in text] == []
    files = [path for path in (SCRIPTS.parent / "torchtitan").rglob("*.py") if path.stat().st_size]
    assert [path for path in files if f"\n- `{path.name}`: " not in text] == []
