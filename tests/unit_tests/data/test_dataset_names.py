"""training.dataset and training.dataset_path: what each name means, and what refuses it."""

import gzip
import json
from pathlib import Path

import datasets
import pytest

from tests.unit_tests.data.byte_tokenizer import OneTokenAByte
from tests.unit_tests.data.kinds import named, opened
from torchtitan.data import DataSettings, build_text_dataloader, check_dataset, files
from torchtitan.data.dataloader import merge_states
from torchtitan.data.sources import HubStream, Shard
from torchtitan.tools.errors import UserError


@pytest.mark.parametrize("name", ["sample", "c4_test", "c4_validation_test"])
def test_the_sample_needs_no_path_and_an_alias_says_what_it_is(name, log):
    source = opened(name, None, "text")
    assert len(source) == 2307
    assert any(f"'{name}' is read from the shipped sample" in line for line in log) == (
        name != "sample"
    )


def test_a_path_wins_over_the_name(jsonl):
    path = jsonl("a.jsonl", ["mine"])
    for name in ("c4", "c4_test", "sample", "org/name", "anything"):
        source = opened(name, str(path), "text")
        assert [record.text for record in source.open(0, 0, Shard())] == ["mine"]


@pytest.mark.parametrize(
    ("name", "path", "sentence"),
    [
        ("c4_tset", None, "'c4_tset' is not known; the nearest name is 'c4_test'"),
        ("smaple", None, "'smaple' is not known; the nearest name is 'sample'"),
        ("text", None, "training.dataset_path is not set"),
        ("sample", "/no/such/place", "'/no/such/place' names no file, folder or glob"),
        ("/tmp", None, "'/tmp' is a path, but the key takes a name"),
    ],
)
def test_names_and_paths_that_mean_nothing_are_refused(name, path, sentence):
    with pytest.raises(UserError, match=sentence):
        opened(name, path, "text")


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("sampel", "'sampel' is not known; did you mean 'sample'"),
        ("txt", "'txt' is not known; did you mean 'text'"),
        ("mine", "'mine' is not known; did you mean 'text'"),
        ("c4@", None),
        ("c4", None),
        ("org/name", None),
        ("org/name:config@v1", None),
        ("text", None),
    ],
)
def test_a_name_beside_a_path_must_be_one_too(jsonl, name, sentence):
    path = str(jsonl("a.jsonl", ["mine"]))
    if sentence is None:
        check_dataset(named(name, path))
        return
    with pytest.raises(UserError, match=sentence) as error:
        check_dataset(named(name, path))
    assert "With training.dataset_path the usual name is 'text'" in str(error.value)


def test_hub_datasets_are_asked_for_by_repository_config_and_split(monkeypatch):
    asked = []

    def load(repository, **arguments):
        asked.append((repository, arguments))
        return datasets.Dataset.from_list([{"text": "from the hub"}]).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load)
    for name in (
        "c4",
        "c4_validation",
        "org/name",
        "org/name:small",
        "org/name:small@v2",
        "c4@abc",
    ):
        assert isinstance(opened(name, None, "text"), HubStream)
    assert asked == [
        ("allenai/c4", {"name": "en", "split": "train", "streaming": True}),
        ("allenai/c4", {"name": "en", "split": "validation", "streaming": True}),
        ("org/name", {"name": None, "split": "train", "streaming": True}),
        ("org/name", {"name": "small", "split": "train", "streaming": True}),
        ("org/name", {"name": "small", "split": "train", "streaming": True, "revision": "v2"}),
        ("allenai/c4", {"name": "en", "split": "train", "streaming": True, "revision": "abc"}),
    ]
    sources = [opened(name, None, "text") for name in ("org/name", "org/name@v2")]
    assert sources[0].identity() == sources[1].identity(), "what was asked for is no identity"


