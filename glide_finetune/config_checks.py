"""Every check of a run's settings, made before torch is imported or anything is downloaded."""

import dataclasses
import math
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from glide_finetune.atomic_files import existing_part
from glide_finetune.config import ConfigError, TrainConfig
from glide_finetune.data.folder_index import check_folder
from glide_finetune.data.shards import expand_shards, is_named_as_shard
from glide_finetune.demo import DEMO_SETTINGS
from glide_finetune.model_options import (
    can_start_from,
    check_option,
    check_options,
    described_model,
    released_options,
    type_of_model,
)
from glide_finetune.runs import Start, interpret_resume, read_args
from glide_finetune.text_settings import read_prompts, read_skip_words
from glide_text2im.defaults import downsampling_factor


def check(config: TrainConfig) -> None:
    """Hold every setting against its range, the others and the files it names.

    Args:
        config: with its defaults filled in by `complete`.

    Raises:
        ValueError: with one line about the first setting that cannot work.
    """
    start = interpret_resume(config.resume_ckpt, config.checkpoints_dir)
    check_choices(config)
    check_ranges(vars(config))
    check_combinations(config, start)
    _check_model(config)
    _check_start(config, start)
    _check_sides(config)
    check_files(config, start)


def check_choices(config: Any) -> None:
    """ConfigError if a setting with choices, of a dataclass made by `flag`, is none of them."""
    for field in dataclasses.fields(config):
        value, choices = getattr(config, field.name), field.metadata["extra"].get("choices")
        if choices and value not in (field.default, *choices):
            known = ", ".join(choices)
            raise ConfigError(f"--{field.name} is {value!r}; give one of {known}")


class Range(NamedTuple):
    """What a number may be, both ends included, and how to say so."""

    low: float
    high: float
    words: str


_MOST = sys.float_info.max  # leaves out infinity
_LEAST = sys.float_info.min
_FROM_ONE = Range(1, _MOST, "a number of at least 1")
_FROM_ZERO = Range(0, _MOST, "a number of at least 0")
RANGES: dict[str, Range] = {
    "batch_size": Range(1, 2**16, f"a number from 1 to {2**16}"),
    "gradient_accumulation_steps": _FROM_ONE,
    "epochs": _FROM_ONE,
    "test_batch_size": _FROM_ONE,
    "side_x": _FROM_ONE,
    "side_y": _FROM_ONE,
    "upscale_factor": _FROM_ONE,
    "save_checkpoint_interval": _FROM_ONE,
    "eval_interval": _FROM_ONE,
    "max_steps": _FROM_ZERO,
    "warmup_steps": _FROM_ZERO,
    "keep_checkpoints": _FROM_ZERO,
    "log_frequency": _FROM_ZERO,
    "num_workers": _FROM_ZERO,
    "wds_min_size": _FROM_ZERO,
    "wds_min_aspect": _FROM_ZERO,
    "wds_max_aspect": _FROM_ZERO,
    "wds_min_similarity": Range(-1, 1, "a number from -1 to 1"),
    "wds_epoch_samples": _FROM_ZERO,
    "adam_weight_decay": _FROM_ZERO,
    "max_grad_norm": _FROM_ZERO,
    "loss_spike_factor": _FROM_ZERO,
    "vlb_weight": _FROM_ZERO,
    "test_guidance_scale": _FROM_ZERO,
    "learning_rate": Range(_LEAST, _MOST, "a number above 0"),
    "seed": Range(0, 2**63 - 1, "a number from 0 to 2^63 - 1"),
    "uncond_p": Range(0, 1, "a number from 0 to 1"),
    "resize_ratio": Range(_LEAST, 1, "a number above 0, 1 at most"),
    "ema_rate": Range(0, 1 - sys.float_info.epsilon, "a number of at least 0, below 1"),
    "val_fraction": Range(0, 0.9, "a number from 0 to 0.9"),
}


def check_ranges(settings: Mapping[str, object], ranges: Mapping[str, Range] = RANGES) -> None:
    """Hold the numbers among the settings, by their names, against their ranges.

    Raises:
        ValueError: the first that is outside of its range.
    """
    for name, allowed in ranges.items():
        value = settings.get(name)
        # None is chosen later, or no limit; NaN is in no range
        if value is not None and not allowed.low <= value <= allowed.high:
            raise ConfigError(f"--{name} is {value}; give {allowed.words}")


