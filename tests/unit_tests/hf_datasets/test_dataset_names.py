"""training.dataset and training.dataset_path: what each name means, and what refuses it."""

import datasets
import pytest

from torchtitan.hf_datasets import build_text_dataloader, open_source
from torchtitan.hf_datasets.sources import HubStream, Shard
from torchtitan.tools.errors import UserError


@pytest.mark.parametrize("name", ["sample", "c4_test", "c4_validation_test"])
def test_the_sample_needs_no_path_and_an_alias_says_what_it_is(name, log):
    source = open_source(name, None, "text")
    assert len(source) == 2307
    assert any(f"'{name}' is read from the shipped sample" in line for line in log) == (
        name != "sample"
    )


def test_a_path_wins_over_the_name(jsonl):
    path = jsonl("a.jsonl", ["mine"])
    for name in ("c4", "c4_test", "sample", "org/name", "anything"):
        source = open_source(name, str(path), "text")
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
        open_source(name, path, "text")


def test_hub_datasets_are_asked_for_by_repository_config_and_split(monkeypatch):
    asked = []

    def load(repository, **arguments):
        asked.append((repository, arguments))
        return datasets.Dataset.from_list([{"text": "from the hub"}]).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load)
    for name in ("c4", "c4_validation", "org/name", "org/name:small"):
        assert isinstance(open_source(name, None, "text"), HubStream)
    assert asked == [
        ("allenai/c4", {"name": "en", "split": "train", "streaming": True}),
        ("allenai/c4", {"name": "en", "split": "validation", "streaming": True}),
        ("org/name", {"name": None, "split": "train", "streaming": True}),
        ("org/name", {"name": "small", "split": "train", "streaming": True}),
    ]


def test_a_hub_without_network_is_one_sentence_with_the_way_out(monkeypatch):
    """The real client, told to stay offline: otherwise it tries again for half a minute."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="'c4'.*'allenai/c4'.*training.dataset_path") as error:
        open_source("c4", None, "text")
    assert "\n" not in str(error.value)


def test_a_hub_dataset_without_the_text_key_is_refused(monkeypatch):
    rows = datasets.Dataset.from_list([{"content": "x"}] * 5).to_iterable_dataset()
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: rows)
    with pytest.raises(UserError, match="5 no 'text' key; first org/name, document"):
        open_source("org/name", None, "text")


def build(path, tokenizer, **changes):
    settings = dict(text_key="text", seq_len=8, batch_size=2, dp_rank=0, dp_degree=1, seed=0)
    settings |= dict(dataset_name="mine", dataset_path=str(path), num_workers=0) | changes
    return build_text_dataloader(tokenizer=tokenizer, **settings)


def test_fewer_documents_than_loader_processes_are_refused(jsonl, tokenizer):
    path = jsonl("a.jsonl", ["x"] * 7)
    build(path, tokenizer, dp_degree=7)
    for changes in ({"dp_degree": 8}, {"dp_degree": 4, "num_workers": 2}):
        with pytest.raises(UserError, match="'mine' has 7 documents, too few for"):
            build(path, tokenizer, **changes)


def test_a_hub_dataset_with_fewer_files_than_workers_is_refused():
    rows = datasets.Dataset.from_list([{"text": "x"}] * 12).to_iterable_dataset(num_shards=6)
    source = HubStream("org/name", rows, "text")
    source.check_shards(dp_degree=2, num_workers=3)
    source.check_shards(dp_degree=4, num_workers=6)  # 4 does not divide 6: all ranks read all
    with pytest.raises(UserError, match="'org/name' has 3 files for each"):
        source.check_shards(dp_degree=2, num_workers=4)


def test_a_process_with_only_bad_documents_stops_instead_of_turning_for_ever(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n{"text": ""}\n')
    with pytest.raises(UserError, match="'mine' had no usable document for loader process"):
        for rank in range(2):
            next(iter(build(tmp_path, tokenizer, dp_rank=rank, dp_degree=2)))
