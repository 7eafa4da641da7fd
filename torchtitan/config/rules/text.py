"""Rules for texts and paths. In every path, `~` is the home folder."""

import os
import re
from typing import Any

from torchtitan.config.job_config import JobConfig
from torchtitan.config.schema import Entry, as_text, entries, replace_entries
from torchtitan.tools.errors import UserError

# Keys that are a path, or part of one.
PATHS = frozenset(
    (
        "job.config_file job.dump_folder job.save_config_file profiling.save_traces_folder "
        "profiling.save_memory_snapshot_folder metrics.save_tb_folder model.hf_assets_path "
        "model.tokenizer_path training.dataset_path training.blend.dataset_path "
        "validation.dataset_path validation.sets.dataset_path chat.template "
        "parallelism.pipeline_parallel_schedule_csv "
        "checkpoint.folder checkpoint.initial_load_path comm.save_traces_folder "
        "comm.save_traces_file_prefix lora.initial_load_path"
    ).split()
)
_FILE_INSIDE = "job.save_config_file"
_MAY_BE_EMPTY = ("parallelism.pipeline_parallel_schedule_csv", "comm.save_traces_file_prefix")
# Names that may also be paths on disk.
_PERHAPS_PATHS = (
    "training.dataset",
    "training.blend.dataset",
    "validation.dataset",
    "validation.sets.dataset",
)
# Limits of Linux's file systems: bytes of a name, and of a whole path.
LONGEST_NAME, LONGEST_PATH = 255, 4095
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
# Python's placeholders for bytes that are not UTF-8; also half of a JSON escape.
_HALF_CHARACTER = re.compile(r"[\ud800-\udfff]")


def with_home(config: JobConfig) -> JobConfig:
    """Expand `~` and `~user` in all paths; those of unknown users stay."""
    paths = {e.title: os.path.expanduser(e.value) for e in entries(config) if _is_path(e)}
    return replace_entries(config, paths)


def check_text(config: JobConfig) -> None:
    """Raise `UserError` for the first text that can't be written to a log or file, or the first
    impossible path.
    """
    for entry in entries(config):
        for text in _texts(entry.value):
            _check_characters(entry.title, text)
        if _is_path(entry) and (entry.value or entry.key not in _MAY_BE_EMPTY):
            check_path(entry.title, entry.value)
            if entry.key == _FILE_INSIDE:
                _check_inside(entry.title, entry.value)
        elif entry.key in _PERHAPS_PATHS:
            _check_length(entry.title, entry.value)


def _is_path(entry: Entry) -> bool:
    return entry.key in PATHS and entry.value is not None


def check_path(key: str, path: str) -> None:
    """Raise `UserError` for an impossible path, in which `~` is expanded already."""
    _check_characters(key, path)
    if path.strip() == "":
        raise UserError(f"{key} = {as_text(path)} must be a path, not empty.")
    if _CONTROL.search(path):
        raise UserError(
            f"{key} = {as_text(path)} holds a line break or another control character, which no "
            "path should; remove it."
        )
    if path.startswith("~"):
        user = path[1:].partition("/")[0]
        raise UserError(
            f"{key} = {as_text(path)} begins with the home folder of user '{user}', who is unknown "
            f"on this machine; write the whole path, or ./{path} for a name that begins with ~."
        )
    _check_length(key, path)


def _check_inside(key: str, path: str) -> None:
    """A run overwrites this file: another one elsewhere may be the user's only copy."""
    parts = path.split("/")
    if ".." in parts or parts[0] == "" or parts[-1] in ("", "."):
        raise UserError(
            f"{key} = {as_text(path)} must be the name of a file inside job.dump_folder, such as "
            '"config.json".'
        )


def _check_length(key: str, path: str) -> None:
    longest = max(len(os.fsencode(name)) for name in path.split("/"))
    rule = None
    if longest > LONGEST_NAME:
        rule = f"has a name of {longest} bytes, but file systems take at most {LONGEST_NAME}"
    elif (length := len(os.fsencode(path))) > LONGEST_PATH:
        rule = f"is {length} bytes long, but paths have at most {LONGEST_PATH}"
    if rule:
        raise UserError(f"{key} = {as_text(path)} {rule}; shorten it.")


def _check_characters(key: str, text: str) -> None:
    wrong = None
    if "\0" in text:
        wrong = "a NUL character"
    elif _HALF_CHARACTER.search(text):
        wrong = "bytes or characters that are not UTF-8 text"
    if wrong:
        raise UserError(f"{key} = {as_text(text)} holds {wrong}; remove them.")


def _texts(value: Any) -> list[str]:
    """List all strings in a value, keys of tables included."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [text for name, item in value.items() for text in (name, *_texts(item))]
    return [text for item in value for text in _texts(item)] if isinstance(value, list) else []
