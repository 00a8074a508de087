"""The training loop: batches in, optimizer steps, and what happens between them.

Every random draw follows from the seed and the number of the step, and every sample from the seed,
the epoch and its position; so a run that goes on from a checkpoint makes the same steps as one
that never stopped, and no random state needs to be kept.
"""

import itertools
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from glide_finetune import checkpoints
from glide_finetune.batch_losses import LossMeter, batch_losses
from glide_finetune.config import TrainConfig
from glide_finetune.ema import EMA
from glide_finetune.fp16_util import Precision
from glide_finetune.glide_util import seed_draws
from glide_finetune.memory import peak_memory
from glide_finetune.metrics import MetricsLog
from glide_finetune.optimization import learning_rate_factor, restore_optimizer
from glide_finetune.seeds import derived_seed
from glide_finetune.step_display import StepDisplay
from glide_finetune.weights import read_weights
from glide_text2im.gaussian_diffusion import GaussianDiffusion

logger = logging.getLogger(__name__)

# Skipped steps in a row after which a run is beyond recovery. fp16 skips some at its start, until
# it has found its loss scale.
MAX_BAD_STEPS = 25


class TrainingDiverged(RuntimeError):
    """Loss or gradients have not been finite for many steps; the message says what to do."""


@dataclass
class Progress:
    """Where a run is. Counts are since its start, over all epochs.

    epoch: epochs that are complete. batch: batches of the current one that are used up.
    step: optimizer steps, those included that were skipped, and those before the run where it
    began with the training state of another one: `first_step`. images: trained on.
    skipped_steps: whose loss or gradient was not finite; skipped_in_a_row: the last of them.
    left_out: how many samples the data left out, by reason, as in `Tally.metrics`.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    first_step: int = 0
    images: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    left_out: dict[str, int] = field(default_factory=dict)


class Trainer:
    """Trains one model; everything a run needs between its start and its end.

    Args:
        model: a GLIDE network on `device`, its frozen parameters without `requires_grad`.
        diffusion: the process over all timesteps.
        optimizer: over the parameters that train. Its learning rate is that after the warm-up.
        config: the settings of the run.
        options: what the model was made with.
        device: where to compute.
        validate: called as validate(trainer) every `eval_interval` steps and at the end; returns
            metrics.
        trained_from: what the first weights were, for the checkpoint's description.
        run_folder: where checkpoints go.
        log: takes the metrics.
        draw_samples: called as draw_samples(trainer) every `log_frequency` steps and at the end.

    Attributes:
        run_folder, log, draw_samples: may be set until training begins; so a run can `restore` a
            checkpoint before it writes anything.
        progress: where the run is.
        ema: the average of the weights, None without `ema_rate`.
        precision: how the model computes.
        stop_requested: set it to have training end after the current step.
    """

    def __init__(
        self,
        model: nn.Module,
        diffusion: GaussianDiffusion,
        optimizer: torch.optim.Optimizer,
        config: TrainConfig,
        *,
        options: dict[str, Any],
        device: torch.device | str,
        validate: Callable[["Trainer"], dict[str, float]] | None = None,
        trained_from: str = "",
        run_folder: Path | None = None,
        log: MetricsLog | None = None,
        draw_samples: Callable[["Trainer"], Any] | None = None,
    ) -> None:
        self.model = model
        self.diffusion = diffusion
        self.optimizer = optimizer
        self.config = config
        self.options = options
        self.device = torch.device(device)
        self.run_folder = run_folder
        self.log = log or MetricsLog(None)
        self.draw_samples = draw_samples
        self.trained_from = trained_from
        self.precision = Precision(config.precision, self.device)
        self.scaler = self.precision.grad_scaler()
        self.ema = EMA(model, config.ema_rate) if config.ema_rate else None
        self.progress = Progress()
        self.stop_requested = False
        self._validate = validate
        self._learning_rates = [group["lr"] for group in optimizer.param_groups]
        self._total_steps: int | None = None
        self._saved_step = 0
        self._last_metrics: dict[str, float] = {}

    # ---------------------------------------------------------------- the loop
    def train(self, loader: Iterable) -> None:
        """Run epochs until the last one, the last step, or a request to stop; then save."""
        if self.reached_end():
            logger.warning(
                "nothing left to train: the run has made its %d steps in %d epochs; raise "
                "--max_steps or --epochs to go on", self.progress.step, self.progress.epoch,
            )  # fmt: skip
        with self.display(loader) as display:
            while not (self.reached_end() or self.stop_requested):
                self.run_epoch(loader, display)
        self.save()

    def display(self, loader: Iterable) -> StepDisplay:
        """What shows the steps of this run."""
        return StepDisplay(self.progress.step, self._count_steps(loader))

    def run_epoch(self, loader: Iterable, display: StepDisplay) -> None:
        """Go through what is left of the current epoch, or until the run is to end.

        Args:
            loader: gives batches as `batch_losses` takes them; the keys of the samples, last in a
                batch, name the samples of a step that is skipped. With `set_epoch(epoch,
                start_batch)` it starts where a resumed run left off. Where it has none but its
                `dataset` has `set_epoch(epoch)`, that is called.
            display: shows the steps.

        Raises:
            ValueError: there is no batch in the epoch.
            TrainingDiverged: too many steps in a row had to be skipped.
        """
        if hasattr(loader, "set_epoch"):
            loader.set_epoch(self.progress.epoch, start_batch=self.progress.batch)
        elif hasattr(getattr(loader, "dataset", None), "set_epoch"):  # torch's DataLoader
            loader.dataset.set_epoch(self.progress.epoch)
        self._total_steps = self._count_steps(loader)
        self.model.train()
        timer = StepTimer(loader)
        groups = groups_of(self.config.gradient_accumulation_steps, timer)
        for batches, ends_epoch in with_last(groups):
            metrics = self.train_step(batches) | timer.metrics(_image_count(batches))
            is_last = ends_epoch and self.progress.epoch + 1 >= self.config.epochs
            self._after_step(metrics, display, is_last or self._made_max_steps())
            if self.reached_end() or self.stop_requested:
                return
            timer.start()
        if self.progress.batch == 0:
            raise ValueError("the data gave no batch: it is empty or everything was filtered out")
        self.progress.epoch += 1
        self.progress.batch = 0

    def train_step(self, batches: list) -> dict[str, float]:
        """Make one optimizer step with the mean gradient over all samples of `batches`.

        A step whose loss or gradient is not finite leaves the weights as they are.

        Returns:
            The metrics of the step: losses are means over its samples.
        """
        learning_rate = self._set_learning_rate()
        image_count = _image_count(batches)
        meter = LossMeter(self.diffusion.num_timesteps)
        for index, batch in enumerate(batches):
            seed_draws(
                derived_seed(self.config.seed, "step", self.progress.step, index), self.device
            )
            with self.precision.autocast():
                losses, timesteps = batch_losses(
                    self.model, self.diffusion, batch, self.device,
                    vlb_weight=self.config.vlb_weight, loss_weighting=self.config.loss_weighting,
                )  # fmt: skip
            self.scaler.scale(losses.loss.sum() / image_count).backward()
            meter.add(losses, timesteps)
        self.scaler.unscale_(self.optimizer)
        grad_norm = nn.utils.clip_grad_norm_(
            self.model.parameters(), self.config.max_grad_norm or math.inf
        )
        metrics = meter.means(grad_norm=grad_norm) | {"lr": learning_rate}
        if math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"]):
            self.scaler.step(self.optimizer)
            if self.ema:
                self.ema.update()
            self.progress.skipped_in_a_row = 0
        else:
            self._skip(metrics, batches)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.progress.step += 1
        self.progress.batch += len(batches)
        self.progress.images += image_count
        left_out = Counter(self.progress.left_out)
        for batch in batches:
            left_out.update(getattr(batch, "left_out", {}))
        self.progress.left_out = dict(left_out)
        metrics |= {f"data/{name}": count for name, count in left_out.items()}
        return metrics | {"skipped_steps": self.progress.skipped_steps}

    def _set_learning_rate(self) -> float:
        """Set that of every parameter group for this step; returns the first one's."""
        factor = learning_rate_factor(
            self.progress.step, self.config.lr_schedule, self.config.warmup_steps, self._total_steps
        )
        for group, rate in zip(self.optimizer.param_groups, self._learning_rates, strict=True):
            group["lr"] = rate * factor
        return self.optimizer.param_groups[0]["lr"]

    def _skip(self, metrics: dict[str, float], batches: list) -> None:
        """Count and report a step that is not made."""
        self.progress.skipped_steps += 1
        self.progress.skipped_in_a_row += 1
        logger.warning(
            "step %d skipped: loss %g, gradient norm %g; samples: %s",
            self.progress.step + 1, metrics["loss"], metrics["grad_norm"],
            ", ".join(_keys(batches)) or "unknown",
        )  # fmt: skip
        if self.progress.skipped_in_a_row >= MAX_BAD_STEPS:
            raise TrainingDiverged(
                f"loss or gradient were not finite in {MAX_BAD_STEPS} steps in a row, up to step "
                f"{self.progress.step + 1}: go on from an earlier checkpoint with a lower "
                "--learning_rate, a lower --max_grad_norm, or --precision bf16 instead of fp16"
            )

    # ------------------------------------------------------- between the steps
    def _after_step(self, metrics: dict[str, float], display: StepDisplay, is_last: bool) -> None:
        """Validate, log, draw samples and save, each if it is time for it."""
        step, config = self.progress.step, self.config
        metrics |= {"epoch": self.progress.epoch, **peak_memory(self.device)}
        if self._validate and (is_last or is_time(step, config.eval_interval)):
            metrics |= self._validate(self)
        self.log.log(metrics, step)
        self._last_metrics = metrics
        display.show(step, metrics, is_last=is_last)
        if self.draw_samples and (is_last or is_time(step, config.log_frequency)):
            self.draw_samples(self)
        if is_time(step, config.save_checkpoint_interval):
            self.save()

    def _count_steps(self, loader: Iterable) -> int | None:
        """Optimizer steps of the whole run; None where the data does not tell its length."""
        try:
            per_epoch = math.ceil(len(loader) / self.config.gradient_accumulation_steps)
        except TypeError:
            return self.config.max_steps or None
        steps = self.progress.first_step + per_epoch * self.config.epochs
        return min(steps, self.config.max_steps or steps)

    def reached_end(self) -> bool:
        """Whether the last step or epoch is made."""
        return self._made_max_steps() or self.progress.epoch >= self.config.epochs

    def _made_max_steps(self) -> bool:
        return 0 < self.config.max_steps <= self.progress.step

    # ------------------------------------------------------------- checkpoints
    def save(self) -> None:
        """Write a checkpoint, unless no step was made since the last one or since the start."""
        if self._saved_step == self.progress.step:
            return
        checkpoints.save_checkpoint(
            self.run_folder,
            epoch=self.progress.epoch,
            step=self.progress.step,
            model_state=self.model.state_dict(),
            ema_state=self.ema.model_state() if self.ema else None,
            training_state={
                "progress": asdict(self.progress),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "ema_updates": self.ema.updates if self.ema else 0,
            },
            description={
                "kind": self.config.model_type,
                "model_options": self.options,
                "precision": self.config.precision,
                "vlb_weight": self.config.vlb_weight,
                "metrics": self._last_metrics,
                "trained_from": self.trained_from,
            },
        )
        self._saved_step = self.progress.step
        if self.config.keep_checkpoints:
            checkpoints.prune(self.run_folder, self.config.keep_checkpoints)

    def restore(self, files: checkpoints.CheckpointFiles, *, new_run: bool = False) -> None:
        """Go on from a checkpoint whose weights the model already has.

        A `new_run` takes optimizer, loss scale, average and the count of steps, but begins with
        its own first epoch.

        Raises:
            ValueError: the training state is damaged or belongs to other parameters.
        """
        state = checkpoints.read_training_state(files.training_state)
        restore_optimizer(self.optimizer, state["optimizer"])
        if state["scaler"]:  # else it was not saved under fp16
            self.scaler.load_state_dict(state["scaler"])
        if self.ema and files.ema:
            self.ema.load(read_weights(files.ema), state["ema_updates"])
        self.progress = Progress(**state["progress"])
        if new_run:
            step = self.progress.step
            self.progress = Progress(step=step, first_step=step)
        self._saved_step = self.progress.step


