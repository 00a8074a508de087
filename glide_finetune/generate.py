"""Draw pictures from captions.

python -m glide_finetune.generate --prompt "a red fox" --base glide_checkpoints/0000
python -m glide_finetune.generate --prompt "a red fox" --upsampler released --num_images 4
python -m glide_finetune.generate --prompt_file prompts.txt --sampler dpm++2m_sde --steps 50
python -m glide_finetune.generate --prompt "a hat" --inpaint_image me.png --inpaint_mask mask.png
python -m glide_finetune.generate --again generated/00003.png      # the same picture once more
"""

import argparse
import logging
import os
import sys
import traceback
from collections.abc import Sequence

from glide_finetune.arguments import Parser, add_flags
from glide_finetune.config import ConfigError
from glide_finetune.generate_config import FIELDS, GenerateConfig, check, settings_of


def build_parser() -> Parser:
    """The parser of every flag; what it returns has only those that are given."""
    parser = Parser(
        prog="python -m glide_finetune.generate",
        usage='python -m glide_finetune.generate --prompt "TEXT" [--base PATH] [flags]',
        description="Draw pictures from captions: a base picture, and with --upsampler a larger "
        "one. Each goes to a PNG file of its own that tells how it was drawn, and all of them to "
        "a labelled grid.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    add_flags(parser, FIELDS.values())
    return parser


def parse_config(argv: Sequence[str] | None = None) -> GenerateConfig:
    """The settings that a command line asks for, checked.

    Args:
        argv: the arguments without the program's name; None takes those of the process.

    Raises:
        SystemExit: after `--help`, or with one line about the first mistake.
    """
    parser = build_parser()
    typed = vars(parser.parse_args(argv))
    try:
        told = settings_of(typed["again"]) if typed.get("again") else {}
        if "prompt_file" in typed:
            told.pop("prompt", None)
        config = GenerateConfig(**(told | typed))
        check(config)
    except ConfigError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    return config


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the command line says; returns the exit status.

    Args:
        argv: the arguments without the program's name; None takes those of the process.
    """
    config = parse_config(argv)
    sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be text
    logging.basicConfig(format="%(message)s", stream=sys.stdout)
    for package in ("glide_finetune", "glide_text2im"):
        logging.getLogger(package).setLevel(logging.INFO)
    # torch takes seconds to import, so it waits until the settings are known to be right
    from glide_finetune.generation import generate
    from glide_finetune.memory import is_out_of_memory
    from glide_text2im.download import DownloadError

    try:
        generate(config)
    except (ValueError, OSError, DownloadError) as error:
        return _failed(str(error))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return _failed(f"memory does not suffice: give a --batch_size below {config.batch_size}")
    except KeyboardInterrupt:
        print(f"{build_parser().prog}: interrupted", file=sys.stderr)
        return 130
    return 0


def _failed(message: str) -> int:
    """Tell what went wrong with the exception at hand; returns the exit status."""
    if os.environ.get("GLIDE_TRACEBACK") == "1":
        traceback.print_exc()
    print(f"{build_parser().prog}: error: {message}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
