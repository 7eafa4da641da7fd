"""Generate text from a checkpoint or a Hugging Face folder.

    python scripts/generate.py outputs/checkpoint/step-1000 --prompt "Once upon" --prompt "2 + 2 ="
    torchrun --nproc-per-node 8 scripts/generate.py assets/hf/DeepSeek-V3 --prompt "Once upon"
    python scripts/generate.py outputs/checkpoint/step-1000 --chat --prompt "Hello" --prompt "And?"

With --chat the prompts are a user's turns, one behind the other, written by the chat template;
without a prompt they are read from the terminal.

Under torchrun the weights are spread over the ranks: experts whole, the rest by FSDP.
"""

import argparse
import math
import os
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from scripts import entry

# isort: split
from torchtitan.tools.errors import UserError

_NEW_TOKENS = 128
_NO_PROMPT = "--prompt must be given (in one process, --chat reads turns without it)."


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=entry.about(__doc__))
    parser.add_argument("source", type=Path, help="a step-N folder, or a Hugging Face folder")
    parser.add_argument("--prompt", action="append", help="again for several")
    parser.add_argument("--chat", action="store_true", help="a conversation: prompts are turns")
    parser.add_argument("--system", help="with --chat: the system's message")
    parser.add_argument(
        "--chat_template", help="Jinja file (default: the run's, else the tokenizer folder's)"
    )
    parser.add_argument(
        "--max_new_tokens",
        type=int,
        help=f"at most (default: {_NEW_TOKENS}, or what the model has positions for)",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.8,
        help="of sampling (default: 0.8); 0 takes the likeliest token, as transformers does",
    )
    parser.add_argument(
        "--top_p",
        type=float,
        default=0.95,
        help="sample from the fewest tokens that have this probability together (default: 0.95)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of sampling (default: 0)")
    parser.add_argument("--ema", action="store_true", help="with the average of the weights")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: bf16 on GPUs")
    parser.add_argument("--tokenizer", help="folder or file (default: what the source came with)")
    return parser.parse_args(argv)


def check(argv: list[str] | None) -> argparse.Namespace:
    """Return the options. Raises `UserError` where some don't go together."""
    args = parse(argv)
    for name in ("system", "chat_template"):
        if getattr(args, name) is not None and not args.chat:
            raise UserError(f"--{name} needs --chat; add it, or leave --{name} out.")
    if not args.prompt and not args.chat:
        raise UserError(_NO_PROMPT)
    return args


if __name__ == "__main__":
    entry.check_first(check, "source", "--chat_template", "--tokenizer")

# isort: split
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from torchtitan.components.checkpoint.dcp_storage import (
    CheckpointReader,
    read_tensor_index,
    reason_of_failure,
)
from torchtitan.components.checkpoint.detect import DetectedModel, detect_model
from torchtitan.components.checkpoint.folder import is_complete
from torchtitan.components.generation import Sampling, check_prompts, encode_prompts, generate
from torchtitan.components.huggingface.folder import HFFolder, read_json
from torchtitan.components.huggingface.load_save import load_hf
from torchtitan.components.optimizer.ema import check_has_average
from torchtitan.config import Chat, ConfigManager, JobConfig
from torchtitan.data.chat import ChatProblem, ChatRenderer
from torchtitan.data.tokenizer import DEFAULT_PATH, Tokenizer, load_tokenizer
from torchtitan.distributed.utils import init_distributed
from torchtitan.models.decoder.args import DecoderArgs
from torchtitan.protocols.model import BaseModel, BaseModelArgs
from torchtitan.protocols.train_spec import TrainSpec
from torchtitan.tools.launcher import read_launch
from torchtitan.tools.script import run_script
from torchtitan.tools.utils import device_type, local_device
from torchtitan.trainer.build import build_model, build_parallel_dims


def find_tokenizer(source: Path, named: str | None) -> tuple[Tokenizer, str]:
    """Load the named tokenizer, else that of the Hugging Face folder, else that of the run which
    wrote the checkpoint (its config.json is above the folder of checkpoints), else the shipped one.
    Returns its path, too.
    """
    if named is None and is_complete(source):
        settings = _settings_of_run(source)
        named = _tokenizer_of_run(settings) if os.path.lexists(settings) else DEFAULT_PATH
    try:
        return load_tokenizer(named or str(source)), named or str(source)
    except UserError as error:
        raise UserError(f"{error} (Or name another tokenizer with --tokenizer.)") from None


def find_chat(source: Path, named: str | None) -> Chat:
    """Take the named template, else the template and its variables of the run that wrote the
    checkpoint, else the tokenizer folder's."""
    settings = _settings_of_run(source)
    if named is not None or not is_complete(source) or not os.path.lexists(settings):
        return Chat(template=named)
    table = read_json(settings).get("chat", {})  # earlier versions had no such table
    template, variables = table.get("template"), table.get("template_kwargs", {})
    if not isinstance(template, str | None) or not isinstance(variables, dict):
        raise UserError(
            f"{settings}, the config of the run, has a damaged table chat; name the template with "
            "--chat_template."
        )
    return Chat(template=template, template_kwargs=variables)


def _settings_of_run(checkpoint: Path) -> Path:
    return checkpoint.absolute().parent.parent / "config.json"


def _tokenizer_of_run(settings: Path) -> str:
    try:
        named = read_json(settings)["model"]["hf_assets_path"]
        if not isinstance(named, str):
            raise TypeError
    except (UserError, KeyError, TypeError):
        raise UserError(
            f"{settings}, the config of the run, is damaged or has no model.hf_assets_path; name "
            "the tokenizer with --tokenizer."
        ) from None
    return named


