"""A peer's whole step, at its best settings: `python -P -m benchmarks.peer_step NAME TOLD ANSWER`.

TOLD is the JSON of `our_step.settings_of`, ANSWER becomes the row. Sizes, batches, AdamW (fused)
and clipping are ours; model, kernels and what gets compiled are the peer's. With fp32 weights the
peer computes under bf16 autocast, as it does itself on one GPU; with bf16 weights all is bf16.
"""

import contextlib
import importlib
import json
import os
import sys
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.rows import random_batches, summary
from benchmarks.timing import peak_gib, time_steps

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))
LossOf = Callable[[Tensor, Tensor], Tensor]  # tokens, labels -> sum of the tokens' losses


def transformers(told: dict, liger: bool = False) -> tuple[nn.Module, LossOf]:
    """One process; grouped experts and SDPA, layers compiled. liger: its linear + cross-entropy
    instead of logits (its norm and SwiGLU trained wrongly under torch.compile, so they stay out).
    """
    from transformers import AutoModelForCausalLM, DeepseekV3Config

    args = told["model_args"]
    if WORLD_SIZE > 1:
        raise NotImplementedError("several processes: only torchtitan's parallelism is known here")
    if args["attn_mask_type"] != "causal":
        raise NotImplementedError("document masks: DeepseekV3 of transformers has none")
    moe = args["moe_args"]
    without_mtp: dict[str, Any] = {"num_nextn_predict_layers": 0}  # no multi-token prediction
    config = DeepseekV3Config(
        vocab_size=args["vocab_size"],
        hidden_size=args["dim"],
        intermediate_size=args["inter_dim"],
        moe_intermediate_size=args["moe_inter_dim"],
        num_hidden_layers=args["n_layers"],
        num_attention_heads=args["n_heads"],
        num_key_value_heads=args["n_heads"],
        n_shared_experts=moe["num_shared_experts"],
        n_routed_experts=moe["num_experts"],
        routed_scaling_factor=moe["route_scale"],
        kv_lora_rank=args["kv_lora_rank"],
        q_lora_rank=args["q_lora_rank"] or None,
        qk_rope_head_dim=args["qk_rope_head_dim"],
        v_head_dim=args["v_head_dim"],
        qk_nope_head_dim=args["qk_nope_head_dim"],
        n_group=moe["num_expert_groups"] or 1,
        topk_group=moe["num_limited_groups"] or 1,
        num_experts_per_tok=moe["top_k"],
        first_k_dense_replace=args["n_dense_layers"],
        norm_topk_prob=moe["route_norm"],
        max_position_embeddings=args["max_seq_len"],
        initializer_range=args["init_std"],
        rms_norm_eps=args["norm_eps"],
        use_cache=False,
        **without_mtp,
    )
    with torch.device(told["device"]):
        model = AutoModelForCausalLM.from_config(
            config,
            dtype=DTYPES[told["weights"]],
            attn_implementation="sdpa",
            experts_implementation="grouped_mm",
        )
    if told["compile"]:
        for layer in model.model.layers:
            layer.compile()
    if liger:
        liger_kernel = importlib.import_module("liger_kernel.transformers")
        fused = liger_kernel.LigerFusedLinearCrossEntropyLoss(reduction="sum")
        weight = model.lm_head.weight

        def loss_of(tokens: Tensor, labels: Tensor) -> Tensor:
            hidden = model.model(tokens).last_hidden_state
            return fused(weight.to(hidden.dtype), hidden.flatten(0, 1), labels.flatten())

        return model, loss_of
    loss = _compiled(cross_entropy, told)
    return model, lambda tokens, labels: loss(model(tokens).logits, labels)


def torchtitan(told: dict) -> tuple[nn.Module, LossOf]:
    """torchtitan 0.2.2: its model, spread and compiled by its own function; flex for documents."""
    if told["device"] == "cpu":
        _make_ready_for_cpu()
    family, MoEArgs = _theirs("models.deepseek_v3"), _theirs("models.moe").MoEArgs
    args, moe = dict(told["model_args"]), dict(told["model_args"]["moe_args"])
    on_gpu = told["device"] == "cuda"
    moe["use_grouped_mm"] = on_gpu  # its own rule: from SM 9.0 on
    documents = args["attn_mask_type"] == "block_causal"
    model_args = family.DeepSeekV3ModelArgs(
        moe_args=MoEArgs(**_known(MoEArgs, moe)),
        **_known(family.DeepSeekV3ModelArgs, {k: v for k, v in args.items() if k != "moe_args"}),
    )
    model_args.attn_type = "flex" if documents else "sdpa"
    model_args.moe_impl = "standard"
    torch.set_default_dtype(DTYPES[told["weights"]])
    with torch.device("meta"):
        model = family.DeepSeekV3Model(model_args)
    torch.set_default_dtype(torch.float32)  # its rotary table is no bf16
    _spread_and_compile(model, told)
    model.to_empty(device=told["device"])
    with torch.no_grad():
        model.init_weights(buffer_device=torch.device(told["device"]))
    loss, tokenizer = _compiled(cross_entropy, told), SimpleNamespace(eos_id=told["eos_id"])

    def loss_of(tokens: Tensor, labels: Tensor) -> Tensor:
        masks = model.get_attention_masks(tokens, tokenizer) if documents else None
        return loss(model(tokens, attention_masks=masks), labels)

    return model, loss_of


