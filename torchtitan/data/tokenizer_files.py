"""Read the files of a tokenizer, checked field by field."""

import base64
import binascii
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torchtitan.tools.errors import UserError, some, suggest

ROLES = ("bos", "eos", "pad")
WAY_OUT = "replace the file, or set model.hf_assets_path to a folder with a good one"


def unreadable(path: Path, kind: str, error: object) -> UserError:
    return UserError(f"{path} could not be read as {kind} ({one_line(error)}); {WAY_OUT}.")


def one_line(error: object) -> str:
    return " ".join(str(error).split())[:200]


def read_text(path: Path) -> str:
    """UTF-8, with or without a byte order mark. Raises `OSError`, `ValueError`."""
    return path.read_text(encoding="utf-8-sig")


def read_json(path: Path) -> dict[str, Any]:
    """Content of a JSON file; empty where there is no such file. Raises `UserError` for one that is
    no JSON object."""
    if not os.path.lexists(path):  # a link to nowhere is a file that was lost
        return {}
    try:
        content = json.loads(read_text(path))
        if not isinstance(content, dict):
            raise ValueError("it is not an object")
    except (OSError, ValueError, RecursionError) as error:
        raise unreadable(path, "JSON", error) from error
    return content


def wrong_value(path: Path, key: str, value: Any, rule: str) -> UserError:
    return UserError(
        f"{path} has {key} = {repr(value)[:80]}, which must be {rule}; correct the value, or "
        "remove the key (model.hf_assets_path)."
    )


# ------------------------------------------------------------------ special tokens


def special_ids(
    folder: Path,
    token_to_id: Callable[[str], int | None],
    vocab_size: int,
    default: Mapping[str, str] | None = None,
) -> dict[str, int | None]:
    """Role (bos, eos, pad) -> id or None, from the first file beside the tokenizer that names it.

    default: role -> text of the token, for roles that no file names. Raises `UserError`.
    """
    ids: dict[str, int | None] = {}
    for name in ("tiktoken.json", "tokenizer_config.json", "special_tokens_map.json"):
        config = read_json(folder / name)
        for role in ROLES:
            text = _token_text(folder / name, f"{role}_token", config.get(f"{role}_token"))
            if text is None or role in ids:
                continue
            ids[role] = token_to_id(text)
            if ids[role] is None:
                raise UserError(
                    f"{folder / name} names '{text}' as {role}_token, which the tokenizer beside "
                    "it doesn't have; correct the name, or remove the key (model.hf_assets_path)."
                )
    config = read_json(folder / "config.json")
    for role in ROLES:
        if role not in ids:
            key = f"{role}_token_id"
            ids[role] = _token_id(folder / "config.json", key, config.get(key), vocab_size)
            if ids[role] is None and default:
                ids[role] = token_to_id(default[role])
    return ids


def _token_text(path: Path, key: str, value: Any) -> str | None:
    """Text of a token that is written as text, or as a table with its content (an AddedToken)."""
    text = value.get("content") if isinstance(value, dict) else value
    if value is None:
        return None
    if not isinstance(text, str) or not _is_text(text):
        raise wrong_value(path, key, value, "a token's text, or a table with its content")
    return text


def _token_id(path: Path, key: str, value: Any, vocab_size: int) -> int | None:
    """Id, or the first of a list (a model may have several ends); -1 in old files: no padding."""
    named = value[0] if isinstance(value, list) and value else value
    if named is None or named == [] or (key == "pad_token_id" and named == -1):
        return None
    if type(named) is not int or not 0 <= named < vocab_size:
        rule = f"an id of the tokenizer beside it, from 0 to {vocab_size - 1}"
        raise wrong_value(path, key, value, rule)
    return named


def added_tokens(folder: Path) -> dict[str, int]:
    """Text -> id, of `added_tokens_decoder` in tokenizer_config.json. Raises `UserError`."""
    path, key = folder / "tokenizer_config.json", "added_tokens_decoder"
    table = read_json(path).get(key) or {}
    if not isinstance(table, dict):
        raise wrong_value(path, key, table, "a table from ids to tokens")
    added: dict[str, int] = {}
    for number, token in table.items():
        text = _token_text(path, f"{key}.{number}", token)
        if text is None or not (number.isascii() and number.isdigit()):
            raise wrong_value(path, f"{key}.{number}", token, "a token under its id, a number")
        added[text] = int(number)
    return added


def _is_text(text: str) -> bool:
    """Return False for half a surrogate pair, which JSON can spell and which is no character."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


# ------------------------------------------------------------------ rank files


def read_rank_settings(folder: Path) -> tuple[str | None, dict[str, int]]:
    """Pattern (None: not given) and special tokens of tiktoken.json. Raises `UserError`."""
    path = folder / "tiktoken.json"
    settings = read_json(path)
    known = {"pattern", "special_tokens", *(f"{role}_token" for role in ROLES)}
    for key in settings.keys() - known:
        raise UserError(f"{path} has an unknown key '{key}'{suggest(key, known)}")
    pattern, specials = settings.get("pattern"), settings.get("special_tokens") or {}
    if pattern is not None and not isinstance(pattern, str):
        raise wrong_value(path, "pattern", pattern, "a regular expression")
    if not isinstance(specials, dict):
        raise wrong_value(path, "special_tokens", specials, "a table from tokens to ids")
    for text, number in specials.items():
        if type(number) is not int or number < 0 or not text or not _is_text(text):
            rule = "an id, 0 or more, under a token's text"
            raise wrong_value(path, f"special_tokens.{text!a}", number, rule)
    return pattern, specials


def read_ranks(path: Path) -> dict[bytes, int]:
    """Read a tiktoken rank file. Raises `UserError` for a file that is none, and for ranks that
    can't encode every text."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise unreadable(path, "a tiktoken rank file", error) from error
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
            text = base64.b64decode(token, validate=True)
            if not rank.isdigit() or not text:
                raise ValueError
        except (ValueError, binascii.Error) as error:
            reason = f"line {number} is not 'base64 rank'"
            raise unreadable(path, "a tiktoken rank file", reason) from error
        if text in ranks:
            raise unreadable(path, "a tiktoken rank file", f"line {number} repeats a token")
        ranks[text] = int(rank[:20])  # longer ones are no ids either
    _check_ranks(path, ranks)
    return ranks


def _check_ranks(path: Path, ranks: dict[bytes, int]) -> None:
    absent = [f"0x{byte:02x}" for byte in range(256) if bytes([byte]) not in ranks]
    reason = None
    if not ranks:
        reason = "it is empty"
    elif len(set(ranks.values())) < len(ranks):
        reason = "two tokens have the same rank"
    elif max(ranks.values()) >= 2**32 - 1:
        reason = "a rank is beyond 32 bits"
    elif absent:
        reason = f"texts can't be encoded without the single bytes {some(absent, ', ')}"
    if reason:
        raise unreadable(path, "a tiktoken rank file", reason)
