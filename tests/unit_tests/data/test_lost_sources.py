"""Sources that are lost while a run reads them: read on where possible, else one sentence."""

import errno
import gzip
import json
import os

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.unit_tests.data.byte_tokenizer import OneTokenAByte
from tests.unit_tests.data.kinds import named, opened, text_dataset
from torchtitan.data import TextDataset, sources
from torchtitan.data.dataloader import build_dataloader
from torchtitan.data.rank_slice import RankSlice
from torchtitan.data.sources import HubStream, Shard
from torchtitan.tools.errors import RunError

TEXTS = [f"document {n}" for n in range(40)]


class Network:
    """Gives the documents; fails at some of them, each as often as it is told."""

    def __init__(self, failures, error=None):
        self.failures, self.error = dict(failures), error or ConnectionError("reset by peer")

    def __call__(self):
        for n, text in enumerate(TEXTS):
            if self.failures.get(n, 0):
                self.failures[n] -= 1
                raise self.error
            yield {"text": text}


@pytest.fixture
def slept(monkeypatch):
    seconds = []
    monkeypatch.setattr(sources.time, "sleep", seconds.append)
    return seconds


@pytest.fixture
def stream(monkeypatch):
    """stream({document: failures}) opens a stream of the hub that fails so."""

    def opened(*network):
        source = Network(*network)
        rows = datasets.IterableDataset.from_generator(source.__call__)
        return HubStream(named("org/name"), rows)

    return opened


@pytest.mark.parametrize("failures", [{0: 2}, {17: 1}, {17: 4}, {0: 1, 5: 3, 6: 4, 39: 1}])
@pytest.mark.parametrize("error", [ConnectionError("reset"), TimeoutError(), RuntimeError("504")])
def test_a_stream_is_read_on_after_failures(stream, slept, log, failures, error):
    reader = stream(failures, error).open(0, 0, Shard())
    expected = [record.text for record in stream({}).open(0, 0, Shard())]
    assert [record.text for record in reader] == expected
    assert len(slept) == sum(failures.values()) == sum("the next attempt" in line for line in log)


def test_a_stream_is_read_on_from_a_position_that_was_loaded(stream, slept):
    first = stream({}).probe()
    before = [next(first).text for _ in range(7)]
    failing = stream({7: 2, 9: 1}).probe()
    failing.load_state_dict(first.state_dict())
    assert before + [record.text for record in failing] == TEXTS


def test_a_stream_that_stays_lost_ends_in_a_sentence_with_its_name(stream, slept):
    reader = stream({17: 100}).open(0, 0, Shard())
    with pytest.raises(RunError, match="'org/name' behind document 17 .*ConnectionError: reset"):
        list(reader)
    assert slept == list(sources.RECONNECT_AFTER)


def write(path):
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    if path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(lines))
    elif path.suffix == ".parquet":
        pq.write_table(pa.table({"text": TEXTS}), path, row_group_size=10)
    else:
        path.write_bytes(lines)


def delete(path):
    path.unlink()
    return "No such file or directory"


def cut(path):
    os.truncate(path, path.stat().st_size // 2)
    return "bytes when the run began and has"


def replace_by_folder(path):
    path.unlink()
    path.mkdir()
    return "Is a directory"


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.jsonl.gz", "a.parquet"])
@pytest.mark.parametrize("happens", [delete, cut, replace_by_folder])
def test_a_file_that_is_lost_is_named_in_a_sentence(tmp_path, name, happens):
    write(tmp_path / name)
    source = opened("text", str(tmp_path), "text")
    reader = source.open(0, 0, Shard())
    reason = happens(tmp_path / name)
    with pytest.raises(RunError, match=reason) as error:
        list(reader)
    assert str(error.value).startswith(f"{tmp_path / name} can't be read any more (")
    assert "\n" not in str(error.value) and "start the run again" in str(error.value)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_an_error_of_the_disk_is_no_damaged_document(tmp_path, name, monkeypatch):
    write(tmp_path / name)
    reader = opened("text", str(tmp_path), "text").open(0, 0, Shard())

    def failing(*args, **kwargs):
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr("pathlib.Path.open", failing)
    with pytest.raises(RunError, match="Stale file handle"):
        list(reader)


def loader_of(path, workers):
    source = opened("text", str(path), "text")
    rank_slice = RankSlice(0, 1, 2, workers)
    return build_dataloader(
        text_dataset(source, OneTokenAByte(), 16, rank_slice=rank_slice, num_streams=2)
    )


@pytest.mark.parametrize("workers", [0, 1])
def test_the_sentence_comes_through_the_loader(tmp_path, workers):
    write(tmp_path / "a.jsonl")
    loader = loader_of(tmp_path / "a.jsonl", workers)
    batches = iter(loader)
    next(batches)
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(RunError, match="a.jsonl can't be read any more .No such file") as error:
        for _ in batches:
            pass
    assert "\n" not in str(error.value) and str(error.value).startswith(str(tmp_path))


def test_a_loader_process_that_is_killed_is_named(tmp_path, monkeypatch):
    write(tmp_path / "a.jsonl")
    loader = loader_of(tmp_path / "a.jsonl", 0)

    def killed(self):
        raise RuntimeError("DataLoader worker (pid(s) 17) exited unexpectedly")
        yield

    monkeypatch.setattr(TextDataset, "__iter__", killed)
    with pytest.raises(RunError, match=r"dataset_num_workers = 0 .*pid\(s\) 17"):
        next(iter(loader))
