"""Each error about a dataset names a key of the table that it stands in."""

import gzip

import pytest

from tests.unit_tests.data.byte_tokenizer import OneTokenAByte
from torchtitan.config import JobConfig, Training, Validation
from torchtitan.config.data_tables import Dataset, ValidationSet
from torchtitan.data import build_training_dataloader, check_training_data
from torchtitan.data.validation import check_validation_data, open_validation_sets
from torchtitan.tools.errors import UserError

RANK = dict(dp_rank=0, dp_degree=1)


class Table:
    """Checks and opens a dataset that stands in one of the four tables."""

    def __init__(self, key):
        self.key = key

    def check(self, **keys):
        if self.key.startswith("validation"):
            check_validation_data(self._validation(keys), max_seq_len=10**6)
        else:
            check_training_data(self._training(keys), OneTokenAByte())

    def open(self, **keys):
        if self.key.startswith("validation"):
            config = JobConfig(validation=self._validation(keys))
            open_validation_sets(config, OneTokenAByte(), **RANK)
        else:
            config = JobConfig(training=self._training(keys))
            build_training_dataloader(config, OneTokenAByte(), seed=0, **RANK)

    def _validation(self, keys):
        if self.key == "validation":
            return Validation(enable=True, **keys)
        good = ValidationSet(name="good", dataset="sample")
        return Validation(enable=True, sets=[good, ValidationSet(name="code", **keys)])

    def _training(self, keys):
        if self.key == "training":
            return Training(**keys)
        good = Dataset(name="good", dataset="sample", weight=1)
        return Training(blend=[good, Dataset(name="code", weight=1, **keys)])


@pytest.fixture(params=["training", "training.blend.code", "validation", "validation.sets.code"])
def table(request):
    return Table(request.param)


def sentence_of(table, call, keys):
    with pytest.raises(UserError) as error:
        call(**keys)
    sentence = str(error.value)
    for other in {"training.dataset", "training.blend.code.dataset", "validation.dataset"}:
        if other != f"{table.key}.dataset":
            assert other not in sentence.replace("training.dataset_lanes", "")
    return sentence


@pytest.mark.parametrize(
    ("keys", "begin"),
    [
        ({"dataset": "c4_tset"}, "dataset = 'c4_tset' is not known"),
        ({"dataset": "text"}, "dataset = 'text' reads local files and {}.dataset_path is not set"),
        ({"dataset": "/tmp"}, "dataset = '/tmp' is a path, but the key takes a name"),
        (
            {"dataset_path": "nowhere/*.jsonl", "dataset": "text"},
            "dataset_path = 'nowhere/*.jsonl'",
        ),
        ({"dataset_path": "x", "dataset": "sampel"}, "dataset = 'sampel' is not known; did you"),
    ],
)
def test_a_name_that_means_nothing(table, keys, begin):
    for call in (table.check, table.open):
        if call == table.open and "sampel" in keys.values():
            continue  # with a path the name is the check's alone
        sentence = sentence_of(table, call, keys)
        assert sentence.startswith(f"{table.key}.{begin.format(table.key)}")


@pytest.mark.parametrize(
    ("content", "key"),
    [
        (b'{"body": "x"}\n' * 3, "{}.dataset_text_key"),
        (b"\n\n", "{}.dataset_path or {}.dataset_text_key"),
        (b"", "None of the 1 file(s) of {}.dataset '"),
        (gzip.compress(b"x", mtime=0), "{}.dataset_path"),
    ],
)
def test_files_that_give_nothing(table, tmp_path, content, key):
    (tmp_path / "a.jsonl").write_bytes(content)
    keys = dict(dataset="text", dataset_path=str(tmp_path))
    assert key.format(table.key, table.key) in sentence_of(table, table.open, keys)


def test_a_link_to_nothing(table, tmp_path):
    (tmp_path / "a.jsonl").symlink_to(tmp_path / "nothing")
    keys = dict(dataset="text", dataset_path=str(tmp_path))
    for call in (table.check, table.open):
        assert sentence_of(table, call, keys).startswith(f"{table.key}.dataset_path: ")


def test_too_few_documents_for_the_streams_of_a_blend(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n' * 3)
    part = Dataset(name="code", dataset="text", dataset_path=str(tmp_path), weight=1)
    config = JobConfig(training=Training(blend=[part], dataset_lanes=4))
    sentence = (
        "training.dataset_lanes = 4 must be at most 3, .* of training.blend.code.dataset 'code'"
    )
    with pytest.raises(UserError, match=sentence):
        build_training_dataloader(config, OneTokenAByte(), seed=0, **RANK)
