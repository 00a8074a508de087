"""The settings of a training run, as one typed object.

Nothing here imports torch, so that `--help` and mistakes answer at once. `glide_finetune.arguments`
makes the command line from the fields below, `glide_finetune.config_checks` checks their values.
"""

import dataclasses
import os
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from glide_finetune.data.shards import is_remote
from glide_finetune.model_options import MODEL_PRESETS, training_options, type_of_model
from glide_finetune.sampler_options import SAMPLERS

DATASET_NAMES = ("laion", "alamy", "generic")
PRECISIONS = ("fp32", "bf16", "fp16")
LOSS_WEIGHTINGS = ("none", "min_snr", "soft_min_snr")

START = "how to start"
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
    if isinstance(default, dict | list):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class TrainConfig:
    """Every setting of a run, named as its flag. Lengths are pixels, intervals optimizer steps."""

    # fmt: off
    demo: bool = flag(False, group=START, once=True,
        help="draw a small captioned set and train a small model on it, in minutes on a CPU")
    dry_run: bool = flag(False, group=START, once=True,
        help="train nothing: print the settings as they come out, then what is wrong with the "
             "data, of which some is drawn into CHECKPOINTS_DIR/dry_run, then what the run will "
             "cost in memory, time and disk")

    data_dir: str = flag("./data", "-data", group=DATA, metavar="DIR",
        help="folder of images with captions beside them; with --use_webdataset a folder of tar "
             "shards, a glob, a pattern {0000..0099}.tar, a text file of these, a URL or pipe:CMD")
    use_captions: bool = flag(True, "-txt", group=DATA,
        help="train on the captions; --no-use_captions uses all images and empty captions")
    uncond_p: float | None = flag(None, "-p", group=DATA, metavar="P",
        help="chance of replacing a caption by the empty one, 0 to 1 "
             "(default: 0.2; 0.0 with --train_upsample)")
    side_x: int = flag(64, "-x", group=DATA, metavar="PIXELS",
        help="width of the base image, also for the upsampler, which multiplies it")
    side_y: int = flag(64, "-y", group=DATA, metavar="PIXELS", help="height of the base image")
    resize_ratio: float = flag(0.8, "-crop", group=DATA, metavar="R",
        help="smallest random crop, as a share of the area of the largest crop of that shape")
    random_hflip: bool = flag(False, group=DATA, help="mirror each image with a chance of one half")
    num_workers: int | None = flag(None, group=DATA, metavar="N",
        help="processes that load data (default: one less than the cores, 8 at most)")
    use_webdataset: bool = flag(False, "-wds", group=DATA,
        help="read --data_dir as WebDataset tar shards")
    wds_image_key: str = flag("jpg", "-wds_img", group=DATA, metavar="KEY",
        help="extension of the images in the shards")
    wds_caption_key: str = flag("txt", "-wds_cap", group=DATA, metavar="KEY",
        help="extension of the captions in the shards")
    wds_dataset_name: str = flag("laion", "-wds_name", group=DATA, choices=DATASET_NAMES,
        help="whose metadata the shards carry; generic: nothing is left out by them")
    wds_min_size: int | None = flag(None, group=DATA, metavar="PIXELS",
        help="smallest original width and height in LAION's metadata "
             "(default: those of the images to train on)")
    wds_min_aspect: float = flag(0.5, group=DATA, metavar="R",
        help="smallest original width / height in LAION's metadata")
    wds_max_aspect: float = flag(2.0, group=DATA, metavar="R",
        help="largest original width / height in LAION's metadata")
    wds_min_similarity: float | None = flag(None, group=DATA, metavar="S",
        help="lowest similarity of image and caption in LAION's metadata, such as 0.3 "
             "(default: no limit)")
    wds_allow_nsfw: bool = flag(False, group=DATA,
        help="keep what LAION's metadata rates as not safe for work")
    wds_skip_words: str = flag("", group=DATA, metavar="FILE",
        help="words and phrases, one a line; captions with any of them are left out")
    wds_epoch_samples: int = flag(0, group=DATA, metavar="N",
        help="samples of an epoch, for which shards are read again and again or cut short; "
             "0: an epoch is one pass over them")

    model_preset: str = flag("glide", group=MODEL, choices=tuple(MODEL_PRESETS),
        help="size of the model: glide has the released sizes, small about 25 M parameters; "
             "tiny is for tests")
    model_options: dict[str, Any] = flag({}, group=MODEL, nargs="+", metavar="KEY=VALUE",
        help="options of the model that differ from the preset's")
    init: str = flag("pretrained", group=MODEL, choices=("pretrained", "scratch"),
        help="start from OpenAI's weights or from random ones")
    train_upsample: bool = flag(False, "-upsample", group=MODEL,
        help="train the upsampler instead of the base model")
    train_inpaint: bool = flag(False, group=MODEL,
        help="train to fill in erased regions of pictures: the inpainting model, or with "
             "--train_upsample its upsampler")
    upscale_factor: int = flag(4, "-upscale", group=MODEL, metavar="N",
        help="how many times larger than the base image the upsampler's image is")
    resume_ckpt: str = flag("", "-resume", group=MODEL, metavar="PATH", once=True,
        help="a run's folder: go on in it; auto: the newest run in --checkpoints_dir, or a fresh "
             "one; a .pt file: a new run from it, which takes the training state beside it and "
             "counts its steps on, but goes through the data for --epochs of its own")
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
        help="end after this optimizer step, unless --epochs ends the run before; 0 for no limit")
    learning_rate: float = flag(2e-5, "-lr", group=TRAINING, metavar="LR", help="of AdamW")
    lr_schedule: str = flag("constant", group=TRAINING, choices=("constant", "cosine"),
        help="after the warm-up: stay, or fall to zero at the last step")
    warmup_steps: int = flag(0, group=TRAINING, metavar="N",
        help="steps over which the learning rate rises from zero")
    adam_weight_decay: float = flag(0.0, "-adam_wd", group=TRAINING, metavar="WD",
        help="weight decay of AdamW")
    max_grad_norm: float = flag(1.0, group=TRAINING, metavar="NORM",
        help="longer gradients are shortened to this norm, 0 for no limit")
    loss_spike_factor: float = flag(0.0, group=TRAINING, metavar="F",
        help="skip steps whose loss is more than F times its running mean, 0 for never")
    ema_rate: float = flag(0.0, group=TRAINING, metavar="RATE",
        help="decay of the moving average of the weights, such as 0.9999; 0 for none")
    vlb_weight: float = flag(0.001, group=TRAINING, metavar="W",
        help="weight of the variational bound, which trains the variance; 0: noise only")
    loss_weighting: str = flag("none", group=TRAINING, choices=LOSS_WEIGHTINGS,
        help="weighting of the noise error over the timesteps")
    freeze_transformer: bool = flag(False, "-fz_xt", group=TRAINING,
        help="leave the text encoder as it is")
    freeze_diffusion: bool = flag(False, "-fz_unet", group=TRAINING,
        help="leave the UNet as it is, train only the text encoder")
    seed: int = flag(0, "-seed", group=TRAINING, metavar="N", help="of all random choices")

    precision: str = flag("fp32", group=MEMORY, choices=PRECISIONS,
        help="of the arithmetic; weights, gradients and optimizer stay float32, but for "
             "--low_memory")
    low_memory: bool = flag(False, group=MEMORY,
        help="keep weights, gradients and the optimizer's moments in bf16, 8 bytes a parameter "
             "instead of 16, rounded at random so that small updates still count; best with "
             "--precision bf16, since fp32 makes float32 copies of the weights in each pass. The "
             "gradients of many accumulated passes lose digits")
    use_fp16: bool = flag(False, "-fp16", group=MEMORY, help="the same as --precision fp16")
    activation_checkpointing: bool = flag(False, "-grad_ckpt", group=MEMORY,
        help="compute activations again in the backward pass instead of keeping them")
    compile: bool = flag(False, group=MEMORY,
        help="compile the training step, which takes minutes at the start; results differ by "
             "rounding, and on CUDA dropout leaves out other numbers")
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
    test_sampler: str = flag("", group=REPORTS, choices=tuple(SAMPLERS), metavar="NAME",
        help=f"how the samples are drawn: {', '.join(SAMPLERS)} (default: dpm++2m; ddim with "
             "--train_upsample)")
    image_to_upsample: str = flag("", "-lowres", group=REPORTS, metavar="FILE",
        help="low-resolution image for the upsampler's samples "
             "(default: a training image that is held back)")
    val_data_dir: str = flag("", group=REPORTS, metavar="DIR",
        help="images to validate on, shards with --use_webdataset")
    val_fraction: float = flag(0.0, group=REPORTS, metavar="F",
        help="share of --data_dir that is held back to validate on")
    eval_interval: int = flag(500, group=REPORTS, metavar="N", help="steps between validations")
    project_name: str = flag("glide-finetune", "-name", group=REPORTS, metavar="NAME",
        help="wandb project; WANDB_MODE=disabled turns wandb off")
    # fmt: on

    @property
    def program(self) -> str:
        """How the program that these settings are for calls itself in its messages."""
        return "train_glide.py"

    @property
    def command(self) -> str:
        """What starts the program that these settings are for."""
        return as_started("python train_glide.py")

    @property
    def model_type(self) -> str:
        """Which of the released architectures is trained."""
        return type_of_model(upsample=self.train_upsample, inpaint=self.train_inpaint)

    @property
    def options(self) -> dict[str, Any]:
        """The options of the model to train, every key of `model_and_diffusion_defaults()`."""
        return training_options(self.model_type, self.model_preset, self.model_options)

    @property
    def text_ctx(self) -> int:
        """How many tokens of a caption the model reads."""
        return self.options["text_ctx"]

    @property
    def scale(self) -> int:
        """How many times larger than the base image the images are that the model draws."""
        return self.upscale_factor if self.train_upsample else 1

    @property
    def image_width(self) -> int:
        """Width in pixels of the images the model draws."""
        return self.side_x * self.scale

    @property
    def image_height(self) -> int:
        """Height in pixels of the images the model draws."""
        return self.side_y * self.scale

    @property
    def memory_advice(self) -> list[str]:
        """Changes that let a training step take less memory, what helps most first."""
        advice = []
        if self.batch_size > 1:
            advice.append(
                f"lower --batch_size (now {self.batch_size}) and raise "
                f"--gradient_accumulation_steps (now {self.gradient_accumulation_steps}) by as "
                "much, which trains the same"
            )
        if not self.activation_checkpointing:
            advice.append("add --activation_checkpointing")
        if self.precision == "fp32":
            advice.append("compute in half precision with --precision bf16")
        return [*advice, *self.state_advice, "choose a smaller --model_preset or image size"]

    @property
    def state_advice(self) -> list[str]:
        """Changes that let weights, gradients and moments take less, what helps most first."""
        advice = []
        if not self.low_memory:
            bf16 = " and --precision bf16" if self.precision == "fp16" else ""
            advice.append(f"keep weights and optimizer in bf16 with --low_memory{bf16}")
        if not (self.freeze_transformer or self.freeze_diffusion):
            advice.append("train only a part with --freeze_transformer")
        return advice

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return dataclasses.asdict(self)