def check_combinations(config: TrainConfig, start: Start) -> None:
    """ConfigError if two settings contradict each other; `start` is what --resume_ckpt means."""
    if config.freeze_transformer and config.freeze_diffusion:
        raise ConfigError(
            "--freeze_transformer and --freeze_diffusion together leave nothing to train: drop one"
        )
    if config.val_data_dir and config.val_fraction:
        raise ConfigError("--val_data_dir and --val_fraction are two ways to validate: give one")
    if config.val_fraction and config.use_webdataset:
        raise ConfigError(
            "--val_fraction needs a folder of images; with --use_webdataset give --val_data_dir"
        )
    if config.image_to_upsample and not config.train_upsample:
        raise ConfigError("--image_to_upsample is for the upsampler: add --train_upsample")
    if config.wds_min_aspect > config.wds_max_aspect:
        raise ConfigError(
            f"--wds_min_aspect is {config.wds_min_aspect}, above --wds_max_aspect "
            f"{config.wds_max_aspect}: no image is both; exchange them"
        )
    if 0 < config.wds_epoch_samples < config.batch_size:
        raise ConfigError(
            f"--wds_epoch_samples is {config.wds_epoch_samples}, which makes no batch of "
            f"{config.batch_size}; give at least that many"
        )
    length_is_known = config.max_steps or config.wds_epoch_samples
    if config.lr_schedule == "cosine" and config.use_webdataset and not length_is_known:
        raise ConfigError(
            "--lr_schedule cosine needs its last step, which shards do not tell: add --max_steps "
            "or --wds_epoch_samples"
        )
    if config.low_memory and config.precision == "fp16":
        raise ConfigError(
            "--low_memory keeps gradients in bf16, for which there is no loss scaling, which fp16 "
            "needs: give --precision bf16 or fp32"
        )
    if config.weights_only and not start.weights:
        raise ConfigError("--weights_only goes with --resume_ckpt FILE.pt")
    check_device(config.device)
    if (processes := os.environ.get("WORLD_SIZE", "")) not in ("", "1"):
        raise ConfigError(
            f"WORLD_SIZE is {processes}, as torchrun sets it, but each process would train a model "
            "of its own: start one process without a launcher"
        )


def check_device(name: str) -> None:
    """ConfigError unless this could be a device, or "" for the best there is."""
    if name and not re.fullmatch(r"cpu|mps|cuda(:\d+)?", name):
        raise ConfigError(f"--device is {name!r}; give cpu, cuda, cuda:N or mps")


def _check_model(config: TrainConfig) -> None:
    decided = {
        "super_res": (config.train_upsample, "--train_upsample decides"),
        "use_fp16": (config.use_fp16, "--precision decides"),
        "inpaint": (config.train_inpaint, "--train_inpaint decides"),
        "cache_text_emb": (False, "captions change in training"),
        "timestep_respacing": ("", "training takes all timesteps"),
    }
    try:
        for key, value in config.model_options.items():
            check_option(key, value)
            if key in decided and value != decided[key][0]:
                raise ValueError(f"{key} cannot be {value!r}, since {decided[key][1]}")
        check_options(config.options)
    except ValueError as error:
        raise ConfigError(f"--model_options: {error}") from None


def _check_start(config: TrainConfig, start: Start) -> None:
    """Whether the first weights will fit the model, as far as can be told without reading them."""
    if start.weights:
        kind, _ = described_model(start.weights)
        if not can_start_from(kind, config.model_type):
            raise ConfigError(
                f"--resume_ckpt: {start.weights} is a model of kind {kind}, but one of kind "
                f"{config.model_type} is to be trained; {_way_to_train(kind, config)}"
            )
    elif start.run_folder:
        saved = read_args(start.run_folder)
        kind = type_of_model(
            upsample=saved.get("train_upsample", False), inpaint=saved.get("train_inpaint", False)
        )
        if kind != config.model_type:
            raise ConfigError(
                f"--resume_ckpt: the run {start.run_folder} trains a model of kind {kind}, not one "
                f"of kind {config.model_type}; {_way_to_train(kind, config)}, or start from a .pt "
                "file"
            )
    elif config.init == "pretrained":
        released = released_options(config.model_type)
        other = [
            key
            for key, value in config.options.items()
            if value != released[key] and key not in ("dropout", "use_fp16")
        ]
        if other:
            asked = f"--model_options {', '.join(other)}"
            if config.model_preset != "glide":
                asked = f"--model_preset {config.model_preset}"
            raise ConfigError(
                f"{asked}: no weights are released for such a model; add --init scratch, or "
                "--resume_ckpt with weights that fit"
            )


