"""A run from its settings to its last checkpoint: model, data, trainer, and what is around them."""

import contextlib
import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import torch

from glide_finetune import demo
from glide_finetune.checkpoints import CheckpointFiles, files_beside, newest_checkpoint
from glide_finetune.config import TrainConfig
from glide_finetune.glide_util import load_model, read_image
from glide_finetune.metrics import MetricsLog
from glide_finetune.optimization import make_optimizer
from glide_finetune.runs import Start, create_run, interpret_resume, write_args
from glide_finetune.samples import SampleDrawer
from glide_finetune.trainer import Trainer
from glide_finetune.training_data import TrainingData, make_training_data
from glide_finetune.validation import Validator

logger = logging.getLogger(__name__)


def run(config: TrainConfig) -> Path:
    """Train as `config` says; returns the folder of the run.

    Raises:
        ValueError, OSError, RuntimeError: with one line for the user, about data, weights or
            numbers that make training impossible.
    """
    if config.demo:
        demo.prepare(config)
    device = pick_device(config.device)
    torch.backends.cudnn.benchmark = config.cudnn_benchmark
    torch.manual_seed(config.seed)

    start = interpret_resume(config.resume_ckpt, config.checkpoints_dir)
    checkpoint = find_checkpoint(start)
    model, diffusion, options = load_model(
        str(checkpoint.weights) if checkpoint else "",
        config.use_fp16,
        config.freeze_transformer,
        config.freeze_diffusion,
        config.activation_checkpointing,
        config.model_type,
        init=config.init,
        model_options=model_options(config, checkpoint),
        device=device,
    )
    data = make_training_data(config, options, device)
    run_folder = start.run_dir or create_run(config.checkpoints_dir)
    write_args(run_folder, config.to_dict())
    going_on = checkpoint if start.run_dir else None
    log = MetricsLog(
        run_folder,
        resume_step=going_on.step if going_on else None,
        project=config.project_name,
        config=config.to_dict(),
    )
    trainer = Trainer(
        model,
        diffusion,
        make_optimizer(model, config.learning_rate, config.adam_weight_decay),
        config,
        options=options,
        device=device,
        run_folder=run_folder,
        log=log,
        draw_samples=sample_drawer(config, options, run_folder, data),
        validate=data.validation and Validator(data.validation, config, diffusion.num_timesteps),
        trained_from=str(checkpoint.weights) if checkpoint else config.init,
    )
    if checkpoint and checkpoint.training_state and not config.weights_only:
        trainer.restore(checkpoint)
    announce(trainer, data)
    with contextlib.closing(log), stopping_on_signals(trainer):
        trainer.train(data.loader)
    if trainer.stop_requested:
        logger.info(
            "stopped at step %d; to go on: python train_glide.py --resume_ckpt %s",
            trainer.progress.step, run_folder,
        )  # fmt: skip
    else:
        logger.info("finished at step %d; everything is in %s", trainer.progress.step, run_folder)
    return run_folder


def pick_device(name: str) -> torch.device:
    """The device called `name`, or for "" the best there is.

    Raises:
        ValueError: CUDA is asked for and not there.
    """
    if not name:
        if torch.cuda.is_available():
            name = "cuda"
        else:
            name = "mps" if torch.backends.mps.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"--device {name}: torch sees {torch.cuda.device_count()} CUDA devices here; "
            "give another one or leave the flag out"
        )
    return device


def find_checkpoint(start: Start) -> CheckpointFiles | None:
    """What a run starts from: the newest whole checkpoint of the run it goes on in, or a file."""
    if start.run_dir:
        return newest_checkpoint(start.run_dir)
    return files_beside(start.weights) if start.weights else None


def model_options(config: TrainConfig, checkpoint: CheckpointFiles | None) -> dict:
    """The options to build the model with: those a checkpoint was trained with, if it tells.

    Raises:
        ValueError: the checkpoint is of another kind of model.
    """
    if not checkpoint or not checkpoint.description:
        return config.options
    kind = checkpoint.description["kind"]
    if kind != config.model_type:
        raise ValueError(
            f"{checkpoint.weights} is a model of kind {kind}, but {config.model_type} is to be "
            f"trained: {'add' if kind == 'upsample' else 'leave out'} --train_upsample"
        )
    return {**checkpoint.description["model_options"], **config.model_options}


def sample_drawer(
    config: TrainConfig, options: dict, run_folder: Path, data: TrainingData
) -> SampleDrawer | None:
    """What draws the samples of the run; None if there shall be none."""
    if not config.log_frequency:
        return None
    low_res = data.low_res
    if config.image_to_upsample:
        low_res = read_image(config.image_to_upsample, (config.side_x, config.side_y))
    return SampleDrawer(config, options, run_folder / "samples", low_res)


def announce(trainer: Trainer, data: TrainingData) -> None:
    """Say in a few lines what is about to happen."""
    count = sum(p.numel() for p in trainer.model.parameters())
    trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    logger.info(
        "%s model, %.1f M parameters, %.1f M of them trained in %s on %s",
        trainer.config.model_type, count / 1e6, trainable / 1e6,
        trainer.config.precision, trainer.device,
    )  # fmt: skip
    logger.info("data: %s", data.description)
    logger.info("run: %s, from step %d", trainer.run_folder, trainer.progress.step)


@contextlib.contextmanager
def stopping_on_signals(trainer: Trainer) -> Iterator[None]:
    """While open, SIGINT, SIGTERM and SIGUSR1 end training after the current step; a second
    Ctrl-C ends it at once."""

    def stop(number: int, frame) -> None:
        trainer.stop_requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        # the loop may be in the middle of a print, so no logging here
        os.write(2, b"\nstopping after this step; press Ctrl-C again to leave at once\n")

    names = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGUSR1"):  # not on Windows
        names.append(signal.SIGUSR1)
    before = {name: signal.signal(name, stop) for name in names}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
