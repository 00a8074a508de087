"""What a run goes on from: one of its own checkpoints, one that is given, or nothing."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from glide_finetune.atomic_files import read_json
from glide_finetune.checkpoints import (
    CheckpointFiles,
    files_beside,
    newest_to_go_on_from,
)
from glide_finetune.config import TrainConfig
from glide_finetune.model_options import description_path
from glide_finetune.runs import Start, read_args
from glide_finetune.weights import kind_of_weights, may_be_widened, read_weights

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Origin:
    """The files that a training process starts from, as they are found under the lock of the run.

    run_folder: the run to go on in; None makes a new one.
    checkpoint: where weights, and perhaps the training state, come from; None follows `init`.
    checkpoint_is_own: whether it is one of that run's own.
    first: the settings `resume_ckpt` and `weights_only` that the run began with, which it needs
        again if it stops before its first checkpoint.
    settings: those that the run was last started with; empty for a new one.
    damaged: the weights files of newer checkpoints of the run, which are passed over.
    """

    run_folder: Path | None = None
    checkpoint: CheckpointFiles | None = None
    checkpoint_is_own: bool = False
    first: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    damaged: tuple[Path, ...] = ()

    @property
    def brings_training_state(self) -> bool:
        """Whether optimizer and step come along with the weights."""
        if not (self.checkpoint and self.checkpoint.training_state):
            return False
        return self.checkpoint_is_own or not self.first["weights_only"]

    @property
    def description(self) -> dict[str, Any]:
        """The JSON beside the checkpoint; empty if there is none that can be read."""
        if self.checkpoint is None:
            return {}
        try:
            return read_json(description_path(self.checkpoint.weights))
        except ValueError:
            return {}


def find_origin(config: TrainConfig, start: Start) -> Origin:
    """What the training process goes on from at this moment; of a run the newest whole checkpoint.

    Args:
        start: what `--resume_ckpt` of `config` means.

    Raises:
        ValueError: the run has checkpoints, but all of them are damaged, or those given are.
    """
    settings: dict[str, Any] = {}
    first = {"resume_ckpt": "", "weights_only": config.weights_only}
    if start.weights:
        first["resume_ckpt"] = str(start.weights.resolve())
    if start.run_folder:
        settings = read_args(start.run_folder)
        first = {name: settings.get(name, value) for name, value in first.items()}
        own, damaged = newest_to_go_on_from(start.run_folder)
        _tell_of_damage(start.run_folder, own, damaged)
        if own:
            return Origin(start.run_folder, own, True, first, settings, tuple(damaged))
    given = files_beside(Path(first["resume_ckpt"])) if first["resume_ckpt"] else None
    if given:
        given.check_bytes(
            with_ema=config.ema_rate > 0, with_training_state=not first["weights_only"]
        )
        if not given.training_state and not first["weights_only"]:
            logger.info("there is no training state of %s: steps count from 0", given.weights)
    return Origin(start.run_folder, given, False, first, settings)


def _tell_of_damage(
    run_folder: Path, own: CheckpointFiles | None, damaged: Mapping[Path, str]
) -> None:
    if not damaged:
        return
    told = "; ".join(f"of {weights.name}, {damage}" for weights, damage in damaged.items())
    if own:
        logger.warning(
            "the run goes on from step %d, since newer checkpoints are damaged: %s", own.step, told
        )
        return
    weights = next((path for path in reversed(damaged) if path.exists()), None)
    instead = f"start a new run with --resume_ckpt {weights}, " if weights else ""
    raise ValueError(
        f"{run_folder} has no checkpoint that is whole: {told}; put back what is missing, {instead}"
        "or delete its checkpoints to train it from its beginning"
    )


def without_state_if_widened(origin: Origin, config: TrainConfig) -> Origin:
    """`origin`, without its training state if an inpainting model starts from weights of the kind
    that knows nothing of masks: the moments would not fit a wider convolution. That is logged.

    Raises:
        ValueError: the weights cannot be read, or are never to learn of masks.
    """
    checkpoint = origin.checkpoint
    if not (checkpoint and config.train_inpaint):
        return origin
    weights = read_weights(checkpoint.weights)
    if not may_be_widened(weights, config.model_type):
        return origin
    kind = kind_of_weights(weights)
    if config.freeze_diffusion:
        raise ValueError(
            f"--freeze_diffusion: {checkpoint.weights} is a model of kind {kind}, whose UNet has "
            "yet to learn what a mask is; leave the flag out"
        )
    logger.info(
        "%s, a model of kind %s, becomes one of kind %s: its weights alone are taken, and the "
        "first convolution gets channels of zeros for the known pixels and the mask",
        checkpoint.weights, kind, config.model_type,
    )  # fmt: skip
    return replace(origin, checkpoint=replace(checkpoint, training_state=None))
