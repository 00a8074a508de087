"""Draw pictures from captions.

python -m glide_finetune.generate --prompt "a red fox" --base glide_checkpoints/0000
python -m glide_finetune.generate --prompt "a red fox" --upsampler released --num_images 4
python -m glide_finetune.generate --prompt_file prompts.txt --sampler ddim --steps 50
python -m glide_finetune.generate --prompt "a hat" --inpaint_image me.png --inpaint_mask mask.png
python -m glide_finetune.generate --again generated/00003.png      # the same picture once more
"""

import argparse
import sys
from collections.abc import Sequence

from glide_finetune.arguments import Parser, add_flags
from glide_finetune.generate_config import FIELDS, GenerateConfig, check, settings_of
from glide_finetune.programs import run_program

PROGRAM = "python -m glide_finetune.generate"


def build_parser() -> Parser:
    """The parser of every flag; what it returns has only those that are given."""
    parser = Parser(
        prog=PROGRAM,
        usage=f'{PROGRAM} --prompt "TEXT" [--base PATH] [flags]',
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
    with parser.mistakes_told():
        told = settings_of(typed["again"]) if typed.get("again") else {}
        if "prompt_file" in typed:
            told.pop("prompt", None)
        config = GenerateConfig(**(told | typed))
        check(config)
    return config


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the command line says; returns the exit status.

    Args:
        argv: the arguments without the program's name; None takes those of the process.
    """
    config = parse_config(argv)
    return run_program(
        PROGRAM,
        lambda: _draw(config),
        other_weights="give other weights to --base, --upsampler or --clip",
    )


def _draw(config: GenerateConfig) -> int:
    # torch takes seconds to import, so it waits until the settings are known to be right
    from glide_finetune.generation import generate
    from glide_finetune.memory import OutOfMemory, is_out_of_memory

    try:
        generate(config)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        fewer = f"a --batch_size below {config.batch_size}, " if config.batch_size > 1 else ""
        raise OutOfMemory(
            f"memory does not suffice: give {fewer}smaller --side_x and --side_y, or another "
            "--device"
        ) from error
    return 0


if __name__ == "__main__":
    sys.exit(main())
