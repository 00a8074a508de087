"""Checkpoints written while training goes on."""

import logging
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glide_finetune.checkpoints import delete_unfinished, prune, save_checkpoint
from glide_finetune.memory import available_memory

logger = logging.getLogger(__name__)

# Of the memory that is available, this share may be taken for the copies.
MOST_OF_MEMORY = 0.8


class CheckpointWriter:
    """Writes the checkpoints of one run in a thread, one at a time.

    Training waits only while the tensors are copied into host memory. The copies are kept for the
    next checkpoint, as fresh memory takes several times as long to fill. Where there is not enough
    memory for them, training waits until the checkpoint is written.

    Args:
        run_folder: the folder of the run.
        keep: how many of its checkpoints to keep, 0 for all; older ones are deleted once a new one
            is whole.

    Attributes:
        saved_step: of the newest checkpoint that is whole; 0 for none yet.
    """

    def __init__(self, run_folder: Path, keep: int = 0) -> None:
        self.run_folder = run_folder
        self.keep = keep
        self.saved_step = 0
        self._copies: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._unfinished: tuple[int, int] | None = None  # (epoch, step) of the last if it failed

    def save(self, **checkpoint: Any) -> None:
        """Write a checkpoint with the arguments of `save_checkpoint`, after `wait`.

        One that cannot be written is an error in the log, and `wait` returns it.
        """
        self.wait()
        copy = None
        if self._has_room(checkpoint):
            try:
                copy = self._copy(checkpoint, "")
            except (RuntimeError, MemoryError):  # less may be pinned than there is, for example
                self._copies.clear()
        if copy is None:
            logger.warning("little memory is left: training waits while the checkpoint is written")
            self._write(checkpoint)
            return
        for device in {tensor.device for tensor in _tensors(checkpoint) if tensor.is_cuda}:
            torch.cuda.synchronize(device)  # the copies above do not wait for each other
        # A daemon, so that somebody who leaves in the middle of it need not wait.
        self._thread = threading.Thread(
            target=self._write, args=(copy,), name="checkpoint", daemon=True
        )
        self._thread.start()

    @property
    def is_writing(self) -> bool:
        """Whether a checkpoint is being written at this moment."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> Exception | None:
        """Until no checkpoint is being written; why the last one failed, None if it did not."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        return self._error

    def _write(self, checkpoint: Mapping[str, Any]) -> None:
        self._error = None
        try:
            if self._unfinished:  # else one after the other they would fill a disk for good
                delete_unfinished(self.run_folder, *self._unfinished)
            self._unfinished = (checkpoint["epoch"], checkpoint["step"])
            save_checkpoint(self.run_folder, **checkpoint)
            self._unfinished = None
        except Exception as error:  # anything else would end the thread unheard
            self._error = error
            logger.error("%s", error, exc_info=not isinstance(error, OSError))
            return
        self.saved_step = checkpoint["step"]
        try:
            prune(self.run_folder, self.keep)
        except OSError as error:
            logger.warning("older checkpoints could not be deleted: %s", error)

    def _has_room(self, checkpoint: Mapping[str, Any]) -> bool:
        if self._copies:
            return True
        available = available_memory(torch.device("cpu"))
        needed = sum(map(_bytes_of_copy, _tensors(checkpoint)))
        # weights that are kept in fewer bytes become float32 while they are written
        needed += sum(4 * t.numel() for t in checkpoint["model_state"].values() if t.itemsize < 4)
        return available is None or needed < MOST_OF_MEMORY * available

    def _copy(self, value: Any, name: str) -> Any:
        """`value` with the tensors in its containers copied to `self._copies`, by their names."""
        if isinstance(value, Tensor):
            copy = self._copies.get(name)
            if copy is None or copy.shape != value.shape or copy.dtype != value.dtype:
                # pinned memory lets the card write to it by itself
                copy = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
                self._copies[name] = copy
            return copy.copy_(value.detach(), non_blocking=value.is_cuda)
        if isinstance(value, Mapping):
            return {key: self._copy(item, f"{name}.{key}") for key, item in value.items()}
        if type(value) in (list, tuple):
            return type(value)(self._copy(item, f"{name}.{i}") for i, item in enumerate(value))
        return value


def _bytes_of_copy(tensor: Tensor) -> int:
    """Pinned memory comes in powers of two."""
    return 1 << (tensor.nbytes - 1).bit_length() if tensor.is_cuda else tensor.nbytes


def _tensors(value: Any) -> list[Tensor]:
    """All that are in some nested containers."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = value.values()
    elif type(value) not in (list, tuple):
        return []
    return [tensor for item in value for tensor in _tensors(item)]
