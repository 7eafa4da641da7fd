"""Parquet: a row group is read once an epoch, and still the documents come well shuffled."""

import gzip
import json
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.unit_tests.data.kinds import opened
from torchtitan.data import parquet as row_groups
from torchtitan.data.sources import Shard

ROWS = 40  # of a row group
GROUPS = 6  # in two files


@pytest.fixture
def reads(monkeypatch):
    """The row groups that were read, in order."""
    found = []

    class Counting(pq.ParquetFile):
        def __init__(self, path, *args, **kwargs):
            self.path = str(path)
            super().__init__(path, *args, **kwargs)

        def read_row_group(self, group, *args, **kwargs):
            found.append((self.path, group))
            return super().read_row_group(group, *args, **kwargs)

    monkeypatch.setattr(pq, "ParquetFile", Counting)
    return found


@pytest.fixture
def folder(tmp_path):
    for file in range(2):
        groups = range(file * 3, file * 3 + 3)
        texts = [f"{group} {row} " + "x" * 100 for group in groups for row in range(ROWS)]
        path = tmp_path / f"{file}.parquet"
        pq.write_table(pa.table({"text": texts}), path, row_group_size=ROWS, use_dictionary=False)
    return tmp_path


def pool_of(groups, monkeypatch):
    # A group takes 40 x (4 + 103 or 104) bytes and some 300 for its page: 114.8 a row.
    monkeypatch.setattr(row_groups, "POOL_BYTES", int(groups * ROWS * 116))


def places(reader):
    return [tuple(map(int, record.text.split()[:2])) for record in reader]


EVERYTHING = [(group, row) for group in range(GROUPS) for row in range(ROWS)]


@pytest.mark.parametrize("pool", [0.5, 2, 100])
@pytest.mark.parametrize("shards", [1, 4, 9])
def test_a_row_group_is_read_once_by_each_shard_that_has_a_part_of_it(
    folder, reads, monkeypatch, pool, shards
):
    """One read a document, as before, was 1,000 times too slow."""
    pool_of(pool * shards, monkeypatch)
    source = opened("text", str(folder), "text")
    reads.clear()
    parts = [places(source.open(3, 1, Shard(index, shards))) for index in range(shards)]
    assert sorted(place for part in parts for place in part) == EVERYTHING
    assert {len(part) for part in parts} <= {240 // shards, -(-240 // shards)}
    # shards - 1 borders cut the line of groups, each at most one group.
    assert len(set(reads)) == GROUPS and len(reads) <= GROUPS + shards - 1


def test_two_readers_in_one_process_leave_each_other_alone(folder, reads, monkeypatch):
    """Training and validation data by turns."""
    pool_of(2, monkeypatch)
    source = opened("text", str(folder), "text")
    reads.clear()
    for _ in zip(source.open(0, 0, Shard()), source.open(1, 0, Shard()), strict=True):
        pass
    assert Counter(Counter(reads).values()) == {2: GROUPS}


def test_what_is_open_together_is_mixed_and_no_more_is_open(folder, monkeypatch):
    pool_of(2, monkeypatch)
    source = opened("text", str(folder), "text")
    found = places(source.open(0, 0, Shard()))
    for start in range(0, len(found), 2 * ROWS):
        part = found[start : start + 2 * ROWS]
        assert len({group for group, _ in part}) == 2, "the documents of two groups, complete"
        # Of 40 neighbours half are of each group, 20 +- 3.2; and rows don't come in file order.
        first = Counter(group for group, _ in part[:ROWS])
        assert all(4 < number < 36 for number in first.values()) and len(first) == 2
        rows = [row for _, row in part]
        assert sum(abs(b - a) == 1 for a, b in zip(rows, rows[1:], strict=False)) < 20


def test_resuming_reads_only_what_is_open(folder, reads, monkeypatch):
    pool_of(2, monkeypatch)
    source = opened("text", str(folder), "text")
    whole = places(source.open(0, 0, Shard()))
    reads.clear()
    again = source.open(0, 0, Shard())
    again.load_state_dict({"taken": 170})
    assert places(again) == whole[170:] and len(reads) == 2


def test_lines_and_texts_beside_parquet_come_too(folder, reads):
    (folder / "a.jsonl").write_text("".join(f'{{"text": "{n} 0"}}\n' for n in range(10, 20)))
    (folder / "b.txt").write_text("20 0")
    source = opened("text", str(folder), "text")
    expected = EVERYTHING + [(n, 0) for n in range(10, 21)]
    assert sorted(places(source.open(0, 0, Shard()))) == expected and len(source) == 251
    reads.clear()
    (folder / "c.jsonl.gz").write_bytes(gzip.compress(json.dumps({"text": "21 0"}).encode()))
    stream = opened("text", str(folder), "text").open(0, 0, Shard())
    assert sorted(places(stream)) == expected + [(21, 0)]
    assert Counter(reads).most_common(1)[0][1] <= 2, "once, and once for the first look"
