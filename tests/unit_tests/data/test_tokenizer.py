"""Tokenizers: the same ids as the libraries give, whole round trips, sentences for what fails."""

import base64
import json
import pickle
import shutil
from pathlib import Path

import pytest
import tiktoken
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from torchtitan.data import tokenizer as tokenizer_module
from torchtitan.data.tokenizer import DEFAULT_PATTERN, load_tokenizer
from torchtitan.tools.errors import UserError

SHIPPED = Path(__file__).resolve().parents[2] / "assets/tokenizer"
TEXTS = [
    "Plain English, isn't it?",
    "def f(x):\n\treturn x ** 2  # quadrat\n\n\n",
    "深度求索发布了新的模型。",
    "3.14159265358979 1,000,000 0x7fff",
    "🙂 👨‍👩‍👧 naïve Ünïcödé",
    " \t \r\n ",
    "",
]
# A rank file is 256 bytes and then merges, in order; these make a few words whole.
MERGES = [b"th", b"the", b" the", b"in", b"ing", b"  ", b"12", b"123", b"\xe6\xb7", b"\xe6\xb7\xb1"]
RANKS = {bytes([i]): i for i in range(256)} | {merge: 256 + i for i, merge in enumerate(MERGES)}


def write_ranks(path, ranks=RANKS):
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()]
    path.write_text("".join(lines))
    return path


@pytest.fixture(params=["huggingface", "tiktoken"])
def any_tokenizer(request, tmp_path):
    if request.param == "huggingface":
        return load_tokenizer(str(SHIPPED))
    return load_tokenizer(str(write_ranks(tmp_path / "a.tiktoken")))


def test_the_identity_tells_tokenizers_apart_that_give_other_ids(tmp_path):
    def identity(name, ranks, config=None):
        folder = tmp_path / name
        folder.mkdir()
        write_ranks(folder / "a.tiktoken", ranks)
        (folder / "tiktoken.json").write_text(json.dumps(config or {}))
        return load_tokenizer(str(folder)).identity()

    swapped = RANKS | {b"th": RANKS[b"the"], b"the": RANKS[b"th"]}
    ends = {"special_tokens": {"<a>": 266, "<b>": 267}, "eos_token": "<a>"}
    different = [
        identity("plain", RANKS),
        identity("same size", swapped),
        identity("split", RANKS, {"pattern": r"\w+|\W+"}),
        identity("ends", RANKS, ends),
        identity("other end", RANKS, ends | {"eos_token": "<b>"}),
        load_tokenizer(str(SHIPPED)).identity(),
    ]
    assert len({json.dumps(one) for one in different}) == len(different)
    assert identity("again", RANKS) == different[0], "the place of the files means nothing"


def test_the_identity_of_a_json_tokenizer_is_that_of_its_file(tmp_path):
    shutil.copytree(SHIPPED, tmp_path / "copy")
    ours, copy = load_tokenizer(str(SHIPPED)), load_tokenizer(str(tmp_path / "copy"))
    assert ours.identity() == copy.identity() == pickle.loads(pickle.dumps(ours)).identity()
    file = tmp_path / "copy/tokenizer.json"
    content = json.loads(file.read_text())
    merges = content["model"]["merges"]
    merges[0], merges[1] = merges[1], merges[0]
    file.write_text(json.dumps(content))
    changed = load_tokenizer(str(tmp_path / "copy"))
    assert changed.vocab_size == ours.vocab_size and changed.identity() != ours.identity()


def test_huggingface_ids_are_those_of_tokenizers():
    oracle = tokenizers.Tokenizer.from_file(str(SHIPPED / "tokenizer.json"))
    ours = load_tokenizer(str(SHIPPED))
    for text in TEXTS:
        assert ours.encode(text) == oracle.encode(text, add_special_tokens=False).ids
        assert ours.decode(ours.encode(text)) == text
    assert ours.vocab_size == oracle.get_vocab_size() == 2048
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (0, 1, 2)