FIELDS = {field.name: field for field in dataclasses.fields(TrainConfig)}


def types_of(setting: dataclasses.Field) -> tuple[type, ...]:
    """The types that the value of a setting can have, the main one first."""
    hint = setting.type
    if isinstance(hint, types.UnionType):
        return typing.get_args(hint)
    return (typing.get_origin(hint) or hint,)


def as_started(command: str) -> str:
    """The command for the next start, by way of uv if it has started this process."""
    return f"uv run {command}" if "UV" in os.environ else command


def complete(config: TrainConfig) -> TrainConfig:
    """`config` with the defaults filled in that depend on other settings or on the machine."""
    precision = "fp16" if config.use_fp16 else config.precision
    uncond_p, num_workers = config.uncond_p, config.num_workers
    if uncond_p is None:
        uncond_p = 0.0 if config.train_upsample else 0.2
    if num_workers is None:
        num_workers = default_workers()
    return dataclasses.replace(
        config,
        precision=precision,
        use_fp16=precision == "fp16",
        uncond_p=uncond_p,
        num_workers=num_workers,
    )


def check_saved(
    name: str, path: str | Path, saved: Mapping[str, Any], fields: Mapping[str, dataclasses.Field]
) -> None:
    """ConfigError unless all settings that a file holds are known and of their type.

    Args:
        name: the flag that gave the file, for messages.
        fields: those of the settings, by their names.
    """
    if unknown := saved.keys() - fields.keys():
        raise ConfigError(
            f"--{name}: {path} holds unknown settings: {', '.join(sorted(unknown))}; use the "
            "program and version that wrote it, or take them out"
        )
    for setting, value in saved.items():
        types = types_of(fields[setting])
        if type(value) not in types and not (float in types and type(value) is int):
            raise ConfigError(
                f"--{name}: in {path} {setting} is {value!r}, which should be of type "
                f"{types[0].__name__}"
            )
        if types[0] is list and not all(isinstance(item, str) for item in value):
            raise ConfigError(f"--{name}: in {path} {setting} is {value!r}, not a list of texts")


