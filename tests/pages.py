"""The pages of the documentation, and what is in them: prose, fenced blocks, commands."""

import re
from pathlib import Path
from typing import NamedTuple

REPO = Path(__file__).parents[1]
# History stays as it was written.
HISTORY = {"LOG.md"}
PAGES = [REPO / name for name in ("README.md", "CONTRIBUTING.md", "AGENTS.md")] + [
    page for page in sorted(REPO.glob("docs/*.md")) if page.name not in HISTORY
]
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Command(NamedTuple):
    """A command of a page, on one line, without its comment. page: relative to the repository."""

    page: str
    line: str


def blocks(page: Path, *languages: str) -> list[str]:
    """The fenced blocks in one of these languages."""
    return [text for language, text in _FENCE.findall(page.read_text()) if language in languages]


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return _FENCE.sub("", page.read_text())


def paragraphs(page: Path) -> list[list[str]]:
    """The lines of each block of prose: no headings, tables, lists or pictures."""
    found = [text.strip().splitlines() for text in prose(page).split("\n\n")]
    return [lines for lines in found if lines and lines[0][0] not in "#|-!"]


def inline_code(page: Path) -> list[str]:
    return re.findall(r"`([^`\n]+)`", prose(page))


def commands() -> list[Command]:
    found = []
    for page in PAGES:
        for block in blocks(page, "bash", "sh"):
            for line in block.replace("\\\n", " ").splitlines():
                if command := " ".join(re.sub(r"(^|\s)#.*", "", line).split()):
                    found.append(Command(str(page.relative_to(REPO)), command))
    return found