def test_tiktoken_ids_are_those_of_tiktoken(tmp_path):
    oracle = tiktoken.Encoding(
        "oracle", pat_str=DEFAULT_PATTERN, mergeable_ranks=RANKS, special_tokens={}
    )
    for name in ("a.tiktoken", "tokenizer.model"):
        (tmp_path / name[0]).mkdir()
        ours = load_tokenizer(str(write_ranks(tmp_path / name[0] / name).parent))
        for text in [*TEXTS, "the thing in 1234 things"]:
            assert ours.encode(text) == oracle.encode_ordinary(text)
            assert ours.decode(ours.encode(text)) == text
        n = len(RANKS)
        assert (ours.bos_id, ours.eos_id, ours.pad_id, ours.vocab_size) == (n, n + 1, n + 2, n + 3)


def test_begin_and_end_are_added_where_asked_and_never_twice(any_tokenizer, tmp_path):
    plain = any_tokenizer.encode("text")
    bos, eos = any_tokenizer.bos_id, any_tokenizer.eos_id
    assert bos not in plain and eos not in plain
    assert any_tokenizer.encode("text", add_bos=True, add_eos=True) == [bos, *plain, eos]


def test_a_template_in_the_file_adds_no_second_begin(tmp_path):
    """Llama's and DeepSeek's tokenizer.json add a begin token to whatever is encoded."""
    tokenizer = tokenizers.Tokenizer.from_file(str(SHIPPED / "tokenizer.json"))
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)]
    )
    tokenizer.enable_truncation(2)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text('{"bos_token_id": 0, "eos_token_id": [1, 2]}')
    ours, shipped = load_tokenizer(str(tmp_path)), load_tokenizer(str(SHIPPED))
    assert ours.encode("some longer text", add_bos=True) == [0, *shipped.encode("some longer text")]
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (0, 1, None)


def test_special_tokens_in_a_document_stay_text(any_tokenizer):
    text = "He wrote <|end_of_text|> and <|begin_of_text|>."
    copy = pickle.loads(pickle.dumps(any_tokenizer))  # as a loader worker gets it
    for tokenizer in (any_tokenizer, copy):
        ids = tokenizer.encode(text)
        assert tokenizer.eos_id not in ids and tokenizer.bos_id not in ids
        assert tokenizer.decode(ids) == text
    assert copy.vocab_size == any_tokenizer.vocab_size


def test_decoding_spells_out_special_tokens_and_passes_over_unknown_ids(any_tokenizer):
    ids = [any_tokenizer.bos_id, *any_tokenizer.encode("x"), any_tokenizer.vocab_size + 7]
    assert any_tokenizer.decode(ids) == "<|begin_of_text|>x"


@given(st.text())
def test_every_text_survives_the_round_trip(text):
    for tokenizer in LOADED:
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.fixture(scope="module", autouse=True)
def _load_once(tmp_path_factory):
    LOADED.append(load_tokenizer(str(SHIPPED)))
    LOADED.append(load_tokenizer(str(write_ranks(tmp_path_factory.mktemp("t") / "a.tiktoken"))))
    yield
    LOADED.clear()


LOADED: list = []


def test_a_very_long_run_of_spaces_is_encoded(tmp_path):
    """tiktoken 0.14 panics on it when it comes in one piece."""
    text = " " * 1_000_000 + "x"
    assert LOADED[1].decode(LOADED[1].encode(text)) == text


