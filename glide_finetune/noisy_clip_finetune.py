"""Fine-tune the noise-aware CLIP that guides GLIDE on your own pictures and captions.

python -m glide_finetune.noisy_clip_finetune --data_dir DIR --val_fraction 0.1
python -m glide_finetune.noisy_clip_finetune --data_dir DIR --freeze_text
python -m glide_finetune.noisy_clip_finetune --data_dir DIR --init scratch --model_preset small
python -m glide_finetune.noisy_clip_finetune --resume_ckpt clip_checkpoints/0000     # go on
python -m glide_finetune.generate --prompt "a red fox" --clip clip_checkpoints/0000  # draw with it

From a notebook: finetune(ClipConfig(data_dir="DIR")).
"""

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from glide_finetune.config import ConfigError
from glide_finetune.noisy_clip_config import ClipConfig, check, completed, parse_config
from glide_finetune.programs import run_program

if TYPE_CHECKING:
    from glide_finetune.training_run import Outcome


def finetune(config: ClipConfig) -> "Outcome":
    """Train as `config` says; leaves the encoders in the run folder in the form of OpenAI's files.

    Raises:
        ValueError, OSError, DownloadError, TrainingDiverged, OutOfMemory: with one line for the
            user.
    """
    config = completed(config)
    check(config)
    if config.dry_run:
        raise ConfigError("dry_run is for the command line; report_clip_data tells of the data")
    return _finetune(config)


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the command line says; returns the exit status.

    Args:
        argv: the arguments without the program's name; None takes those of the process.
    """
    config = parse_config(argv)
    return run_program(
        config.program,
        lambda: _dry_run(config) if config.dry_run else _finetune(config).exit_status,
        other_weights="start from other weights with --clip PATH, or from nothing with --init "
        "scratch",
    )


def _finetune(config: ClipConfig) -> "Outcome":
    # torch takes seconds to import, so it waits until the settings are known to be right
    from glide_finetune.noisy_clip import clip_job
    from glide_finetune.training_run import run

    return run(config, clip_job)


def _dry_run(config: ClipConfig) -> int:
    print(json.dumps(config.to_dict(), indent=2), flush=True)
    from glide_finetune.noisy_clip import report_clip_data

    report_clip_data(config)
    return 0


if __name__ == "__main__":
    sys.exit(main())
