"""The settings of a training run: one typed object and every check of it.

Nothing here imports torch, so that `--help` and mistakes answer at once. The command line is made
from the fields below by `glide_finetune.arguments`.
"""

import dataclasses
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from glide_finetune.folder_index import check_folder
from glide_finetune.model_options import MODEL_PRESETS, training_options
from glide_finetune.shards import expand_shards
from glide_text2im.defaults import downsampling_factor

DATASET_NAMES = ("laion", "alamy", "generic")
PRECISIONS = ("fp32", "bf16", "fp16")

DATA = "data"
MODEL = "model and checkpoints"
TRAINING = "training"
MEMORY = "precision, memory and speed"
REPORTS = "samples, validation and logging"


class ConfigError(ValueError):
    """A setting that cannot work; the message is one line for the user."""


def flag(
    default: Any, short: str = "", *, group: str, help: str, once: bool = False, **extra: Any
) -> Any:
    """A field of `TrainConfig` together with what its command-line flag needs to know.

    `once` marks what belongs to one start of the program and is never taken over from another
    run's args.json; `extra` goes to `ArgumentParser.add_argument`.
    """
    metadata = {"short": short, "group": group, "help": help, "once": once, "extra": extra}
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class TrainConfig:
    """Every setting of a run, named as its flag. Lengths are pixels, intervals optimizer steps."""

    # fmt: off
    data_dir: str = flag("./data", "-data", group=DATA, metavar="DIR",
        help="folder of images with captions beside them, or of tar shards")
    use_captions: bool = flag(True, "-txt", group=DATA,
        help="train on the captions; --no-use_captions uses all images and empty captions")
    uncond_p: float | None = flag(None, "-p", group=DATA, type=float, metavar="P",
        help="chance of replacing a caption by the empty one, 0 to 1 "
             "(default: 0.2; 0.0 with --train_upsample)")
    side_x: int = flag(64, "-x", group=DATA, metavar="PIXELS",
        help="width of the base image, also for the upsampler, which multiplies it")
    side_y: int = flag(64, "-y", group=DATA, metavar="PIXELS", help="height of the base image")
    resize_ratio: float = flag(0.8, "-crop", group=DATA, metavar="R",
        help="smallest random crop, as a share of the area of the largest crop of that shape")
    random_hflip: bool = flag(False, group=DATA, help="mirror every other image at random")
    num_workers: int | None = flag(None, group=DATA, type=int, metavar="N",
        help="processes that load data (default: one less than the cores, 8 at most)")
    use_webdataset: bool = flag(False, "-wds", group=DATA,
        help="read --data_dir as WebDataset tar shards")
    wds_image_key: str = flag("jpg", "-wds_img", group=DATA, metavar="KEY",
        help="extension of the images in the shards")
    wds_caption_key: str = flag("txt", "-wds_cap", group=DATA, metavar="KEY",
        help="extension of the captions in the shards")
    wds_dataset_name: str = flag("laion", "-wds_name", group=DATA, choices=DATASET_NAMES,
        help="whose metadata the shards carry; generic: none is read")

    model_preset: str = flag("glide", group=MODEL, choices=tuple(MODEL_PRESETS),
        help="size of the model: glide has the released sizes, small about 25 M parameters")
    model_options: dict[str, Any] = flag({}, group=MODEL, nargs="+", metavar="KEY=VALUE",
        help="options of the model that differ from the preset's")
    init: str = flag("pretrained", group=MODEL, choices=("pretrained", "scratch"),
        help="start from OpenAI's weights or from random ones")
    train_upsample: bool = flag(False, "-upsample", group=MODEL,
        help="train the upsampler instead of the base model")
    upscale_factor: int = flag(4, "-upscale", group=MODEL, metavar="N",
        help="how many times larger than the base image the upsampler's image is")
    resume_ckpt: str = flag("", "-resume", group=MODEL, metavar="PATH", once=True,
        help="a run's folder: go on in it; auto: the newest run in --checkpoints_dir, or a fresh "
             "one; a .pt file: a new run from it")
    weights_only: bool = flag(False, group=MODEL, once=True,
        help="with --resume_ckpt FILE.pt: take the weights and leave the training state beside it")
    checkpoints_dir: str = flag("./glide_checkpoints/", "-ckpt", group=MODEL, metavar="DIR",
        help="where the numbered runs are")
    save_checkpoint_interval: int = flag(1000, group=MODEL, metavar="N",
        help="steps between checkpoints; one more is written at the end")
    keep_checkpoints: int = flag(5, group=MODEL, metavar="N",
        help="newest checkpoints of this run to keep, 0 for all")
    config: str = flag("", group=MODEL, metavar="FILE", once=True,
        help="args.json of another run, whose settings become the defaults of this one")

    batch_size: int = flag(1, "-bs", group=TRAINING, metavar="N", help="images in one pass")
    gradient_accumulation_steps: int = flag(1, group=TRAINING, metavar="N",
        help="passes whose gradients make up one optimizer step")
    epochs: int = flag(20, "-epochs", group=TRAINING, metavar="N", help="passes over the data")
    max_steps: int = flag(0, group=TRAINING, metavar="N",
        help="end after this optimizer step whatever --epochs says, 0 for no limit")
    learning_rate: float = flag(2e-5, "-lr", group=TRAINING, metavar="LR", help="of AdamW")
    lr_schedule: str = flag("constant", group=TRAINING, choices=("constant", "cosine"),
        help="after the warm-up: stay, or fall to zero at the last step")
    warmup_steps: int = flag(0, group=TRAINING, metavar="N",
        help="steps over which the learning rate rises from zero")
    adam_weight_decay: float = flag(0.0, "-adam_wd", group=TRAINING, metavar="WD",
        help="weight decay of AdamW")
    max_grad_norm: float = flag(1.0, group=TRAINING, metavar="NORM",
        help="longer gradients are shortened to this norm, 0 for no limit")
    ema_rate: float = flag(0.0, group=TRAINING, metavar="RATE",
        help="decay of the moving average of the weights, such as 0.9999; 0 for none")
    vlb_weight: float = flag(0.001, group=TRAINING, metavar="W",
        help="weight of the variational bound, which trains the variance; 0: noise only")
    loss_weighting: str = flag("none", group=TRAINING, choices=("none", "min_snr", "soft_min_snr"),
        help="weighting of the noise error over the timesteps")
    freeze_transformer: bool = flag(False, "-fz_xt", group=TRAINING,
        help="leave the text encoder as it is")
    freeze_diffusion: bool = flag(False, "-fz_unet", group=TRAINING,
        help="leave the UNet as it is, train only the text encoder")
    seed: int = flag(0, "-seed", group=TRAINING, metavar="N", help="of all random choices")

    precision: str = flag("fp32", group=MEMORY, choices=PRECISIONS,
        help="of the arithmetic; weights, gradients and optimizer stay float32")
    use_fp16: bool = flag(False, "-fp16", group=MEMORY, help="the same as --precision fp16")
    activation_checkpointing: bool = flag(False, "-grad_ckpt", group=MEMORY,
        help="compute activations again in the backward pass instead of keeping them")
    device: str = flag("", "-dev", group=MEMORY, metavar="NAME",
        help="cpu, cuda, cuda:1 … (default: the best there is)")
    cudnn_benchmark: bool = flag(False, "-cudnn", group=MEMORY,
        help="let cuDNN search for its fastest kernels")

    log_frequency: int = flag(100, "-freq", group=REPORTS, metavar="N",
        help="steps between sample grids, 0 for none")
    test_prompt: str = flag("a group of skiers are preparing to ski down a mountain.", "-prompt",
        group=REPORTS, metavar="TEXT", help="caption of the samples")
    prompt_file: str = flag("", group=REPORTS, metavar="FILE",
        help="captions of the samples, one a line, instead of --test_prompt")
    test_batch_size: int = flag(1, "-tbs", group=REPORTS, metavar="N", help="samples a caption")
    test_guidance_scale: float = flag(4.0, "-tgs", group=REPORTS, metavar="SCALE",
        help="classifier-free guidance of the samples, 1 for none")
    image_to_upsample: str = flag("", "-lowres", group=REPORTS, metavar="FILE",
        help="low-resolution image for the upsampler's samples "
             "(default: a training image that is held back)")
    val_data_dir: str = flag("", group=REPORTS, metavar="DIR", help="images to validate on")
    val_fraction: float = flag(0.0, group=REPORTS, metavar="F",
        help="share of --data_dir that is held back to validate on")
    eval_interval: int = flag(500, group=REPORTS, metavar="N", help="steps between validations")
    project_name: str = flag("glide-finetune", "-name", group=REPORTS, metavar="NAME",
        help="wandb project; WANDB_MODE=disabled turns wandb off")
    dry_run: bool = flag(False, group=REPORTS, once=True,
        help="print the settings as they come out, and train nothing")
    demo: bool = flag(False, group=REPORTS, once=True,
        help="draw a small captioned set and train a small model on it, in minutes on a CPU")
    # fmt: on

    @property
    def model_type(self) -> str:
        """Which of the released architectures is trained."""
        return "upsample" if self.train_upsample else "base"

    @property
    def options(self) -> dict[str, Any]:
        """The options of the model to train, every key of `model_and_diffusion_defaults()`."""
        return training_options(self.model_type, self.model_preset, self.model_options)

    @property
    def image_width(self) -> int:
        """Width in pixels of the images the model draws."""
        return self.side_x * (self.upscale_factor if self.train_upsample else 1)

    @property
    def image_height(self) -> int:
        """Height in pixels of the images the model draws."""
        return self.side_y * (self.upscale_factor if self.train_upsample else 1)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values, the content of args.json."""
        return dataclasses.asdict(self)


def complete(config: TrainConfig) -> TrainConfig:
    """`config` with the defaults filled in that depend on other settings."""
    if config.use_fp16 and config.precision == "bf16":
        raise ConfigError("--use_fp16 means --precision fp16, but --precision is bf16: give one")
    precision = "fp16" if config.use_fp16 else config.precision
    uncond_p = config.uncond_p
    if uncond_p is None:
        uncond_p = 0.0 if config.train_upsample else 0.2
    return dataclasses.replace(
        config, precision=precision, use_fp16=precision == "fp16", uncond_p=uncond_p
    )


def check(config: TrainConfig) -> None:
    """Hold every setting against its range, the others and the files it names.

    Raises:
        ConfigError: about the first setting that cannot work.
    """
    _check_ranges(config)
    _check_combinations(config)
    _check_sizes(config)
    _check_files(config)


# name: (lowest, highest); what is open at an end says so by a number just inside
_AT_LEAST_ONE = (1, math.inf)
_NOT_NEGATIVE = (0, math.inf)
_SHARE = (0.0, 1.0)
RANGES: dict[str, tuple[float, float]] = {
    "batch_size": _AT_LEAST_ONE,
    "gradient_accumulation_steps": _AT_LEAST_ONE,
    "epochs": _AT_LEAST_ONE,
    "test_batch_size": _AT_LEAST_ONE,
    "side_x": _AT_LEAST_ONE,
    "side_y": _AT_LEAST_ONE,
    "upscale_factor": _AT_LEAST_ONE,
    "save_checkpoint_interval": _AT_LEAST_ONE,
    "eval_interval": _AT_LEAST_ONE,
    "max_steps": _NOT_NEGATIVE,
    "warmup_steps": _NOT_NEGATIVE,
    "keep_checkpoints": _NOT_NEGATIVE,
    "log_frequency": _NOT_NEGATIVE,
    "num_workers": _NOT_NEGATIVE,
    "learning_rate": _NOT_NEGATIVE,
    "adam_weight_decay": _NOT_NEGATIVE,
    "max_grad_norm": _NOT_NEGATIVE,
    "vlb_weight": _NOT_NEGATIVE,
    "test_guidance_scale": _NOT_NEGATIVE,
    "seed": _NOT_NEGATIVE,
    "uncond_p": _SHARE,
    "resize_ratio": (1e-3, 1.0),
    "ema_rate": (0.0, 1.0 - 1e-9),
    "val_fraction": (0.0, 0.9),
}


def _check_ranges(config: TrainConfig) -> None:
    for name, (low, high) in RANGES.items():
        value = getattr(config, name)
        if value is None:
            continue
        if not low <= value <= high or value == math.inf:
            asked = f"at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
            raise ConfigError(f"--{name} is {value}; give a number {asked}")


def _check_combinations(config: TrainConfig) -> None:
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
    if config.lr_schedule == "cosine" and config.use_webdataset and not config.max_steps:
        raise ConfigError(
            "--lr_schedule cosine needs its last step, which shards do not tell: add --max_steps"
        )
    if config.weights_only and not config.resume_ckpt.endswith(".pt"):
        raise ConfigError("--weights_only goes with --resume_ckpt FILE.pt")
    if config.model_preset != "glide" and config.init == "pretrained" and not config.resume_ckpt:
        raise ConfigError(
            f"there are no released weights for --model_preset {config.model_preset}: "
            "add --init scratch, or --resume_ckpt with weights of that size"
        )
    if config.device and not re.fullmatch(r"cpu|mps|cuda(:\d+)?", config.device):
        raise ConfigError(f"--device {config.device!r} is unknown; give cpu, cuda, cuda:N or mps")


def _check_sizes(config: TrainConfig) -> None:
    try:
        factor = downsampling_factor(config.options["image_size"], config.options["channel_mult"])
    except (AssertionError, ValueError) as error:
        raise ConfigError(f"--model_options: {error}") from None
    for name, side in (("side_x", config.image_width), ("side_y", config.image_height)):
        if side % factor:
            base_step = factor // math.gcd(factor, side // getattr(config, name))
            lower = getattr(config, name) // base_step * base_step
            near = f"{lower} or {lower + base_step}" if lower else f"{base_step}"
            raise ConfigError(
                f"--{name} {getattr(config, name)} cannot be halved often enough for this model: "
                f"give a multiple of {base_step}, such as {near}"
            )


def _check_files(config: TrainConfig) -> None:
    for name in ("prompt_file", "image_to_upsample"):
        path = getattr(config, name)
        if path and not Path(path).is_file():
            raise ConfigError(f"--{name}: there is no file {path}")
    if config.prompt_file and not read_prompts(config):
        raise ConfigError(f"--prompt_file: {config.prompt_file} holds no prompt")
    for name in ("data_dir", "val_data_dir"):
        if getattr(config, name) and not config.demo:
            _check_data(config, name)


def _check_data(config: TrainConfig, name: str) -> None:
    path = getattr(config, name)
    try:
        if config.use_webdataset:
            expand_shards(path)
        else:
            check_folder(path, config.use_captions)
    except ValueError as error:
        raise ConfigError(f"--{name}: {error}") from None


def read_prompts(config: TrainConfig) -> list[str]:
    """The captions of the samples: the lines of --prompt_file, or else --test_prompt."""
    if not config.prompt_file:
        return [config.test_prompt]
    try:
        lines = Path(config.prompt_file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--prompt_file: cannot read {config.prompt_file}: {error}") from None
    return [line.strip() for line in lines if line.strip()]
