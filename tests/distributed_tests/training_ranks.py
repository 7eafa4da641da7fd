"""Training on the ranks of a pool, and the plain single process that it must equal."""

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from tests.reference.training import train_plainly
from torchtitan.config import ConfigManager, JobConfig
from torchtitan.data.tokenizer import load_tokenizer
from torchtitan.distributed.utils import sum_over_ranks
from torchtitan.models.deepseek_v3 import DeepSeekV3Model, deepseekv3_args
from torchtitan.ops.cross_entropy import IGNORE_INDEX
from torchtitan.tools.utils import device_type
from torchtitan.trainer import Trainer
from torchtitan.trainer.forward_backward import StepCounts
from torchtitan.trainer.step_log import Interval

# The second step shows all that the first has updated; after it the state is compared.
STEPS, SEQUENCES, SEQ_LEN = 2, 8, 16
EOS = load_tokenizer(JobConfig().model.hf_assets_path).eos_id
LR, MAX_NORM, WEIGHT_DECAY = 2e-3, 0.5, 0.1
FP32 = "--training.mixed_precision_param=float32"
# Everything once: dense and MoE layers, compressed queries, groups, sigmoid with bias.
MODEL = {
    "n_layers": 2,
    "n_heads": 4,
    "dim": 32,
    "inter_dim": 48,
    "moe_inter_dim": 16,
    "vocab_size": 2048,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,  # 16 is the least that flex attention takes on a GPU
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "init_std": 0.1,
}


def config_of(*options: str) -> JobConfig:
    model = [f"--model.args.{name}={value}" for name, value in MODEL.items()]
    flavor = "--model.flavor=debugmodel_node_limited"
    return ConfigManager().parse_args([*training_options(), flavor, *model, *options])


def training_options() -> list[str]:
    """Options of all models here."""
    return [
        f"--training.seq_len={SEQ_LEN}",
        f"--training.steps={STEPS}",
        f"--training.global_batch_size={SEQUENCES}",
        f"--training.max_norm={MAX_NORM}",
        f"--optimizer.lr={LR}",
        f"--optimizer.weight_decay={WEIGHT_DECAY}",
        "--lr_scheduler.warmup_steps=0",
        "--lr_scheduler.min_lr_factor=1",
        "--debug.seed=7",
    ]


def global_batches() -> list[tuple[Tensor, Tensor]]:
    """Random text of documents of 5 tokens on average, whose sequences end in paddings of very
    different lengths."""
    generator = torch.Generator().manual_seed(5)
    steps = []
    for step in range(STEPS):
        tokens = torch.randint(0, 2048, (SEQUENCES, SEQ_LEN + 1), generator=generator)
        tokens[torch.rand(tokens.shape, generator=generator) < 0.2] = EOS
        labels = tokens[:, 1:].clone()
        for sequence in range(SEQUENCES):
            labels[sequence, SEQ_LEN - (sequence * (step + 1)) % SEQ_LEN :] = IGNORE_INDEX
        steps.append((tokens[:, :-1].contiguous(), labels))
    return steps


def train_on_this_rank(options: list[str], dump_folder: str, gradients: bool = False) -> dict:
    """Run the trainer on this rank's share of the global batches.

    gradients: return those of the first step, too, before clipping.
    """
    return train_with(config_of(*options, f"--job.dump_folder={dump_folder}"), gradients)


def train_with(config: JobConfig, gradients: bool = False) -> dict:
    trainer, first_gradients = Trainer(config), {}
    size = trainer.config.training.local_batch_size
    share = SEQUENCES // trainer.dims.dp_degree
    first = trainer.dims.dp_rank(trainer.rank) * share
    mine = [
        ({"input": tokens[i : i + size]}, labels[i : i + size])
        for tokens, labels in global_batches()
        for i in range(first, first + share, size)
    ]
    batches, results = iter(mine), []
    for _ in range(STEPS):
        trainer.step += 1
        results.append(trainer.train_step(batches, Interval()))
        if gradients and not first_gradients:
            first_gradients = gradients_of(trainer, results[0].grad_norm)
    state = {name: whole(tensor) for name, tensor in trainer.model.state_dict().items()}
    state = of_all_stages(state, trainer)
    trainer.close()
    return {
        "losses": [result.loss for result in results],
        "norms": [result.grad_norm for result in results],
        "side_losses": [result.side_losses for result in results],
        "state": state,
        "gradients": first_gradients,
    }


