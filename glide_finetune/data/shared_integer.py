"""A number that running DataLoader workers see change."""

import torch

NO_EPOCH = -1  # of a dataset whose `set_epoch` was never called


class SharedInteger:
    """One int64 in shared memory.

    Persistent workers keep the copy of the dataset that they were started with; through this they
    learn the epoch that the main process sets later.
    """

    def __init__(self, value: int = 0) -> None:
        self._cell = torch.tensor([value], dtype=torch.int64).share_memory_()

    @property
    def value(self) -> int:
        return int(self._cell.item())

    @value.setter
    def value(self, value: int) -> None:
        self._cell.fill_(value)
