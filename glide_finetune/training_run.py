"""A run from its settings to its last checkpoint: model, data, trainer, and what is around them."""

import contextlib
import logging
import shlex
import signal
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from tqdm.contrib.logging import logging_redirect_tqdm

from glide_finetune import demo
from glide_finetune.atomic_files import remove_temporary
from glide_finetune.checkpoints import set_aside
from glide_finetune.config import DATA, TRAINING, TrainConfig, recorded
from glide_finetune.devices import check_compiler, pick_device
from glide_finetune.folder_lock import locked
from glide_finetune.fp16_util import keep_in_bf16
from glide_finetune.glide_util import load_model
from glide_finetune.memory import (
    available_memory,
    lack_for_the_model_explained,
    training_state_bytes,
)
from glide_finetune.metrics import MetricsLog
from glide_finetune.optimization import make_optimizer
from glide_finetune.origin import Origin, find_origin, without_state_if_widened
from glide_finetune.programs import LineHandler
from glide_finetune.runs import create_run, interpret_resume, write_args
from glide_finetune.samples import SampleDrawer
from glide_finetune.stopping import stopping_on_signals
from glide_finetune.trainer import Trainer
from glide_finetune.training_data import TrainingData, make_training_data
from glide_finetune.validation import Validator

logger = logging.getLogger(__name__)

SAMPLES_NAME = "samples"
INSTEAD = "start a new run without --resume_ckpt"  # of a run that is trained already


@dataclass(frozen=True)
class Outcome:
    """How a run ended: its folder, and the signal that stopped it early, if one did."""

    run_folder: Path
    stopped_by: signal.Signals | None = None

    @property
    def exit_status(self) -> int:
        """0 for a run that is complete, or else what shells make of that signal."""
        return 128 + self.stopped_by if self.stopped_by else 0


@dataclass(frozen=True)
class Job:
    """What a run trains, and on what.

    trainer: as it is before a checkpoint is restored.
    data: what it trains on.
    origin: what it goes on from; without the training state where that cannot be used.
    at_end: called with the run's folder when its last checkpoint is written.
    """

    trainer: Trainer
    data: TrainingData
    origin: Origin
    at_end: Callable[[Path], None] | None = None


MakeJob = Callable[[TrainConfig, Origin, torch.device], Job]


def run(config: TrainConfig, make_job: MakeJob | None = None) -> Outcome:
    """Train as `config` says.

    Args:
        config: completed and checked, as `arguments.parse_config` makes it.
        make_job: called as make_job(config, origin, device), before anything is written but the
            lock of a run that goes on; None makes `glide_job`.

    Raises:
        ValueError, OSError, DownloadError, TrainingDiverged, OutOfMemory: with one line for the
            user, about data, weights, numbers or a machine that make training impossible.
    """
    if config.demo:
        demo.prepare(config)
    with contextlib.ExitStack() as stack:
        start = interpret_resume(config.resume_ckpt, config.checkpoints_dir)
        # before its checkpoints are looked for, which change while it is trained
        if start.run_folder:
            stack.enter_context(locked(start.run_folder, INSTEAD))
        with lack_for_the_model_explained(config):
            origin = find_origin(config, start)
        return _run(config, origin, make_job or glide_job, stack)


def _run(
    config: TrainConfig, origin: Origin, make_job: MakeJob, stack: contextlib.ExitStack
) -> Outcome:
    """Train as `config` says; `stack` holds the lock of the run for as long as that takes."""
    device = pick_device(config.device)
    torch.backends.cudnn.benchmark = config.cudnn_benchmark
    torch.manual_seed(config.seed)

    with lack_for_the_model_explained(config):
        job = make_job(config, origin, device)
        trainer, data, origin = job.trainer, job.data, job.origin
        go_on(trainer, origin)
    settings = recorded(config) | origin.first
    trainer.provenance = provenance = {
        "trained_from": origin.first["resume_ckpt"] or config.init,
        "data": {"description": data.description, "fingerprint": data.fingerprint},
        "settings": settings,
    }

    # from here on something is written
    trainer.run_folder = run_folder = origin.run_folder or create_run(config.checkpoints_dir)
    if not origin.run_folder:
        stack.enter_context(locked(run_folder, INSTEAD))
    for folder in (run_folder, run_folder / SAMPLES_NAME):
        remove_temporary(folder)
    for weights in origin.damaged:
        set_aside(weights)
    write_args(run_folder, settings)
    if config.log_frequency:
        trainer.draw_samples = SampleDrawer(
            config, trainer.options, run_folder / SAMPLES_NAME, data.low_res,
            example=data.example if config.train_inpaint else None,
        )  # fmt: skip
    trainer.log = MetricsLog(
        run_folder,
        resume_step=trainer.reported_step if origin.checkpoint_is_own else None,
        project=config.project_name,
        config=settings,
    )
    with contextlib.closing(trainer.log):
        announce(trainer, data)
        warn_of_changes(origin, provenance, config)
        with _lines_above_bars(), stopping_on_signals(trainer) as received:
            trainer.train(data.loader)
        # before the log is closed, for which wandb may take a while
        outcome = report_end(trainer, received)
        if job.at_end:
            job.at_end(run_folder)
    return outcome


def _lines_above_bars() -> contextlib.AbstractContextManager:
    """In a notebook; the programs print theirs so anyway."""
    handlers = logging.getLogger().handlers
    if any(isinstance(handler, LineHandler) for handler in handlers):
        return contextlib.nullcontext()
    return logging_redirect_tqdm()


