"""Text to token ids and back: Hugging Face and tiktoken files behind one interface."""

import hashlib
import json
import os
import re
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import tiktoken
import tokenizers

from torchtitan.data.tokenizer_files import (
    WAY_OUT,
    added_tokens,
    read_rank_settings,
    read_ranks,
    read_text,
    special_ids,
    unreadable,
)
from torchtitan.data.tokenizer_probe import (
    PROBE,
    RustError,
    lost_characters,
    no_panic_report,
    rust_errors,
)
from torchtitan.tools.errors import UserError, some
from torchtitan.tools.logging import logger
from torchtitan.tools.near_path import near_path

# The value of model.hf_assets_path when nobody sets it. An installed wheel carries a copy.
DEFAULT_PATH = "tests/assets/tokenizer"
_PACKAGE = Path(__file__).resolve().parents[1]

# The split of cl100k_base, in our own grouping: contractions, words, numbers of up to three
# digits, punctuation, white space. Rank files don't carry their pattern, so this is a default.
DEFAULT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# tiktoken's regex engine panics on runs of about half a million spaces, so longer documents are
# encoded in pieces of this many characters; a word on the seam may be split differently.
LONGEST_PIECE = 400_000
# For a rank file that says nothing of special tokens: these follow the last rank, in this order.
DEFAULT_SPECIALS = {"bos": "<|begin_of_text|>", "eos": "<|end_of_text|>", "pad": "<|pad|>"}


