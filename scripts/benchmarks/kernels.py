"""Single operations of a layer, through our public functions, each beside a floor or a plain way.

A model's widths give the sizes (671B with 32 of its experts, one rank's share at EP 8). Rates count
the FLOPs that the result needs (attention: half of the scores; a backward pass twice its forward
pass), or the bytes that must be read and written once.
"""

import argparse
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.timing import machine, measure
from torchtitan.components.optimizer import build_optimizer
from torchtitan.components.optimizer.compute_weights import ComputeWeights
from torchtitan.config.job_config import Optimizer
from torchtitan.models.deepseek_v3 import DeepSeekV3ModelArgs, deepseekv3_args
from torchtitan.models.moe import MoE
from torchtitan.ops.attention import attention
from torchtitan.ops.linear import grouped_linear
from torchtitan.ops.linear_cross_entropy import linear_cross_entropy
from torchtitan.ops.rope import apply_rope, rope_table
from torchtitan.tools.errors import UserError, suggest

Row = dict[str, Any]


def run(options: argparse.Namespace) -> list[Row]:
    """Rows of all kernels at all widths. Raises `UserError` for unknown widths and odd sizes."""
    for flavor in options.widths:
        if flavor not in deepseekv3_args:
            raise UserError(f"--widths: '{flavor}' is no flavor{suggest(flavor, deepseekv3_args)}")
    for name in ("tokens", "seq_len", "reps", "vocab", "params"):
        if getattr(options, name) <= 0:
            raise UserError(f"--{name} ({getattr(options, name)}) must be above 0.")
    if options.tokens % options.seq_len:
        raise UserError(
            f"--tokens ({options.tokens}) must be a multiple of --seq_len ({options.seq_len})."
        )
    torch.manual_seed(0)
    rows = []
    for flavor in options.widths:
        args = deepseekv3_args[flavor]
        if flavor == "671B":
            experts = dataclasses.replace(args.moe_args, num_experts=32)
            args = dataclasses.replace(args, moe_args=experts)
        for name in options.kernels:
            for row in globals()[f"_{name}"](args, options):
                settings = {"tokens": options.tokens, "reps": options.reps, "dtype": "bfloat16"}
                row |= {"widths": flavor, "settings": settings, "machine": machine()}
                rows.append(row)
    return rows


def _row(name: str, timed: Row, *, flops: float | None = None, bytes_: float | None = None) -> Row:
    """flops, bytes_: of the forward pass; the backward pass of a product does twice as much."""
    row = {"kernel": name} | timed
    for way, factor in (("forward", 1), ("backward", 2)):
        if f"{way}_ms" not in timed:
            continue
        seconds = timed[f"{way}_ms"]["median"] / 1e3
        if flops:
            row[f"{way}_tflops"] = factor * flops / seconds / 1e12
        if bytes_:
            row[f"{way}_gb_s"] = factor * bytes_ / seconds / 1e9
    return row


def _random(*shape: int, grad: bool = True) -> Tensor:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.randn(shape, device=device, dtype=torch.bfloat16).requires_grad_(grad)


def _maybe_compiled(function: Callable, options: argparse.Namespace) -> Callable:
    """Compile on a GPU, as a run on this device does."""
    return function if options.eager or not torch.cuda.is_available() else torch.compile(function)


# ---------------------------------------------------------------------------------------- layers


def _moe(args: DeepSeekV3ModelArgs, options: argparse.Namespace) -> Iterator[Row]:
    """An MoE layer without shared experts, router included, against a plain chain."""
    moe_args = dataclasses.replace(args.moe_args, num_shared_experts=0)
    moe = MoE(moe_args, dim=args.dim, hidden_dim=args.moe_inter_dim)
    moe = moe.to(_random(1).device, torch.bfloat16)
    with torch.no_grad():
        moe.init_weights(args.init_std)
    plain_weights = list(moe.parameters())
    x_BSD = _random(1, options.tokens, args.dim)
    flops = 6 * options.tokens * moe_args.top_k * args.dim * args.moe_inter_dim
    chain = _maybe_compiled(lambda: plain_chain(moe, x_BSD), options)
    yield _row(
        "moe, plain chain", measure(chain, [x_BSD, *plain_weights], options.reps), flops=flops
    )
    _work_in_bf16(moe)
    layer = _maybe_compiled(moe.forward, options)
    timed = measure(lambda: layer(x_BSD), [x_BSD, *plain_weights], options.reps)
    yield _row("moe", timed, flops=flops)


