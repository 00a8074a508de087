"""Fine-tune GLIDE on your own pictures and captions.

python train_glide.py --demo                                     # see it work, on any computer
python train_glide.py --data_dir DIR                             # the base model, 64 x 64
python train_glide.py --data_dir DIR --train_upsample            # the upsampler, 256 x 256
python train_glide.py --data_dir DIR_WITH_TARS --use_webdataset  # WebDataset shards
python train_glide.py --resume_ckpt glide_checkpoints/0000       # go on with a run
"""

import json
import logging
import os
import sys
import traceback
from collections.abc import Sequence

from glide_finetune.arguments import parse_config


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
    if config.dry_run:
        print(json.dumps(config.to_dict(), indent=2), flush=True)
    # torch takes seconds to import, so it waits until the settings are known to be right
    from glide_finetune.bad_steps import TrainingDiverged
    from glide_finetune.dry_run import dry_run
    from glide_finetune.memory import OutOfMemory
    from glide_finetune.training_run import run
    from glide_text2im.download import DownloadError

    try:
        if config.dry_run:
            dry_run(config)
            return 0
        return run(config).exit_status
    except (ValueError, OSError, DownloadError, TrainingDiverged, OutOfMemory) as error:
        if os.environ.get("GLIDE_TRACEBACK") == "1":
            traceback.print_exc()
        print(f"train_glide.py: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("train_glide.py: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