class Tokenizer(ABC):
    """Interface of tokenizers.

    `encode` treats the text as plain text: a special token spelled out in a document is not taken
    for the special token, and begin and end are added only where asked, so never twice.
    `vocab_size` is the highest id + 1, added tokens included.
    """

    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    # For sentences: where it came from.
    _path: Path
    # Of all that decides which ids a text gets, special ids aside: the content of the files.
    _content_hash: str

    def identity(self) -> dict[str, Any]:
        """Facts that the ids of a text depend on: without them a data position, which counts
        tokens, means nothing."""
        specials = repr((self.bos_id, self.eos_id, self.pad_id))
        return {
            "tokenizer entries": self.vocab_size,
            "tokenizer hash": _hash(self._content_hash, specials),
        }

    @abstractmethod
    def _encode(self, text: str) -> list[int]: ...

    @property
    def end_ids(self) -> frozenset[int]:
        """The end token, as a set; empty where there is none."""
        return frozenset() if self.eos_id is None else frozenset((self.eos_id,))

    @abstractmethod
    def token_id(self, text: str) -> int | None:
        """Id of the token spelled so, which may be a special one; None where there is none."""

    @abstractmethod
    def decode(self, ids: list[int]) -> str:
        """Text of the ids, special tokens spelled out; ids that the tokenizer doesn't have give
        nothing (a model may have more rows than the tokenizer has entries)."""

    @abstractmethod
    def _encode_with_starts(self, text: str, special: bool) -> tuple[list[int], list[int]]: ...

    def encode_with_starts(self, text: str, special: bool = True) -> tuple[list[int], list[int]]:
        """Ids, and where each token begins: the index of the character that its first byte belongs
        to. Nothing is added at either end.

        special: take special tokens spelled out in the text for the tokens, as templates need
        """
        try:
            return self._encode_with_starts(text, special)
        except RustError as error:
            raise self._unencodable(text, error) from None

    def encode(self, text: str, add_bos: bool = False, add_eos: bool = False) -> list[int]:
        try:
            ids = self._encode(text)
        except RustError as error:
            raise self._unencodable(text, error) from None
        if add_bos:
            ids.insert(0, _required(self.bos_id, "add_bos", "begin"))
        if add_eos:
            ids.append(_required(self.eos_id, "add_eos", "end"))
        return ids

    def _unencodable(self, text: str, error: RustError) -> UserError:
        return UserError(
            f"{self._path} can't encode the text {text[:40]!a} ({error}); take it out of the "
            "data, or set model.hf_assets_path to a tokenizer with byte fallback."
        )


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json`, read by `tokenizers`; specials is role (bos, eos, pad) -> id."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._json = read_text(path)
            with rust_errors(), no_panic_report():
                self._build()
            numbers = self._tokenizer.get_vocab(with_added_tokens=True).values()
            if not numbers:
                raise ValueError("its vocabulary is empty")
            if len(set(numbers)) < len(numbers):
                raise ValueError("two of its tokens have the same id")
        except (OSError, ValueError, RustError) as error:
            raise unreadable(path, "a Hugging Face tokenizer.json", error) from error
        self.vocab_size = max(numbers) + 1
        self._check_added_tokens()
        ids = special_ids(path.parent, self._tokenizer.token_to_id, self.vocab_size)
        self.bos_id, self.eos_id, self.pad_id = ids["bos"], ids["eos"], ids["pad"]
        self._content_hash = _hash(self._json)

    def _build(self) -> None:
        self._tokenizer = tokenizers.Tokenizer.from_str(self._json)
        # The file's cutting and filling are for inference batches; we want the text, whole.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # which means: as ordinary text

    def _check_added_tokens(self) -> None:
        """`tokenizers` numbers them on from its vocabulary, whatever the file says."""
        for token in json.loads(self._json).get("added_tokens") or []:
            given = self._tokenizer.token_to_id(token["content"])
            if given not in (None, token["id"]):
                raise UserError(
                    f"{self._path} gives its added token {token['content']!r} the id "
                    f"{token['id']}, but behind the tokens before it comes {given}; {WAY_OUT}."
                )

    def __getstate__(self) -> dict:
        # Pickling `tokenizers.Tokenizer` itself forgets encode_special_tokens (0.23).
        return {name: value for name, value in self.__dict__.items() if name != "_tokenizer"}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self._build()

    def _encode(self, text: str) -> list[int]:
        with rust_errors():
            return self._tokenizer.encode(text, add_special_tokens=False).ids

    def _encode_with_starts(self, text: str, special: bool) -> tuple[list[int], list[int]]:
        self._tokenizer.encode_special_tokens = not special
        try:
            with rust_errors():
                encoded = self._tokenizer.encode(text, add_special_tokens=False)
        finally:
            self._tokenizer.encode_special_tokens = True
        return encoded.ids, [start for start, _ in encoded.offsets]

    def token_id(self, text: str) -> int | None:
        return self._tokenizer.token_to_id(text)

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)


class TikTokenTokenizer(Tokenizer):
    """A tiktoken rank file: lines of "base64 of the token's bytes, rank".

    Rank files carry neither split pattern nor special tokens. These come from `tiktoken.json`
    beside the file, all keys optional: {"pattern": "...", "special_tokens": {"<|x|>": 128000},
    "bos_token": "<|x|>", "eos_token": ..., "pad_token": ...}; else the special tokens from
    `added_tokens_decoder` of tokenizer_config.json; else DEFAULT_PATTERN and DEFAULT_SPECIALS.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        ranks = read_ranks(path)
        pattern, specials = read_rank_settings(path.parent)
        pattern = DEFAULT_PATTERN if pattern is None else pattern
        specials = specials or added_tokens(path.parent)
        if not specials:
            first = max(ranks.values()) + 1
            specials = {text: first + n for n, text in enumerate(DEFAULT_SPECIALS.values())}
        try:
            _check_special_ids(specials, frozenset(ranks.values()))
            with rust_errors(), no_panic_report():
                self._encoding = tiktoken.Encoding(
                    path.name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=specials
                )
        except (ValueError, RustError) as error:
            raise unreadable(path, "a tiktoken rank file with its tiktoken.json", error) from error
        self._known = frozenset(ranks.values()) | frozenset(specials.values())
        self.vocab_size = max(self._known) + 1
        ids = special_ids(path.parent, specials.get, self.vocab_size, DEFAULT_SPECIALS)
        self.bos_id, self.eos_id, self.pad_id = ids["bos"], ids["eos"], ids["pad"]
        self._content_hash = _hash(repr(sorted(ranks.items())), pattern)

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for start in range(0, len(text), LONGEST_PIECE):
            with rust_errors():
                ids += self._encoding.encode_ordinary(text[start : start + LONGEST_PIECE])
        return ids

    def _encode_with_starts(self, text: str, special: bool) -> tuple[list[int], list[int]]:
        names = self._encoding.special_tokens_set if special else set()
        longest_first = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
        ids: list[int] = []
        for piece in re.split(f"({longest_first})", text) if names else [text]:
            if piece in names:
                ids.append(self._encoding.encode_single_token(piece))
            else:
                ids += self._encode(piece)
        # For each byte of the text, its character.
        owners = [n for n, character in enumerate(text) for _ in character.encode()]
        starts, position = [], 0
        for token in ids:
            starts.append(owners[position])
            position += len(self._encoding.decode_single_token_bytes(token))
        return ids, starts

    def token_id(self, text: str) -> int | None:
        try:
            return self._encoding.encode_single_token(text)
        except KeyError:
            return None

    def decode(self, ids: list[int]) -> str:
        return self._encoding.decode([i for i in ids if i in self._known])


def _check_special_ids(specials: dict[str, int], ranks: frozenset[int]) -> None:
    """Raise `ValueError` where two tokens would share an id."""
    numbers = list(specials.values())
    if taken := ranks & set(numbers):
        raise ValueError(f"the special token ids {sorted(taken)} are ranks already")
    if repeated := sorted(n for n in set(numbers) if numbers.count(n) > 1):
        raise ValueError(f"two special tokens have the id {repeated[0]}")


def load_tokenizer(path: str, repo: str | None = None) -> Tokenizer:
    """Load from a folder (model.hf_assets_path) or a file; the file says which kind it is.

    repo: on the Hugging Face hub, where the model's own can be fetched. Raises `UserError`.
    """
    script = f"python scripts/download_hf_assets.py {repo}"
    fetch = f" (`{script}` fetches this model's)" if repo else ""
    found = locate(path, fetch)
    file = _choose_file(found, fetch) if found.is_dir() else found
    if file.name.endswith(".json"):
        tokenizer: Tokenizer = HuggingFaceTokenizer(file)
    else:
        tokenizer = TikTokenTokenizer(file)
    _tell_lost_characters(file, tokenizer)
    logger.info(
        f"Tokenizer {file}: {tokenizer.vocab_size:,} entries, bos {tokenizer.bos_id}, "
        f"eos {tokenizer.eos_id}, pad {tokenizer.pad_id}"
    )
    return tokenizer


def _tell_lost_characters(file: Path, tokenizer: Tokenizer) -> None:
    try:
        lost = lost_characters(tokenizer._encode)
    except RustError as error:
        raise unreadable(file, "a tokenizer of single characters", error) from error
    for what, characters in lost.items():
        logger.warning(
            f"Tokenizer {file}: {len(characters)} of {len(PROBE)} characters tried {what} "
            f"({some(characters, ', ')}); use a tokenizer with byte fallback or an unknown token, "
            "or texts without them"
        )


def locate(path: str, fetch: str = "") -> Path:
    """Find the folder or file that model.hf_assets_path names. Raises `UserError`.

    path: value of the key
    fetch: how to get it, for the sentence
    """
    given = Path(os.path.expanduser(path))
    try:
        if given.is_dir() or given.is_file():
            return given
    except (OSError, ValueError):  # a name too long, a folder that may not be entered, a NUL
        pass
    if Path(path) == Path(DEFAULT_PATH):
        for folder in (_PACKAGE.parent / DEFAULT_PATH, _PACKAGE / "assets/tokenizer"):
            if folder.is_dir():
                logger.info(f"No {path} in the working directory: using the shipped {folder}")
                return folder
    otherwise = (
        f"set it to a folder with tokenizer.json or *.tiktoken{fetch}, or leave it out for the "
        "shipped tokenizer."
    )
    if re.fullmatch(r"[\w.-]+/[\w.-]+", path) and not os.path.exists(given.parent):
        otherwise = (
            "if it is a model on the Hugging Face hub, fetch its tokenizer (`python "
            f"scripts/download_hf_assets.py {path}`), and set the key to assets/hf/{given.name}."
        )
    way_out = near_path(path, otherwise)
    raise UserError(
        f"model.hf_assets_path = '{path}' is neither a folder nor a file here; {way_out}"
    )


def _choose_file(folder: Path, fetch: str) -> Path:
    if os.path.lexists(folder / "tokenizer.json"):
        return folder / "tokenizer.json"
    ranks = sorted({*folder.glob("*.tiktoken"), *folder.glob("tiktoken.model")})
    ranks += sorted(folder.glob("tokenizer.model"))
    if len(ranks) == 1:
        return ranks[0]
    if ranks:
        names = ", ".join(file.name for file in ranks)
        raise UserError(
            f"model.hf_assets_path = '{folder}' holds several tokenizers ({names}); "
            "name one of these files instead of the folder."
        )
    raise UserError(
        f"model.hf_assets_path = '{folder}' holds no tokenizer; it needs tokenizer.json, "
        f"*.tiktoken, or tokenizer.model in tiktoken's rank format{fetch}."
    )


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _required(token_id: int | None, argument: str, role: str) -> int:
    if token_id is None:
        raise UserError(
            f"{argument} was asked for, but the tokenizer names no {role} token; name it in "
            "tokenizer_config.json beside the tokenizer."
        )
    return token_id