def printable(text: str) -> str:
    """Escape characters that the terminal's encoding lacks."""
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def make_config(args: argparse.Namespace, model: DetectedModel) -> JobConfig:
    """Make the config of a run of forward passes only, with experts spread over as many ranks as
    divide their number."""
    world_size = read_launch().world_size
    dtype = args.dtype or ("bfloat16" if device_type() == "cuda" else "float32")
    degree = 1
    if isinstance(model.args, DecoderArgs) and model.args.has_experts:
        degree = math.gcd(model.args.moe_args.num_experts, world_size)
    options = {
        "model.name": model.name,
        "model.flavor": model.flavor,
        "training.dtype": dtype,
        "training.mixed_precision_param": dtype,
        "activation_checkpoint.mode": "none",
        "parallelism.expert_parallel_degree": degree,
    }
    config = ConfigManager().parse_args([f"--{key}={value}" for key, value in options.items()])
    if model.lora is None:
        return config
    return replace(config, lora=model.lora, model=replace(config.model, converters=["lora"]))


def load_weights(model: BaseModel, spec: TrainSpec, source: Path, *, averaged: bool) -> None:
    if is_complete(source):
        index = read_tensor_index(source)
        if averaged:
            check_has_average(source, index)
        stored = index.state_dict_metadata
        names = [name for name, _ in model.named_parameters()] if averaged else []
        of_average = {name for name in names if f"ema.{name}" in stored}  # frozen ones have none
        state = {
            ("ema." if name in of_average else "model.") + name: tensor
            for name, tensor in model.state_dict().items()
        }
        try:
            dcp.load(state, storage_reader=CheckpointReader(source))
        except CheckpointException as error:
            why = reason_of_failure(error, source)
            raise UserError(
                f"checkpoint {source} could not be loaded ({why}); take another one."
            ) from None
        own = {name.partition(".")[2]: tensor for name, tensor in state.items()}
        model.load_state_dict(own)
    elif averaged:
        raise UserError(
            f"--ema: {source} is a Hugging Face folder, which holds one set of weights; leave it "
            "out (convert_to_hf.py --ema writes the average as such a folder)."
        )
    else:
        adapter = spec.hf_adapter(model.model_args, str(source))
        load_hf(model, adapter, source, quantized=HFFolder(source).quantized)


def turns_of(args: argparse.Namespace) -> Iterator[str]:
    """Yield the user's turns: the prompts, else the lines of the terminal."""
    if args.prompt:
        yield from args.prompt
        return
    while True:
        print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()


def converse(
    args: argparse.Namespace,
    renderer: ChatRenderer,
    answer: Callable[[list[int], Collection[int]], str],
) -> None:
    """Answer turn by turn; each answer joins the conversation.

    answer: prompt and the tokens that end an answer to its text
    """
    messages = [{"role": "system", "content": args.system}] if args.system else []
    for turn in turns_of(args):
        messages.append({"role": "user", "content": turn})
        try:
            text = answer(renderer.prompt(messages), renderer.stop_ids)
        except ChatProblem as error:
            raise UserError(f"The chat template can't write this conversation ({error}).") from None
        messages.append({"role": "assistant", "content": text})
        if dist.get_rank() == 0:
            print(printable(f"user: {turn}\nassistant: {text}\n"))


def sampling_for(
    prompts: Sequence[list[int]], args: argparse.Namespace, model_args: BaseModelArgs
) -> Sampling:
    """Settings for these prompts. Raises `UserError` for impossible values."""
    most = args.max_new_tokens
    if most is None:
        left = model_args.max_seq_len - max(map(len, prompts))
        most = max(1, min(_NEW_TOKENS, left))
    return Sampling(most, args.temperature, args.top_p, args.seed)


def run(args: argparse.Namespace) -> None:
    if not args.prompt and read_launch().world_size > 1:
        raise UserError(_NO_PROMPT)
    found = detect_model(args.source)
    spec, model_args = found.spec, found.args
    tokenizer, assets_path = find_tokenizer(args.source, args.tokenizer)
    chat = find_chat(args.source, args.chat_template) if args.chat else Chat()
    renderer = ChatRenderer(tokenizer, assets_path, chat)
    prompts = [] if args.chat else encode_prompts(tokenizer, args.prompt)
    sampling = sampling_for(prompts or [[]], args, model_args)
    if max(map(max, filter(None, prompts)), default=0) >= model_args.vocab_size:
        raise UserError(
            f"the tokenizer has more entries than the model's {model_args.vocab_size}; name the "
            "model's own with --tokenizer."
        )
    if args.chat:
        renderer.check_template()
    else:
        check_prompts(prompts, sampling, model_args)
    config, device = make_config(args, found), local_device()
    options = {f"--{name}": str(value) for name, value in vars(args).items()}
    leave = init_distributed(config.comm, device, config.job.dump_folder, lambda rank: options)
    try:
        model, _ = build_model(spec, model_args, build_parallel_dims(config), config, device)
        load_weights(model, spec, args.source, averaged=args.ema)
        if args.chat:

            def answer(prompt: list[int], stop_ids: Collection[int]) -> str:
                settings = sampling_for([prompt], args, model_args)
                ids = generate(model, [prompt], settings, stop_ids=stop_ids, device=device)
                return tokenizer.decode(ids[0])

            return converse(args, renderer, answer)
        stop_ids = tokenizer.end_ids
        texts = generate(model, prompts, sampling, stop_ids=stop_ids, device=device)
        if dist.get_rank() == 0:
            for prompt, text in zip(args.prompt, texts, strict=True):
                print(printable(f"{prompt}{tokenizer.decode(text)}\n"))
    finally:
        leave()


def main(argv: list[str] | None = None) -> int:
    return run_script(lambda: run(check(argv)))


if __name__ == "__main__":
    entry.run(main)
