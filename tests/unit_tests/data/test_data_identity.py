"""A position belongs to its files: what may change between two runs, and what is refused."""

import gzip
import json
import os
import shutil

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.tiny_run import as_option, tiny
from tests.unit_tests.data.kinds import named, opened
from torchtitan.data import fingerprint
from torchtitan.data.identity import (
    CONTENTS,
    REVISION,
    first_difference,
    refuse_other_data,
    tell_other_validation_data,
)
from torchtitan.data.sources import HubStream
from torchtitan.tools.errors import UserError
from torchtitan.train import main

NAMES = ["a", "b", "c"]


def write(path, texts):
    """Documents in the format of the file's suffix."""
    path.parent.mkdir(exist_ok=True, parents=True)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    if path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(lines, mtime=0))
    elif path.suffix == ".parquet":
        pq.write_table(pa.table({"text": texts}), path)
    else:
        path.write_bytes("\n".join(texts).encode() if path.suffix == ".txt" else lines)


def identity(path):
    """Return the data's identity as a checkpoint stores it."""
    return json.loads(json.dumps(opened("text", str(path), "text").identity()))


@pytest.fixture(params=[".jsonl", ".json", ".jsonl.gz", ".parquet", ".txt"])
def data(request, tmp_path):
    """A folder of three files of a kind, and their suffix."""
    for name in NAMES:
        write(tmp_path / f"data/{name}{request.param}", [f"{name} one", f"{name} two"])
    return tmp_path / "data", request.param


def rename(folder, suffix):
    (folder / f"a{suffix}").rename(folder / f"z{suffix}")
    return f"a{suffix} is named z{suffix} now"


def rename_in_place(folder, suffix):
    (folder / f"b{suffix}").rename(folder / f"b2{suffix}")
    return f"b{suffix} is named b2{suffix} now"


def remove(folder, suffix):
    (folder / f"b{suffix}").unlink()
    return f"b{suffix} is missing"


def add(folder, suffix):
    write(folder / f"deeper/new{suffix}", ["new", "newer"])
    return f"deeper/new{suffix} is new"


def change(folder, suffix):
    write(folder / f"c{suffix}", ["c one", "c 222"])
    return f"c{suffix} has other content"


def swap(folder, suffix):
    (folder / f"a{suffix}").rename(folder / "x")
    (folder / f"b{suffix}").rename(folder / f"a{suffix}")
    (folder / "x").rename(folder / f"b{suffix}")
    return f"a{suffix} has other content"


@pytest.mark.parametrize("what", [rename, rename_in_place, remove, add, change, swap])
def test_each_change_of_files_is_refused_by_the_name_of_the_first(data, what):
    folder, suffix = data
    saved = identity(folder)
    difference = what(folder, suffix)
    with pytest.raises(UserError) as error:
        refuse_other_data(saved, identity(folder))
    assert difference in str(error.value) and "\n" not in str(error.value)
    assert "exclude_from_loading" in str(error.value) and "files back" in str(error.value)


def test_other_folders_above_and_other_times_are_the_same_data(data, tmp_path):
    folder, suffix = data
    saved = identity(folder)
    shutil.copytree(folder, tmp_path / "elsewhere/copy")
    (tmp_path / "link").symlink_to(folder)
    os.utime(folder / f"a{suffix}", (1, 1))
    for same in (folder, tmp_path / "elsewhere/copy", tmp_path / "link", f"{folder}/*{suffix}"):
        refuse_other_data(saved, identity(same))


@pytest.mark.parametrize("place", ["start", "middle", "end"])
def test_a_large_file_is_known_by_blocks_of_it(tmp_path, monkeypatch, place):
    monkeypatch.setattr(fingerprint, "WHOLE", 1000)
    monkeypatch.setattr(fingerprint, "BLOCKS", 3)
    monkeypatch.setattr(fingerprint, "BLOCK", 100)
    content = bytearray(b"x" * 10_000)
    (tmp_path / "a").write_bytes(content)
    before = fingerprint.fingerprint(tmp_path / "a")
    assert before == fingerprint.fingerprint(tmp_path / "a")
    content[{"start": 0, "middle": 5_000, "end": -1}[place]] = 0
    (tmp_path / "a").write_bytes(content)
    assert fingerprint.fingerprint(tmp_path / "a") != before


