"""Text to token ids and back: Hugging Face and tiktoken files behind one interface."""

import base64
import binascii
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tiktoken
import tokenizers

from torchtitan.tools.errors import UserError
from torchtitan.tools.logging import logger

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
    """What the trainer needs of a tokenizer.

    `encode` treats the text as plain text: a special token spelled out in a document is not taken
    for the special token, and begin and end are added only where asked, so never twice.
    `vocab_size` is the highest id + 1, added tokens included.
    """

    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    # Of all that decides which ids a text gets, special ids aside: the content of the files.
    _content_hash: str

    def identity(self) -> dict[str, Any]:
        """What the ids of a text depend on: a data position in tokens means nothing without."""
        specials = repr((self.bos_id, self.eos_id, self.pad_id))
        return {
            "tokenizer entries": self.vocab_size,
            "tokenizer hash": _hash(self._content_hash, specials),
        }

    @abstractmethod
    def _encode(self, text: str) -> list[int]: ...

    @abstractmethod
    def token_id(self, text: str) -> int | None:
        """Of the token spelled so, a special one perhaps; None where there is none."""

    @abstractmethod
    def decode(self, ids: list[int]) -> str:
        """The text, special tokens spelled out; ids that the tokenizer doesn't have give nothing
        (a model may have more rows than the tokenizer has entries)."""

    def encode(self, text: str, add_bos: bool = False, add_eos: bool = False) -> list[int]:
        ids = self._encode(text)
        if add_bos:
            ids.insert(0, _required(self.bos_id, "add_bos", "begin"))
        if add_eos:
            ids.append(_required(self.eos_id, "add_eos", "end"))
        return ids


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json`, read by `tokenizers`; specials is role (bos, eos, pad) -> id."""

    def __init__(self, path: Path) -> None:
        try:
            self._json = path.read_text(encoding="utf-8")
            self._build()
        except Exception as error:  # tokenizers raises plain Exception for what it cannot parse
            raise _unreadable(path, "a Hugging Face tokenizer.json", error) from error
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        ids = _special_ids(path.parent, self._tokenizer.token_to_id)
        self.bos_id, self.eos_id, self.pad_id = ids["bos"], ids["eos"], ids["pad"]
        self._content_hash = _hash(self._json)

    def _build(self) -> None:
        self._tokenizer = tokenizers.Tokenizer.from_str(self._json)
        # The file's cutting and filling are for inference batches; we want the text, whole.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # which means: as ordinary text

    def __getstate__(self) -> dict:
        # Pickling `tokenizers.Tokenizer` itself forgets encode_special_tokens (0.23).
        return {name: value for name, value in self.__dict__.items() if name != "_tokenizer"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._build()

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

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
        ranks = _read_ranks(path)
        config = _read_json(path.parent / "tiktoken.json")
        specials = config.get("special_tokens") or _added_tokens(path.parent)
        if not specials:
            first = max(ranks.values()) + 1
            specials = {text: first + n for n, text in enumerate(DEFAULT_SPECIALS.values())}
        pattern = config.get("pattern", DEFAULT_PATTERN)
        try:
            taken = set(ranks.values()) & set(specials.values())
            if taken:
                raise ValueError(f"the special token ids {sorted(taken)} are ranks already")
            self._encoding = tiktoken.Encoding(
                path.name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=specials
            )
        except Exception as error:  # a bad pattern or clashing ids; the Rust side has no one class
            raise _unreadable(path, "a tiktoken rank file with its tiktoken.json", error) from error
        ids = _special_ids(path.parent, specials.get, DEFAULT_SPECIALS)
        self._known = frozenset(ranks.values()) | frozenset(specials.values())
        self.vocab_size = max(self._known) + 1
        self.bos_id, self.eos_id, self.pad_id = ids["bos"], ids["eos"], ids["pad"]
        self._content_hash = _hash(repr(sorted(ranks.items())), pattern)

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for start in range(0, len(text), LONGEST_PIECE):
            ids += self._encoding.encode_ordinary(text[start : start + LONGEST_PIECE])
        return ids

    def token_id(self, text: str) -> int | None:
        try:
            return self._encoding.encode_single_token(text)
        except KeyError:
            return None

    def decode(self, ids: list[int]) -> str:
        return self._encoding.decode([i for i in ids if i in self._known])


def load_tokenizer(path: str) -> Tokenizer:
    """Load from a folder (model.hf_assets_path) or a file; the file says which kind it is."""
    found = locate(path)
    file = _choose_file(found) if found.is_dir() else found
    if file.name.endswith(".json"):
        tokenizer: Tokenizer = HuggingFaceTokenizer(file)
    else:
        tokenizer = TikTokenTokenizer(file)
    logger.info(
        f"Tokenizer {file}: {tokenizer.vocab_size:,} entries, bos {tokenizer.bos_id}, "
        f"eos {tokenizer.eos_id}, pad {tokenizer.pad_id}"
    )
    return tokenizer


def locate(path: str) -> Path:
    """The folder or file that model.hf_assets_path names. Raises `UserError`."""
    given = Path(path).expanduser()
    if given.exists():
        return given
    if Path(path) == Path(DEFAULT_PATH):
        for place in (_PACKAGE.parent / DEFAULT_PATH, _PACKAGE / "assets/tokenizer"):
            if place.is_dir():
                logger.info(f"No {path} in the working directory: using the shipped {place}")
                return place
    raise UserError(
        f"model.hf_assets_path = '{path}' is neither a folder nor a file here; set it to a folder "
        f"with tokenizer.json or *.tiktoken, or leave it out for the shipped tokenizer."
    )


def _choose_file(folder: Path) -> Path:
    if (folder / "tokenizer.json").is_file():
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
        "*.tiktoken, or tokenizer.model in tiktoken's rank format."
    )


def _read_ranks(path: Path) -> dict[bytes, int]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise _unreadable(path, "a tiktoken rank file", error) from error
    # A sentencepiece model is a protobuf whose first field, a vocabulary piece, has tag 0x0a.
    if data[:1] == b"\n" and b"\0" in data[:4096]:
        raise UserError(
            f"{path} looks like a sentencepiece model, which we don't read; put the model's "
            "tokenizer.json (Hugging Face) into model.hf_assets_path instead."
        )
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), start=1):
        if not line:
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            reason = ValueError(f"line {number} is not 'base64 rank'")
            raise _unreadable(path, "a tiktoken rank file", reason) from error
    if not ranks:
        raise _unreadable(path, "a tiktoken rank file", ValueError("it is empty"))
    return ranks


def _special_ids(folder: Path, token_to_id, default: Mapping[str, str] | None = None) -> dict:
    """role -> id or None, from the first of the files beside the tokenizer that names the role."""
    ids: dict[str, int | None] = {}
    for name in ("tiktoken.json", "tokenizer_config.json", "special_tokens_map.json"):
        config = _read_json(folder / name)
        for role in ("bos", "eos", "pad"):
            token = config.get(f"{role}_token")
            token = token.get("content") if isinstance(token, dict) else token  # an AddedToken
            if token is None or role in ids:
                continue
            ids[role] = token_to_id(token)
            if ids[role] is None:
                raise UserError(
                    f"{folder / name} names '{token}' as {role}_token, which the tokenizer beside "
                    "it doesn't have; correct the name, or remove the key (model.hf_assets_path)."
                )
    config = _read_json(folder / "config.json")
    for role in ("bos", "eos", "pad"):
        named = config.get(f"{role}_token_id")  # a list where a model has several ends: the first
        named = named[0] if isinstance(named, list) and named else named
        by_default = token_to_id(default[role]) if default else None
        ids.setdefault(role, named if isinstance(named, int) else by_default)
    return ids


def _added_tokens(folder: Path) -> dict[str, int]:
    added = _read_json(folder / "tokenizer_config.json").get("added_tokens_decoder", {})
    return {token["content"]: int(number) for number, token in added.items()}


def _read_json(path: Path) -> dict:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it is not an object")
    except (OSError, ValueError) as error:
        raise _unreadable(path, "JSON", error) from error
    return content


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _required(token_id: int | None, argument: str, role: str) -> int:
    if token_id is None:
        raise UserError(
            f"{argument} was asked for, but the tokenizer names no {role} token; name it in "
            "tokenizer_config.json beside the tokenizer."
        )
    return token_id


def _unreadable(path: Path, kind: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:200]
    return UserError(
        f"{path} could not be read as {kind} ({reason}); replace the file, or set "
        "model.hf_assets_path to a folder with a good one."
    )