class StepTimer:
    """Passes batches on and takes the time of steps: that between `start` and `metrics`, in which
    the batches of the next step are fetched, but not samples drawn or checkpoints saved.
    """

    def __init__(self, loader: Iterable) -> None:
        self._loader = loader
        self.start()

    def start(self) -> None:
        self._waited, self._started = 0.0, time.perf_counter()

    def __iter__(self) -> Iterator[Any]:
        batches, end = iter(self._loader), object()
        while True:
            started = time.perf_counter()
            batch = next(batches, end)
            self._waited += time.perf_counter() - started
            if batch is end:
                return
            yield batch

    def metrics(self, image_count: int) -> dict[str, float]:
        """Images per second, and the share of the time, 0 to 1, that was spent on the data."""
        seconds = time.perf_counter() - self._started
        return {
            "images_per_second": image_count / seconds,
            "data/wait_share": self._waited / seconds,
        }


def is_time(step: int, interval: int) -> bool:
    """Whether something that happens every `interval` steps, 0 for never, happens after `step`."""
    return interval > 0 and step % interval == 0


def groups_of(size: int, items: Iterable) -> Iterator[list]:
    """Lists of `size` successive items; the last one may be shorter."""
    iterator = iter(items)
    while group := list(itertools.islice(iterator, size)):
        yield group


def with_last(items: Iterable) -> Iterator[tuple[Any, bool]]:
    """Each item with whether it is the last; so the one behind it is fetched first."""
    iterator = iter(items)
    for item in iterator:
        for following in iterator:
            yield item, False
            item = following
        yield item, True


def _image_count(batches: list) -> int:
    return sum(len(batch[0]) for batch in batches)


def _keys(batches: list) -> list[str]:
    """The keys of all samples, where the loader gives them."""
    return [key for batch in batches if not torch.is_tensor(batch[-1]) for key in batch[-1]]