def test_the_order_counts_and_not_the_names_alone():
    a, b = ["a", 1, "0"], ["b", 1, "1"]
    assert first_difference([a, b], [b, a]) == "b is read where a was (the order has changed)"


def test_a_checkpoint_of_an_earlier_version_is_compared_by_what_it_has(data, log):
    folder, suffix = data
    old = identity(folder)
    del old[CONTENTS]
    refuse_other_data(old, identity(folder))
    assert ["no fingerprint of its data" in line for line in log if "checkpoint" in line] == [True]
    write(folder / f"new{suffix}", ["new", "newer"])
    with pytest.raises(UserError, match="with data bytes = "):
        refuse_other_data(old, identity(folder))


def test_the_shipped_sample_has_a_fingerprint_too():
    saved = opened("sample", None, "text").identity()
    ((name, size, _),) = saved[CONTENTS]
    assert name == "sample.jsonl"
    with pytest.raises(UserError, match="sample.jsonl has other content .*of the same size"):
        refuse_other_data(saved, saved | {CONTENTS: [[name, size, "0"]]})


def test_a_hub_dataset_is_known_by_its_commit(monkeypatch):
    rows = datasets.Dataset.from_list([{"text": "x"}]).to_iterable_dataset()

    def of(commit):
        address = f"hf://datasets/org/name@{commit}/data/0.parquet"
        monkeypatch.setattr(rows._ex_iterable, "kwargs", {"files": [address], "shards": [1]})
        return HubStream(named("org/name"), rows).identity()

    assert of("abc")[REVISION] == "abc"
    refuse_other_data(of("abc"), of("abc"))
    with pytest.raises(UserError, match='revision = abc, .* has def; .*"organisation/name@abc"'):
        refuse_other_data(of("abc"), of("def"))


def test_other_validation_data_is_told_and_not_refused(tmp_path, log):
    write(tmp_path / "a.jsonl", ["one"])
    saved = identity(tmp_path)
    tell_other_validation_data(saved, identity(tmp_path))
    assert not [line for line in log if "validation" in line]
    write(tmp_path / "a.jsonl", ["two"])
    tell_other_validation_data(saved, identity(tmp_path))
    tell_other_validation_data(saved, saved | {"training.dataset_text_key": "body"})
    told = [line for line in log if "The validation data is not what it was" in line]
    assert "a.jsonl has other content" in told[0] and "can't be compared" in told[0]
    assert "validation.dataset_text_key was text and is body" in told[1]


SAVES = ["--checkpoint.enable", "--checkpoint.interval=2", "--checkpoint.no_last_save_model_only"]


def test_a_run_refuses_files_that_changed_and_tells_a_changed_batch(tmp_path, capfd):
    """Case 15 of 2026-11-26, in a blend, then the way out; and a batch of other size."""
    for name in NAMES:
        write(tmp_path / f"d/{name}.jsonl", [f"file {name} document {n}" for n in range(40)])
    options = tiny(tmp_path / "out", training__steps=2)
    options = [option for option in options if "training.dataset=" not in option] + SAVES
    parts = [{"name": "web", "weight": 1, "dataset_path": str(tmp_path / "d")}]
    options.append(as_option(parts, "training.blend"))
    assert main(options) == 0
    (tmp_path / "d/a.jsonl").rename(tmp_path / "d/z.jsonl")
    options.append("--training.steps=4")
    capfd.readouterr()
    assert main(options) == 2
    told = capfd.readouterr().err
    assert "training.blend.web" in told and "a.jsonl is named z.jsonl now" in told
    anew = ['--checkpoint.exclude_from_loading=["dataloader"]', "--training.local_batch_size=2"]
    assert main([*options, *anew]) == 0
    told = capfd.readouterr().err
    assert "A step has 2 sequences from now on; it had 4" in told
    assert "set training.global_batch_size = 4 to keep them" in told
