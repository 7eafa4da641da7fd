"""The page of a card, made from its JSON alone."""

from typing import Any

HEAD = """\
# {flavor}

Written by `python scripts/card.py {flavor}` from {flavor}.json beside it; do not edit it.
Family `{family}`, [{repo}](https://huggingface.co/{repo}) on the Hugging Face hub.
"""
STAND_IN = """\
All but the sizes is checked on a stand-in for the CPU: the flavor's computation with small sizes
and random weights. A test repeats it and fails where a figure is worse. Versions: {versions}.
"""


def render(card: dict[str, Any]) -> str:
    """Return the page in Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in card["versions"].items())
    parts = [
        HEAD.format(**card),
        "## Checked\n",
        STAND_IN.format(versions=versions),
        _checks(card["checks"]),
        "## Layouts proven\n",
        _proofs(card["proofs"]),
        "## Throughput\n",
        _throughput(card["throughput"]),
        "## Arguments\n",
        _arguments(card["arguments"]),
    ]
    return "\n".join(parts)


def _table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def _checks(checks: list[dict[str, Any]]) -> str:
    rows = [
        [
            each["name"],
            "passed" if each["figure"] <= each["limit"] else "**FAILED**",
            f"{each['figure']:g} (at most {each['limit']:g})",
            each["text"],
        ]
        for each in checks
    ]
    return _table(["check", "", "figure", "what"], rows)


def _proofs(proofs: list[dict[str, Any]]) -> str:
    if not proofs:
        return "None recorded: `--prove` runs scripts/prove.py on its files in train_configs.\n"
    rows = [[f"`{each['config']}`", each["layout"], each["result"]] for each in proofs]
    return _table(["file", "layout", "scripts/prove.py"], rows)


def _throughput(tables: list[dict[str, Any]]) -> str:
    if not tables:
        return "No rows in [performance.md](../performance.md).\n"
    text = "Rows of [performance.md](../performance.md) that name this size; measured there.\n\n"
    return text + "\n".join(
        f"{table['section']}:\n\n{_table(table['columns'], table['rows'])}" for table in tables
    )


def _arguments(arguments: dict[str, Any]) -> str:
    rows = [[f"`{key}`", str(value)] for key, value in arguments.items()]
    return _table(["`[model.args]`", "value"], rows)