def gradients_of(trainer: Trainer, norm: float) -> dict[str, Tensor]:
    """Gradients of the step that has just ended, before clipping; whole tensors on every rank.

    norm: of all gradients.
    """
    clipped = min(1, MAX_NORM / norm)
    found = {n: whole(p.grad) / clipped for n, p in trainer.model.named_parameters()}
    return of_all_stages(found, trainer)


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()).cpu()


def of_all_stages(tensors: dict[str, Tensor], trainer: Trainer) -> dict[str, Tensor]:
    """With those of the other pipeline stages; no tensor lies on two of them."""
    if trainer.dims.pp == 1:
        return tensors
    by_stage: list[dict] = [{}] * trainer.dims.pp
    dist.all_gather_object(by_stage, tensors, group=trainer.dims.mesh["pp"].get_group())
    merged = {name: tensor for stage in by_stage for name, tensor in stage.items()}
    assert len(merged) == sum(map(len, by_stage))
    return merged


def assert_trained_alike(result: dict, expected: dict) -> None:
    """Losses, norms and every tensor after the last step, the tensors by their norm: AdamW divides
    by |gradient|, so an element whose gradient is next to nothing moves by its rounding error."""
    assert result["losses"] == pytest.approx(expected["losses"], rel=1e-6)
    assert result["norms"] == pytest.approx(expected["norms"], rel=1e-5)
    assert result["state"].keys() == expected["state"].keys()
    for name, tensor in expected["state"].items():
        error = (result["state"][name] - tensor).norm().item()
        assert error <= 1e-5 * tensor.norm().item(), f"{name} is off by {error:.1e}"


def counts_of(labels: Tensor | int) -> StepCounts:
    """Counts of a step of text: each token has a label of weight 1."""
    return StepCounts(*torch.as_tensor(labels).expand(3))


def evaluated_and_trained(options: list[str], dump_folder: str) -> list[float]:
    """Losses of a step, of the second batch without gradients, and of the step with it."""
    trainer = Trainer(config_of(*options, f"--job.dump_folder={dump_folder}"))
    share = SEQUENCES // trainer.dims.dp_degree
    first = trainer.dims.dp_rank(trainer.rank) * share
    mine = slice(first, first + share)
    batches = [({"input": tokens[mine]}, labels[mine]) for tokens, labels in global_batches()]
    losses = [_step(trainer, batches[0])]
    trainer.model.eval()
    with torch.no_grad():
        loss, count, _ = map(sum_over_ranks, trainer.loss_sum(batches[1]))
    trainer.model.train()
    losses += [(loss / count).item(), _step(trainer, batches[1])]
    trainer.close()
    return losses


def _step(trainer: Trainer, batch: tuple) -> float:
    trainer.step += 1
    return trainer.train_step(iter([batch]), Interval()).loss


@pytest.fixture(scope="module")
def one_process() -> dict:
    return train_alone()


@pytest.fixture(scope="module")
def one_process_with_documents() -> dict:
    """Attention ends where a document does."""
    return train_alone(mask_of=document_mask)


def train_alone(prepare: Callable = lambda model: None, **options) -> dict:
    args = deepseekv3_args["debugmodel_node_limited"].for_run(overrides=MODEL, seq_len=SEQ_LEN)
    torch.manual_seed(7)
    with torch.device(device_type()):  # a GPU draws other weights than a CPU
        model = DeepSeekV3Model(args)
    model.init_weights()
    prepare(model)
    batches = [
        (tokens.to(device_type()), labels.to(device_type())) for tokens, labels in global_batches()
    ]
    losses, norms = train_plainly(
        model, batches, lr=LR, max_norm=MAX_NORM, weight_decay=WEIGHT_DECAY, **options
    )
    return {"losses": losses, "norms": norms, "state": model.cpu().state_dict()}


def document_mask(tokens: Tensor) -> Tensor:
    """Token by token: back to the last end of a document before it."""
    mask = torch.zeros(len(tokens), 1, SEQ_LEN, SEQ_LEN, dtype=torch.bool)
    for sequence, row in enumerate(tokens.tolist()):
        for query in range(SEQ_LEN):
            for key in range(query, -1, -1):
                if row[key] == EOS and key < query:
                    break
                mask[sequence, 0, query, key] = True
    return mask.to(tokens.device)