def _spread_and_compile(model: nn.Module, told: dict) -> None:
    degrees = told["parallelism"]
    dims = _theirs("distributed").ParallelDims(
        dp_replicate=degrees["data_parallel_replicate_degree"],
        dp_shard=degrees["data_parallel_shard_degree"],
        cp=1,
        tp=1,
        pp=1,
        ep=degrees["expert_parallel_degree"],
        etp=1,
        world_size=WORLD_SIZE,
    )
    config = _theirs("config").JobConfig()
    config.compile.enable = told["compile"]
    config.activation_checkpoint.mode = told["recompute"]
    config.training.seq_len = told["seq_len"]
    config.training.mixed_precision_param = told["compute"]
    if WORLD_SIZE > 1:
        dims.build_mesh()
    parallelize = _theirs("models.deepseek_v3.infra.parallelize").parallelize_deepseekv3
    parallelize(model, dims, config)


def _theirs(module: str) -> Any:
    """A module of the peer torchtitan, whose name is not ours in this process."""
    return importlib.import_module(f"torchtitan.{module}")


PEERS = {
    "transformers": transformers,
    "transformers+liger": lambda told: transformers(told, liger=True),
    "torchtitan": torchtitan,
}


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum")


def _compiled(function: Callable, told: dict) -> Callable:
    return torch.compile(function) if told["compile"] else function


def _known(cls: type, values: dict) -> dict:
    """Select the settings that this version's arguments have."""
    return {name: value for name, value in values.items() if name in cls.__dataclass_fields__}


def _make_ready_for_cpu() -> None:
    """Remove what stops torchtitan 0.2.2 on a CPU: a Triton kernel that it imports, though its loop
    over experts needs none; and `histc`, by which it counts tokens, takes no integers.
    """
    kernels: Any = ModuleType("torchtitan.models.moe.kernels")
    kernels.generate_permute_indices = None
    sys.modules[kernels.__name__] = kernels
    count = torch.histc
    torch.histc = lambda ids, **kwargs: count(ids.float(), **kwargs).long()


def run(name: str, told: dict) -> dict:
    if WORLD_SIZE > 1:
        if told["device"] == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group("nccl" if told["device"] == "cuda" else "gloo")
    torch.manual_seed(0)
    model, loss_of = PEERS[name](told)
    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=told["lr"] / 100,  # a speed row: no warm-up, so a rate that no model blows up at
        betas=tuple(told["betas"]),
        eps=told["eps"],
        weight_decay=told["weight_decay"],
        fused=True,
    )
    clip, rank = torch.nn.utils.clip_grad_norm_, int(os.environ.get("RANK", 0))
    if WORLD_SIZE > 1:
        clip = partial(
            _theirs("distributed.utils").clip_grad_norm_,
            ep_enabled=told["parallelism"]["expert_parallel_degree"] > 1,
        )
    batches, losses, device = random_batches(told, rank), [], told["device"]
    mixed = told["weights"] != told["compute"] and WORLD_SIZE == 1  # else by FSDP
    autocast = torch.autocast(device, torch.bfloat16) if mixed else contextlib.nullcontext()

    def step() -> None:
        inputs, labels = next(batches)
        tokens, labels = inputs["input"].to(device), labels.to(device)
        optimizer.zero_grad()
        with autocast:
            loss = loss_of(tokens, labels) / labels.numel()
        loss.backward()
        clip(model.parameters(), told["max_norm"], foreach=True)
        optimizer.step()
        losses.append(loss.item())  # ours reads its loss each step, too

    seconds = time_steps(step, told["warmup"], told["steps"])
    row = summary(name, told, seconds, losses) | {"peak_gib": peak_gib()}
    packages = [name.split("+")[0]] + ["liger-kernel"] * name.endswith("liger")
    return row | {"versions": {package: version(package) for package in packages}}


def main(name: str, told_file: str, answer_file: str) -> None:
    told = json.loads(Path(told_file).read_text())
    try:
        row = run(name, told)
    except (ModuleNotFoundError, PackageNotFoundError) as error:
        row = {"name": name, "missing": f"not installed ({error})"}
    except NotImplementedError as error:
        row = {"name": name, "failed": str(error)}
    Path(answer_file).write_text(json.dumps(row))


if __name__ == "__main__":
    main(*sys.argv[1:])
