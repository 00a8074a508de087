"""Shrink a data set to training size, once, so that training never waits for it.

python -m glide_finetune.prepare --data_dir DIR --output_dir OUT                    # for 64 x 64
python -m glide_finetune.prepare --data_dir DIR --output_dir OUT --train_upsample   # for 256 x 256
python -m glide_finetune.prepare --data_dir DIR_WITH_TARS --use_webdataset --output_dir OUT
python train_glide.py --data_dir OUT --use_webdataset --wds_dataset_name generic    # train on it
"""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from glide_finetune.arguments import Parser, add_flag
from glide_finetune.config import FIELDS, OF_PREPARED_SHARDS, ConfigError, TrainConfig, cores
from glide_finetune.config_checks import check_ranges
from glide_finetune.programs import run_program


def build_parser() -> Parser:
    """The parser of every flag; of those of training it returns only what is given."""
    parser = Parser(
        prog="python -m glide_finetune.prepare",
        usage="python -m glide_finetune.prepare --data_dir DIR --output_dir OUT [flags]",
        description="Turn a folder of pictures with captions, or tar shards, into WebDataset "
        "shards of whole pictures just large enough for training. Nothing is filtered: the "
        "metadata come along, so that training can still do so.",
        epilog="Give the same sizes as in training. Where it was stopped, the same command goes "
        "on. Train with --data_dir OUT --use_webdataset --wds_dataset_name generic, or with the "
        "name that the shards had.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--output_dir",
        "-out",
        required=True,
        metavar="OUT",
        help="folder for the shards, a new one or one that an earlier start has begun",
    )
    parser.add_argument(
        "--num_workers",
        type=int,
        default=cores(),
        metavar="N",
        help="processes that decode and shrink (default: one a core)",
    )
    parser.add_argument(
        "--shard_size",
        type=int,
        default=1000,
        metavar="N",
        help="samples in a shard (default: 1000)",
    )
    group = parser.add_argument_group("as in training", argument_default=argparse.SUPPRESS)
    for name in OF_PREPARED_SHARDS:
        add_flag(group, FIELDS[name])
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the command line says; returns the exit status.

    Args:
        argv: the arguments without the program's name; None takes those of the process.
    """
    parser = build_parser()
    typed = vars(parser.parse_args(argv))
    return run_program(
        parser.prog, lambda: _prepare(typed), after_interrupt="the same command goes on"
    )


def _prepare(typed: dict[str, Any]) -> int:
    for name in ("RANK", "WORLD_SIZE"):  # by which the shards would be divided among processes
        os.environ.pop(name, None)
    settings = {name: typed.get(name, FIELDS[name].default) for name in OF_PREPARED_SHARDS}
    check_ranges(settings | {"num_workers": typed["num_workers"]})
    if typed["shard_size"] < 1:
        raise ConfigError(f"--shard_size is {typed['shard_size']}; give a number of at least 1")
    # torch takes seconds to import, so it waits until the settings are known to be right
    from glide_finetune.preparation import prepare

    prepare(
        TrainConfig(**settings),
        typed["output_dir"],
        shard_size=typed["shard_size"],
        num_workers=typed["num_workers"],
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
