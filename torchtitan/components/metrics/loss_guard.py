"""Decision about a step from its loss and gradient norm: update, skip, rewind or stop.

It is made from numbers that are the same on all ranks, before the weights change. For a loss that
is not finite `training.non_finite_loss` decides, for a finite one far above the recent ones
`training.loss_spike`.
"""

import math
import statistics
from collections import deque
from typing import Any, Literal

from torchtitan.config import Training
from torchtitan.tools.errors import RunError
from torchtitan.tools.logging import logger

# More steps in a row without a finite loss or gradient mean a diverged model, not a bad batch.
MAX_SKIPS_IN_A_ROW = 10
# More rewinds to the same checkpoint mean that the cause is in it or before it.
MAX_REWINDS_IN_A_ROW = 3
# A spike is measured against the median of this many finite losses, or of at least half as many.
RECENT_LOSSES = 32

Verdict = Literal["update", "skip", "rewind"]


class LossGuard:
    """Judges steps and counts bad ones.

    Its state belongs to the checkpoint, so that a resumed run judges as the uninterrupted one.

    loss_ranks: the ranks whose losses `judge` gets, to name them; None = ranks 0, 1, ….
    early_step: weights have changed before a step is judged, so it can't be skipped.
    """

    def __init__(
        self,
        training: Training,
        loss_ranks: list[int] | None = None,
        *,
        early_step: bool = False,
    ) -> None:
        self._loss_ranks = loss_ranks
        self._early_step = early_step
        self._on_non_finite = training.non_finite_loss
        self._on_spike = training.loss_spike
        self._factor = training.loss_spike_factor
        self._recent: deque[float] = deque(maxlen=RECENT_LOSSES)
        self.skipped_steps = 0
        self.skips_in_a_row = 0
        self.rewinds = 0
        self._rewound_to: list[int] = []  # one step, repeated for each rewind to it; or empty

    def judge(self, step: int, rank_losses: list[float], grad_norm: float) -> Verdict:
        """Judge a step. Raises `RunError` where the run must stop.

        rank_losses: each rank's part of the loss.
        """
        loss = sum(rank_losses)
        if not all(map(math.isfinite, [*rank_losses, grad_norm])):
            return self._judge_non_finite(step, rank_losses, grad_norm)
        verdict = self._judge_spike(step, loss)
        if verdict == "update":
            self.skips_in_a_row = 0
            self._recent.append(loss)
        return verdict

    def _judge_spike(self, step: int, loss: float) -> Verdict:
        if self._factor is None or len(self._recent) < RECENT_LOSSES // 2:
            return "update"
        usual = statistics.median(self._recent)
        if loss <= self._factor * usual:
            return "update"
        what = (
            f"the loss ({loss:.5g}) is more than training.loss_spike_factor ({self._factor}) times "
            f"the median of the last {len(self._recent)} ({usual:.5g})"
        )
        if self._on_spike == "warn":
            logger.warning("Step %d: %s", step, what)
            return "update"
        return self._skip_or_rewind(self._on_spike, step, what)

    def _judge_non_finite(self, step: int, rank_losses: list[float], grad_norm: float) -> Verdict:
        names = self._loss_ranks or range(len(rank_losses))
        ranks = [r for r, x in zip(names, rank_losses, strict=True) if not math.isfinite(x)]
        what = f"the loss of rank {', '.join(map(str, ranks))}" if ranks else "the gradient norm"
        values = f"losses by rank {rank_losses}, gradient norm {grad_norm}"
        if self._on_non_finite == "stop":
            if self._early_step:
                raise RunError(
                    f"step {step}: {what} is not finite ({values}), and the weights are updated "
                    "already; lower optimizer.lr, or set training.non_finite_loss to 'rewind'."
                )
            raise RunError(
                f"step {step}: {what} is not finite ({values}); the weights are still those of "
                f"step {step - 1}, {self._before(step)}; lower optimizer.lr or "
                "training.max_norm, or set training.non_finite_loss to 'skip_step' or 'rewind'."
            )
        return self._skip_or_rewind(self._on_non_finite, step, f"{what} is not finite ({values})")

    @staticmethod
    def _before(step: int) -> str:
        if step == 1:
            return "with which it began: if they were loaded, see whether they are finite"
        return "the last one with finite numbers"

    def _skip_or_rewind(self, policy: str, step: int, what: str) -> Verdict:
        if policy == "rewind":
            logger.warning("Step %d: %s; going back to the last checkpoint", step, what)
            return "rewind"
        self.skips_in_a_row += 1
        if self.skips_in_a_row == MAX_SKIPS_IN_A_ROW:
            last = step - self.skips_in_a_row
            raise RunError(
                f"step {step}: {what}, for the {self.skips_in_a_row}th step in a row; the weights "
                f"are still those of step {last}, the last one with finite numbers; lower "
                "optimizer.lr or training.max_norm."
            )
        self.skipped_steps += 1
        logger.warning(
            "Step %d skipped (%d so far): %s; weights and expert bias keep the values of the "
            "previous step",
            step,
            self.skipped_steps,
            what,
        )
        return "skip"

    def count_rewind(self, step: int, to_step: int) -> None:
        """Count a rewind. Raises `RunError` at the fourth one to the same checkpoint."""
        self.rewinds += 1
        same = self._rewound_to if self._rewound_to[:1] == [to_step] else []
        self._rewound_to = [*same, to_step]
        if len(self._rewound_to) > MAX_REWINDS_IN_A_ROW:
            raise RunError(
                f"step {step}: {MAX_REWINDS_IN_A_ROW} rewinds to step {to_step} have not helped; "
                "begin from an older checkpoint with checkpoint.load_step, or lower optimizer.lr."
            )
        logger.warning(
            "Rewound from step %d to step %d (%d rewinds so far); the data continues after the "
            "batch that caused it",
            step,
            to_step,
            self.rewinds,
        )

    def state_dict(self) -> dict[str, Any]:
        return {
            "skipped_steps": self.skipped_steps,
            "skips_in_a_row": self.skips_in_a_row,
            "rewinds": self.rewinds,
            "rewound_to": self._rewound_to,
            "recent_losses": list(self._recent),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.skipped_steps = state["skipped_steps"]
        self.skips_in_a_row = state["skips_in_a_row"]
        self.rewinds = state["rewinds"]
        self._rewound_to = list(state["rewound_to"])
        self._recent = deque(state["recent_losses"], maxlen=RECENT_LOSSES)
