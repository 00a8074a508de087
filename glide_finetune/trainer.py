"""The training loop: batches in, optimizer steps, and what happens between them.

Every random draw follows from the seed and the number of the step, and every sample from the seed,
the epoch and its key or position; so a run that goes on from a checkpoint makes the same steps as
one that never stopped, and no random state needs to be kept.
"""

import contextlib
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from glide_finetune.bad_steps import BadSteps
from glide_finetune.batch_losses import Losses, LossMeter, batch_losses
from glide_finetune.checkpoint_writer import CheckpointWriter
from glide_finetune.checkpoints import CheckpointFiles, read_training_state
from glide_finetune.config import TrainConfig
from glide_finetune.devices import is_of_the_compiler
from glide_finetune.ema import EMA
from glide_finetune.fp16_util import Precision
from glide_finetune.memory import (
    OutOfMemory,
    is_out_of_memory,
    out_of_memory_explained,
    peak_memory,
    training_state_bytes,
)
from glide_finetune.metrics import MetricsLog
from glide_finetune.optimization import clip_gradients, learning_rate_factor, restore_optimizer
from glide_finetune.random_state import seed_draws
from glide_finetune.seeds import derived_seed
from glide_finetune.step_display import StepDisplay
from glide_finetune.steps import (
    Progress,
    StepTimer,
    groups_of,
    image_count,
    is_time,
    sample_keys,
    set_epoch_of_datasets,
)
from glide_finetune.weights import WeightsError, read_weights
from glide_text2im.gaussian_diffusion import GaussianDiffusion

logger = logging.getLogger(__name__)

BatchLosses = Callable[
    [nn.Module, GaussianDiffusion, Sequence[Any], torch.device], tuple[Losses, Tensor]
]


class _Interrupted(Exception):
    """What happens between two steps is left, since training shall stop."""


