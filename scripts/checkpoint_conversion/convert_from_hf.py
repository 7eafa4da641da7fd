"""Convert a Hugging Face folder (FP8 and MXFP4 too) to a checkpoint for use as initial_load_path.

    python scripts/checkpoint_conversion/convert_from_hf.py assets/hf/DeepSeek-V3 outputs/v3

Needs memory for about one of the folder's files. Interrupted (Ctrl-C), it resumes when run again. A
run can also load the folder directly: checkpoint.initial_load_in_hf.

Every tensor is accounted for in CHECKPOINT.audit.json and .txt, beside the checkpoint.

The layer of multi-token prediction is included with `--model_arg n_mtp_layers=1`.
"""

import argparse
import sys
from pathlib import Path
from typing import Any, get_args

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from scripts import entry

# isort: split
from torchtitan.config.schema import KEYS

DTYPES = get_args(KEYS["checkpoint.export_dtype"].type)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=entry.about(__doc__))
    parser.add_argument("hf_folder", type=Path, help="with *.safetensors and config.json")
    parser.add_argument("checkpoint", type=Path, help="folder to make")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="of the weights (default: unchanged; quantized as bf16)",
    )
    parser.add_argument(
        "--model_arg",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="argument of the run ([model.args]) that overrides config.json; again for several",
    )
    parser.add_argument(
        "--no_read_back", action="store_true", help="don't read the checkpoint again to check it"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    entry.check_first(parse, "hf_folder")

# isort: split
from torchtitan.components.checkpoint.convert import hf_to_checkpoint
from torchtitan.components.checkpoint.detect import detect_model
from torchtitan.components.huggingface.folder import HFFolder
from torchtitan.config.manager import parse_value
from torchtitan.protocols.model import override_fields
from torchtitan.tools.errors import UserError
from torchtitan.tools.logging import logger
from torchtitan.tools.script import run_script
from torchtitan.tools.utils import TORCH_DTYPES


def model_arg(text: str) -> dict[str, Any]:
    """Parse `moe_args.top_k=2` into nested tables."""
    name, has_value, value = text.partition("=")
    if not has_value:
        raise UserError(f"--model_arg {text} needs a value, as in --model_arg n_mtp_layers=1.")
    *outer, last = name.split(".")
    table = {last: parse_value(value)}
    for each in reversed(outer):
        table = {each: table}
    return table


def convert(args: argparse.Namespace) -> None:
    source = HFFolder(args.hf_folder)
    model = detect_model(args.hf_folder)
    model_args = model.args
    for text in args.model_arg:
        model_args = override_fields(model_args, model_arg(text), "model.args")
    hf_to_checkpoint(
        source,
        args.checkpoint,
        model.spec.hf_adapter(model_args, str(args.hf_folder)),
        model=model.name,
        flavor=model.flavor,
        dtype=TORCH_DTYPES[args.dtype] if args.dtype else None,
        read_back=not args.no_read_back,
    )
    logger.info("Made %s: set checkpoint.initial_load_path to it", args.checkpoint)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    return run_script(lambda: convert(args), resumable=True)


if __name__ == "__main__":
    entry.run(main)