def recorded(config: TrainConfig) -> dict[str, Any]:
    """The content of args.json: `config` as other folders, machines and kinds of run can use it.

    Paths are absolute. What `complete` would choose anyway is left open, as None, so that it is
    chosen again; but the workers of a run over shards stay, since the order of its samples depends
    on their number.
    """
    settings = config.to_dict()
    settings |= {name: absolute(settings[name]) for name in settings.keys() & PATHS}
    chosen = complete(dataclasses.replace(config, uncond_p=None, num_workers=None))
    if config.uncond_p == chosen.uncond_p:
        settings["uncond_p"] = None
    if config.num_workers == chosen.num_workers and not config.use_webdataset:
        settings["num_workers"] = None
    return settings


# What decides what prepared shards hold, for `prepare.py`.
OF_PREPARED_SHARDS = (
    "data_dir", "use_captions", "use_webdataset", "wds_image_key", "wds_caption_key",
    "wds_dataset_name", "side_x", "side_y", "train_upsample", "upscale_factor", "resize_ratio",
)  # fmt: skip

PATHS = (
    "data_dir",
    "val_data_dir",
    "wds_skip_words",
    "prompt_file",
    "image_to_upsample",
    "checkpoints_dir",
)


def absolute(path: str) -> str:
    """`path`, a file, folder or pattern of shards, from the root; URLs, commands and "" as they
    are."""
    # braces around whole paths have no common folder
    if not path or is_remote(path) or path.startswith("{"):
        return path
    return str(Path(path).expanduser().absolute())


def cores() -> int:
    """How many processor cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def default_workers() -> int:
    """Processes that load data: one less than the cores, as training needs one too; 8 at most."""
    return min(8, max(1, cores() - 1))
