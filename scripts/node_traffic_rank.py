"""One rank of scripts/measure_node_traffic.py: steps of an MoE layer, and its node's counters.

`python -m scripts.node_traffic_rank SETTINGS RANK`, with the JSON of `Settings`; writes
`rank<RANK>.json` into its folder: bytes and seconds of every step, by routing and dispatcher.

Letters as in models/moe/moe.py: T tokens, D model dim, K top-k.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import cast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from scripts import entry

# isort: split
import torch
import torch.distributed as dist
from torch import Tensor

from tests.reference.plain_all_to_all import PlainAllToAllDispatcher
from torchtitan.distributed.groups import world_group
from torchtitan.distributed.token_dispatch import AllToAllDispatcher, NodeLimitedDispatcher
from torchtitan.models.moe import GroupedExperts, MoE, MoEArgs
from torchtitan.models.moe.dispatcher import TokenDispatcher


def _own_group(groups: list[list[int]], index: int) -> dist.ProcessGroup:
    """Make all groups, as every rank must; return this rank's own, at `index`."""
    made = [dist.new_group(ranks) for ranks in groups]
    return cast(dist.ProcessGroup, made[index])  # others' groups are plain numbers


DISPATCHERS = ("plain", "all_to_all", "node_limited")


@dataclass(frozen=True)
class Settings:
    """Settings of the measurement.

    routings: (num_expert_groups, num_limited_groups), (0, 0) = no groups.
    tokens: of each rank.
    link: name of the interface that leaves a node.
    store: address of the rendezvous.
    """

    nodes: int
    ranks_per_node: int
    num_experts: int
    top_k: int
    routings: list[tuple[int, int]]
    dim: int
    hidden_dim: int
    tokens: int
    steps: int
    warmup_steps: int
    seconds: float
    link: str
    store: str
    folder: str

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks_per_node


