"""Translation of torchtitan's settings into ours: keys that moved, values that mean something else.

Nothing is lost in silence: each key is kept, moved, left out with a reason, or refused.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from scripts.torchtitan_files.meanings import meanings
from scripts.torchtitan_files.names import LEFT_OUT, REFUSED
from scripts.torchtitan_files.read import Header, Item, Remark, Setting, Source, keep_items
from torchtitan.config import validate
from torchtitan.config.moved_keys import MOVED, MOVED_TABLES
from torchtitan.config.schema import (
    KEYS,
    as_text,
    build,
    matches,
    requirement,
    row_mistakes,
    row_type,
)
from torchtitan.config.schema import unknown as unknown_key
from torchtitan.protocols.train_spec import get_flavor, get_train_spec
from torchtitan.tools.errors import UserError, suggest

_MODEL_ARGS = "model.args"
_LINEAR_FP8, _EXPERTS_FP8 = "quantize.linear.float8", "quantize.grouped_mm.float8"
# Flavors of torchtitan whose attention keeps documents apart, and v0.3's tables: it always does.
_MASKED = ("16B", "236B", "671B")
_OF_V03 = {"model_spec", "dataloader", "profiler", "validator", "hf_assets_path"}


@dataclass
class Translation:
    """Our settings, and sentences for the reader.

    moved: our name by theirs.
    left_out: their keys by the reason.
    notes: what else is different.
    refused: sentences; with any of them there is no translation.
    """

    source: Source
    moved: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    notes: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)

    @property
    def values(self) -> dict[str, Any]:
        return {each.key: each.value for each in self.source.settings}

    def add(self, key: str, value: Any) -> None:
        """Add a setting behind those of its table."""
        setting, items = Setting(key, value), self.source.items
        places = [
            n
            for n, each in enumerate(items)
            if each.section == setting.section and not isinstance(each, Remark)
        ]
        items.insert(places[-1] + 1 if places else len(items), setting)


def translate(theirs: Source) -> Translation:
    """Translate a file; see `Translation.refused`."""
    result = Translation(Source([], ending=theirs.ending))
    origin: dict[str, str] = {}
    for item in theirs.items:
        try:
            new = _translate_item(item, result)
        except UserError as error:
            result.refused.append(str(error))
            continue
        for ours in new:
            if isinstance(ours, Setting) and isinstance(item, Setting):
                if not _is_first(ours, item.key, origin, result):
                    continue
            result.source.items.append(ours)
    _after_all(result, {each.key for each in theirs.settings})
    return result


def _is_first(ours: Setting, old: str, origin: dict[str, str], result: Translation) -> bool:
    """Return whether no other key has become this one; refuse two that differ.

    origin: their name by ours, of the keys so far.
    """
    first = origin.setdefault(ours.key, old)
    if first != old and ours.value != result.values[ours.key]:
        result.refused.append(
            f"{first} and {old} are both {ours.key} here and have different values; remove one."
        )
    return first == old


def _translate_item(item: Item, result: Translation) -> Sequence[Item]:
    if isinstance(item, Setting):
        return [_placed(ours, item) for ours in _translate_one(item, result)]
    new = _new_table(item.section)
    if new == item.section:
        return [item]
    return [replace(item, section=new, **{"text": None} if isinstance(item, Header) else {})]


def _placed(ours: Setting, theirs: Setting) -> Setting:
    """Leave the empty lines before a key in the table that it leaves."""
    if ours.table == _new_table(theirs.table):
        return ours
    return replace(ours, above=[line for line in ours.above if line.strip()])


def _new_table(table: str) -> str:
    first = table.partition(".")[0]
    return MOVED_TABLES.get(table) or MOVED_TABLES.get(first, first) + table[len(first) :]


def _translate_one(setting: Setting, result: Translation) -> list[Setting]:
    old, value = setting.key, setting.value
    if handler := _HANDLERS.get(old):
        return handler(setting, result)
    if value is None:  # JSON's for "unset"
        return []
    for prefix in _prefixes(old):
        neutral, reason = REFUSED.get(prefix, (None, ""))
        if reason and value != neutral:
            raise UserError(f"{old} = {as_text(value)} {reason}; remove it from the file first.")
    new = MOVED.get(old)
    if new is None and (reason := _left_out(old)):
        result.left_out[reason].append(old)
        return []
    if new is None:
        table = _new_table(setting.table)
        new = f"{table}.{setting.name}" if table else setting.name
    if new.startswith(f"{_MODEL_ARGS}."):
        return [setting]
    if new not in KEYS:
        raise UserError(_unknown(setting))
    if not matches(value, KEYS[new].type):
        raise UserError(f"{old} = {as_text(value)} {requirement(new, value)}")
    if row := row_type(KEYS[new].type):
        for n, table in enumerate(value, start=1):
            result.refused += row_mistakes(row, table, f"{old} {n}")
    if new != old:
        result.moved[old] = new
    return [replace(setting, key=new)]


def _prefixes(key: str) -> list[str]:
    parts = key.split(".")
    return [".".join(parts[:n]) for n in range(len(parts), 0, -1)]


def _left_out(key: str) -> str | None:
    return next((LEFT_OUT[p] for p in _prefixes(key) if p in LEFT_OUT), None) or (
        REFUSED[key.partition(".")[0]][1] if key.partition(".")[0] in REFUSED else None
    )


def _unknown(setting: Setting) -> str:
    """Say that neither torchtitan nor we have such a key, with the nearest that one of both has."""
    known = {*KEYS, *MOVED, *LEFT_OUT}
    names = [key.rpartition(".")[2] for key in known if key.rpartition(".")[0] == setting.table]
    if not names or not setting.table:
        return f"{setting.key}: {unknown_key(setting.key)}"
    return f"unknown key '{setting.name}' in [{setting.table}]{suggest(setting.name, names)}"


# ---------------------------------------------------------------------------------------------
# Keys that need more than a new name
# ---------------------------------------------------------------------------------------------


def _model_name(setting: Setting, result: Translation) -> list[Setting]:
    get_train_spec(setting.value)  # refuses llama3 and others by name
    if setting.key != "model.name":
        result.moved[setting.key] = "model.name"
    return [replace(setting, key="model.name")]


def _flavor(setting: Setting, result: Translation) -> list[Setting]:
    flavor = str(setting.value).removesuffix("_flex_attn")
    if setting.key != "model.flavor":
        result.moved[setting.key] = "model.flavor"
    if flavor == setting.value:
        return [replace(setting, key="model.flavor")]
    result.notes.append(
        f"model.flavor '{setting.value}' is '{flavor}' with attn_mask_type = \"block_causal\" here"
    )
    mask = Setting(f"{_MODEL_ARGS}.attn_mask_type", "block_causal")
    return [replace(setting, key="model.flavor", value=flavor, text=None), mask]


def _tokenizer(setting: Setting, result: Translation) -> list[Setting]:
    if setting.value is None:
        return []
    result.moved[setting.key] = "model.hf_assets_path"
    folder, _, file = setting.value.rpartition("/")
    if file != "tokenizer.model":
        return [replace(setting, key="model.hf_assets_path")]
    result.notes.append(
        f"model.hf_assets_path = {as_text(folder)} must hold tokenizer.json or *.tiktoken: "
        "scripts/download_hf_assets.py fetches them"
    )
    return [replace(setting, key="model.hf_assets_path", value=folder, text=None)]


def _converters(setting: Setting, result: Translation) -> list[Setting]:
    """Keep the converters that we have, and name the others."""
    kept = [name for name in setting.value if _converts(name)]
    if lacking := [name for name in setting.value if name not in kept]:
        result.notes.append(
            f"model.converters: {', '.join(lacking)} has no counterpart here and is left out, so "
            "these layers compute in training.mixed_precision_param"
        )
        return [replace(setting, value=kept, text=keep_items(setting.text, kept))]
    return [setting]


def _converts(name: str) -> bool:
    """Return whether a run on a GPU may name this converter."""
    settings = {"model.converters": [name], f"{_EXPERTS_FP8}.fqns": ["experts"]}
    try:
        validate(build(settings), 1, "cuda")
    except UserError:
        return False
    return True


def _float8(setting: Setting, result: Translation) -> list[Setting]:
    """Leave out what only torchtitan's FP8 has: gathers with scales of whole tensors."""
    name = setting.key.rpartition(".")[2]
    if name == "recipe_name" or not setting.value:
        return [replace(setting, key=f"{_LINEAR_FP8}.{name}")]
    reason = "FSDP gathers blocks of FP8 here, whose scales need no maximum over ranks"
    result.left_out[reason].append(setting.key)
    return []


