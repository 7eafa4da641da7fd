"""The forward and backward pass over a micro-batch, in any layout: of one model, or of the parts of
a pipeline; over whole sequences, or over this rank's part of each.

Shapes come with the batch; nothing here is made for one length of sequences.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from torchtitan.components.cuda_graph import GraphedPass
from torchtitan.components.loss import build_loss
from torchtitan.components.optimizer import replay_steps
from torchtitan.components.optimizer.compute_weights import ComputeWeights
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.context_parallel import positions_of_this_rank
from torchtitan.distributed.pipeline_parallel import StepInputs
from torchtitan.distributed.pipeline_plan import PipelinePlan
from torchtitan.distributed.utils import gather_from_ranks
from torchtitan.ops.attention import Documents, number_documents, starts_of, with_places
from torchtitan.ops.cross_entropy import IGNORE_INDEX, cross_entropy_sum, weights_by_document
from torchtitan.ops.cudnn_documents import places_for
from torchtitan.protocols.model import BaseModel
from torchtitan.tools.logging import logger
from torchtitan.tools.utils import to_device
from torchtitan.trainer.build import build_pipeline

Batch = tuple[dict[str, Tensor], Tensor]


class StepCounts(NamedTuple):
    """Counts of an optimizer step over all ranks and micro-batches, each a scalar.

    labels: labels that count in the loss.
    tokens: tokens that are no padding; conversations have many without a label.
    weight: sum of the labels' weights, by which the loss is divided.
    """

    labels: Tensor
    tokens: Tensor
    weight: Tensor


class ForwardBackward:
    """Forward and backward passes of one model in the layout of this run.

    eos_id: token that ends a document of text.
    parts, plan: from `build_model`; only with pipeline parallelism.
    """

    def __init__(
        self,
        config: JobConfig,
        model: BaseModel,
        dims: ParallelDims,
        device: torch.device,
        *,
        eos_id: int | None,
        parts: list[BaseModel],
        plan: PipelinePlan | None,
    ) -> None:
        self.model, self.dims, self.device, self.eos_id = model, dims, device, eos_id
        parallelism, compiler = config.parallelism, config.compile
        self._gathers_keys = parallelism.context_parallel_rotate_method == "allgather"
        # The model's own loss holds no logits; a CPU has the memory, and one GEMM is its fastest.
        # Split logits, pipelines, multi-token prediction and weights have losses of their own.
        self._by_document = config.chat.loss_weight == "conversation"
        self._model_has_loss = (
            model.computes_loss
            and device.type != "cpu"
            and dims.tp == 1
            and plan is None
            and not self._by_document
            and not model.model_args.has_side_losses
        )
        self.loss_fn = build_loss(dims, disable_loss_parallel=parallelism.disable_loss_parallel)
        if compiler.enable and "loss" in compiler.components:
            self.loss_fn = torch.compile(self.loss_fn, backend=compiler.backend)
        self.pipeline = None
        if plan is not None:
            how = {"device": device, "loss_fn": self.loss_fn, "masks_of": self.masks}
            args = model.model_args
            self.pipeline = build_pipeline(config, args, dims, parts, plan, **how)
        self._positions: dict[int, Tensor | None] = {}
        self._causal_masks: dict[int, Any] = {}

    def count(self, batch: Batch) -> Tensor:
        """Count what the fields of `StepCounts` count in a micro-batch: (3,) int64."""
        documents = self.documents(batch)
        labels = weight = (batch[1] != IGNORE_INDEX).sum()
        if self._by_document:  # each with a label weighs 1
            weight = weights_by_document(batch[1], documents).double().sum().round().long()
        return torch.stack((labels, (documents >= 0).sum(), weight))

    def forward_backward(self, batch: Batch, counts: StepCounts) -> Tensor:
        """Add to the gradients; return this micro-batch's part of the step's loss."""
        self.model.set_tokens_in_step(counts.tokens, counts.weight)
        inputs = self.inputs(batch)
        if self.pipeline is not None:
            return self.pipeline.step(inputs, counts.weight)
        return self.backward(inputs, self.masks(self.documents(batch)), counts.weight)

    def loss_sum(self, batch: Batch, *, hits: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Sum the losses of this rank's valid labels of a batch.

        Returns the sum, the number of labels, and the number of those that are the likeliest token:
        NaN unless asked for, and where no rank has whole logits (pipelines, tensor parallelism).

        hits: count them; the logits of the batch are held.
        """
        inputs = self.inputs(batch)._replace(weights=None)
        valid_BS = inputs.labels != IGNORE_INDEX
        unknown = torch.full((), torch.nan, device=self.device)
        if self.pipeline is not None:
            return self.pipeline.evaluate(inputs), valid_BS.sum(), unknown
        masks = self.masks(self.documents(batch))
        if not hits or self.dims.tp > 1:
            return self._loss_sum(inputs, masks), valid_BS.sum(), unknown
        logits = self._forward(inputs, masks)
        found_BS = valid_BS & (logits.argmax(dim=-1) == inputs.labels)
        return cross_entropy_sum(logits, inputs.labels), valid_BS.sum(), found_BS.sum()

    def documents(self, batch: Batch) -> Tensor:
        """Number of each token's document, (B, S) int64; −1 = padding.

        Conversations bring theirs; a document of text ends with `eos_id`.
        """
        if "documents" in batch[0]:
            return batch[0]["documents"]
        documents = number_documents(batch[0]["input"], self.eos_id)
        return documents.masked_fill(batch[1] == IGNORE_INDEX, -1)

    def inputs(self, batch: Batch) -> StepInputs:
        """Move a batch to the device; with context parallelism, cut it to this rank's part."""
        on_host = batch[0]["input"], batch[1], self.documents(batch)
        tokens, labels, documents = (to_device(each, self.device) for each in on_host)
        here, token_mask, positions = self._positions_in(tokens), documents >= 0, None
        weights = weights_by_document(labels, documents) if self._by_document else None
        extra = self.model.extra_inputs(tokens, labels, documents, here, weights)
        if here is not None:
            tokens, labels, token_mask = tokens[:, here], labels[:, here], token_mask[:, here]
            weights = None if weights is None else weights[:, here]
            positions = here.unsqueeze(0)
        return StepInputs(tokens, labels, documents, positions, token_mask, extra, weights)

    def masks(self, documents: Tensor) -> Any:
        """Make attention masks of whole sequences; with gathered keys, for this rank's positions.

        Causal ones, which differ by length only, are made once: the host waits for the device.
        """
        queries = self._positions_in(documents) if self._gathers_keys else None
        if self.model.model_args.keeps_documents_apart:
            return self.model.get_attention_masks(documents, queries, self.device)
        seq_len = documents.size(1)
        if seq_len not in self._causal_masks:
            made = self.model.get_attention_masks(documents, queries, self.device)
            self._causal_masks[seq_len] = made
        return self._causal_masks[seq_len]

    def backward(self, inputs: StepInputs, masks: Any, divisor: Tensor) -> Tensor:
        """Run the backward pass, too. Returns the detached loss."""
        loss = self._loss_sum(inputs, masks) / divisor
        loss.backward()
        return loss.detach()

    def _positions_in(self, tokens_BS: Tensor) -> Tensor | None:
        """Positions of this rank's tokens in the whole sequences; None without CP."""
        seq_len = tokens_BS.size(1)
        if seq_len not in self._positions:
            self._positions[seq_len] = positions_of_this_rank(self.dims, seq_len, self.device)
        return self._positions[seq_len]

    def _forward(self, inputs: StepInputs, masks: Any, **labels: Tensor) -> Tensor:
        return self.model(
            inputs.tokens,
            attention_masks=masks,
            positions=inputs.positions,
            token_mask=inputs.token_mask,
            **labels,
            **inputs.extra,
        )

    def _loss_sum(self, inputs: StepInputs, masks: Any) -> Tensor:
        labels = {"labels": inputs.labels} if self._model_has_loss else {}
        out = self._forward(inputs, masks, **labels)
        # The logits, the largest activation, are freed as soon as their gradient is computed.
        if self._model_has_loss:
            return out
        weights = () if inputs.weights is None else (inputs.weights,)
        return self.loss_fn(out, inputs.labels, *weights)


