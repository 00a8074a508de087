"""The settings of `python -m glide_finetune.noisy_clip_finetune`, and their checks.

Nothing here imports torch, so that `--help` and mistakes answer at once.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from glide_finetune.arguments import (
    Parser,
    add_flags,
    merge,
    of_run,
    refuse_commands,
    saved_settings,
)
from glide_finetune.clip_options import (
    CLIP_CONFIG,
    CLIP_FILES,
    CLIP_KIND,
    CLIP_PRESETS,
    FIRST_LOGIT_SCALE,
    RELEASED_OPTIONS,
    check_clip_options,
    clip_paths,
    parse_clip_option,
)
from glide_finetune.config import (
    DATA,
    MODEL,
    REPORTS,
    START,
    TRAINING,
    ConfigError,
    TrainConfig,
    absolute,
    as_started,
    complete,
    flag,
)
from glide_finetune.config_checks import (
    check_choices,
    check_combinations,
    check_files,
    check_ranges,
)
from glide_finetune.model_options import RELEASED, described_model
from glide_finetune.runs import Start, interpret_resume, read_args

PROGRAM = "python -m glide_finetune.noisy_clip_finetune"


@dataclass
class ClipConfig(TrainConfig):
    """Every setting of a run that fine-tunes the noise-aware CLIP. Those of `TrainConfig` that are
    no flag in `FIELDS` keep their defaults."""

    # fmt: off
    dry_run: bool = flag(False, group=START, once=True,
        help="train nothing: print the settings as they come out, then what is wrong with the "
             "data, and draw some of it into CHECKPOINTS_DIR/dry_run")
    model_preset: str = flag("released", group=MODEL, choices=tuple(CLIP_PRESETS),
        help="size of the model: released has OpenAI's, small about 4 M parameters, most of them "
             "word vectors")
    model_options: dict[str, Any] = flag({}, group=MODEL, nargs="+", metavar="KEY=VALUE",
        parse=parse_clip_option, help="options of the model that differ from the preset's")
    init: str = flag("pretrained", group=MODEL, choices=("pretrained", "scratch"),
        help="start from OpenAI's weights, or those of --clip, or from random ones")
    clip: list[str] = flag([], group=MODEL, nargs="+", metavar="PATH",
        help=f"weights to start from: a folder with {CLIP_FILES[0]} and {CLIP_FILES[1]}, or these "
             "two files (default: OpenAI's)")
    checkpoints_dir: str = flag("./clip_checkpoints/", "-ckpt", group=MODEL, metavar="DIR",
        help="where the numbered runs are")
    batch_size: int = flag(64, "-bs", group=TRAINING, metavar="N",
        help="pairs in one pass, among which every image shall find its caption; other than in "
             "train_glide.py, accumulation does not replace a large batch")
    freeze_text: bool = flag(False, group=TRAINING, help="leave the text encoder as it is")
    freeze_image: bool = flag(False, group=TRAINING, help="leave the image encoder as it is")
    uncond_p: float | None = flag(0.0, group=DATA, help="every picture keeps its caption")
    log_frequency: int = flag(0, group=REPORTS, help="a CLIP draws no samples")
    # fmt: on

    @property
    def program(self) -> str:
        """How the program that these settings are for calls itself in its messages."""
        return PROGRAM

    @property
    def command(self) -> str:
        """What starts the program that these settings are for."""
        return as_started(PROGRAM)

    @property
    def model_type(self) -> str:
        """What the descriptions of the checkpoints call it."""
        return CLIP_KIND

    @property
    def memory_advice(self) -> list[str]:
        """Changes that let a training step take less memory, what helps most first."""
        advice = []
        if self.precision == "fp32":
            advice.append("compute in half precision with --precision bf16")
        advice += self.state_advice
        advice.append(
            f"lower --batch_size (now {self.batch_size}), although there is less to learn from "
            "fewer captions"
        )
        return [*advice, "choose a smaller --model_preset"]

    @property
    def state_advice(self) -> list[str]:
        """Those that let weights, gradients and moments take less."""
        if self.freeze_text or self.freeze_image:
            return []
        return ["train only a part with --freeze_text or --freeze_image"]

    @property
    def options(self) -> dict[str, Any]:
        """The options of the model to train, every key of `RELEASED_OPTIONS`."""
        first = {"logit_scale": FIRST_LOGIT_SCALE} if self.init == "scratch" else {}
        return {
            **RELEASED_OPTIONS, **CLIP_PRESETS[self.model_preset], **first, **self.model_options
        }  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values, without what does not concern a CLIP."""
        return {name: value for name, value in super().to_dict().items() if name in FIELDS}

    @property
    def text_ctx(self) -> int:
        """How many tokens of a caption the model reads, start and end token included."""
        return self.options["max_text_len"]


_FOLLOW_FROM_OTHERS = ("side_x", "side_y", "use_fp16")
_NOT_OF_CLIP = (
    "demo", "use_captions", "uncond_p", "train_upsample", "train_inpaint", "upscale_factor",
    "vlb_weight", "loss_weighting", "freeze_transformer", "freeze_diffusion",
    "activation_checkpointing", "low_memory", "compile", "log_frequency", "test_prompt",
    "prompt_file", "test_batch_size", "test_guidance_scale", "test_sampler", "image_to_upsample",
)  # fmt: skip
SETTINGS = {field.name: field for field in dataclasses.fields(ClipConfig)}
FIELDS = {
    name: field
    for name, field in SETTINGS.items()
    if name not in (*_FOLLOW_FROM_OTHERS, *_NOT_OF_CLIP)
}


