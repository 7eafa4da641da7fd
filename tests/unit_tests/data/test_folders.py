"""What training.dataset_path means: links, globs, hidden files, and what is told or refused."""

import errno
import glob
import os
from pathlib import Path

import pytest

from tests.unit_tests.data.kinds import named, opened
from torchtitan.data import check_dataset, files, folders
from torchtitan.data.folders import search
from torchtitan.tools.errors import UserError


def names(path) -> list[str]:
    found = search(named("text", str(path)))
    return [str(file.relative_to(found.root)) for file in found.files]


@pytest.fixture
def tree(tmp_path, jsonl):
    """d/a.jsonl, d/en/b.jsonl, d/en/deep/c.jsonl, and outside/e.jsonl."""
    for name in ("d/a.jsonl", "d/en/b.jsonl", "d/en/deep/c.jsonl", "outside/e.jsonl"):
        jsonl(name, [name])
    return tmp_path / "d"


ALL = ["a.jsonl", "en/b.jsonl", "en/deep/c.jsonl"]


def test_linked_folders_and_files_are_read(tree):
    (tree / "fr").symlink_to(tree.parent / "outside")
    (tree / "one.jsonl").symlink_to(tree.parent / "outside/e.jsonl")
    assert names(tree) == [*ALL, "one.jsonl"], "the linked file is read once, by its shortest name"
    (tree / "one.jsonl").unlink()
    assert names(tree) == [*ALL, "fr/e.jsonl"] == names(f"{tree}/**/*.jsonl")
    assert len(opened("text", str(tree), "text")) == 4


@pytest.mark.parametrize("pattern", ["", "/**", "/**/*.jsonl"])
def test_links_in_a_circle_end(tree, pattern):
    (tree / "en/up").symlink_to(tree)
    (tree / "en/deep/again").symlink_to(tree / "en")
    assert names(f"{tree}{pattern}") == ALL


def test_what_is_left_out_is_counted_and_told_once(tree, log):
    for name in ("en/more.jsonl.zst", "more.zst", "LICENSE", ".x.jsonl", ".cache/y.jsonl"):
        (tree / name).parent.mkdir(exist_ok=True)
        (tree / name).write_bytes(b"x")
    (tree / "en/same.jsonl").symlink_to(tree / "a.jsonl")
    os.mkfifo(tree / "pipe.jsonl")
    check_dataset(named("text", str(tree)))
    opened("mine", str(tree), "text")
    (line,) = [line for line in log if "not read" in line]
    assert line.startswith("Data mine: not read: ")
    for part in (
        "2 with suffix .zst (more.zst, ...)",
        "1 without a suffix (LICENSE)",
        "1 reached twice through links (en/same.jsonl)",
        "1 that are no regular files (pipe.jsonl)",
        "2 hidden by a dot (.cache, ...)",
    ):
        assert part in line


def test_folders_that_a_glob_matches_are_told(tree):
    assert names(f"{tree}/*") == ["a.jsonl"]
    assert search(named("text", f"{tree}/*")).left_out == [
        "1 folders, which a glob reads with /** only (en)"
    ]
    with pytest.raises(UserError, match=r"holds no file .*1 folders, which .*with /\*\* only"):
        search(named("text", f"{tree}/e*"))


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("d/*/*.jsonl", ["d/en/b.jsonl"]),
        ("*/en/**/*.jsonl", ["d/en/b.jsonl", "d/en/deep/c.jsonl"]),
        ("**/deep/*", ["d/en/deep/c.jsonl"]),
        ("d/[ab].jsonl", ["d/a.jsonl"]),
        ("d/e?/../a.jsonl", ["d/en/../a.jsonl"]),
        ("./d/**/c.jsonl", ["d/en/deep/c.jsonl"]),
    ],
)
def test_globs_find_what_globs_find(tree, monkeypatch, pattern, found):
    monkeypatch.chdir(tree.parent)
    assert [str(file) for file in search(named("text", pattern)).files] == found
    absolute = [str(tree.parent / name) for name in found]
    assert [
        str(file) for file in search(named("text", f"{tree.parent}/{pattern}")).files
    ] == absolute
    assert sorted(map(Path, found)) == sorted(map(Path, glob.glob(pattern, recursive=True)))


@pytest.mark.parametrize("name", ["gone.jsonl", "gone"])
def test_a_link_to_nothing_is_refused(tree, name):
    (tree / "en" / name).symlink_to("/no/such/place")
    for path in (tree, f"{tree}/en/*", tree / "en" / name):
        with pytest.raises(UserError, match=f"en/{name} is a link to /no/such/place"):
            check_dataset(named("text", str(path)))


@pytest.mark.parametrize("pattern", ["", "/**", "/*/*.jsonl", "/en/*.jsonl"])
def test_a_folder_that_may_not_be_read_is_an_error(tree, monkeypatch, pattern):
    """Tests may run as root, who may read everything."""
    scan = os.scandir

    def scandir(folder):
        if str(folder) == str(tree / "en"):
            raise PermissionError(errno.EACCES, "Permission denied", str(folder))
        return scan(folder)

    monkeypatch.setattr(folders.os, "scandir", scandir)
    with pytest.raises(UserError, match="d/en can't be read .Permission denied.; give") as error:
        check_dataset(named("text", f"{tree}{pattern}"))
    assert "training.dataset_path" in str(error.value)


def test_a_path_that_can_be_no_name_is_one_sentence():
    with pytest.raises(UserError, match="can't be read .File name too long"):
        check_dataset(named("text", "/tmp/" + "x" * 300))


def test_a_file_that_may_not_be_read_is_an_error_beside_others(tree, monkeypatch):
    real = files.open_file

    def open_file(path, text_key):
        if path.name == "b.jsonl":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, text_key)

    monkeypatch.setattr("torchtitan.data.catalog.open_file", open_file)
    with pytest.raises(UserError, match="en/b.jsonl: it can't be read .Permission denied"):
        opened("text", str(tree), "text")
