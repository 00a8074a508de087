"""The signals that ask a run to stop, which it does after the step that it is in."""

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from glide_finetune.trainer import Trainer

# Ctrl-C, a kill or the end of a job, Slurm's warning of that, a terminal that is closed. Windows
# has two of them.
STOP_SIGNALS = [
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")
    if hasattr(signal, name)
]
ONE_PRESS = 0.2  # seconds within which one Ctrl-C may come twice: from the terminal and a launcher


@contextlib.contextmanager
def stopping_on_signals(trainer: "Trainer") -> Iterator[list[signal.Signals]]:
    """While open, these signals end training after the current step; a second Ctrl-C, no sooner
    than `ONE_PRESS` after the first, ends it at once. Gives the list of the signals received, which
    stays empty outside of the main thread, where Python lets nobody listen to them."""
    received: list[signal.Signals] = []
    first_at = 0.0
    owner = os.getpid()
    program = trainer.config.program

    def stop(number: int, frame: object) -> None:
        nonlocal first_at
        if os.getpid() != owner:  # a worker of a caller's loader, which ends with this process
            return
        received.append(signal.Signals(number))
        if not trainer.stop_requested:
            trainer.stop_requested, first_at = True, time.monotonic()
            _write("\nstopping after this step; press Ctrl-C again to leave at once\n")
        elif number == signal.SIGINT and time.monotonic() - first_at > ONE_PRESS:
            _write(f"\n{program}: interrupted\n")
            for worker in multiprocessing.active_children():  # one that sends would wait for ever
                worker.kill()
            os._exit(128 + number)  # waits for no thread, such as one that writes a checkpoint

    in_main_thread = threading.current_thread() is threading.main_thread()
    listened_to = [n for n in STOP_SIGNALS if in_main_thread and not _is_left_out(n)]
    before = {number: signal.signal(number, stop) for number in listened_to}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def ctrl_c_calls(handler: Callable | signal.Handlers) -> Iterator[None]:
    """While open, Ctrl-C calls that instead of raising; outside of the main thread, where Python
    lets nobody listen, nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _is_left_out(number: int) -> bool:
    """Whether it is ignored on purpose: by nohup, whose runs go on without the terminal."""
    return signal.Signals(number).name == "SIGHUP" and signal.getsignal(number) is signal.SIG_IGN


def _write(text: str) -> None:
    """On standard error, without logging, in the middle of which the loop may be. If it is gone,
    as where Ctrl-C has ended `tee` as well, the run is still to be saved."""
    with contextlib.suppress(OSError):
        os.write(2, text.encode())