def parse_config(argv: Sequence[str] | None = None) -> ClipConfig:
    """The settings that a command line asks for, completed and checked.

    Defaults come, the later winning, from `ClipConfig`, `--config`, and from what `--resume_ckpt`
    or `--clip` names: the settings of a run to go on in, the sizes of the model in the files.

    Args:
        argv: the arguments without the program's name; None takes those of the process.

    Raises:
        SystemExit: after `--help`, or with one line about the first mistake.
    """
    parser = build_parser()
    typed = vars(parser.parse_args(argv))
    with parser.mistakes_told():
        config = completed(ClipConfig(**_with_defaults(typed)))
        check(config)
    return config


def build_parser() -> Parser:
    """The parser of every flag; what it returns has only those that are given."""
    parser = Parser(
        prog=PROGRAM,
        usage=f"{PROGRAM} --data_dir DIR [flags]",
        description="Fine-tune the noise-aware CLIP, which guides GLIDE, on your own pictures and "
        "captions. Draw with it: python -m glide_finetune.generate --clip RUN",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    add_flags(parser, FIELDS.values())
    return parser


def _with_defaults(typed: dict[str, Any]) -> dict[str, Any]:
    defaults: dict[str, Any] = {}
    if typed.get("config"):
        defaults = saved_settings("config", typed["config"], SETTINGS)
        refuse_commands(defaults, typed)
        if "freeze_text" not in defaults:
            raise ConfigError(f"--config: {typed['config']} is of a run that trains no CLIP")
    if typed.keys() & {"clip", "init"}:  # of which one may contradict the other's default
        defaults = {key: value for key, value in defaults.items() if key not in ("clip", "init")}
    settings = merge(defaults, typed)
    start = interpret_resume(
        typed.get("resume_ckpt", ""), settings.get("checkpoints_dir", ClipConfig.checkpoints_dir)
    )
    if start.run_folder:
        if "freeze_text" not in read_args(start.run_folder):
            raise ConfigError(
                f"--resume_ckpt: the run {start.run_folder} trains no CLIP: go on with it by "
                f"{TrainConfig().command}"
            )
        return merge(defaults, *of_run(start.run_folder, typed, SETTINGS))
    if start.weights and "model_preset" not in typed:
        kind, options = described_model(start.weights)
        if kind == CLIP_KIND:  # else `check` tells what it is
            return merge(defaults, {"model_options": options}, typed)
    if typed.get("clip") and "model_preset" not in typed:
        return merge(defaults, {"model_options": _options_beside(typed["clip"])}, typed)
    return settings


def _options_beside(clip: list[str]) -> dict[str, Any]:
    """Those in the file beside the weights that `--clip` names; none where there is no such file.

    Raises:
        ConfigError: it holds something else.
    """
    import yaml  # here, as it takes a while to import

    if clip == [RELEASED]:
        return {}
    path = clip_paths(clip)[0].with_name(CLIP_CONFIG)
    if not path.exists():
        return {}
    try:
        options = dict(yaml.safe_load(path.read_text(encoding="utf-8")))
        check_clip_options(options)
    except (ValueError, TypeError, OSError, yaml.YAMLError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"--clip: {path} describes no CLIP: {reason}") from None
    return options


def completed(config: ClipConfig) -> ClipConfig:
    """`config` with the defaults filled in that depend on other settings or on the machine.

    Raises:
        ConfigError: a setting with choices is none of them.
    """
    check_choices(config)
    side = config.options["image_size"]
    clip = [path if path == RELEASED else absolute(path) for path in config.clip]
    return dataclasses.replace(complete(config), side_x=side, side_y=side, clip=clip)


def check(config: ClipConfig) -> None:
    """Hold every setting against its range, the others and the files it names; those of
    `TrainConfig` that are not for a CLIP against their defaults.

    Args:
        config: of `completed`.

    Raises:
        ValueError: with one line about the first setting that cannot work.
    """
    for name in _NOT_OF_CLIP:
        if getattr(config, name) != SETTINGS[name].default:
            raise ConfigError(f"{name} is not for a CLIP: leave it out")
    start = interpret_resume(config.resume_ckpt, config.checkpoints_dir)
    try:
        check_clip_options(config.options)
    except ValueError as error:
        raise ConfigError(f"--model_options: {error}") from None
    check_ranges(vars(config))
    if config.batch_size < 2:
        raise ConfigError("--batch_size is 1, which leaves nothing to tell apart; give 2 or more")
    if config.freeze_text and config.freeze_image:
        raise ConfigError("--freeze_text and --freeze_image together leave nothing to train")
    check_combinations(config, start)
    _check_start(config, start)
    check_files(config, start)


def _check_start(config: ClipConfig, start: Start) -> None:
    if config.clip and config.init == "scratch":
        raise ConfigError("--clip gives weights to start from, --init scratch takes none: drop one")
    if start.weights:
        kind, _ = described_model(start.weights)
        if kind not in ("", CLIP_KIND):
            raise ConfigError(f"--resume_ckpt: {start.weights} is a model of kind {kind}, no CLIP")
    elif not start.run_folder and config.clip and config.clip != [RELEASED]:
        paths = clip_paths(config.clip)
        if len(paths) == 1:
            raise ConfigError(
                f"--clip: {paths[0]} belongs to a run: to start from a checkpoint give its .pt "
                "file as --resume_ckpt"
            )
        for path in paths:
            if not path.is_file():
                raise ConfigError(f"--clip: there is no file {path}")
    elif not start.run_folder and config.init == "pretrained":  # OpenAI's
        other = [key for key, value in config.options.items() if value != RELEASED_OPTIONS[key]]
        if other:
            raise ConfigError(
                f"no weights are released for a CLIP with another {', '.join(other)}: add --init "
                "scratch, or --clip or --resume_ckpt with weights that fit"
            )
