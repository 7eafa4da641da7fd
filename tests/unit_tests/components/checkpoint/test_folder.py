"""Folders that a save replaces: what is not ours is never removed."""

from pathlib import Path

from torchtitan.components.checkpoint import folder


def save(where: Path) -> Path:
    return folder.publish(folder.begin(where, 6), {"meta.json": "{}", "state.json": "{}"}, {})


def test_files_of_others_in_a_replaced_folder_are_kept(tmp_path, caplog):
    for number in (1, 2):
        (tmp_path / "step-6").mkdir(exist_ok=True)
        (tmp_path / "step-6" / f"notes-{number}.txt").write_text("mine")
        assert folder.is_complete(save(tmp_path))
        kept = tmp_path / f"step-6.old.{number}"
        assert (kept / f"notes-{number}.txt").read_text() == "mine" and str(kept) in caplog.text
    folder.clean_up(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"step-6", "step-6.old.1", "step-6.old.2"}


def test_a_file_with_the_name_of_a_step_is_kept(tmp_path):
    (tmp_path / "step-6").write_text("mine")
    assert folder.is_complete(save(tmp_path))
    assert (tmp_path / "step-6.old.1").read_text() == "mine"


def test_a_save_done_again_leaves_one_folder(tmp_path):
    assert save(tmp_path) == save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-6"]
