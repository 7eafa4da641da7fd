"""The balance loss over the global batch is the same on every layout and however a step is cut into
micro-batches: its loads are those of the whole step before."""

import pytest
import torch
from torch import Tensor, nn

from tests.distributed_tests.test_layouts import COMPILED, layout, nodes_of, pipeline
from tests.distributed_tests.training_ranks import (
    assert_trained_alike,
    one_process,  # noqa: F401 (a fixture)
    train_alone,
    train_on_this_rank,
)
from torchtitan.models.deepseek_v3 import DeepSeekV3Model

# Large enough that a loss left out would show in the third digit.
ALPHA = 2.0
GLOBAL = f"--model.args.moe_args.global_balance_coeff={ALPHA}"


class PlainLoss:
    """E Σ_i f_i P_i of each layer of a model that takes a step in one pass, f from the choices of
    the step before; in the first step f = 1."""

    def __init__(self) -> None:
        self.before: list[list[list[int]]] = []  # by layer, by token
        self.seen: list[tuple[Tensor, list[list[int]]]] = []

    def watch(self, model: DeepSeekV3Model) -> None:
        for moe in model.moe_layers().values():
            moe.router.register_forward_hook(self._keep)

    def _keep(self, router: nn.Module, args: tuple, out: tuple) -> None:
        self.seen.append(((args[0] @ router.gate.weight.T).sigmoid(), out[1].tolist()))

    def __call__(self, mask_BS: Tensor) -> Tensor:
        real = mask_BS.flatten().tolist()
        total, chosen = torch.zeros((), device=mask_BS.device), []
        for layer, (scores_TE, ids) in enumerate(self.seen):
            chosen.append([each for each, counts in zip(ids, real, strict=True) if counts])
            P_E = (scores_TE / scores_TE.sum(dim=1, keepdim=True))[mask_BS.flatten()].mean(dim=0)
            total = total + ALPHA * sum(self.f(layer, i) * P for i, P in enumerate(P_E))
        self.before, self.seen = chosen, []
        return total

    def f(self, layer: int, expert: int) -> float:
        if not self.before:
            return 1.0
        ids = [i for each in self.before[layer] for i in each]
        return 8 * ids.count(expert) / len(ids)


@pytest.fixture(scope="module")
def plain() -> dict:
    loss = PlainLoss()
    return train_alone(side_loss=loss, prepare=loss.watch)


LAYOUTS = {
    "one process": layout(1),
    "one process, a sequence at a time": layout(1, accumulation=8),
    "FSDP 2, recomputed, accumulation": layout(2, ac="full", accumulation=2),
    # Tokens travel, so the layers are compiled in pieces, inside of what is recomputed.
    "EP 2, compiled, recomputed": layout(2, *COMPILED, ac="full", ep=2),
    "PP 2, recomputed": layout(2, *pipeline("1F1B"), ac="full", pp=2),
    "PP 2, split backward": layout(2, *pipeline("DualPipeV", 4), pp=2),
    "CP 2 x TP 2, accumulation": layout(4, cp=2, tp=2, accumulation=4),
    "EP 4, nodes of 2": layout(4, nodes_of(2), ep=4),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_trains_like_a_plain_process(ranks, plain, name, tmp_path):
    world_size, options = LAYOUTS[name]
    for result in ranks(world_size).run(train_on_this_rank, [GLOBAL, *options], str(tmp_path)):
        assert_trained_alike(result, plain)


def test_the_loss_moves_the_gradients_from_the_second_step_on(plain, one_process):  # noqa: F811
    """Otherwise the comparisons above would say nothing about it."""
    assert plain["norms"][0] == pytest.approx(one_process["norms"][0], rel=1e-6)
    assert plain["norms"][1] != pytest.approx(one_process["norms"][1], rel=1e-3)
