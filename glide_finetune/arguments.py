"""The command line of train_glide.py, made from the fields of `TrainConfig`."""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from glide_finetune.config import ConfigError, TrainConfig, check, complete
from glide_finetune.demo import DEMO_SETTINGS
from glide_finetune.model_options import parse_model_option
from glide_finetune.runs import ARGS_NAME, interpret_resume, read_args

FIELDS = dataclasses.fields(TrainConfig)
ONCE = {field.name for field in FIELDS if field.metadata["once"]}


def parse_config(argv: Sequence[str] | None = None) -> TrainConfig:
    """The settings that a command line asks for, completed and checked.

    Defaults come, the later winning, from `TrainConfig`, `--demo`, `--config`, and the run that
    `--resume_ckpt` goes on in. What is typed wins over all of them.

    Args:
        argv: the arguments without the program's name; None takes those of the process.

    Raises:
        SystemExit: after `--help`, or with one line about the first mistake.
    """
    parser = build_parser()
    typed = parser.parse_args(argv)
    try:
        if typed.demo:
            parser.set_defaults(**DEMO_SETTINGS)
        if typed.config:
            parser.set_defaults(**saved_settings(typed.config))
        typed = parser.parse_args(argv)
        run_dir = interpret_resume(typed.resume_ckpt, typed.checkpoints_dir).run_dir
        if run_dir and (run_dir / ARGS_NAME).exists():
            parser.set_defaults(**saved_settings(run_dir))
            typed = parser.parse_args(argv)
        config = complete(TrainConfig(**vars(typed)))
        check(config)
    except ValueError as error:
        parser.error(str(error))
    return config


def saved_settings(path: str | Path) -> dict[str, Any]:
    """The settings of an earlier run, less those that belong to one start alone.

    Args:
        path: an args.json or the folder of a run.

    Raises:
        ValueError: it cannot be read, or holds names that are no settings.
    """
    settings = read_args(path)
    unknown = settings.keys() - {field.name for field in FIELDS}
    if unknown:
        raise ConfigError(f"{path} holds no settings known here: {', '.join(sorted(unknown))}")
    # use_fp16 is recorded as the precision, which a flag can then change
    return {name: value for name, value in settings.items() if name not in ONCE | {"use_fp16"}}


def build_parser() -> argparse.ArgumentParser:
    """The parser of every flag, grouped by topic, each showing its default."""
    parser = argparse.ArgumentParser(
        prog="train_glide.py",
        description="Fine-tune GLIDE on your own pictures and captions.",
        epilog="Switches may be given a value: --train_upsample False.",
        allow_abbrev=False,
    )
    groups: dict[str, argparse._ArgumentGroup] = {}
    for field in FIELDS:
        title = field.metadata["group"]
        group = groups.setdefault(title, parser.add_argument_group(title))
        _add_flag(group, field)
    return parser


def _add_flag(group: argparse._ArgumentGroup, field: dataclasses.Field) -> None:
    name, short, extra = f"--{field.name}", field.metadata["short"], field.metadata["extra"]
    spellings = (name, short) if short and short != name else (name,)
    text = field.metadata["help"].replace("%", "%%")
    if field.default_factory is not dataclasses.MISSING:
        group.add_argument(*spellings, action=_Merge, default={}, help=text, **extra)
        return
    if "default:" not in text and field.default not in ("", False):
        text += " (default: %(default)s)"
    if isinstance(field.default, bool):
        group.add_argument(
            *spellings, nargs="?", const=True, type=_switch, metavar="True", help=text,
            default=field.default,
        )  # fmt: skip
        if field.default:
            group.add_argument(
                f"--no-{field.name}", dest=field.name, action="store_false",
                default=argparse.SUPPRESS, help=argparse.SUPPRESS,
            )  # fmt: skip
        return
    keywords = {"type": type(field.default), "help": text, "default": field.default, **extra}
    group.add_argument(*spellings, **keywords)


def _switch(text: str) -> bool:
    """True or False from what people type for them."""
    value = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}.get(
        text.lower()
    )
    if value is None:
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return value


class _Merge(argparse.Action):
    """Collects KEY=VALUE pairs into one dictionary, over what the defaults already hold."""

    def __call__(self, parser, namespace, values, option_string=None):
        try:
            pairs = dict(map(parse_model_option, values))
        except ValueError as error:
            raise argparse.ArgumentError(self, str(error)) from None
        setattr(namespace, self.dest, {**getattr(namespace, self.dest), **pairs})
