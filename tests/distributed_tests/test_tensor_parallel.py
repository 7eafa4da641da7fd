"""What tensor and context parallelism promise beside equal numbers: size, balance, what travels."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.distributed_tests.test_layouts import BY_HEADS, layout
from tests.distributed_tests.training_ranks import (
    MODEL,
    SEQ_LEN,
    SEQUENCES,
    config_of,
    counts_of,
    global_batches,
)
from torchtitan.components.loss import cross_entropy_sum
from torchtitan.config import JobConfig
from torchtitan.distributed.context_parallel import positions_of
from torchtitan.distributed.tensor_parallel import vocab_parallel_cross_entropy_sum
from torchtitan.ops.cross_entropy import IGNORE_INDEX
from torchtitan.trainer import Trainer


class Watch(TorchDispatchMode):
    """Sizes of all results, and of what the collectives make, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()
        self.gathered: list[tuple[int, ...]] = []
        self.exchanged: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for result in out if isinstance(out, list | tuple) else (out,):
            if isinstance(result, Tensor):
                self.shapes.add(tuple(result.shape))
                if "c10d" in str(func) and "all_gather" in str(func):
                    self.gathered.append(tuple(args[0].shape))
                if "all_to_all" in str(func):
                    self.exchanged.append(tuple(args[0].shape))
        return out


def watch_a_step(options: list[str], dump_folder: str) -> tuple[set, list, list]:
    return watched(config_of(*options, f"--job.dump_folder={dump_folder}"))


def watched(config: JobConfig) -> tuple[set, list, list]:
    trainer = Trainer(config)
    tokens, labels = global_batches()[0]
    with Watch() as watch:
        trainer.forward_backward(({"input": tokens}, labels), counts_of(1))
    trainer.close()
    return watch.shapes, watch.gathered, watch.exchanged


without_flex = pytest.mark.skipif(
    torch.cuda.is_available(),
    reason="on GPUs context parallelism takes flex attention, which `Watch` can't follow",
)


@pytest.mark.parametrize("whole", [False, True])
def test_no_rank_ever_holds_all_logits(ranks, tmp_path, whole):
    vocabulary, tokens = MODEL["vocab_size"], SEQUENCES * SEQ_LEN
    option = ["--parallelism.disable_loss_parallel"] if whole else []
    for shapes, *_ in ranks(2).run(watch_a_step, [*layout(2, tp=2)[1], *option], str(tmp_path)):
        of_all = [s for s in shapes if torch.Size(s).numel() >= tokens * vocabulary]
        # … which the test would see, for with whole logits it does.
        assert bool(of_all) == whole, of_all


@without_flex
def test_context_parallelism_gathers_the_compressed_form_only(ranks, tmp_path):
    channels = MODEL["kv_lora_rank"] + MODEL["qk_rope_head_dim"]
    half = (SEQUENCES, SEQ_LEN // 2, channels)
    for _, gathered, exchanged in ranks(2).run(watch_a_step, layout(2, cp=2)[1], str(tmp_path)):
        of_tokens = [shape for shape in gathered if shape[:2] == half[:2]]
        assert of_tokens == [half] * MODEL["n_layers"]
        assert exchanged == []


def test_by_heads_nothing_is_gathered(ranks, tmp_path):
    options = layout(2, BY_HEADS, cp=2)[1]
    for _, gathered, exchanged in ranks(2).run(watch_a_step, options, str(tmp_path)):
        assert not [shape for shape in gathered if shape[:2] == (SEQUENCES, SEQ_LEN // 2)]
        # Queries, keys, values and outputs, and the gradients of each.
        assert len(exchanged) == 2 * 4 * MODEL["n_layers"]


@pytest.mark.parametrize("degree", [1, 2, 4, 8])
def test_each_rank_has_the_same_causal_work_and_every_position_one_rank(degree):
    positions = [positions_of(rank, degree, 64) for rank in range(degree)]
    work = [int((p + 1).sum()) for p in positions]
    assert len(set(work)) == 1, work
    assert torch.cat(positions).sort().values.tolist() == list(range(64))
    assert all(p.diff().gt(0).all() for p in positions), "in order, as masks and RoPE need"


def split_loss(dtype: torch.dtype, scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss and gradient of logits split over the ranks, and those of one process."""
    generator = torch.Generator().manual_seed(3)
    logits = (scale * torch.randn(2, 5, 24, generator=generator)).to(dtype).requires_grad_()
    labels = torch.randint(0, 24, (2, 5), generator=generator)
    labels[0, 3:] = IGNORE_INDEX
    expected = cross_entropy_sum(logits, labels)
    (expected_grad,) = torch.autograd.grad(expected, logits)
    size, rank = dist.get_world_size(), dist.get_rank()
    mine = logits.detach().chunk(size, dim=-1)[rank].clone().requires_grad_()
    loss = vocab_parallel_cross_entropy_sum(
        mine, labels, group=dist.group.WORLD, ignore_index=IGNORE_INDEX
    )
    (grad,) = torch.autograd.grad(loss, mine)
    expected_grad = expected_grad.chunk(size, dim=-1)[rank]
    return loss.detach(), expected.detach(), grad, expected_grad


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(torch.float64, 1), (torch.float32, 1), (torch.float32, 1e3), (torch.bfloat16, 1)],
)
def test_the_loss_of_split_logits_is_that_of_whole_ones(ranks, dtype, scale):
    """Logits of a thousand overflow without the maximum; bf16 ones are summed in fp32."""
    for loss, expected, grad, expected_grad in ranks(4).run(split_loss, dtype, scale):
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
        torch.testing.assert_close(grad, expected_grad)
