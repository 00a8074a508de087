"""What all programs do alike: where their lines go, how errors end them, what memory they keep.

torch is not imported here, unless to know an error by.
"""

import contextlib
import ctypes
import errno
import logging
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import TextIO

from glide_finetune.config import ConfigError
from glide_finetune.stopping import ONE_PRESS, ctrl_c_calls

# Settings of glibc's mallopt(3).
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3


def run_program(
    name: str,
    action: Callable[[], int],
    *,
    other_weights: str = "",
    after_interrupt: str = "",
) -> int:
    """Do what a command line asks for; returns the exit status.

    It is what `action` returns. With one line on standard error it is 2 for a setting that cannot
    work, 1 for another error that the user can do something about, and 130 after Ctrl-C. With
    GLIDE_TRACEBACK=1 in the environment such an error also shows where it comes from, as all
    others do.

    Args:
        name: of the program, which these lines begin with.
        action: what is to be done, all imports that take long included.
        other_weights: what to do instead where OpenAI's cannot be downloaded.
        after_interrupt: what is to be said after Ctrl-C.
    """
    _open_standard_streams()
    if hasattr(sys.stdout, "reconfigure"):  # what a caller put in its place need not have it
        sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be text
    logging.basicConfig(format="%(message)s", handlers=[LineHandler()])
    for package in ("glide_finetune", "glide_text2im"):
        logging.getLogger(package).setLevel(logging.INFO)
    keep_freed_memory()
    try:
        return action()
    except KeyboardInterrupt:
        with ctrl_c_calls(signal.SIG_IGN):
            for worker in multiprocessing.active_children():  # which would be waited for
                worker.kill()
            tell("; ".join(filter(None, (f"{name}: interrupted", after_interrupt))))
            time.sleep(ONE_PRESS)  # within which it may come a second time
        return 130
    except Exception as error:
        line = _line_about(error, other_weights)
        if line is None:
            raise
        if os.environ.get("GLIDE_TRACEBACK") == "1":
            tell(traceback.format_exc())
        tell(f"{name}: error: {line}")
        return 2 if isinstance(error, ConfigError) else 1
    finally:
        for stream in (sys.stdout, sys.stderr):
            _give_up_if_gone(stream)


def _open_standard_streams() -> None:
    """Point standard streams that the caller has closed, as some launchers do, to /dev/null: else
    the file that is opened next would take their place, and get what is written to them. Lines go
    to standard error where standard output was closed."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # gets the lowest that is free
    sys.stderr = sys.stderr or os.fdopen(2, "w", errors="backslashreplace", closefd=False)
    sys.stdout = sys.stdout or sys.stderr


def tell(line: str) -> None:
    """On standard error, unless that is gone: a pipe nobody reads, a file on a full disk."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)


class LineHandler(logging.Handler):
    """Prints log lines above progress bars, or on standard error where standard output is gone. A
    line that cannot be printed ends no run."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm  # here, as not all that comes here has a bar

        try:
            line = self.format(record)
        except Exception:  # a mistake in the call
            self.handleError(record)
            return
        try:
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()
        except (OSError, ValueError, AttributeError):  # the latter two: closed, then or always
            tell(line)


def _give_up_if_gone(stream: TextIO | None) -> None:
    """Else Python would end with an error of its own, in place of the exit status."""
    if stream is None or stream.closed:
        return
    try:
        stream.flush()
    except OSError:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())


def keep_freed_memory() -> None:
    """Have the process keep the memory of tensors that are freed for those that come.

    glibc gives large blocks back to the system, which fills them with zeros, page by page, when
    they are asked for again: on a CPU 6 % of the processor time of a float32 training step, and
    more where convolutions are faster. Without glibc nothing happens.
    """
    mallopt = sys.platform == "linux" and getattr(ctypes.CDLL(None), "mallopt", None)
    # An old glibc refuses a threshold as large, and without that one the other would do harm.
    if mallopt and mallopt(_MMAP_THRESHOLD, 2**31 - 1):
        mallopt(_TRIM_THRESHOLD, -1)


def _line_about(error: Exception, other_weights: str) -> str | None:
    """What is wrong and what to do; None if this is not for the user to know."""
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"{error}: free some, or have what is written go to another disk"
    if isinstance(error, ValueError | OSError):
        return str(error)
    if isinstance(error, ImportError):  # perhaps of torch, which cannot be imported again
        return None
    # here, since what is told above needs no torch
    from glide_finetune.bad_steps import TrainingDiverged
    from glide_finetune.memory import OutOfMemory
    from glide_text2im.download import DownloadError

    if isinstance(error, DownloadError) and other_weights:
        return f"{error}; or {other_weights}"
    if isinstance(error, DownloadError | TrainingDiverged | OutOfMemory):
        return str(error)
    return None
