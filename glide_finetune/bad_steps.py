"""Which optimizer steps are not made, since their numbers would harm the weights."""

import logging
import math

from glide_finetune.steps import Progress

logger = logging.getLogger(__name__)

# Skipped steps in a row after which a run is beyond recovery. fp16 skips some at its start, until
# it has found its loss scale.
MAX_BAD_STEPS = 25

# The running mean of the loss goes over about this many steps. Before it has seen some, nothing is
# a spike, since the loss of single steps jumps about and falls fast at the start of training.
STEPS_OF_MEAN = 100
STEPS_BEFORE_SPIKES = 20


class TrainingDiverged(RuntimeError):
    """Many steps in a row had to be skipped; the message says what to do."""


class BadSteps:
    """Tells bad steps from good ones, and counts them in the progress of the run.

    A step is bad if its loss or gradient is not finite, or if its loss is a spike: more than
    `spike_factor` times the running mean of the steps that were made; 0 for no such limit.
    """

    def __init__(self, spike_factor: float = 0.0) -> None:
        self.spike_factor = spike_factor
        self.mean_loss = 0.0
        self.steps_in_mean = 0

    def state_dict(self) -> dict[str, float]:
        """What a resumed run needs for the same decisions."""
        return {"mean_loss": self.mean_loss, "steps_in_mean": self.steps_in_mean}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Take the state of an earlier process."""
        self.mean_loss, self.steps_in_mean = state["mean_loss"], state["steps_in_mean"]

    def judge(self, progress: Progress, loss: float, grad_norm: float, keys: list[str]) -> bool:
        """Judge the step that comes after `progress`, and count it there as skipped if it is bad.

        Args:
            loss, grad_norm: those of the step.
            keys: of its samples, to be named if it is bad.

        Returns:
            Whether it must be skipped.

        Raises:
            TrainingDiverged: it is bad like the `MAX_BAD_STEPS` - 1 before it.
        """
        reason = self._reason(loss, grad_norm)
        if not reason:
            progress.skipped_in_a_row = 0
            self.steps_in_mean += 1
            self.mean_loss += (loss - self.mean_loss) / min(self.steps_in_mean, STEPS_OF_MEAN)
            return False
        progress.skipped_steps += 1
        progress.skipped_in_a_row += 1
        logger.warning(
            "step %d skipped: %s; samples: %s",
            progress.step + 1, reason, ", ".join(keys) or "unknown",
        )  # fmt: skip
        if progress.skipped_in_a_row >= MAX_BAD_STEPS:
            raise TrainingDiverged(
                f"{MAX_BAD_STEPS} steps in a row had to be skipped, up to step "
                f"{progress.step + 1} ({reason}): go on from a checkpoint, all of which are "
                "unharmed, with a lower --learning_rate, a lower --max_grad_norm, or --precision "
                "bf16 instead of fp16"
                + (", or a higher --loss_spike_factor" if self.spike_factor else "")
            )
        return True

    def _reason(self, loss: float, grad_norm: float) -> str:
        """Why a step is bad; "" if it is not."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return f"loss {loss:g}, gradient norm {grad_norm:g}"
        is_settled = self.steps_in_mean >= STEPS_BEFORE_SPIKES
        if self.spike_factor and is_settled and loss > self.spike_factor * self.mean_loss:
            return (
                f"loss {loss:g} is more than {self.spike_factor:g} times its running mean, "
                f"{self.mean_loss:g}"
            )
        return ""
