"""The cards of all published flavors: checked again, no figure worse, pages as their JSON says."""

import json
import subprocess

import pytest

from scripts.cards import checks as card_checks
from scripts.cards.checks import run_checks, sizes, subject_of
from scripts.cards.official import PARAMETERS, PUBLISHED
from scripts.cards.page import render
from scripts.cards.throughput import rows_of
from tests.pages import REPO
from tests.scripts import script
from torchtitan.protocols.train_spec import get_train_spec

CARDS = REPO / "docs/cards"
tool = script("card.py")


def card_of(flavor: str) -> dict:
    return json.loads((CARDS / f"{flavor}.json").read_text())


WITH_CARD = sorted(file.stem for file in CARDS.glob("*.json"))


def test_every_flavor_is_a_published_or_a_debug_one_and_cards_are_of_published_ones():
    flavors = {flavor for name in tool.FAMILIES for flavor in get_train_spec(name).model_args}
    assert {flavor for flavor in flavors if "debug" not in flavor} == PUBLISHED.keys()
    assert PARAMETERS.keys() == PUBLISHED.keys()
    assert set(WITH_CARD) == PUBLISHED.keys()
    assert sorted(file.stem for file in CARDS.glob("*.md")) == WITH_CARD


@pytest.mark.parametrize("flavor", PUBLISHED)
def test_all_checks_pass_and_no_figure_of_a_card_got_worse(flavor, tmp_path):
    subject = subject_of(tool.family_of(flavor), flavor, tmp_path)
    found = run_checks(subject)
    assert [check for check in found if not check.passed] == []
    if flavor not in WITH_CARD:
        return
    card = card_of(flavor)
    recorded = {check["name"]: check for check in card["checks"]}
    assert [check.name for check in found] == list(recorded)
    for check in found:
        before = recorded[check.name]
        assert check.limit <= before["limit"], check
        # Rounding differs from one machine to the next.
        assert check.figure <= 4 * before["figure"] + 1e-6, (check, before)
    assert card["arguments"] == {key: ours for key, (ours, _) in sizes(subject).items()}


@pytest.mark.parametrize("flavor", WITH_CARD)
def test_a_page_is_made_from_its_json_and_quotes_measured_rows(flavor):
    card = card_of(flavor)
    assert (CARDS / f"{flavor}.md").read_text() == render(card)
    performance = (REPO / "docs/performance.md").read_text()
    names = [flavor, *tool.ALSO.get(flavor, [])]
    there = [row for table in rows_of(performance, names) for row in table["rows"]]
    quoted = [row for table in card["throughput"] for row in table["rows"]]
    assert [row for row in quoted if row not in there] == [], "run scripts/card.py again"
    assert all(proof["result"].startswith("PROVED") for proof in card["proofs"])


def test_the_script_writes_the_card_and_fails_with_a_check(tmp_path, monkeypatch, capsys):
    assert tool.main(["16b", "--out", str(tmp_path)]) == 2
    assert "did you mean '16B'?" in capsys.readouterr().err
    monkeypatch.setattr(card_checks, "_OF_STAND_IN", ())
    monkeypatch.setattr(card_checks, "_checked", {})
    assert tool.main(["16B", "--out", str(tmp_path)]) == 0
    assert "passed  sizes" in capsys.readouterr().out
    card = json.loads((tmp_path / "16B.json").read_text())
    assert (tmp_path / "16B.md").read_text() == render(card)
    wrong = PUBLISHED["16B"] | {"hidden_size": 2049}
    monkeypatch.setitem(PUBLISHED, "16B", wrong)
    assert tool.main(["16B", "--out", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert "FAILED  sizes: " in said and said.splitlines()[0].endswith(": dim")
    assert "**FAILED**" in (tmp_path / "16B.md").read_text()


def test_the_files_of_a_flavor_are_proven_also_those_that_leave_out_the_name(monkeypatch):
    said = "Proof of a.toml for 8 ranks\n\nPROVED: this layout computes (9 tensors), 12 s\n"

    def proves(command, **_):
        return subprocess.CompletedProcess(command, 0, said, "")

    monkeypatch.setattr(tool.subprocess, "run", proves)
    result = {"layout": "8 ranks", "result": "PROVED: this layout computes (9 tensors)"}
    assert tool.prove("16B", "deepseek_v3") == [{"config": "deepseek_v3_16b.toml", **result}]
    files = [proof["config"] for proof in tool.prove("30B-A3B", "qwen3")]
    assert files == ["qwen3_30b_a3b_chat.toml", "qwen3_30b_a3b_lora.toml"]


def test_rows_are_those_that_name_the_size_and_what_is_the_same_as_them():
    page = """\
## Now

| case | tokens/s |
|---|---|
| 16B, 8 layers | 1 |
| same, longer | 2 |
| debug model | 3 |
| same, eager | 4 |

| other | x |
|---|---|
| Moonlight-16B-A3B | 5 |
"""
    assert rows_of(page, ["16B"]) == [
        {
            "section": "Now",
            "columns": ["case", "tokens/s"],
            "rows": [["16B, 8 layers", "1"], ["same, longer", "2"]],
        }
    ]
