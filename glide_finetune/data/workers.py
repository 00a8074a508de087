"""Processes that load data, what they send, and what becomes of a run when one of them dies."""

import atexit
import contextlib
import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from functools import partial
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any
from weakref import ref

try:
    import resource
except ImportError:  # Windows
    resource = None

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from glide_finetune.stopping import STOP_SIGNALS, ctrl_c_calls

MOST_FILES = 10_000  # open at a time; macOS allows few more

# Torch's iterators, which may be gone, and the workers of each.
_started: list[tuple[ref, Sequence[BaseProcess]]] = []


def worker_loader(
    dataset: Dataset,
    *,
    num_workers: int,
    pin_memory: bool = False,
    items_ahead: int = 1,
    **options: Any,
) -> DataLoader:
    """How every `DataLoader` is made here; what the dataset gives is sent as it is.

    The workers make at least `items_ahead` before they are asked for.
    """
    if num_workers:
        _allow_many_files()
        options["prefetch_factor"] = max(2, math.ceil(items_ahead / num_workers))
    return DataLoader(
        dataset,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=pin_memory,
        collate_fn=_as_it_is,
        # DataLoader draws a number at the start of each iteration. From a generator of its own, so
        # that entering an epoch in the middle leaves the training's random state alone.
        generator=torch.Generator(),
        worker_init_fn=partial(_begin_worker, os.getpid()),
        **options,
    )


def _as_it_is(batch):
    return batch


def _allow_many_files() -> None:
    """A tensor in shared memory is an open file, and a step of many batches holds all of theirs."""
    if resource is None:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError, OSError):  # of a system that allows fewer than it says
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _begin_worker(trainer: int, worker: int) -> None:
    """Leave signals to the trainer: a job that is asked to stop, all of its processes at once,
    still needs its batches to end the current step."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if os.name == "posix":  # elsewhere the parent stays the same when it is gone
        threading.Thread(target=_end_after, args=[trainer], daemon=True).start()


def _end_after(parent: int) -> None:
    """End this process when its parent is gone. Torch sees to that too, but not while it sends
    more than a pipe holds, whose other end it keeps open itself."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


@atexit.register
def _end_workers() -> None:
    """Else multiprocessing would send those of an iterator that is still referred to the SIGTERM
    that they ignore, and wait for ever."""
    for iterator, _ in _started:
        if (items := iterator()) is not None:
            items._shutdown_workers()
        del items
    _kill_forgotten()


def _kill_forgotten() -> None:
    """Those of iterators that are gone. One that was part of a cycle of references, as after an
    error, ends with its queues closed, and cannot tell its workers to end."""
    for iterator, workers in _started:
        if iterator() is None:
            for worker in workers:
                worker.kill()
    _started[:] = [pair for pair in _started if pair[0]() is not None]


def place_among_workers() -> tuple[int, int]:
    """(number of this worker, how many there are); (0, 1) where the main process does the work."""
    info = get_worker_info()
    return (info.id, info.num_workers) if info else (0, 1)


class _Copied:
    """A tensor that travels through a pipe, and arrives as a tensor."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor

    def __reduce__(self) -> tuple:
        return torch.from_numpy, (self._tensor.numpy(),)


def to_send(tensor: torch.Tensor) -> torch.Tensor | _Copied:
    """The tensor; in a worker, in the shared memory in which it travels, where that has room.

    Containers often have 64 MB of it. When torch finds it full, while sending, it drops the batch,
    for which the trainer then waits for ever.
    """
    if get_worker_info() is None:
        return tensor
    try:
        return tensor.share_memory_()
    except RuntimeError:
        return _Copied(tensor)


def start_workers(loader: DataLoader) -> None:
    """Start those of a loader that has nothing to give for now, which the caller sees to.

    On Linux they are forks of this process: they keep whatever it holds then, so that what it
    changes afterwards, as training does a model, is copied and takes memory twice.

    Ctrl-C waits until they are up: it would be lost in the middle of a fork, and would kill a
    worker that does not ignore it yet.

    Raises:
        OSError, ChildProcessError: as in `received_from`.
    """
    if not loader.num_workers:
        return
    # Asking settles the number for this thread. Else, when it first computes, it would take over
    # the 1 of the thread in which torch pins memory.
    torch.get_num_threads()
    presses = []
    with ctrl_c_calls(lambda *_: presses.append(1)):
        for _ in received_from(loader):
            raise AssertionError("there is something to give")
    if presses:
        signal.raise_signal(signal.SIGINT)


_END = object()


def received_from(loader: DataLoader) -> Iterator[Any]:
    """What the workers of a loader make.

    Raises:
        OSError: they cannot be started.
        ChildProcessError: one of them has died. That is told when its next item is due; torch's own
            handler of SIGCHLD would break a training step off in the middle.
    """
    handler = _handler_of_children()
    _kill_forgotten()
    others = multiprocessing.active_children()
    try:
        try:
            items = iter(loader)
        except OSError as error:
            for worker in multiprocessing.active_children():
                if worker not in others:  # which waits for the rest, and would for ever
                    worker.kill()
            raise OSError(
                f"not all of {loader.num_workers} data workers can be started "
                f"({error.strerror or error}): lower --num_workers, or raise the limits (ulimit)"
            ) from None
        finally:
            _handle_children(handler)
        workers = getattr(items, "_workers", [])
        if workers and all(iterator() is not items for iterator, _ in _started):
            _started.append((ref(items), workers))
        try:
            while (item := _next_item(items, workers)) is not _END:
                yield item
        except ChildProcessError:
            _abandon(items, workers)
            raise
    except RuntimeError as error:
        if str(error).startswith("Too many open files"):
            raise OSError(
                "a step's batches take more open files than the system allows: raise the limit "
                "(ulimit -n), or lower --gradient_accumulation_steps"
            ) from None
        if not str(error).startswith("DataLoader worker (pid"):
            raise
        raise _worker_died() from None


def _next_item(items: Iterator[Any], workers: Sequence[BaseProcess]) -> Any:
    """The next item, or `_END`. ChildProcessError as soon as a worker is dead: one that dies while
    it sends leaves half a message, for whose other half torch would wait."""

    def look_at_them(*_: Any) -> None:
        if not all(worker.is_alive() for worker in workers):
            raise _worker_died()

    handler = _handler_of_children()
    if handler is not None:
        _handle_children(look_at_them)
    try:
        look_at_them()
        return next(items, _END)
    except (RuntimeError, ConnectionError, EOFError):  # which may all come of a worker's death
        if workers and wait([worker.sentinel for worker in workers], timeout=1):
            raise _worker_died() from None
        raise
    finally:
        _handle_children(handler)


def _abandon(items: Iterator[Any], workers: Sequence[BaseProcess]) -> None:
    """Where batches are pinned, a thread of torch's may wait for the other half of a message, and
    torch for that thread as it ends the workers."""
    for worker in workers:
        worker.kill()
    vars(items).pop("_pin_memory_thread", None)


def _worker_died() -> ChildProcessError:
    return ChildProcessError(
        "a data worker was killed, most likely since memory ran out: lower --num_workers, or "
        "--batch_size"
    )


def _handler_of_children() -> Any:
    return signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None


def _handle_children(handler: Any) -> None:
    """Set the handler of SIGCHLD, where there is one and this is the thread that can."""
    if handler is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, handler)
