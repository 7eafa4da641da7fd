"""Degrees of parallelism: resolved and checked against the processes and the sequence length.

Ranks are laid out as (pp, dp_replicate, dp_shard, cp, tp), the last axis fastest; the experts of a
pipeline stage as (dp_replicate, the remaining ranks, ep, etp) over the same ranks.
"""

from math import isqrt, lcm, prod
from typing import NamedTuple

from torchtitan.config.job_config import Parallelism
from torchtitan.tools.errors import UserError


class Degrees(NamedTuple):
    """Resolved degrees: pp · dp_replicate · dp_shard · cp · tp = number of processes; etp is 1 or
    tp."""

    pp: int
    dp_replicate: int
    dp_shard: int
    cp: int
    tp: int
    ep: int
    etp: int


def resolve_degrees(parallelism: Parallelism, world_size: int) -> Degrees:
    """Resolve the degrees, data_parallel_shard_degree = -1 included. Raises `UserError`."""
    given = {
        "pipeline_parallel_degree": parallelism.pipeline_parallel_degree,
        "tensor_parallel_degree": parallelism.tensor_parallel_degree,
        "context_parallel_degree": parallelism.context_parallel_degree,
        "data_parallel_replicate_degree": parallelism.data_parallel_replicate_degree,
    }
    rest = _take_off(given, world_size)
    shard = parallelism.data_parallel_shard_degree
    if shard < 1 and shard != -1:
        raise UserError(
            f"parallelism.data_parallel_shard_degree = {shard} must be 1 or more, or -1 for all "
            "processes that the other degrees leave."
        )
    if shard not in (-1, rest):
        factors = given | {"data_parallel_shard_degree": shard}
        shown = [name for name, n in factors.items() if n > 1 or name.startswith("data")]
        product = prod(factors.values())
        raise UserError(
            f"parallelism.{' x '.join(f'{name} ({factors[name]})' for name in shown)} = {product}, "
            f"but the number of processes is {world_size}; set data_parallel_shard_degree to "
            f"{rest} (or to -1, which means the rest), or start {product} processes."
        )
    pp, tp, cp, replicate = given.values()
    ep, etp = parallelism.expert_parallel_degree, parallelism.expert_tensor_parallel_degree
    degrees = Degrees(pp, replicate, rest, cp, tp, ep, etp)
    _check_experts(degrees, world_size // pp)
    _check_node_size(parallelism.expert_parallel_node_size, degrees)
    return degrees


def nearest(value: int, legal: list[int]) -> str:
    """Name the legal numbers next to `value` on both sides: "4 or 8"."""
    below = [number for number in legal if number < value][-1:]
    above = [number for number in legal if number > value][:1]
    return " or ".join(str(number) for number in below + above)


def _take_off(given: dict[str, int], world_size: int) -> int:
    """Divide the processes by these degrees, one after the other; return the quotient."""
    rest, taken = world_size, []
    for name, degree in given.items():
        if degree < 1:
            raise UserError(f"parallelism.{name} = {degree} must be 1 or more.")
        if rest % degree:
            over = f" over {' x '.join(taken)}" if taken else ""
            raise UserError(
                f"parallelism.{name} = {degree} does not divide the number of processes{over} "
                f"({rest}); set it to {nearest(degree, divisors(rest))}."
            )
        rest //= degree
        taken += [f"{name} ({degree})"] if degree > 1 else []
    return rest


def divisors(number: int) -> list[int]:
    """List all divisors, in order; fast even for numbers of billions."""
    small = [n for n in range(1, isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def _check_experts(degrees: Degrees, stage: int) -> None:
    """Check that EP groups consist of ranks of one replica, or of whole replicas.

    stage: processes of a pipeline stage.
    """
    if degrees.etp not in (1, degrees.tp):
        raise UserError(
            f"parallelism.expert_tensor_parallel_degree = {degrees.etp} must be 1 or "
            f"parallelism.tensor_parallel_degree ({degrees.tp}); set it to "
            f"{' or '.join(str(n) for n in sorted({1, degrees.tp}))}."
        )
    replica = degrees.dp_shard * degrees.cp * degrees.tp // degrees.etp
    most = stage // degrees.etp
    legal = [n for n in divisors(most) if 0 in (replica % n, n % replica)]
    if degrees.ep in legal:
        return
    parts = {"data-parallel shard": degrees.dp_shard, "context-parallel": degrees.cp}
    if degrees.etp == 1:
        parts["tensor-parallel"] = degrees.tp
    shown = [name for name, n in parts.items() if n > 1] or ["data-parallel shard"]
    processes = "the number of processes"
    if degrees.pp > 1:
        processes += " of a pipeline stage"
    if degrees.etp > 1:
        processes += " over expert_tensor_parallel_degree"
    way_out = nearest(degrees.ep, legal)
    if most < degrees.ep and stage == replica:
        way_out += f", or start a multiple of {degrees.ep} processes"
    raise UserError(
        f"parallelism.expert_parallel_degree = {degrees.ep} must divide the "
        f"{' x '.join(shown)} degree ({replica}), or be a multiple of it that divides "
        f"{processes} ({most}); set it to {way_out}."
    )


def _check_node_size(size: int | None, degrees: Degrees) -> None:
    """Check that a node is a part of an EP group (ep · etp consecutive ranks) or several of them,
    and never ends between ranks that split one expert."""
    span = degrees.ep * degrees.etp

    def fits(n: int) -> bool:
        return n % span == 0 or (span % n == 0 and n % degrees.etp == 0)

    if size is None or (size >= 1 and fits(size)):
        return
    below = max(size, 0) // span * span
    legal = [n for n in [*divisors(span), below, below + span] if n and fits(n)]
    what = "parallelism.expert_parallel_degree"
    if degrees.etp > 1:
        what += " x expert_tensor_parallel_degree"
    raise UserError(
        f"parallelism.expert_parallel_node_size = {size} must divide {what} ({span}) or be a "
        f"multiple of it; set it to {nearest(size, sorted({*legal}))}."
    )


def check_sequence(key: str, seq_len: int, degrees: Degrees) -> None:
    """Raise `UserError` where a sequence can't be split evenly over TP and CP ranks.

    TP splits each rank's part of a sequence evenly; CP splits sequences into 2 x cp chunks, an
    early and a late one for each rank, so that causal attention costs all ranks the same.
    """
    tp, cp = degrees.tp, degrees.cp
    unit = lcm(2 * cp if cp > 1 else 1, cp * tp)
    if seq_len % unit == 0:
        return
    of = {"context_parallel_degree": cp, "tensor_parallel_degree": tp}
    names = [f"parallelism.{name} ({n})" for name, n in of.items() if n > 1]
    split = "split" if len(names) > 1 else "splits"
    below = seq_len // unit * unit
    legal = nearest(seq_len, [n for n in (below, below + unit) if n])
    raise UserError(
        f"{key} = {seq_len} must be a multiple of {unit}, so that {' and '.join(names)} "
        f"{split} it evenly; set it to {legal}."
    )