def test_the_files_beside_a_rank_file_give_pattern_and_special_tokens(tmp_path):
    write_ranks(tmp_path / "a.tiktoken")
    decoder = {"300": {"content": "<s>"}, "301": {"content": "</s>"}}
    config = {"added_tokens_decoder": decoder, "bos_token": "<s>", "eos_token": {"content": "</s>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours = load_tokenizer(str(tmp_path))
    assert (ours.bos_id, ours.eos_id, ours.pad_id, ours.vocab_size) == (300, 301, None, 302)

    own = {"pattern": ".", "special_tokens": {"<x>": 400}, "bos_token": "<x>", "eos_token": "<x>"}
    (tmp_path / "tiktoken.json").write_text(json.dumps(own))
    ours = load_tokenizer(str(tmp_path / "a.tiktoken"))
    assert ours.encode("the") == [ord("t"), ord("h"), ord("e")]  # "." splits off each letter
    assert (ours.bos_id, ours.eos_id, ours.vocab_size) == (400, 400, 401)


def test_the_shipped_tokenizer_is_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("./tests/assets/tokenizer", "tests/assets/tokenizer"):
        assert load_tokenizer(path).vocab_size == 2048
    # In an installed wheel the package has the copy inside, and no repository around.
    package = tmp_path / "site-packages/torchtitan"
    shutil.copytree(SHIPPED, package / "assets/tokenizer")
    monkeypatch.setattr(tokenizer_module, "_PACKAGE", package)
    assert load_tokenizer("./tests/assets/tokenizer").vocab_size == 2048
    shutil.rmtree(package)
    with pytest.raises(UserError, match="model.hf_assets_path"):
        load_tokenizer("./tests/assets/tokenizer")


SENTENCEPIECE = b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02\n\x0c\n\x03<s>"


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("readme.txt", b"", "holds no tokenizer; it needs tokenizer.json"),
        ("tokenizer.json", b"{}", "tokenizer.json could not be read as a Hugging Face"),
        ("tokenizer.json", b"\xff\xff", "tokenizer.json could not be read as a Hugging Face"),
        ("tokenizer.model", SENTENCEPIECE, "looks like a sentencepiece model"),
        ("a.tiktoken", b"YQ== 0\nnot-base64! 1\n", r"line 2 is not 'base64 rank'"),
        ("a.tiktoken", b"YQ== zero\n", r"line 1 is not 'base64 rank'"),
        ("a.tiktoken", b"", "it is empty"),
    ],
)
def test_unreadable_tokenizers_are_refused_in_one_sentence(tmp_path, name, content, sentence):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=sentence) as error:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)
    assert "model.hf_assets_path" in str(error.value)


def test_a_missing_folder_is_named_with_its_key():
    with pytest.raises(UserError, match="model.hf_assets_path = '/no/such' is neither"):
        load_tokenizer("/no/such")


def test_several_rank_files_are_not_chosen_from(tmp_path):
    for name in ("a.tiktoken", "b.tiktoken"):
        write_ranks(tmp_path / name)
    with pytest.raises(UserError, match=r"several tokenizers \(a.tiktoken, b.tiktoken\)"):
        load_tokenizer(str(tmp_path))


def test_wrong_files_beside_the_tokenizer_are_named(tmp_path):
    shutil.copy(SHIPPED / "tokenizer.json", tmp_path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text('{"eos_token": "</s>"}')
    with pytest.raises(UserError, match="tokenizer_config.json names '</s>' as eos_token"):
        load_tokenizer(str(tmp_path))
    config.write_text("{")
    with pytest.raises(UserError, match="tokenizer_config.json could not be read as JSON"):
        load_tokenizer(str(tmp_path))
    config.write_text('{"bos_token": null}')
    with pytest.raises(UserError, match="add_bos was asked for"):
        load_tokenizer(str(tmp_path)).encode("x", add_bos=True)


def test_clashing_ranks_and_a_bad_pattern_are_refused(tmp_path):
    write_ranks(tmp_path / "a.tiktoken")
    for wrong in ({"pattern": "("}, {"special_tokens": {"<x>": 5}, "bos_token": "<x>"}):
        (tmp_path / "tiktoken.json").write_text(json.dumps(wrong))
        with pytest.raises(UserError, match="rank file with its tiktoken.json"):
            load_tokenizer(str(tmp_path))