class Rank:
    """This rank's process groups, and the counters of its node."""

    def __init__(self, settings: Settings, rank: int):
        self.settings, self.rank = settings, rank
        self.node = rank // settings.ranks_per_node
        dist.init_process_group(
            "gloo",
            init_method=settings.store,
            rank=rank,
            world_size=settings.world_size,
            timeout=timedelta(seconds=settings.seconds),
        )
        grid = torch.arange(settings.world_size).view(settings.nodes, settings.ranks_per_node)
        self.within = _own_group(grid.tolist(), self.node)
        self.between = _own_group(grid.T.tolist(), rank % settings.ranks_per_node)

    def sent_bytes(self) -> tuple[int, int]:
        """Read the kernel's counters of bytes that this node sent to other nodes, and inside."""
        link, inside = (
            int(Path(f"/sys/class/net/{name}/statistics/tx_bytes").read_text())
            for name in (self.settings.link, "lo")
        )
        return link, inside

    def measure(self, step: Callable[[], object]) -> dict[str, float]:
        """Run `step` on all ranks at once; measure the bytes that the node sent, the seconds until
        the last rank was done, and this rank's processor seconds (of all its threads).
        """
        dist.barrier()
        before = self.sent_bytes()
        dist.barrier()  # no rank begins before all have read the counters
        start, cpu_start = time.perf_counter(), time.process_time()
        step()
        cpu = time.process_time() - cpu_start
        dist.barrier()
        seconds = time.perf_counter() - start
        link, inside = (a - b for a, b in zip(self.sent_bytes(), before, strict=True))
        return {"link": link, "inside": inside, "seconds": seconds, "cpu": cpu}

    def probe(self, megabytes: int = 8) -> dict:
        """Measure a broadcast inside the node, which must not use the link."""
        payload = torch.zeros(megabytes * 2**20, dtype=torch.uint8)
        first = self.node * self.settings.ranks_per_node
        measured = self.measure(lambda: dist.broadcast(payload, first, group=self.within))
        return measured | {"payload": payload.numel() * (self.settings.ranks_per_node - 1)}

    def dispatcher(self, name: str) -> TokenDispatcher:
        s = self.settings
        if name == "plain":
            plain = PlainAllToAllDispatcher(world_group(), s.num_experts, s.ranks_per_node)
            return cast(TokenDispatcher, plain)  # lacks shared experts, which no layer here has
        if name == "all_to_all":
            return AllToAllDispatcher(world_group(), s.num_experts, s.ranks_per_node)
        return NodeLimitedDispatcher(self.between, self.within, s.num_experts)

    def layer(self, groups: int, limited: int) -> MoE:
        """Make a layer with this rank's experts; routers are equal on all ranks."""
        s = self.settings
        args = MoEArgs(
            num_experts=s.num_experts,
            num_shared_experts=0,
            route_norm=True,
            score_before_experts=False,
            top_k=s.top_k,
            num_expert_groups=groups or None,
            num_limited_groups=limited or None,
            load_balance_coeff=None,
        )
        torch.manual_seed(0)
        moe = MoE(args, s.dim, s.hidden_dim)
        moe.experts = GroupedExperts(
            dim=s.dim, hidden_dim=s.hidden_dim, num_experts=s.num_experts // s.world_size
        )
        # Logits of unit variance: every expert is chosen about as often.
        moe.init_weights(init_std=s.dim**-0.5)
        return moe

    def activations(self, step: int) -> Tensor:
        torch.manual_seed(1000 * step + self.rank)
        return torch.randn(1, self.settings.tokens, self.settings.dim, requires_grad=True)

    def run_routing(self, groups: int, limited: int) -> dict[str, list[dict]]:
        """Measure all steps, by dispatcher. The dispatchers alternate at every step, so that other
        work on the machine affects them alike.
        """
        moe = self.layer(groups, limited)
        dispatchers = {name: self.dispatcher(name) for name in DISPATCHERS}
        measured = {name: [] for name in DISPATCHERS}
        for step in range(self.settings.warmup_steps + self.settings.steps):
            x = self.activations(step)
            for name, moe.dispatcher in dispatchers.items():
                measured[name].append(self.run_step(moe, x, name))
        return {name: steps[self.settings.warmup_steps :] for name, steps in measured.items()}

    def run_step(self, moe: MoE, x: Tensor, name: str) -> dict:
        loads = []

        def forward_and_backward() -> None:
            out, load = moe(x, return_load=True)
            loads.append(load)
            out.backward(torch.ones_like(out))

        numbers = self.measure(forward_and_backward)
        return numbers | {
            "meter": loads[0].traffic.tolist(),
            "counted_rows": self.rows_to_other_nodes(moe, x, name),
        }

    @torch.no_grad()
    def rows_to_other_nodes(self, moe: MoE, x: Tensor, name: str) -> int:
        """Count rows from the router's choice alone: copies, or distinct (token, rank) or (token,
        node) pairs."""
        s = self.settings
        ids_TK = moe.router(x.flatten(0, 1))[1]
        if name == "plain":
            return int((ids_TK * s.nodes // s.num_experts != self.node).sum())
        places = s.nodes if name == "node_limited" else s.world_size
        met = torch.zeros(s.tokens, places, dtype=torch.bool)
        met.scatter_(1, ids_TK * places // s.num_experts, True)
        remote = torch.arange(places) * s.nodes // places != self.node
        return int(met[:, remote].sum())


def main(settings: str, rank: str) -> None:
    torch.set_num_threads(1)
    me = Rank(Settings(**json.loads(settings)), int(rank))
    results = {"node": me.node, "torch": torch.__version__, "probe": me.probe(), "cases": []}
    for groups, limited in me.settings.routings:
        for name, steps in me.run_routing(groups, limited).items():
            results["cases"].append([groups, limited, name, steps])
    Path(me.settings.folder, f"rank{rank}.json").write_text(json.dumps(results))
    dist.barrier()  # the store is in rank 0, which must not exit first
    dist.destroy_process_group()


if __name__ == "__main__":
    entry.run(main, *sys.argv[1:])
