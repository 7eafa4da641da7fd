"""Files beside the weights of an exported Hugging Face folder: config.json, generation_config.json,
the tokenizer's files.

Both JSON files are made from the model and from the ids of the run's tokenizer. From the assets'
own files they copy the keys that are listed here, and nothing that describes a model.
"""

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
import torch
from tokenizers import processors

from torchtitan.components.huggingface.folder import CONFIG, read_json
from torchtitan.data.tokenizer import HuggingFaceTokenizer, Tokenizer, load_tokenizer, locate
from torchtitan.ops.block_fp8 import BLOCK
from torchtitan.tools.errors import UserError
from torchtitan.tools.logging import logger

GENERATION = "generation_config.json"
ROLES = ("bos", "eos", "pad")
# Files of a model's folder beside weights and configs: tokenizer, chat template, and the Python
# files that some tokenizers have.
ASSETS = (
    "tokenizer* special_tokens_map.json added_tokens.json vocab.* merges.txt *.tiktoken "
    "tiktoken.* chat_template* *.py LICENSE*"
).split()
FROM_CONFIG = ("tokenizer_class", "unk_token_id", "sep_token_id", "cls_token_id", "mask_token_id")
FROM_GENERATION = (
    "do_sample temperature top_k top_p min_p typical_p repetition_penalty no_repeat_ngram_size "
    "length_penalty num_beams max_new_tokens min_new_tokens stop_strings"
).split()


class Assets(NamedTuple):
    """Files of a tokenizer's folder.

    path: the tokenizer's folder or file.
    config, generation: contents of the JSON files beside it, empty where a file is missing.
    """

    path: Path
    config: dict[str, Any]
    generation: dict[str, Any]

    @property
    def folder(self) -> Path:
        return self.path if self.path.is_dir() else self.path.parent


def find_assets(path: str | Path | None) -> Assets | None:
    """Find the assets at `model.hf_assets_path`; None where it has none. Raises `UserError` for a
    JSON file that can't be read."""
    try:
        found = locate(str(path)) if path is not None else None
    except UserError:
        found = None
    if found is None:
        return None
    folder = found if found.is_dir() else found.parent
    return Assets(found, read_json(folder / CONFIG), read_json(folder / GENERATION))


def write_assets(
    model: dict[str, Any],
    folder: Path,
    *,
    assets_path: str | Path | None,
    dtype: torch.dtype,
    fp8: bool,
) -> None:
    """Write the files beside the weights.

    model: the adapter's `hf_config`.
    folder: to write to.
    assets_path: folder of the tokenizer, or None.
    dtype: of the weights.
    fp8: whether matrices are in block-wise FP8.
    """
    assets = find_assets(assets_path)
    theirs, generation, known = ({}, {}, {})
    if assets is not None:
        _copy(assets.folder, folder)
        theirs, generation, tokenizer = assets.config, assets.generation, _load(assets.path)
        if tokenizer is not None:
            known = {role: getattr(tokenizer, f"{role}_id") for role in ROLES}
        if isinstance(tokenizer, HuggingFaceTokenizer):
            _begin_texts(folder, tokenizer.bos_id)
    # null: unknown. For a missing key readers would take an id of the family's published model.
    unknown = {f"{role}_token_id": None for role in ROLES}
    vocab_size = model["vocab_size"]
    config = {key: theirs[key] for key in FROM_CONFIG if key in theirs}
    config |= model | unknown | _token_ids(theirs, known, vocab_size)
    config["torch_dtype"] = str(dtype).removeprefix("torch.")
    if fp8:
        config["quantization_config"] = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [BLOCK, BLOCK],
        }
    _write(folder / CONFIG, config)
    settings = {key: generation[key] for key in FROM_GENERATION if key in generation}
    settings |= _token_ids(generation, known, vocab_size)
    if settings:
        _write(folder / GENERATION, settings)


def _load(path: Path) -> Tokenizer | None:
    """Load the tokenizer, which knows the special ids; None where it can't be loaded."""
    try:
        return load_tokenizer(str(path))
    except UserError as error:
        logger.warning("Ids of special tokens come from %s alone: %s", CONFIG, error)
        return None


def _begin_texts(folder: Path, bos_id: int | None) -> None:
    """Let an exported tokenizer.json begin texts with the begin token, as training does, where
    neither it nor tokenizer_config.json says how texts begin."""
    file = folder / "tokenizer.json"
    says = "add_bos_token" in read_json(folder / "tokenizer_config.json")
    if bos_id is None or says or not file.exists():
        return
    tokenizer = tokenizers.Tokenizer.from_file(str(file))
    token = tokenizer.id_to_token(bos_id)
    if token is None or bos_id in tokenizer.encode("a").ids:
        return
    begin = processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A $B:1", special_tokens=[(token, bos_id)]
    )
    before = tokenizer.post_processor
    tokenizer.post_processor = begin if before is None else processors.Sequence([before, begin])
    tokenizer.save(str(file))


def _token_ids(
    theirs: dict[str, Any], known: dict[str, int | None], vocab_size: int
) -> dict[str, Any]:
    """Choose special ids: the tokenizer's (`known`), and where it has none those in `theirs`.

    A text may have several end ids, such as that of a turn in a chat.
    """
    found: dict[str, Any] = {}
    for role in ROLES:
        key = f"{role}_token_id"
        own = theirs.get(key)
        candidates = [known.get(role), *(own if isinstance(own, list) else [own])]
        ids = [each for each in candidates if type(each) is int and 0 <= each < vocab_size]
        ids = list(dict.fromkeys(ids))
        if ids:
            found[key] = ids if role == "eos" and len(ids) > 1 else ids[0]
    return found


def _copy(source: Path, folder: Path) -> None:
    for pattern in ASSETS:
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, folder / file.name)


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