def plain_chain(moe: MoE, x_BSD: Tensor) -> Tensor:
    """The plain chain: sort, gather, three grouped GEMMs, weigh, put back, sum."""
    x_TD, experts = x_BSD.flatten(0, 1), moe.experts
    weights_TK, ids_TK, counts_E = moe.router(x_TD, moe.expert_bias)
    slots_N = ids_TK.flatten().argsort(stable=True)
    tokens_N = slots_N // ids_TK.size(1)
    rows_ND = x_TD[tokens_N]
    gate_NF = grouped_linear(rows_ND, experts.w1, counts_E)
    up_NF = grouped_linear(rows_ND, experts.w3, counts_E)
    out_ND = grouped_linear(F.silu(gate_NF) * up_NF, experts.w2, counts_E)
    out_ND = (out_ND * weights_TK.flatten()[slots_N].unsqueeze(1)).to(x_TD.dtype)
    unsorted_ND = out_ND[slots_N.argsort()]
    return unsorted_ND.unflatten(0, ids_TK.shape).sum(dim=1).view_as(x_BSD)


def _work_in_bf16(module: nn.Module) -> ComputeWeights:
    """The layout of weights that a run computes with."""
    how = {"root": module, "grad_dtype": torch.bfloat16}
    return ComputeWeights(module.modules(), torch.bfloat16, **how)


def _core(args: DeepSeekV3ModelArgs, options: argparse.Namespace) -> Iterator[Row]:
    """softmax(q kᵀ) v with MLA's channels, causal, against torch's own choice of kernel."""
    B, S, H = options.tokens // options.seq_len, options.seq_len, args.n_heads
    q, k = _random(B, S, H, args.qk_head_dim), _random(B, S, H, args.qk_head_dim)
    v = _random(B, S, H, args.v_head_dim)
    flops = B * H * S * S * (args.qk_head_dim + args.v_head_dim)

    def ours() -> Tensor:
        return attention(q, k, v, scale=args.softmax_scale)

    def torchs() -> Tensor:
        heads = [t.transpose(1, 2) for t in (q, k, v)]
        out = F.scaled_dot_product_attention(heads[0], heads[1], heads[2], is_causal=True)
        return out.transpose(1, 2)

    for name, function in (("core, torch's choice", torchs), ("core", ours)):
        yield _row(name, measure(function, [q, k, v], options.reps), flops=flops)


def _head(args: DeepSeekV3ModelArgs, options: argparse.Namespace) -> Iterator[Row]:
    """Linear + cross-entropy, forward and backward in one, against its three GEMMs alone."""
    T, D, V = options.tokens, args.dim, options.vocab
    x_TD = _random(T, D)
    weight_VD = _random(V, D, grad=False).mul_(0.02).requires_grad_()
    labels_T = torch.randint(V, (T,), device=x_TD.device)
    grad_TV = _random(min(T, 4096), V, grad=False)  # in blocks: 16k x 129,280 alone are 4 GiB

    def gemms() -> Tensor:
        with torch.no_grad():
            for x in x_TD.split(grad_TV.size(0)):
                grad = grad_TV[: x.size(0)]
                products = x @ weight_VD.t(), grad @ weight_VD, grad.t() @ x
                del products
        return x_TD

    def both() -> Tensor:
        # Gradients may be made in either pass, so only their sum compares.
        x_TD.grad = weight_VD.grad = None
        total = linear_cross_entropy(x_TD, weight_VD, labels_T)
        total.backward()
        return total.detach()

    for name, function in (("head, three GEMMs alone", gemms), ("head", both)):
        yield _row(name, measure(function, [], options.reps), flops=6 * T * D * V)


# ------------------------------------------------------------------------------- smaller kernels