def _way_to_train(kind: str, config: TrainConfig) -> str:
    """Which flags of `config` to change for a model of another kind."""
    changes = [
        f"{'add' if wanted else 'leave out'} {flag}"
        for flag, given, wanted in (
            ("--train_upsample", config.train_upsample, kind.startswith("upsample")),
            ("--train_inpaint", config.train_inpaint, kind.endswith("-inpaint")),
        )
        if given != wanted
    ]
    return " and ".join(changes) or "give another file"


def _check_sides(config: TrainConfig) -> None:
    factor = downsampling_factor(config.options["image_size"], config.options["channel_mult"])
    step = factor // math.gcd(factor, config.scale)  # of the base image's sides
    for name in ("side_x", "side_y"):
        side = getattr(config, name)
        if side % step:
            below = side // step * step
            near = f"{below} or {below + step}" if below else f"{step}"
            raise ConfigError(
                f"--{name} is {side}, which this model cannot take; give a multiple of {step}, "
                f"such as {near}"
            )


def check_files(config: TrainConfig, start: Start) -> None:
    """ConfigError if a file or folder that is named cannot be used; `start` is what --resume_ckpt
    means."""
    made_later = DEMO_SETTINGS if config.demo else {}
    if config.prompt_file != made_later.get("prompt_file"):
        read_prompts(config)
    read_skip_words(config)
    if config.image_to_upsample:
        image_size("image_to_upsample", config.image_to_upsample)
    for name in ("data_dir", "val_data_dir"):
        path = getattr(config, name)
        if path != made_later.get(name) and (path or name == "data_dir"):
            _check_data(config, name, path)
    if start.run_folder:  # which need not lie in --checkpoints_dir, if it was moved
        check_writable("resume_ckpt", str(start.run_folder))
    else:
        check_writable("checkpoints_dir", config.checkpoints_dir)
    if not (config.use_captions or config.use_webdataset):
        data, runs = (
            Path(p).expanduser().resolve() for p in (config.data_dir, config.checkpoints_dir)
        )
        if runs.is_relative_to(data):
            raise ConfigError(
                f"--checkpoints_dir: {runs} lies in the data, and without captions the samples "
                "that are drawn there would be trained on; give a folder elsewhere"
            )


def image_size(name: str, given: str) -> tuple[int, int]:
    """(width, height) of an image file as it is to be seen; ConfigError, naming the flag, if it
    cannot be read."""
    from glide_finetune.data.image_files import readable_size  # here, as it takes a while

    path = Path(given).expanduser()
    try:
        return readable_size(path)
    except ValueError as error:
        raise ConfigError(f"--{name}: cannot read {path}: {error}") from None


def _check_data(config: TrainConfig, name: str, path: str) -> None:
    try:
        if config.use_webdataset:
            expand_shards(path)
        else:
            check_folder(path, config.use_captions)
    except (ValueError, OSError) as error:
        if config.dry_run and Path(path).expanduser().is_dir():
            return  # its report tells so itself, after the settings
        hint = ""
        if not config.use_webdataset and _holds_shards(path):
            hint = "; to train on tar shards add --use_webdataset"
        raise ConfigError(f"--{name}: {error}{hint}") from None


def _holds_shards(path: str) -> bool:
    """Whether `path` is a shard, or a folder with a shard in it."""
    folder = Path(path).expanduser()
    try:
        return is_named_as_shard(folder) or any(map(is_named_as_shard, folder.iterdir()))
    except OSError:  # no folder, or none that can be read
        return False


def check_writable(name: str, path: str) -> None:
    """ConfigError, naming the flag, unless the folder can be written to or made."""
    existing = existing_part(Path(path))
    if not existing.is_dir():
        raise ConfigError(f"--{name}: {existing} is a file, not a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(f"--{name}: {existing} cannot be written to; give another one")
