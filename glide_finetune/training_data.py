"""The data of a run: batches to train on, images to validate on, one to draw samples from."""

import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from glide_finetune.config import FIELDS, TrainConfig
from glide_finetune.data import fingerprint
from glide_finetune.data.captions import Tokenizer
from glide_finetune.data.dataloading import FolderBatches, ShardBatches, make_dataloader
from glide_finetune.data.folder_dataset import TextImageDataset
from glide_finetune.data.images import read_image
from glide_finetune.data.shard_stream import ShardStream
from glide_finetune.data.validation_split import hold_back, split_validation
from glide_finetune.text_settings import read_skip_words
from glide_finetune.wds_loader import glide_wds_loader

logger = logging.getLogger(__name__)

LAION_LIMITS = (
    "wds_min_size", "wds_min_aspect", "wds_max_aspect", "wds_min_similarity", "wds_allow_nsfw",
)  # fmt: skip
SHARD_LIMITS = ("wds_skip_words", "wds_epoch_samples")

Split = Callable[[TextImageDataset, float, int], tuple[TextImageDataset, TextImageDataset]]


@dataclass(frozen=True)
class TrainingData:
    """What `make_training_data` makes.

    loader: batches, with the keys of their samples last.
    validation: items without keys and without anything random, if there is validation: a local
        dataset or part of one, or shards.
    low_res: (1, 3, side_y, side_x) in [-1, 1], what the samples of an upsampler are made from: the
        image that is asked for, or one that is held back.
    example: the tensors of one item, (tokens, mask, images) or (tokens, mask, low_res, high_res),
        of the validation data if there is any.
    description: one line about it all.
    fingerprint: changes with the names of the images, or the names and sizes of the shards.
    """

    loader: FolderBatches | ShardBatches
    validation: Sequence | ShardStream | None
    low_res: torch.Tensor | None
    example: tuple[torch.Tensor, ...]
    description: str
    fingerprint: str


def make_training_data(
    config: TrainConfig,
    device: torch.device | str,
    *,
    tokenizer: Tokenizer | None = None,
    split: Split = split_validation,
) -> TrainingData:
    """Find and arrange the data that `config` names.

    Args:
        tokenizer: None means GLIDE's own.
        split: divides a local dataset, as `split_validation` does.

    Raises:
        ValueError: nothing usable is there.
    """
    _warn_of_idle_limits(config)
    training = make_dataset(config.data_dir, config, return_keys=True, tokenizer=tokenizer)
    validation, low_res = None, None
    if config.val_data_dir:
        validation = make_dataset(config.val_data_dir, config, tokenizer=tokenizer).for_evaluation()
    elif config.val_fraction:
        training, validation = split(training, config.val_fraction, config.seed)
    if config.image_to_upsample:
        low_res = _image_to_upsample(config)
    elif config.train_upsample:
        training, low_res = _held_back_low_res(training, validation, config.seed)
    # Wrong keys, and filters that let nothing pass, are found before anything else is made.
    example = next(iter(training.for_evaluation()))
    if validation is not None:
        example = next(iter(validation.for_evaluation()))
    if not isinstance(training, ShardStream) and len(training) < config.batch_size:
        logger.warning(
            "--batch_size is %d, but there are %d samples: a batch holds them several times, in "
            "other crops", config.batch_size, len(training),
        )  # fmt: skip
    loader = make_dataloader(
        training,
        config.batch_size,
        seed=config.seed,
        num_workers=config.num_workers,
        device=device,
        epoch_samples=config.wds_epoch_samples,
        batches_a_step=config.gradient_accumulation_steps,
    )
    return TrainingData(
        loader,
        validation,
        low_res,
        tuple(example[: 4 if config.train_upsample else 3]),
        _describe(config, training, validation),
        _fingerprint(training),
    )


def _warn_of_idle_limits(config: TrainConfig) -> None:
    """Tell of limits on what is trained on that nothing reads."""
    if not config.use_webdataset:
        idle, read_by = LAION_LIMITS + SHARD_LIMITS, "--use_webdataset"
    elif config.wds_dataset_name != "laion":
        idle, read_by = LAION_LIMITS, "--wds_dataset_name laion"
    else:
        return
    for name in idle:
        if getattr(config, name) != FIELDS[name].default:
            logger.warning("--%s does nothing without %s", name, read_by)


