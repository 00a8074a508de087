"""Processes that load data, what they send, and what becomes of a run when one of them dies."""

import atexit
import math
import multiprocessing
import signal
import threading
from collections.abc import Iterator, Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any
from weakref import WeakSet

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from glide_finetune.stopping import STOP_SIGNALS

_loaders: WeakSet[DataLoader] = WeakSet()


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
        options["prefetch_factor"] = max(2, math.ceil(items_ahead / num_workers))
    loader = DataLoader(
        dataset,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=pin_memory,
        collate_fn=_as_it_is,
        # DataLoader draws a number at the start of each iteration. From a generator of its own, so
        # that entering an epoch in the middle leaves the training's random state alone.
        generator=torch.Generator(),
        worker_init_fn=_leave_signals_to_the_trainer,
        **options,
    )
    _loaders.add(loader)
    return loader


def _as_it_is(batch):
    return batch


def _leave_signals_to_the_trainer(worker: int) -> None:
    """A job that is asked to stop, all of its processes at once, still needs its batches to end
    the current step. Workers notice by themselves when the trainer is gone."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@atexit.register
def _end_workers() -> None:
    """Else multiprocessing would send those of a loader that is still referred to the SIGTERM that
    they ignore, and wait for ever."""
    for loader in _loaders:
        if loader._iterator is not None:
            loader._iterator._shutdown_workers()


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


_END = object()


def received_from(loader: DataLoader) -> Iterator[Any]:
    """What the workers of a loader make.

    Raises:
        OSError: they cannot be started.
        ChildProcessError: one of them has died. That is told when its next item is due; torch's own
            handler of SIGCHLD would break a training step off in the middle.
    """
    handler = _handler_of_children()
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
        try:
            while (item := _next_item(items, workers)) is not _END:
                yield item
        except ChildProcessError:
            _abandon(items, workers)
            raise
    except RuntimeError as error:
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