def test_a_hub_without_network_is_one_sentence_with_the_way_out(monkeypatch):
    """The real client, told to stay offline: otherwise it tries again for half a minute."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="'c4'.*'allenai/c4'.*training.dataset_path") as error:
        opened("c4", None, "text")
    assert "\n" not in str(error.value)


def test_a_hub_dataset_without_the_text_key_is_refused(monkeypatch):
    rows = datasets.Dataset.from_list([{"content": "x"}] * 5).to_iterable_dataset()
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: rows)
    with pytest.raises(UserError, match="5 no 'text' key; first org/name, document"):
        opened("org/name", None, "text")


def build(path, tokenizer, text_key="text", num_streams=None, dp_degree=1):
    datasets = (named("mine", str(path), text_key),)
    settings = DataSettings(datasets, False, seq_len=8, batch_size=2, num_streams=num_streams)
    return build_text_dataloader(settings, tokenizer, dp_rank=0, dp_degree=dp_degree)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"tokenizer": "bytes"}, "with tokenizer entries = 2048, and this run has 259"),
        ({"text_key": "body"}, "with training.dataset_text_key = text, and this run has body"),
        ({"path": "b.jsonl"}, "with data bytes = "),
    ],
)
def test_a_position_in_other_tokens_or_documents_is_refused(tmp_path, tokenizer, changes, sentence):
    (tmp_path / "a.jsonl").write_text('{"text": "this is one", "body": "this is another"}\n' * 20)
    (tmp_path / "b.jsonl").write_text('{"text": "this is another one"}\n' * 20)
    loader = build(tmp_path / "a.jsonl", tokenizer)
    next(iter(loader))
    state = merge_states([loader.local_state()])
    build(tmp_path / "a.jsonl", tokenizer).load_state_dict(state)
    path = tmp_path / changes.pop("path", "a.jsonl")
    other = OneTokenAByte() if changes.pop("tokenizer", None) else tokenizer
    with pytest.raises(UserError, match=sentence):
        build(path, other, **changes).load_state_dict(state)


def test_what_is_known_of_a_hub_dataset_is_part_of_its_identity(tmp_path):
    def identity(files, text_key="text"):
        paths = [str(tmp_path / f"{number}.jsonl") for number in range(files)]
        for path in paths:
            Path(path).write_text('{"text": "x"}\n')
        rows = datasets.load_dataset("json", data_files=paths, split="train", streaming=True)
        return HubStream(named("org/name", text_key=text_key), rows).identity()

    two = identity(2)
    assert two == identity(2) == json.loads(json.dumps(two))
    assert two != identity(3) and two != identity(2, "body")
    assert two["data split"] == "train"


@pytest.mark.parametrize("kind", ["hub", "gzip"])
def test_one_usable_document_is_enough_to_know_that_a_stream_has_some(tmp_path, monkeypatch, kind):
    """A window of 2,048 documents through the network, on each rank, was the price before."""
    read = []
    if kind == "hub":

        def generate():
            for number in range(5000):
                read.append(number)
                yield {"text": f"document {number}"}

        rows = datasets.IterableDataset.from_generator(generate)
        monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: rows)
        source = opened("org/name", None, "text")
    else:
        original = files.record_of_json_line
        counting = lambda *args: read.append(args) or original(*args)  # noqa: E731
        monkeypatch.setattr(files, "record_of_json_line", counting)
        path = tmp_path / "a.jsonl.gz"
        path.write_bytes(gzip.compress(b'{"text": "x"}\n' * 5000))
        source = opened("text", str(path), "text")
    assert 1 <= len(read) <= 2
    assert len(list(source.open(0, 0, Shard()))) == 5000, "the probe used nothing up"


def test_fewer_documents_than_streams_are_refused(jsonl, tokenizer):
    path = jsonl("a.jsonl", ["x"] * 7)
    for dp_degree in (1, 8):  # more ranks than documents are no reason
        build(path, tokenizer, dp_degree=dp_degree, num_streams=7)
    with pytest.raises(UserError, match="dataset_lanes = 8 must be at most 7, the number of doc"):
        build(path, tokenizer, num_streams=8)


@pytest.mark.parametrize("streams", [3, 4, 6, 8])
def test_the_streams_of_a_hub_dataset_are_its_files_or_else_its_documents(streams):
    rows = datasets.Dataset.from_list([{"text": str(n)} for n in range(12)])
    source = HubStream(named("org/name"), rows.to_iterable_dataset(num_shards=6))
    assert source.num_streams() == 6
    shards = [
        [r.text for r in source.open(0, 0, Shard(stream, streams))] for stream in range(streams)
    ]
    assert sorted(text for shard in shards for text in shard) == sorted(map(str, range(12)))
    if streams in (3, 6):  # files of two documents each
        assert {len(shard) for shard in shards} == {12 // streams}


def test_data_that_gives_nothing_stops_instead_of_turning_for_ever(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n' + '{"text": ""}\n' * 50)
    loader = build(tmp_path, tokenizer, num_streams=51)
    sentence = "'mine' had no usable document for stream . of 51 in 10 epochs .*dataset_lanes"
    with pytest.raises(UserError, match=sentence):
        next(iter(loader))
