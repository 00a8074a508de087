"""What all programs do alike: where their lines go, and how errors end them.

torch is not imported here, unless to know an error by.
"""

import logging
import os
import sys
import traceback
from collections.abc import Callable

from glide_finetune.config import ConfigError


def run_program(name: str, action: Callable[[], int], *, after_interrupt: str = "") -> int:
    """Do what a command line asks for; returns the exit status.

    It is what `action` returns. With one line on standard error it is 2 for a setting that cannot
    work, 1 for another error that the user can do something about, and 130 after Ctrl-C. With
    GLIDE_TRACEBACK=1 in the environment such an error also shows where it comes from, as all
    others do.

    Args:
        name: of the program, which these lines begin with.
        action: what is to be done, all imports that take long included.
        after_interrupt: what is to be said after Ctrl-C.
    """
    sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be text
    logging.basicConfig(format="%(message)s", stream=sys.stdout)
    for package in ("glide_finetune", "glide_text2im"):
        logging.getLogger(package).setLevel(logging.INFO)
    try:
        return action()
    except KeyboardInterrupt:
        print("; ".join(filter(None, (f"{name}: interrupted", after_interrupt))), file=sys.stderr)
        return 130
    except Exception as error:
        if not _is_for_the_user(error):
            raise
        if os.environ.get("GLIDE_TRACEBACK") == "1":
            traceback.print_exc()
        print(f"{name}: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1


def _is_for_the_user(error: Exception) -> bool:
    """Whether its message is one line about what is wrong and what to do."""
    if isinstance(error, ValueError | OSError):
        return True
    # here, since what is told above needs no torch
    from glide_finetune.bad_steps import TrainingDiverged
    from glide_finetune.memory import OutOfMemory
    from glide_text2im.download import DownloadError

    return isinstance(error, DownloadError | TrainingDiverged | OutOfMemory)
