"""Convert a checkpoint of a run to a Hugging Face folder for transformers, vLLM and the like.

    python scripts/checkpoint_conversion/convert_to_hf.py outputs/checkpoint/step-1000 my-model \\
        --assets assets/hf/DeepSeek-V3 [--dtype bfloat16] [--fp8] [--ema]

Needs memory for about one of the checkpoint's files. Interrupted (Ctrl-C), it resumes when run
again. A run can also write the folder itself: checkpoint.last_save_in_hf.

Every tensor is accounted for in HF_FOLDER.audit.json and .txt, beside the folder.

Of a checkpoint with adapters (LoRA) it writes these alone, in PEFT's format; with --merged the
weights with the adapters in them.
"""

import argparse
import math
import sys
from functools import partial
from pathlib import Path
from typing import get_args

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from scripts import entry

# isort: split
from torchtitan.components.huggingface import MAX_FILE_BYTES
from torchtitan.config.schema import KEYS
from torchtitan.tools.errors import UserError

DTYPES = get_args(KEYS["checkpoint.export_dtype"].type)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=entry.about(__doc__))
    parser.add_argument("checkpoint", type=Path, help="a step-N folder")
    parser.add_argument("hf_folder", type=Path, help="folder to make")
    parser.add_argument(
        "--assets",
        "--hf_assets_path",
        type=Path,
        help="folder with the tokenizer (and a config.json to complete)",
    )
    parser.add_argument(
        "--dtype",
        "--export_dtype",
        choices=DTYPES,
        default="bfloat16",
        help="of the files (default: bfloat16)",
    )
    parser.add_argument(
        "--fp8",
        action="store_true",
        help="matrices in FP8 with scales per 128 x 128, as DeepSeek's",
    )
    parser.add_argument(
        "--ema", action="store_true", help="the moving average of the weights ([ema]) instead"
    )
    parser.add_argument(
        "--merged", action="store_true", help="of a LoRA run: weights with the adapters in them"
    )
    parser.add_argument(
        "--max_file_gb", type=float, default=MAX_FILE_BYTES / 1e9, help="size of a file in 10^9 B"
    )
    parser.add_argument(
        "--no_read_back", action="store_true", help="don't read the folder again to check it"
    )
    return parser.parse_args(argv)


def check(argv: list[str] | None) -> argparse.Namespace:
    """Return the options. Raises `UserError` for an impossible size."""
    args = parse(argv)
    if not 0 < args.max_file_gb < math.inf:
        raise UserError(f"--max_file_gb {args.max_file_gb} must be a finite number above 0.")
    return args


if __name__ == "__main__":
    entry.check_first(check, "checkpoint", "--assets")

# isort: split
import torch

from torchtitan.components.checkpoint.convert import checkpoint_to_hf
from torchtitan.components.checkpoint.convert_adapters import MergedTensors, checkpoint_to_peft
from torchtitan.components.checkpoint.detect import detect_model
from torchtitan.components.checkpoint.folder import require_checkpoint
from torchtitan.components.checkpoint.stored_tensors import StoredTensors
from torchtitan.components.finetuning.lora import adapter_sizes
from torchtitan.tools.logging import logger
from torchtitan.tools.script import run_script
from torchtitan.tools.utils import TORCH_DTYPES


def convert(args: argparse.Namespace) -> None:
    if args.assets is not None and not args.assets.exists():
        raise UserError(
            f"--assets {args.assets} does not exist; name the folder with the tokenizer, or leave "
            "it out."
        )
    require_checkpoint(args.checkpoint)
    model = detect_model(args.checkpoint)
    adapter, reader = model.spec.hf_adapter(model.args), StoredTensors
    what = {"dtype": TORCH_DTYPES[args.dtype], "averaged": args.ema}
    if model.lora is None and args.merged:
        raise UserError(f"--merged: {args.checkpoint} has no adapters; leave it out.")
    if model.lora is not None:
        with torch.device("meta"):
            sizes = adapter_sizes(model.spec.model_cls(model.args), model.lora)
        if not args.merged:
            if args.fp8:
                raise UserError("--fp8 is for whole weights, not for adapters; add --merged.")
            adapter.hf_assets_path = args.assets and str(args.assets)
            checkpoint_to_peft(args.checkpoint, args.hf_folder, adapter, sizes, **what)
            logger.info("Made %s", args.hf_folder)
            return
        reader = partial(MergedTensors, sizes=sizes)
    checkpoint_to_hf(
        args.checkpoint,
        args.hf_folder,
        adapter,
        **what,
        fp8=args.fp8,
        assets_path=args.assets,
        max_file_bytes=int(args.max_file_gb * 1e9),
        reader=reader,
        read_back=not args.no_read_back,
    )
    logger.info("Made %s", args.hf_folder)


def main(argv: list[str] | None = None) -> int:
    return run_script(lambda: convert(check(argv)), resumable=True)


if __name__ == "__main__":
    entry.run(main)