class Trainer:
    """Trains one model; everything a run needs between its start and its end.

    Args:
        model: a GLIDE network, or what `losses` is for, on `device`; its frozen parameters without
            `requires_grad`.
        diffusion: the process over all timesteps.
        optimizer: over the parameters that train. Its learning rate is that after the warm-up.
        config: the settings of the run.
        options: what the model was made with.
        device: where to compute.
        validate: called as validate(trainer) every `eval_interval` steps and at the end; returns
            metrics.
        run_folder: where checkpoints go.
        log: takes the metrics.
        draw_samples: called as draw_samples(trainer) every `log_frequency` steps and at the end.
        losses: called as losses(model, diffusion, batch, device), under autocast and with the draws
            of the step seeded; returns what `LossMeter.add` takes, of which the mean of `loss` over
            the samples is trained. None trains GLIDE's own loss as `config` says.

    Attributes:
        run_folder, log, draw_samples: may be set until training begins; so a run can `restore` a
            checkpoint before it writes anything.
        provenance: what the model is trained from, for the descriptions of checkpoints; may be set
            until then, too.
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
        run_folder: Path | None = None,
        log: MetricsLog | None = None,
        draw_samples: Callable[["Trainer"], Any] | None = None,
        losses: BatchLosses | None = None,
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
        self.provenance: dict[str, Any] = {}
        self.precision = Precision(config.precision, self.device)
        # Samples and validation use the model as it is: their batches have other shapes, for each
        # of which it would have to be compiled again.
        self._network = self.precision.compiled(model) if config.compile else model
        self.scaler = self.precision.grad_scaler()
        self.ema = EMA(model, config.ema_rate) if config.ema_rate else None
        self.progress = Progress()
        self.stop_requested = False
        self._validate = validate
        self._losses = losses or self._glide_losses
        self._description_of_loss = {} if losses else {"vlb_weight": config.vlb_weight}
        self._learning_rates = [group["lr"] for group in optimizer.param_groups]
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if any(parameter.dtype == torch.float16 for parameter in self._parameters):
            raise ValueError(
                "the weights to train are float16, in which the squares of gradients vanish and "
                "AdamW divides by zero: call convert_to_fp32() before the optimizer is made, and "
                "compute in half precision with use_fp16 or --precision"
            )
        self._bad_steps = BadSteps(config.loss_spike_factor)
        self._total_steps: int | None = None
        self._writer: CheckpointWriter | None = None
        self._saved_step = 0  # that of the checkpoint that the run goes on from
        self._updating = False  # the weights and their average
        self._last_metrics: dict[str, float] = {}
        # The metrics of the last step and whether it ends the run, if `_after_step` was left.
        self._unreported: tuple[dict[str, float], bool] | None = None
        self._has_left = False  # validation or samples of the last step, as training shall stop

    # ---------------------------------------------------------------- the loop
    def train(self, loader: Iterable) -> None:
        """Run epochs until the last one, the last step, or a request to stop; then save.

        Raises:
            OSError: the last checkpoint cannot be written.
            TrainingDiverged: too many steps in a row had to be skipped.
            OutOfMemory: a step does not fit.
        """
        with self.display(loader) as display:
            try:
                self._train(loader, display)
            finally:
                self.wait_for_checkpoint()
        self.finish()

    def _train(self, loader: Iterable, display: StepDisplay) -> None:
        if self._unreported:
            self._saved_step = 0  # what the checkpoint lacks is made up for now
            with self._saved_at_error():
                self._after_step(*self._unreported, display)
        elif self.reached_end():
            logger.warning(
                "nothing left to train: the run has made its %d steps in %d epochs; raise "
                "--max_steps or --epochs to go on", self.progress.step, self.progress.epoch,
            )  # fmt: skip
        while not (self.reached_end() or self.stop_requested):
            self.run_epoch(loader, display)

    def display(self, loader: Iterable) -> StepDisplay:
        """What shows the steps of this run."""
        return StepDisplay(self.progress.step, self.count_steps(loader))

    def run_epoch(
        self, loader: Iterable, display: StepDisplay, *, data_epoch: int | None = None
    ) -> None:
        """Go through what is left of the current epoch, or until the run is to end.

        Args:
            loader: gives batches as `batch_losses` takes them; the keys of the samples, last in a
                batch, name the samples of a step that is skipped. With `set_epoch(epoch,
                start_batch)` it starts where a resumed run left off. Where it has none,
                `set_epoch(epoch)` of its datasets is called, those inside of others included.
            display: shows the steps.
            data_epoch: what `set_epoch` is called with; None is the run's own count.

        Raises:
            ValueError: there is no batch in the epoch.
            TrainingDiverged: too many steps in a row had to be skipped.
            OutOfMemory: a step does not fit.
        """
        if data_epoch is None:
            data_epoch = self.progress.epoch
        if hasattr(loader, "set_epoch"):
            loader.set_epoch(data_epoch, start_batch=self.progress.batch)
        else:
            set_epoch_of_datasets(loader, data_epoch)
        self._total_steps = self.count_steps(loader)
        self.model.train()
        timer = StepTimer(loader)
        groups = groups_of(self.config.gradient_accumulation_steps, self._saving_if_it_fails(timer))
        state_bytes = training_state_bytes(self.model.parameters(), self.ema is not None)
        for batches, ends_epoch in groups:
            try:
                with out_of_memory_explained(
                    self.config, self.progress.step + 1, state_bytes, self.device
                ):
                    metrics = self.train_step(batches) | timer.metrics(image_count(batches))
            except OutOfMemory:
                self.save_what_is_made()
                raise
            except Exception as error:
                if self.stop_requested and is_of_the_compiler(error):  # which heard the signal too
                    return
                raise
            metrics["epoch"] = self.progress.epoch
            if ends_epoch:
                self._count_epoch()
            with self._saved_at_error():
                self._after_step(metrics, self.reached_end(), display)
            if ends_epoch or self.reached_end() or self.stop_requested:
                return
            timer.start()
        if self.progress.batch == 0:
            raise ValueError("the data gave no batch: it is empty or everything was filtered out")
        self._count_epoch()  # of which a resumed run found nothing left

    def _saving_if_it_fails(self, batches: Iterable) -> Iterator[Any]:
        """Passes batches on; where the data fails, saves first, since no step is half made then."""
        with self._saved_at_error():
            yield from batches

    @contextlib.contextmanager
    def _saved_at_error(self) -> Iterator[None]:
        """Around what happens between two steps: saves before an error there ends the run."""
        try:
            yield
        except Exception:
            self.save_what_is_made()
            raise

    def save_what_is_made(self) -> None:
        """Save before an error ends training, unless that hit the update of the weights, which may
        then be of two steps, or nothing was trained."""
        if self._updating:
            logger.error(
                "the weights were being updated, so they are not saved; checkpoints are unharmed"
            )
        if self._updating or self.progress.step == self.progress.first_step:
            return
        try:
            self.finish()
        except OSError as error:
            logger.error("%s", error)
        else:
            logger.info("saved at step %d in %s", self.progress.step, self.run_folder)

    def _count_epoch(self) -> None:
        self.progress.epoch += 1
        self.progress.batch = 0

    def train_step(self, batches: list) -> dict[str, float]:
        """Make one optimizer step with the mean gradient over all samples of `batches`.

        A step that `BadSteps` calls bad leaves the weights as they are.

        Returns:
            The metrics of the step: losses are means over its samples.
        """
        self._forget_gradients()  # of a step that was interrupted
        learning_rate = self._set_learning_rate()
        images = image_count(batches)
        meter = LossMeter(self.diffusion.num_timesteps)
        for index, batch in enumerate(batches):
            seed_draws(
                derived_seed(self.config.seed, "step", self.progress.step, index), self.device
            )
            with self.precision.autocast():
                losses, timesteps = self._losses(self._network, self.diffusion, batch, self.device)
            self.scaler.scale(losses.loss.sum() / images).backward()
            meter.add(losses, timesteps)
        self.scaler.unscale_(self.optimizer)
        grad_norm = clip_gradients(self._parameters, self.config.max_grad_norm or math.inf)
        metrics = meter.means(grad_norm=grad_norm) | {"lr": learning_rate}
        keys = sample_keys(batches)
        if not self._bad_steps.judge(self.progress, metrics["loss"], metrics["grad_norm"], keys):
            self._updating = True
            self.scaler.step(self.optimizer)
            if self.ema:
                self.ema.update()
            self._updating = False
        self.scaler.update()
        self._forget_gradients()
        self.progress.step += 1
        self.progress.batch += len(batches)
        self.progress.images += images
        metrics["images"] = self.progress.images
        left_out = Counter(self.progress.left_out)
        for batch in batches:
            left_out.update(getattr(batch, "left_out", {}))
        self.progress.left_out = dict(left_out)
        metrics |= {f"data/{name}": count for name, count in left_out.items()}
        return metrics | {"skipped_steps": self.progress.skipped_steps}

    def _forget_gradients(self) -> None:
        """Of the whole model, since some of its parameters may be unknown to the optimizer."""
        self.optimizer.zero_grad(set_to_none=True)
        self.model.zero_grad(set_to_none=True)

    def _glide_losses(self, *args: Any) -> tuple[Losses, Tensor]:
        return batch_losses(
            *args, vlb_weight=self.config.vlb_weight, loss_weighting=self.config.loss_weighting
        )

    def _set_learning_rate(self) -> float:
        """Set that of every parameter group for this step; returns the first one's."""
        first, total = self.progress.first_step, self._total_steps
        factor = learning_rate_factor(
            self.progress.step - first,
            self.config.lr_schedule,
            self.config.warmup_steps,
            total and total - first,
        )
        for group, rate in zip(self.optimizer.param_groups, self._learning_rates, strict=True):
            group["lr"] = rate * factor
        return self.optimizer.param_groups[0]["lr"]

    # ------------------------------------------------------- between the steps
    def _after_step(self, metrics: dict[str, float], is_last: bool, display: StepDisplay) -> None:
        """Validate, log, draw samples and save, each if it is time for it.

        Who asks training to stop need not wait for validation and samples: they are left, and the
        resumed run begins with them.
        """
        step, config = self.progress.step, self.config
        self._unreported, self._has_left = (metrics, is_last), False
        validates = self._validate and (is_last or is_time(step, config.eval_interval))
        draws = self.draw_samples and (is_last or is_time(step, config.log_frequency))
        all_metrics = metrics | peak_memory(self.device)
        if validates:
            all_metrics |= self._unless_stopping(self._validate) or {}
        self.log.log(all_metrics, step)
        self._last_metrics = all_metrics
        display.show(step, all_metrics, is_last=is_last)
        if draws:
            self._unless_stopping(self.draw_samples)
        if not self._has_left:
            self._unreported = None
        if is_time(step, config.save_checkpoint_interval):
            self.save()

    def _unless_stopping(self, action: Callable[["Trainer"], Any]) -> Any:
        """The result of action(self), which is left at its next use of any part of the model when
        training shall stop, or where memory runs out; None then."""

        def leave_if_stopping(*_: Any) -> None:
            if self.stop_requested:
                raise _Interrupted

        # of all parts, since some models, such as CLIP, are only ever used in part
        hooks = [m.register_forward_pre_hook(leave_if_stopping) for m in self.model.modules()]
        try:
            return action(self)
        except _Interrupted:
            self._has_left = True
            return None
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            flags = ["test_batch_size", "batch_size"] if self.draw_samples else ["batch_size"]
            smaller = [f"--{flag} (now {getattr(self.config, flag)})" for flag in flags]
            logger.error(
                "not enough memory for the samples or the validation of step %d, which are left "
                "out: lower %s", self.progress.step, " or ".join(smaller),
            )  # fmt: skip
            return None
        finally:
            for hook in hooks:
                hook.remove()

    def count_steps(self, loader: Iterable) -> int | None:
        """Optimizer steps of the whole run: those that are made, and what its epochs have left.
        None where the data does not tell its length."""
        progress, size = self.progress, self.config.gradient_accumulation_steps
        try:
            batches = len(loader)
        except TypeError:
            return self.config.max_steps or None
        steps = progress.step
        # Batches and accumulation need not be those that the steps so far were made with.
        if (epochs_left := self.config.epochs - progress.epoch) > 0:
            steps += math.ceil(max(0, batches - progress.batch) / size)
            steps += (epochs_left - 1) * math.ceil(batches / size)
        return min(steps, self.config.max_steps or steps)

    def reached_end(self) -> bool:
        """Whether the last step or epoch is made."""
        made_max_steps = 0 < self.config.max_steps <= self.progress.step
        return made_max_steps or self.progress.epoch >= self.config.epochs

    # ------------------------------------------------------------- checkpoints
    def save(self) -> None:
        """Begin to write a checkpoint, unless no step was made since the last one or the start.

        Training need not wait until it is written; one that cannot be is an error in the log, and
        the next one is tried in its turn.
        """
        if self._writer is None:
            self._writer = CheckpointWriter(self.run_folder, self.config.keep_checkpoints)
        self._writer.wait()
        if self.progress.step in (self._saved_step, self._writer.saved_step):
            return
        self.log.sync()
        self._writer.save(
            epoch=self.progress.epoch,
            step=self.progress.step,
            model_state=self.model.state_dict(),
            ema_state=self.ema.model_state() if self.ema else None,
            training_state={
                "progress": asdict(self.progress),
                "unreported": self._unreported,
                "batch_size": self.config.batch_size,
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "bad_steps": self._bad_steps.state_dict(),
                "ema_updates": self.ema.updates if self.ema else 0,
            },
            description={
                "kind": self.config.model_type,
                "model_options": self.options,
                "precision": self.config.precision,
                **self._description_of_loss,
                "metrics": self._last_metrics,
                **self.provenance,
            },
        )

    def finish(self) -> None:
        """Save, and wait until the checkpoint is written.

        Raises:
            OSError: it cannot be.
        """
        self.save()
        if error := self.wait_for_checkpoint():
            raise error

    def wait_for_checkpoint(self) -> Exception | None:
        """Until none is being written; why the last one could not be written, if so."""
        return self._writer.wait() if self._writer else None

    @property
    def reported_step(self) -> int:
        """The last step whose metrics are complete."""
        return self.progress.step - (self._unreported is not None)

    def restore(self, files: CheckpointFiles, *, new_run: bool = False) -> None:
        """Go on from a checkpoint whose weights the model already has.

        A `new_run` takes optimizer, loss scale, average and the count of steps, but begins with
        its own first epoch, its own schedule of learning rates and its own idea of usual losses.

        Raises:
            ValueError: the training state is damaged or belongs to other parameters.
        """
        state = read_training_state(files.training_state)
        try:
            restore_optimizer(self.optimizer, state["optimizer"])
            if state["scaler"]:  # else it was not saved under fp16
                self.scaler.load_state_dict(state["scaler"])
            if self.ema and files.ema:
                self.ema.load(read_weights(files.ema), state["ema_updates"])
            progress = Progress(**state["progress"])
            if "bad_steps" in state and not new_run:  # older versions did not keep them
                self._bad_steps.load_state_dict(state["bad_steps"])
        except (LookupError, TypeError, AttributeError):
            raise WeightsError(
                f"{files.training_state} is no training state: give --weights_only with the .pt "
                "file beside it to start without"
            ) from None
        self._unreported = state.get("unreported")
        if self._unreported:  # in which older versions did not keep the epoch
            self._unreported[0].setdefault("epoch", progress.epoch)
        saved_batch_size = state.get("batch_size", self.config.batch_size)
        progress.batch = progress.batch * saved_batch_size // self.config.batch_size
        if new_run:
            progress = Progress(step=progress.step, first_step=progress.step)
            self._unreported = None
        self.progress = progress
        self._saved_step = progress.step