def _split_points(setting: Setting, result: Translation) -> list[Setting]:
    """Leave out an empty list; a real one needs the number of layers to become modules by part."""
    if not setting.value:
        result.left_out["parts of a pipeline are split evenly here"].append(setting.key)
        return []
    raise UserError(
        f"{setting.key} = {as_text(setting.value)} names where parts begin; write the modules of "
        "each part as parallelism.module_fqns_per_model_part, or remove it for an even split."
    )


def _total_steps(setting: Setting, result: Translation) -> list[Setting]:
    if setting.value is not None:
        raise UserError(
            f"lr_scheduler.total_steps = {setting.value} makes the curve longer than the run; here "
            "it ends with training.steps: set that to it, and stop the run earlier with SIGTERM."
        )
    return []


def _implementation(setting: Setting, result: Translation) -> list[Setting]:
    if setting.value != "fused_opt_states_bf16":
        return [setting]
    result.moved[f"{setting.key} '{setting.value}'"] = "optimizer.state_dtype"
    fused = replace(setting, value="fused", text=None)
    return [fused, Setting("optimizer.state_dtype", "bfloat16")]


def _param_groups(setting: Setting, result: Translation) -> list[Setting]:
    """Turn v0.3's only group, of all parameters, into plain keys."""
    groups = setting.value or []
    if len(groups) != 1 or groups[0].get("pattern") not in (".*", None):
        patterns = ", ".join(repr(group.get("pattern")) for group in groups)
        raise UserError(
            f"optimizer.param_groups has patterns ({patterns}), which are regular expressions of "
            "torchtitan's names; keep the group of '.*', and write the others as "
            "[[optimizer.group]] (docs/config.md)."
        )
    values = dict(groups[0].get("optimizer_kwargs", {}))
    values["name"] = groups[0].get("optimizer_name", "AdamW")
    values |= dict(zip(("beta1", "beta2"), values.pop("betas", ()), strict=False))
    for name, value in values.items():
        key = f"optimizer.{name}"
        if key not in KEYS or not matches(value, KEYS[key].type):
            result.refused.append(
                f"optimizer.param_groups: {name} = {as_text(value)} has no key here; remove it."
            )
    result.moved[setting.key] = f"optimizer.{{{', '.join(values)}}}"
    return [Setting(f"optimizer.{name}", value) for name, value in values.items()]


