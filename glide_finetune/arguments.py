"""The command line of train_glide.py, made from the fields of `TrainConfig`."""

import argparse
import contextlib
import dataclasses
import difflib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from glide_finetune.config import (
    FIELDS,
    ConfigError,
    TrainConfig,
    check_saved,
    complete,
    types_of,
)
from glide_finetune.config_checks import check
from glide_finetune.demo import DEMO_SETTINGS, fast_precision
from glide_finetune.model_options import MODEL_TYPES, described_model, parse_model_option
from glide_finetune.runs import interpret_resume, read_args

# Setting one of these means that the other is not wanted.
_INSTEAD: dict[str, dict[str, Any]] = {
    "test_prompt": {"prompt_file": ""},
    "val_data_dir": {"val_fraction": 0.0},
    "val_fraction": {"val_data_dir": ""},
}


def parse_config(argv: Sequence[str] | None = None) -> TrainConfig:
    """The settings that a command line asks for, completed and checked.

    Defaults come, the later winning, from `TrainConfig`, `--demo`, `--config`, and from what
    `--resume_ckpt` names: the settings of a run to go on in, the model of a weights file. What is
    typed wins over all of them.

    Args:
        argv: the arguments without the program's name; None takes those of the process.

    Raises:
        SystemExit: after `--help`, or with one line about the first mistake.
    """
    parser = build_parser()
    typed = vars(parser.parse_args(argv))
    with parser.mistakes_told():
        config = complete(TrainConfig(**_with_defaults(typed)))
        check(config)
    return config


def _with_defaults(typed: dict[str, Any]) -> dict[str, Any]:
    """What is typed, over everything that it names as defaults."""
    defaults = DEMO_SETTINGS | {"precision": fast_precision()} if typed.get("demo") else {}
    if typed.get("config"):
        saved = saved_settings("config", typed["config"])
        refuse_commands(saved, typed)
        defaults = merge(defaults, saved)
    settings = merge(defaults, typed)
    start = interpret_resume(
        typed.get("resume_ckpt", ""), settings.get("checkpoints_dir", TrainConfig.checkpoints_dir)
    )
    if start.run_folder:
        return merge(defaults, *of_run(start.run_folder, typed))
    if start.weights and "model_preset" not in typed:
        kind, options = described_model(start.weights)
        if kind in MODEL_TYPES:  # else there are options of something that is no GLIDE
            return merge(defaults, {"model_options": options}, typed)
    return settings


def saved_settings(
    flag: str, path: str | Path, fields: Mapping[str, dataclasses.Field] = FIELDS
) -> dict[str, Any]:
    """The settings of an earlier run, less those that belong to one start alone.

    Args:
        flag: the one that named the path, for messages.
        path: an args.json or the folder of a run.
        fields: the settings that there are, by their names.

    Raises:
        ConfigError: it cannot be read, or holds other names or types than those of the settings.
    """
    try:
        saved = read_args(path)
    except ValueError as error:
        raise ConfigError(f"--{flag}: {error}") from None
    check_saved(flag, path, saved, fields)
    return {name: value for name, value in saved.items() if not fields[name].metadata["once"]}


def of_run(
    run_folder: Path, typed: Mapping[str, Any], fields: Mapping[str, dataclasses.Field] = FIELDS
) -> list[Mapping[str, Any]]:
    """Layers for `merge`: the settings of a run to go on in, and what is typed.

    They name the run by its folder, as "auto" may mean another one later, and the folder of runs
    by where it lies now, since it may have been moved. ConfigError as of `saved_settings`.
    """
    now = {"checkpoints_dir": os.path.dirname(os.path.abspath(run_folder))}
    saved = saved_settings("resume_ckpt", run_folder, fields)
    return [saved, now, typed, {"resume_ckpt": str(run_folder)}]


def refuse_commands(saved: Mapping[str, Any], typed: Mapping[str, Any]) -> None:
    """ConfigError if the settings of `--config`, which may be somebody else's, have a command that
    prints shards, which is not `typed` as well."""
    for name in ("data_dir", "val_data_dir"):
        if saved.get(name, "").startswith("pipe:") and name not in typed:
            raise ConfigError(
                f"--config: {typed['config']} has the command {saved[name]} as {name}: commands "
                f"are run only when typed, so give --{name} too"
            )