def make_dataset(
    place: str,
    config: TrainConfig,
    *,
    return_keys: bool = False,
    tokenizer: Tokenizer | None = None,
) -> TextImageDataset | ShardStream:
    """All samples of the folder or the shards at `place`, as `config` asks for them.

    Raises:
        ValueError: nothing is there.
    """
    make = _shards if config.use_webdataset else _folder
    return make(
        place,
        config,
        text_ctx_len=config.text_ctx,
        return_keys=return_keys,
        tokenizer=tokenizer,
    )


def _folder(folder: str, config: TrainConfig, **keywords: Any) -> TextImageDataset:
    return TextImageDataset(
        folder,
        side_x=config.side_x,
        side_y=config.side_y,
        resize_ratio=config.resize_ratio,
        shuffle=True,
        uncond_p=config.uncond_p,
        use_captions=config.use_captions,
        enable_glide_upsample=config.train_upsample,
        upscale_factor=config.upscale_factor,
        seed=config.seed,
        random_hflip=config.random_hflip,
        **keywords,
    )


def _shards(urls: str, config: TrainConfig, **keywords: Any) -> ShardStream:
    min_size = config.wds_min_size
    return glide_wds_loader(
        urls,
        enable_text=config.use_captions,
        image_key=config.wds_image_key,
        caption_key=config.wds_caption_key,
        base_x=config.side_x,
        base_y=config.side_y,
        uncond_p=config.uncond_p,
        nsfw_filter=not config.wds_allow_nsfw,
        ar_lower=config.wds_min_aspect,
        ar_upper=config.wds_max_aspect,
        # pictures that would have to be enlarged teach blur
        min_original_width=config.image_width if min_size is None else min_size,
        min_original_height=config.image_height if min_size is None else min_size,
        enable_upsample=config.train_upsample,
        similarity_threshold_lower=config.wds_min_similarity,
        words_to_skip=read_skip_words(config),
        dataset_name=config.wds_dataset_name,
        upscale_factor=config.upscale_factor,
        seed=config.seed,
        resize_ratio=config.resize_ratio,
        random_hflip=config.random_hflip,
        **keywords,
    )


def _image_to_upsample(config: TrainConfig) -> torch.Tensor:
    path = Path(config.image_to_upsample).expanduser()
    try:
        return read_image(path, (config.side_x, config.side_y))
    except ValueError as error:
        raise ValueError(f"--image_to_upsample: {error}") from None


def _held_back_low_res(
    training: TextImageDataset | ShardStream, validation: Sequence | None, seed: int
) -> tuple[TextImageDataset | ShardStream, torch.Tensor]:
    """The training set less one image, and the low resolution of that image."""
    if isinstance(training, ShardStream):
        (*_, low_res, _, key), *others = itertools.islice(training.for_evaluation(), 2)
        return training.without({key}) if others else training, low_res.unsqueeze(0)
    if validation is None and len(training) > 1:
        training, validation = hold_back(training, 1, seed)
    low_res = (validation or training.for_evaluation())[0][2]
    return training, low_res.unsqueeze(0)


def _fingerprint(training: TextImageDataset | ShardStream) -> str:
    if isinstance(training, ShardStream):
        return fingerprint.of_shards(training.shards)[:16]
    return fingerprint.of_folder(training.keys)[:16]


def _describe(
    config: TrainConfig, training: TextImageDataset | ShardStream, validation: Sequence | None
) -> str:
    size = f"{config.image_width}x{config.image_height}"
    if isinstance(training, ShardStream):
        epoch = f"{config.wds_epoch_samples} samples" if config.wds_epoch_samples else "one pass"
        text = f"{len(training.shards)} shards of {config.data_dir}, at {size}, {epoch} an epoch"
    else:
        text = f"{len(training)} images of {config.data_dir}, at {size}"
    if validation is not None and not isinstance(validation, ShardStream):
        text += f"; {len(validation)} to validate on"
    return text