def _router(args: DeepSeekV3ModelArgs, options: argparse.Namespace) -> Iterator[Row]:
    router = MoE(args.moe_args, dim=args.dim, hidden_dim=16).router
    router = router.to(_random(1).device, torch.bfloat16)
    nn.init.normal_(router.gate.weight, std=args.init_std)
    x_TD = _random(options.tokens, args.dim)
    bias_E = torch.zeros(args.moe_args.num_experts, device=x_TD.device)
    route = _maybe_compiled(lambda x: router(x, bias_E)[0], options)
    timed = measure(lambda: route(x_TD), [x_TD, router.gate.weight], options.reps)
    yield _row("router", timed, bytes_=x_TD.nbytes)


def _norm(args: DeepSeekV3ModelArgs, options: argparse.Namespace) -> Iterator[Row]:
    norm = nn.RMSNorm(args.dim, eps=args.norm_eps).to(_random(1).device, torch.bfloat16)
    x_TD = _random(options.tokens, args.dim)
    function = _maybe_compiled(norm.forward, options)
    timed = measure(lambda: function(x_TD), [x_TD, norm.weight], options.reps)
    yield _row("norm", timed, bytes_=2 * x_TD.nbytes)


def _rope(args: DeepSeekV3ModelArgs, options: argparse.Namespace) -> Iterator[Row]:
    B, S = options.tokens // options.seq_len, options.seq_len
    q_BSHC = _random(B, S, args.n_heads, args.qk_rope_head_dim)
    table = rope_table(args.qk_rope_head_dim, S, args.rope_theta).to(q_BSHC.device)
    function = _maybe_compiled(apply_rope, options)
    timed = measure(lambda: function(q_BSHC, table), [q_BSHC], options.reps)
    row = _row("rope", timed, bytes_=2 * q_BSHC.nbytes)
    if "backward_gb_s" in row:  # it reads one gradient and writes one
        row["backward_gb_s"] /= 2
    yield row


def _optimizer(args: DeepSeekV3ModelArgs, options: argparse.Namespace) -> Iterator[Row]:
    """AdamW with fp32 weights and states: 28 bytes a parameter (32 with a bf16 copy and gradient
    of 2 bytes each in place of a gradient of 4: 28 again).
    """
    rows = max(1, round(options.params * 1e9 / args.dim))
    device = _random(1).device
    layer = nn.Linear(args.dim, rows, bias=False, device=device)
    settings = asdict(Optimizer())
    working = _work_in_bf16(layer) if device.type == "cuda" else None
    if working is None:
        settings.pop("early_step_in_backward")
        optimizer = build_optimizer([layer], **settings)
    else:
        optimizer = build_optimizer([layer], compute_weights=working, **settings)
    grad_dtype = torch.float32 if working is None else torch.bfloat16
    layer.weight.grad = torch.randn_like(layer.weight).to(grad_dtype) * 1e-3

    def update() -> Tensor:
        optimizer.step()
        return layer.weight

    yield _row("optimizer", measure(update, [], options.reps), bytes_=28 * layer.weight.numel())


def table(rows: list[Row]) -> str:
    lines = [
        "widths  kernel                   forward ms (q1-q3)   backward ms  both together  "
        "rates  GiB kept/peak"
    ]
    for row in rows:
        times = [_ms(row.get(f"{way}_ms")) for way in ("forward", "backward")]
        rates = [
            f"{row[key]:,.1f} {unit}"
            for unit, ending in (("TF/s", "tflops"), ("GB/s", "gb_s"))
            for way in ("forward", "backward")
            if (key := f"{way}_{ending}") in row
        ]
        memory, together = "", "-"
        if row["peak_gib"] is not None:
            together = f"{row['together_ms']:.3f}"
            memory = f"{row['kept_gib']:.2f}/{row['peak_gib']:.2f}"
        lines.append(
            f"{row['widths']:7} {row['kernel']:24} {times[0]}  {times[1]}  "
            f"{together}  {' / '.join(rates)}  {memory}"
        )
    return "\n".join([*lines, str(rows[0]["machine"])])


def _ms(times: dict[str, float] | None) -> str:
    return "-" if times is None else f"{times['median']:.3f} ({times['q1']:.3f}-{times['q3']:.3f})"