def merge(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Settings from several sources, the later ones winning; of the model options, each by itself.

    Raises:
        ConfigError: a source has `use_fp16` and another precision.
    """
    settings: dict[str, Any] = {"model_options": {}}
    for layer in layers:
        options = settings["model_options"] | layer.get("model_options", {})
        for name, value in layer.items():
            if value or name == "test_prompt":  # which may be empty
                settings |= _INSTEAD.get(name, {})
        settings |= _as_precision(layer, settings.get("precision")) | {"model_options": options}
    return settings


def _as_precision(settings: Mapping[str, Any], earlier: str | None) -> dict[str, Any]:
    """`settings` with `use_fp16`, if it is there, as the precision that it stands for: False undoes
    an `earlier` fp16, and leaves any other."""
    settings = dict(settings)
    use_fp16 = settings.pop("use_fp16", None)
    if use_fp16 is None:
        return settings
    others = "fp32" if earlier in (None, "fp16") else earlier
    precision = settings.setdefault("precision", "fp16" if use_fp16 else others)
    if use_fp16 and precision != "fp16":
        raise ConfigError(
            f"--use_fp16 means --precision fp16, but --precision is {precision}: give one of them"
        )
    return settings


class Parser(argparse.ArgumentParser):
    """Of a command line with so many flags that a mistake is told in one line."""

    def error(self, message: str) -> NoReturn:
        """Leave with one line, without the usage, which would fill the screen."""
        self._leave(f"{message} (--help lists all flags)")

    def parse_args(self, *args: Any, **keywords: Any) -> argparse.Namespace:
        """As argparse does, but a word that is no flag is told with the flag that was meant."""
        found, unknown = self.parse_known_args(*args, **keywords)
        if unknown:
            self.error(self._about(unknown[0]))
        return found

    @contextlib.contextmanager
    def mistakes_told(self) -> Iterator[None]:
        """While settings are put together and checked: leave with one line about a mistake."""
        try:
            yield
        except OSError as error:  # a folder that may not be looked into, say
            named = f"cannot read {error.filename}: {error.strerror}"
            self._leave(named if error.filename else str(error))
        except ValueError as error:
            self._leave(str(error))
        except RuntimeError as error:
            if "home directory" not in str(error):
                raise
            # of Path.expanduser
            self._leave(f"a path begins with the ~ of a user who is not known ({error})")

    def _leave(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")

    def _about(self, word: str) -> str:
        if not word.startswith("-"):
            return f"{word!r} belongs to no flag; put quotes around what has spaces"
        given = word.split("=")[0]
        short = "-" + given.lstrip("-")
        flags = [text for text in self._option_string_actions if text.startswith("--")]
        near = difflib.get_close_matches(given, flags, n=1)
        near = [short] if short in self._option_string_actions else near
        return f"there is no flag {word}" + (f"; did you mean {near[0]}?" if near else "")


def build_parser() -> Parser:
    """The parser of every flag, grouped by topic, each showing its default.

    What it returns has only the flags that are given.
    """
    parser = Parser(
        prog="train_glide.py",
        usage="train_glide.py [--demo | --data_dir DIR] [flags]",
        description="Fine-tune GLIDE on your own pictures and captions.",
        epilog="Switches may be given a value: --train_upsample False. With GLIDE_TRACEBACK=1 in "
        "the environment an error also shows where it comes from.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    add_flags(parser, FIELDS.values())
    return parser


def add_flags(parser: argparse.ArgumentParser, fields: Iterable[dataclasses.Field]) -> None:
    """Add the flags of fields that `config.flag` made, each to the group of its topic."""
    groups: dict[str, argparse._ArgumentGroup] = {}
    for field in fields:
        title = field.metadata["group"]
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        add_flag(groups[title], field)


def add_flag(group: argparse._ActionsContainer, field: dataclasses.Field) -> None:
    """Add the flag of a field that `config.flag` made to a parser or a group of it.

    A dictionary has KEY=VALUE pairs, which are taken apart as the field's `parse` does it, or else
    `parse_model_option`.
    """
    name, short, extra = f"--{field.name}", field.metadata["short"], dict(field.metadata["extra"])
    spellings = (name, short) if short and short != name else (name,)
    text = field.metadata["help"]
    parse = extra.pop("parse", parse_model_option)
    kind = types_of(field)[0]
    if kind in (int, float, str) and field.default not in ("", None):
        text += f" (default: {field.default})"
    text = text.replace("%", "%%")
    if kind is dict:
        group.add_argument(*spellings, action=partial(_Collect, parse), help=text, **extra)
    elif kind is bool:
        group.add_argument(
            *spellings, nargs="?", const=True, type=_switch, metavar="True|False", help=text
        )
        if field.default:
            group.add_argument(
                f"--no-{field.name}", dest=field.name, action="store_false", help=argparse.SUPPRESS
            )
    else:
        kind = str if kind is list else kind
        group.add_argument(*spellings, type=kind, help=text, **extra)


def _switch(text: str) -> bool:
    """True or False from what people type for them."""
    words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in words:
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return words[text.lower()]


class _Collect(argparse.Action):
    """Collects KEY=VALUE pairs, each as `parse` takes it apart, into one dictionary."""

    def __init__(self, parse: Callable[[str], tuple[str, Any]], *args: Any, **keywords: Any):
        super().__init__(*args, **keywords)
        self.parse = parse

    def __call__(self, parser, namespace, values, option_string=None):
        try:
            pairs = dict(map(self.parse, values))
        except ValueError as error:
            raise argparse.ArgumentError(self, str(error)) from None
        setattr(namespace, self.dest, {**getattr(namespace, self.dest, {}), **pairs})
