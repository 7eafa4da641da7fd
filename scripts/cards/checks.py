"""Checks of a flavor on the CPU: sizes of the flavor itself, everything else of its stand-in."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from scripts.cards.official import PARAMETERS, PUBLISHED
from scripts.cards.stand_in import LENGTH, VOCAB, build, small_args
from torchtitan.components.checkpoint.convert import checkpoint_to_hf, hf_to_checkpoint
from torchtitan.components.generation import Sampling, generate
from torchtitan.components.huggingface.folder import HFFolder
from torchtitan.components.huggingface.load_save import load_hf, save_hf
from torchtitan.models.decoder import Decoder, DecoderArgs
from torchtitan.protocols.state_dict_adapter import StateDictAdapter
from torchtitan.protocols.train_spec import TrainSpec, get_train_spec

LATENT_EPS = 1e-6  # transformers' fixed one of MLA's latents


@dataclass(frozen=True)
class Check:
    """Outcome of a check.

    name: of the row.
    figure: what was measured; smaller is better.
    limit: the largest figure that passes.
    text: what was done, in a sentence.
    """

    name: str
    figure: float
    limit: float
    text: str

    @property
    def passed(self) -> bool:
        return self.figure <= self.limit


@dataclass(frozen=True)
class Subject:
    """A flavor, and its stand-in.

    folder: empty, for the files of the checks.
    """

    name: str
    flavor: str
    spec: TrainSpec
    args: DecoderArgs
    small: DecoderArgs
    model: Decoder
    folder: Path

    def adapter(self, args: DecoderArgs | None = None) -> StateDictAdapter:
        return self.spec.hf_adapter(args or self.small)


def subject_of(name: str, flavor: str, folder: Path) -> Subject:
    spec = get_train_spec(name)
    args = spec.model_args[flavor]
    assert isinstance(args, DecoderArgs)
    small = small_args(args)
    return Subject(name, flavor, spec, args, small, build(spec, small), folder)


# Flavors that differ in size alone have one stand-in, which is checked once a process.
_checked: dict[tuple[str, DecoderArgs], list[Check]] = {}


def run_checks(subject: Subject) -> list[Check]:
    """Run all checks, in the order of the page."""
    key = subject.name, subject.small
    if key not in _checked:
        _checked[key] = [check for part in _OF_STAND_IN for check in part(subject)]
    return [*_sizes(subject), *_checked[key]]


# ---------------------------------------------------------------------------------------------
# The flavor
# ---------------------------------------------------------------------------------------------


def sizes(subject: Subject) -> dict[str, tuple[Any, Any]]:
    """Return each argument: (ours, that of the published config.json)."""
    published = subject.spec.hf_adapter.args_of(PUBLISHED[subject.flavor]).as_flavor()
    ours, theirs = (_flat(asdict(each)) for each in (subject.args, published))
    free = {"max_seq_len", "init_std"}
    if ours.get("yarn") == "off":
        free |= set(getattr(subject.args, "yarn_numbers", ()))
    return {key: (value, theirs[key]) for key, value in ours.items() if key not in free}


def _flat(table: dict[str, Any], at: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in table.items():
        found |= _flat(value, f"{at}{key}.") if isinstance(value, dict) else {at + key: value}
    return found


def _sizes(subject: Subject) -> Iterator[Check]:
    compared = sizes(subject)
    wrong = [key for key, (ours, theirs) in compared.items() if ours != theirs]
    text = f"{len(compared)} arguments against the published config.json"
    yield Check("sizes", len(wrong), 0, text + (f": {', '.join(wrong)}" if wrong else ""))
    with torch.device("meta"):
        model = subject.spec.model_cls(subject.args)
    count = sum(parameter.numel() for parameter in model.parameters())
    published = PARAMETERS[subject.flavor] * 1e9
    text = f"{count:,}; published as {PARAMETERS[subject.flavor]:g} B"
    yield Check("parameters", round(abs(count / published - 1), 4), 0.03, text)


# ---------------------------------------------------------------------------------------------
# The stand-in
# ---------------------------------------------------------------------------------------------


def _tensors(folder: Path) -> dict[str, Tensor]:
    return {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}


def _round_trip(subject: Subject) -> Iterator[Check]:
    """Folder → checkpoint → folder → model, with the audit of both conversions."""
    folder, adapter = subject.folder, subject.adapter()
    save_hf(subject.model, adapter, folder / "hf", dtype=torch.bfloat16)
    names = {"model": subject.name, "flavor": subject.flavor}
    hf_to_checkpoint(HFFolder(folder / "hf"), folder / "ours", adapter, **names)
    checkpoint_to_hf(folder / "ours", folder / "again", adapter, dtype=torch.bfloat16)
    before, after = _tensors(folder / "hf"), _tensors(folder / "again")
    differing = before.keys() ^ after.keys()
    differing |= {n for n in before.keys() & after.keys() if not torch.equal(before[n], after[n])}
    configs = [json.loads((folder / n / "config.json").read_text()) for n in ("hf", "again")]
    unequal = len(differing) + (configs[0] != configs[1])
    text = f"folder → checkpoint → folder, bf16: {len(before)} tensors and config.json, bitwise"
    yield Check("import and export", unequal, 0, text)
    audits = [json.loads((folder / f"{n}.audit.json").read_text()) for n in ("ours", "again")]
    lost = sum(len(before) - audit["totals"]["read_back"] for audit in audits)
    rounded = sum(audit["totals"]["rounded"] for audit in audits)
    yield Check("audit", lost + rounded, 0, "every tensor read back in both, no value rounded")
    yield from _routing(subject)


def _routing(subject: Subject) -> Iterator[Check]:
    """Choices of experts before and after weights are rounded to bf16, on fixed tokens."""
    if not subject.args.has_experts:
        return
    rounded = subject.spec.model_cls(subject.small)
    assert isinstance(rounded, Decoder)
    load_hf(rounded, subject.adapter(), subject.folder / "hf")
    before, after = (_choices(model) for model in (subject.model, rounded))
    share = (before != after).any(dim=-1).float().mean().item()
    text = (
        f"share of {before[..., 0].numel():,} choices (tokens × layers) with other experts when "
        "fp32 weights become bf16"
    )
    yield Check("changed top-k", round(share, 4), 0.1, text)


def _choices(model: Decoder) -> Tensor:
    """Return the experts of each token, sorted: (layers, tokens, top-k)."""
    chosen, handles = [], []
    for layer in model.moe_layers().values():

        def keep(module: Any, inputs: Any, outputs: Any) -> None:
            chosen.append(outputs[1].sort(dim=-1).values)

        handles.append(layer.router.register_forward_hook(keep))
    with torch.no_grad():
        model(_tokens())
    for handle in handles:
        handle.remove()
    return torch.stack(chosen)


def _tokens() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, VOCAB, (4, LENGTH), generator=generator)


def _transformers(subject: Subject) -> Iterator[Check]:
    """Logits and greedy text of the exported folder in transformers."""
    from transformers import AutoModelForCausalLM

    args, note = subject.small, ""
    if hasattr(args, "kv_lora_rank") and args.norm_eps != LATENT_EPS:
        args = replace(args, norm_eps=LATENT_EPS)
        note = f", with norm_eps {LATENT_EPS:g}, which transformers fixes for latents"
    model = build(subject.spec, args)
    folder = subject.folder / "fp32"
    save_hf(model, subject.adapter(args), folder, dtype=torch.float32)
    theirs: Any = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    theirs.eval()
    with torch.no_grad():
        ours, expected = model(_tokens()), theirs(_tokens()).logits
    assert expected.std() > 0.1, "logits that are all alike prove nothing"
    error = ((ours - expected).abs().max() / expected.abs().max()).item()
    text = f"largest difference from transformers over the largest logit, fp32{note}"
    yield Check("logits", float(f"{error:.1e}"), 1e-5, text)
    prompts = [_tokens()[row, : 5 + 4 * row].tolist() for row in range(2)]
    new = 16
    texts = generate(
        model, prompts, Sampling(max_new_tokens=new), stop_ids=(), device=torch.device("cpu")
    )
    wrong = 0
    for prompt, text in zip(prompts, texts, strict=True):
        whole = theirs.generate(
            torch.tensor([prompt]), max_new_tokens=new, do_sample=False, eos_token_id=None
        )
        wrong += sum(a != b for a, b in zip(text, whole[0, len(prompt) :].tolist(), strict=True))
    text = f"{2 * new} greedy tokens in a batch against transformers one by one{note}"
    yield Check("generation", wrong, 0, text)


def _resume(subject: Subject) -> Iterator[Check]:
    """Three steps against one, a checkpoint, and two: losses and gradient norms, bitwise."""
    from torchtitan.train import main

    folder = subject.folder / "run"
    words = _options(subject, folder)
    assert main(words) == 0
    whole = _steps(folder)
    shutil.rmtree(folder / "checkpoint/step-3")
    assert main(words) == 0
    again = _steps(folder)
    unequal = sum(whole[step] != again[step] for step in (2, 3))
    text = "losses and gradient norms of steps 2 and 3 after a restart from step 1, bitwise"
    yield Check("resume", unequal, 0, text)


def _options(subject: Subject, folder: Path) -> list[str]:
    sizes = _flat(asdict(subject.small)) | {"vocab_size": 2048}
    sizes.pop("max_seq_len")
    model = {
        f"model.args.{key}": "none" if value is None else value
        for key, value in sizes.items()
        if not key.startswith("moe_args.") or subject.args.has_experts
    }
    settings = model | {
        "model.name": subject.name,
        "model.flavor": subject.flavor,
        "training.dataset": "sample",
        "training.seq_len": 64,
        "training.local_batch_size": 2,
        "training.steps": 3,
        "training.mixed_precision_param": "float32",
        "optimizer.lr": 1e-3,
        "lr_scheduler.warmup_steps": 1,
        "activation_checkpoint.mode": "none",
        "checkpoint.enable": True,
        "checkpoint.enable_first_step_checkpoint": True,
        "checkpoint.last_save_model_only": False,
        "metrics.log_freq": 1,
        "metrics.enable_report": False,
        "debug.seed": 7,
        "job.dump_folder": folder,
    }
    return [f"--{key}={value}" for key, value in settings.items()]


def _steps(folder: Path) -> dict[int, tuple[float, float]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return {each["step"]: (each["loss"], each["grad_norm"]) for each in records}


_OF_STAND_IN: tuple[Callable[[Subject], Iterator[Check]], ...] = (
    _round_trip,
    _transformers,
    _resume,
)