def _sources(setting: Setting, result: Translation) -> list[Setting]:
    raise UserError(
        f"{setting.key} blends several datasets; write them as [[training.blend]] (docs/config.md) "
        "and remove it from the file first."
    )


_SCALES = (
    "recipe_name enable_fsdp_float8_all_gather precompute_float8_dynamic_scale_for_fsdp".split()
)
_HANDLERS: dict[str, Callable[[Setting, Translation], list[Setting]]] = {
    "model.name": _model_name,
    "model_spec.name": _model_name,
    "model.flavor": _flavor,
    "model_spec.flavor": _flavor,
    "model.tokenizer_path": _tokenizer,
    "model.converters": _converters,
    "parallelism.pipeline_parallel_split_points": _split_points,
    "lr_scheduler.total_steps": _total_steps,
    "optimizer.implementation": _implementation,
    "optimizer.param_groups": _param_groups,
    "dataloader.sources": _sources,
    **{f"{table}.{key}": _float8 for table in ("float8", _LINEAR_FP8) for key in _SCALES},
}


# ---------------------------------------------------------------------------------------------
# The whole file
# ---------------------------------------------------------------------------------------------


def _after_all(result: Translation, theirs: set[str]) -> None:
    """Add what their versions have by default, and note what means something else here."""
    values = result.values
    name, flavor = (values.get(f"model.{key}") for key in ("name", "flavor"))
    if name is None and theirs & {"model.name", "model_spec.name"}:
        return  # it is refused
    if name is None:
        result.refused.append(
            "the file has no model.name, and torchtitan's default is llama3, which is no family "
            "here; write the family's name, such as deepseek_v3, into it."
        )
        return
    try:
        get_flavor(get_train_spec(name), name, flavor or "debugmodel")
    except UserError as error:
        result.refused.append(str(error))
        return
    _add_mode(result, theirs)
    v01 = {key for key in theirs if re.search("enable_checkpoint|_weights_only", key)}
    if v01 and values.get("checkpoint.enable") and "checkpoint.last_save_model_only" not in values:
        result.add("checkpoint.last_save_model_only", False)
        result.notes.append(
            "checkpoint.last_save_model_only = false was v0.1's default; ours is true"
        )
    masked = f"torchtitan's {flavor}" if flavor in _MASKED else ""
    if {key.partition(".")[0] for key in theirs} & _OF_V03:
        masked = "torchtitan v0.3"
        _add_validation(result)
    mask = f"{_MODEL_ARGS}.attn_mask_type"
    if masked and mask not in values:
        result.add(mask, "block_causal")
        result.notes.append(
            f'{mask} = "block_causal" is added: {masked} keeps documents apart, our default is '
            '"causal"'
        )
    result.notes += meanings(name, flavor, result.values)


def _add_validation(result: Translation) -> None:
    """Add the sizes of validation's batches, which are training's in v0.3."""
    if result.values.get("validation.enable"):
        for name in ("local_batch_size", "seq_len"):
            size = result.values.get(f"training.{name}", KEYS[f"training.{name}"].default)
            result.add(f"validation.{name}", size)


def _add_mode(result: Translation, theirs: set[str]) -> None:
    """Add the mode of recomputation, which is a class in v0.3."""
    of_table = {key for key in theirs if key.startswith("activation_checkpoint.")}
    if not of_table or "activation_checkpoint.mode" in of_table:
        return
    names = {key.partition(".")[2] for key in of_table}
    if "force_recompute_mm_shapes_by_fqns" in names:
        result.add("activation_checkpoint.mode", "selective")
        result.add("activation_checkpoint.selective_ac_option", "op")
    elif "memory_budget" in names:
        result.add("activation_checkpoint.mode", "memory_budget")
    elif "preserve_rng_state" in names:
        result.add("activation_checkpoint.mode", "full")