class GraphedStep:
    """The passes of a step, replayed as a CUDA graph of one forward and backward pass.

    Of a step with one micro-batch clipping is part of the graph, whose replay overwrites the
    gradients; with several, each replay adds to them.

    Packed documents have a fixed number of places in a graph, and where they lie is copied to it as
    tokens are. Batches with more documents have it recorded anew, on all ranks at once.

    clip: clips the gradients and returns their norm.
    """

    def __init__(
        self,
        passes: ForwardBackward,
        optimizer: Optimizer,
        compute_weights: ComputeWeights | None,
        clip: Callable[[], Tensor],
    ) -> None:
        self._passes, self._optimizer, self._clip = passes, optimizer, clip
        self._compute_weights = compute_weights
        self._places = 0
        self.forget()

    def forget(self) -> None:
        """Drop the graphs, to record them anew: their kernels no longer fit."""
        self._positions: Tensor | None = None
        self._mask: Any = None
        self._one_pass = GraphedPass(self._run)
        self._whole_step = GraphedPass(self._run_and_clip)
        replay_steps(self._optimizer, grads_stay=False)

    def __call__(
        self, micro_batches: Sequence[Batch], labels_in_step: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Run the step; return loss and gradient norm."""
        weights, one_pass = self._compute_weights, len(micro_batches) == 1
        if weights is not None:
            weights.sums_replicas = one_pass
            if one_pass:
                weights.gather_in_pass()  # each step needs it, so it is recorded
            else:
                weights.gather()
        starts = self._starts(micro_batches)
        inputs = zip(micro_batches, starts, strict=True)
        if one_pass:
            if not self._whole_step.holds_grads:
                self._optimizer.zero_grad()
            loss, norm = self._whole_step(*self._inputs(*next(inputs)), labels_in_step)
            grads_stay = self._whole_step.holds_grads
        else:
            # In place: the graph adds to gradients that are there when it is recorded.
            self._optimizer.zero_grad(set_to_none=False)
            losses = [self._one_pass(*self._inputs(*each), labels_in_step)[0] for each in inputs]
            if weights is not None:
                weights.sum_over_replicas()
            loss, norm = torch.stack(losses).sum(), self._clip()
            grads_stay = self._one_pass.holds_grads
        replay_steps(self._optimizer, grads_stay=grads_stay)
        return loss, norm

    def _starts(self, micro_batches: Sequence[Batch]) -> list[Tensor | None]:
        """Return where the documents of each batch lie, in equally many places; None = causal."""
        passes = self._passes
        if not passes.model.model_args.keeps_documents_apart:
            return [None] * len(micro_batches)
        found = []
        for batch in micro_batches:
            documents = passes.documents(batch)
            found.append(starts_of(passes.masks(documents), documents.shape, passes.device))
        self._make_room(max(starts.numel() for starts in found) - 1)
        tokens = micro_batches[0][1].numel()
        return [with_places(starts, self._places, tokens) for starts in found]

    def _make_room(self, places: int) -> None:
        """Have so many places on each rank; forget graphs with fewer.

        All ranks do so in the same step, since they record the same messages. They agree on their
        hosts, which are free between steps; GPUs are not waited for.
        """
        needed = max(int(each) for each in gather_from_ranks(torch.tensor(places)))
        if needed <= self._places:
            return
        if self._places:
            logger.info(
                "CUDA graph: a batch has more than %d documents; it is recorded anew, for up to %d",
                self._places,
                places_for(2 * needed),
            )
        self._places = places_for(2 * needed)
        self.forget()

    def _inputs(self, batch: Batch, starts: Tensor | None) -> tuple[Tensor, ...]:
        """Return what a pass takes, on the device; keep what is the same in every step."""
        if starts is None:
            self._mask = self._passes.masks(self._passes.documents(batch))
        inputs = self._passes.inputs(batch)
        self._positions = inputs.positions
        return inputs.tokens, inputs.labels, *(() if starts is None else (starts,))

    def _run(self, tokens: Tensor, labels: Tensor, *others: Tensor) -> tuple[Tensor]:
        """Run one pass.

        others: where documents begin, if they are kept apart; labels in the step.
        """
        *starts, labels_in_step = others
        mask = Documents(*starts, longest=tokens.size(1)) if starts else self._mask
        # Text: every token that is no padding has a label.
        self._passes.model.set_tokens_in_step(labels_in_step, labels_in_step)
        inputs = StepInputs(tokens, labels, tokens, self._positions, labels != IGNORE_INDEX, {})
        return (self._passes.backward(inputs, mask, labels_in_step),)

    def _run_and_clip(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        return *self._run(*inputs), self._clip()