def glide_job(config: TrainConfig, origin: Origin, device: torch.device) -> Job:
    """The training of a GLIDE network."""
    if config.compile:
        check_compiler(device)
    checkpoint = origin.checkpoint
    # first the data, since mistakes in it should not have to wait for a download
    data = make_training_data(config, device)
    data.loader.start_workers()
    origin = without_state_if_widened(origin, config)
    model, diffusion, options = load_model(
        str(checkpoint.weights) if checkpoint else "",
        use_fp16=config.use_fp16,
        freeze_transformer=config.freeze_transformer,
        freeze_diffusion=config.freeze_diffusion,
        activation_checkpointing=config.activation_checkpointing,
        model_type=config.model_type,
        init=config.init,
        model_options=config.options,
        device=device,
    )
    if config.low_memory:
        keep_in_bf16(model)
    validate = None
    if data.validation is not None:
        validate = Validator(data.validation, config, diffusion.num_timesteps)
    trainer = Trainer(
        model,
        diffusion,
        make_optimizer(model, config.learning_rate, config.adam_weight_decay, config.seed),
        config,
        options=options,
        device=device,
        validate=validate,
    )
    return Job(trainer, data, origin)


def go_on(trainer: Trainer, origin: Origin) -> None:
    """Take over the training state that `origin` brings, if it brings one.

    Raises:
        ValueError: it cannot be used, or leaves a new run nothing to do.
    """
    if not origin.brings_training_state:
        return
    trainer.restore(origin.checkpoint, new_run=not origin.checkpoint_is_own)
    if not origin.checkpoint_is_own and trainer.reached_end():
        raise ValueError(
            f"--max_steps is {trainer.config.max_steps}, but {origin.checkpoint.weights} is of "
            f"step {trainer.progress.step} already: give a higher one, or --weights_only, which "
            "counts from 0"
        )


def announce(trainer: Trainer, data: TrainingData) -> None:
    """Say in a few lines what is about to happen."""
    count = sum(p.numel() for p in trainer.model.parameters())
    trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    logger.info(
        "%s model, %.1f M parameters, %.1f M of them trained in %s on %s",
        trainer.config.model_type, count / 1e6, trainable / 1e6,
        trainer.config.precision, trainer.device,
    )  # fmt: skip
    if trainer.config.freeze_diffusion and trainer.provenance["trained_from"] == "scratch":
        logger.warning(
            "--freeze_diffusion with --init scratch trains nothing: a UNet that has learned "
            "nothing puts out zeros and passes no gradient on; start from weights, or leave it out"
        )
    if advice := trainer.precision.advice:
        logger.info("%s", advice)
    logger.info("data: %s", data.description)
    warn_of_little_memory(trainer)
    logger.info("run: %s, from step %d", trainer.run_folder, trainer.progress.step)


def warn_of_little_memory(trainer: Trainer) -> None:
    """Tell beforehand if not even gradients and moments will fit, since a system that runs out of
    main memory ends the process without a word."""
    parameters = list(trainer.model.parameters())
    there = sum(p.nbytes for p in parameters)
    states = trainer.optimizer.state.values()  # of a run that goes on
    there += sum(v.nbytes for state in states for v in state.values() if torch.is_tensor(v))
    needed = training_state_bytes(parameters, with_ema=False) - there
    available = available_memory(trainer.device)
    if available is not None and needed > available:
        advice = [*trainer.config.state_advice, "choose a smaller --model_preset"]
        logger.warning(
            "gradients and moments will need %.1f GB beside what is in memory now, but %.1f GB are "
            "available: the first step will probably fail. Best end other programs; or %s",
            needed / 1e9, available / 1e9, "; or ".join(advice),
        )  # fmt: skip


def warn_of_changes(origin: Origin, now: dict[str, Any], config: TrainConfig) -> None:
    """Name the settings and the data that are not those of the training state, or of the run's
    last start, if there was one.

    Args:
        now: what the descriptions of the checkpoints to come tell of them.
    """
    described = origin.description if origin.brings_training_state else {}
    before = origin.settings
    of_interest = [
        field
        for field in fields(config)
        if not field.metadata["once"] and field.name != "checkpoints_dir"  # the run may be moved
    ]
    if not origin.run_folder:  # a new run has its own folders, samples and intervals
        before = described.get("settings", {})
        of_interest = [f for f in of_interest if f.metadata["group"] in (DATA, TRAINING)]
    changes = [
        f"{name} {before[name]} -> {now['settings'][name]}"
        for name in (field.name for field in of_interest)
        if name in before.keys() & now["settings"].keys() and before[name] != now["settings"][name]
    ]
    old_data, new_data = described.get("data"), now["data"]
    if old_data and old_data["fingerprint"] != new_data["fingerprint"]:
        texts = [data["description"] for data in (old_data, new_data)]
        other = "other files" if texts[0] == texts[1] else f"{texts[0]} -> {texts[1]}"
        changes.append(f"data: {other}")
    if changes:
        what = origin.run_folder or origin.checkpoint.training_state
        logger.warning("%s was trained with other settings: %s", what, "; ".join(changes))


def report_end(trainer: Trainer, received: list[signal.Signals]) -> Outcome:
    """Say how training ended and what to do next."""
    step, run_folder = trainer.progress.step, trainer.run_folder
    is_complete = trainer.reached_end() and trainer.reported_step == step
    if is_complete or not received:  # a signal may come while the last checkpoint is written
        grids = sorted((run_folder / SAMPLES_NAME).glob("*.png"))
        results = f"the samples are in {grids[-1]}, everything else" if grids else "everything"
        logger.info("finished at step %d; %s is in %s", step, results, run_folder)
        return Outcome(run_folder)
    logger.info(
        "stopped by %s, saved at step %d; to go on: %s --resume_ckpt %s",
        received[0].name, step, trainer.config.command, shlex.quote(str(run_folder)),
    )  # fmt: skip
    return Outcome(run_folder, received[0])
