"""Download tokenizer, config and (with --weights) weights of a model from the Hugging Face hub.

    python scripts/download_hf_assets.py deepseek-ai/DeepSeek-V2-Lite [--weights]
    python scripts/download_hf_assets.py --repo_id deepseek-ai/DeepSeek-V2-Lite --assets tokenizer

Files go to assets/hf/<model>. torchtitan's options mean here what they do there. Shows its
progress; run again, it resumes where it stopped and downloads nothing twice. A private or gated
model needs a token: `hf auth login`, or HF_TOKEN.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from scripts import entry

KINDS = ("tokenizer", "config", "index", "safetensors")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=entry.about(__doc__), allow_abbrev=False)
    parser.add_argument("model", nargs="?", help="such as deepseek-ai/DeepSeek-V3")
    parser.add_argument("--repo_id", help="the same")
    parser.add_argument("--weights", action="store_true", help="the safetensors files too")
    kinds = {"nargs": "+", "choices": KINDS, "default": []}
    parser.add_argument("--assets", **kinds, help="kinds of files (default: tokenizer config)")
    parser.add_argument("--additional_patterns", nargs="+", default=[], help="such as '*.md'")
    parser.add_argument("--all", action="store_true", help="every file")
    parser.add_argument("--revision", help="branch, tag or commit (default: main)")
    where = {"type": Path, "default": Path("assets/hf")}
    parser.add_argument("--folder", "--local_dir", **where, help="parent folder")
    parser.add_argument("--hf_token", help="of a private or gated model (default: HF_TOKEN)")
    args = parser.parse_args(argv)
    if (args.model is None) == (args.repo_id is None):
        parser.error("name the model once, such as deepseek-ai/DeepSeek-V3")
    args.repo_id = args.repo_id or args.model
    return args


if __name__ == "__main__":
    entry.check_first(parse)

# isort: split
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from torchtitan.components.huggingface.assets import ASSETS, GENERATION
from torchtitan.components.huggingface.folder import CONFIG, INDEX
from torchtitan.tools.errors import UserError
from torchtitan.tools.logging import logger
from torchtitan.tools.script import run_script


def patterns_of(args: argparse.Namespace) -> list[str] | None:
    """List the names of the files that are asked for; None = all."""
    if args.all:
        return None
    files = {
        "tokenizer": ASSETS,
        "config": (CONFIG, GENERATION),
        "index": (INDEX,),
        "safetensors": (INDEX, "*.safetensors"),
    }
    kinds = args.assets or ([] if args.additional_patterns else ["tokenizer", "config"])
    kinds = [*kinds, *["safetensors"] * args.weights]
    return [name for kind in kinds for name in files[kind]] + args.additional_patterns


def download(args: argparse.Namespace) -> None:
    """Download. Raises `UserError` where the hub can't be reached or has no such model."""
    target = args.folder / args.repo_id.rpartition("/")[2]
    try:
        snapshot_download(
            args.repo_id,
            revision=args.revision,
            allow_patterns=patterns_of(args),
            local_dir=target,
            token=args.hf_token,
        )
    except HFValidationError:
        raise UserError(
            f"'{args.repo_id}' is not the name of a model; write it as on the hub: owner/name."
        ) from None
    except GatedRepoError:
        raise UserError(
            f"{args.repo_id} is gated: accept its terms on huggingface.co, then log in with "
            "`hf auth login`."
        ) from None
    except RevisionNotFoundError:
        raise UserError(
            f"{args.repo_id} has no revision '{args.revision}'; leave it out."
        ) from None
    except RepositoryNotFoundError:
        raise UserError(
            f"the hub has no model {args.repo_id} (or it is private: log in with `hf auth login`); "
            "correct the name."
        ) from None
    except OSError as error:  # the base of all its network errors, and of disk errors
        reason = str(error).strip().partition("\n")[0][:120]
        raise UserError(
            f"{args.repo_id} could not be fetched ({reason}); check the network (and the disk), or "
            f"copy the model's files to {target} by hand."
        ) from None
    logger.info("%s is in %s: set model.hf_assets_path to it", args.repo_id, target)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    return run_script(lambda: download(args), resumable=True)


if __name__ == "__main__":
    entry.run(main)
