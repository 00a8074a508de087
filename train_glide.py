"""Fine-tune GLIDE on your own pictures and captions.

python train_glide.py --demo                                     # see it work, on any computer
python train_glide.py --data_dir DIR                             # the base model, 64 x 64
python train_glide.py --data_dir DIR --train_upsample            # the upsampler, 256 x 256
python train_glide.py --data_dir DIR_WITH_TARS --use_webdataset  # WebDataset shards
python train_glide.py --resume_ckpt glide_checkpoints/0000       # go on with a run
"""

import json
import sys
from collections.abc import Sequence

from glide_finetune.arguments import parse_config
from glide_finetune.config import TrainConfig
from glide_finetune.programs import run_program


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the command line says; returns the exit status.

    Args:
        argv: the arguments without the program's name; None takes those of the process.
    """
    config = parse_config(argv)
    return run_program(
        config.program,
        lambda: _train(config),
        other_weights="start from other weights with --resume_ckpt FILE.pt, or from nothing with "
        "--init scratch",
    )


def _train(config: TrainConfig) -> int:
    if config.dry_run:
        print(json.dumps(config.to_dict(), indent=2), flush=True)
    # torch takes seconds to import, so it waits until the settings are known to be right
    from glide_finetune.dry_run import dry_run
    from glide_finetune.training_run import run

    if config.dry_run:
        dry_run(config)
        return 0
    return run(config).exit_status


if __name__ == "__main__":
    sys.exit(main())
