"""A Hugging Face folder (FP8 ones too) → a checkpoint that runs take as initial_load_path.

    python scripts/checkpoint_conversion/convert_from_hf.py assets/hf/DeepSeek-V3 outputs/v3

Needs memory for about one of the folder's files. Interrupted (Ctrl-C), it goes on when called
again. A run can also load the folder as it is: checkpoint.initial_load_in_hf.
"""

import argparse
import sys
from pathlib import Path

from torchtitan.components.hf_convert import hf_to_checkpoint
from torchtitan.components.hf_files import CONFIG, HFFolder
from torchtitan.protocols.train_spec import get_train_spec
from torchtitan.tools.errors import UserError
from torchtitan.tools.logging import init_logger, logger
from torchtitan.tools.utils import TORCH_DTYPES


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("hf_folder", type=Path, help="with *.safetensors and config.json")
    parser.add_argument("checkpoint", type=Path, help="folder to make")
    parser.add_argument("--model", default="deepseek_v3", help="family, a folder of models/")
    parser.add_argument(
        "--dtype", choices=TORCH_DTYPES, help="of the weights (default: as they are; FP8 as bf16)"
    )
    return parser.parse_args(argv)


def convert(args: argparse.Namespace) -> None:
    make_adapter = get_train_spec(args.model).state_dict_adapter
    source = HFFolder(args.hf_folder)
    if not source.config:
        raise UserError(f"{args.hf_folder} has no {CONFIG}, which describes the model; add it.")
    adapter = make_adapter(make_adapter.args_of(source.config), str(args.hf_folder))
    hf_to_checkpoint(
        source,
        args.checkpoint,
        adapter,
        model=args.model,
        flavor=args.hf_folder.name,
        dtype=TORCH_DTYPES[args.dtype] if args.dtype else None,
    )
    logger.info("Made %s: set checkpoint.initial_load_path to it", args.checkpoint)


def main(argv: list[str] | None = None) -> int:
    init_logger()
    args = parse(argv)
    try:
        convert(args)
    except UserError as error:
        logger.error("%s", error)
        return 2
    except KeyboardInterrupt:
        logger.info("Interrupted; the same command goes on from here")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
