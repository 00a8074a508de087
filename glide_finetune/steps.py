"""Where a run is, and how the batches of a loader become its timed steps."""

import itertools
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.data import ChainDataset, ConcatDataset, Subset


@dataclass
class Progress:
    """Where a run is. Counts are since its start, over all epochs.

    epoch: epochs that are complete. batch: batches of the current one that are used up.
    step: optimizer steps, those included that were skipped, and those before the run where it
    began with the training state of another one: `first_step`. images: trained on.
    skipped_steps: whose loss or gradient was not finite, or whose loss was a spike;
    skipped_in_a_row: how many of them came one after the other, up to the last step.
    left_out: how many samples the data left out, and the rest of `Tally.metrics`.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    first_step: int = 0
    images: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    left_out: dict[str, int] = field(default_factory=dict)


class StepTimer:
    """Passes batches on and times steps, from `start` to `metrics`. That includes fetching the
    batches of the next step, but not drawing samples or saving.
    """

    def __init__(self, loader: Iterable) -> None:
        self._loader = loader
        self.start()

    def start(self) -> None:
        self._waited, self._started = 0.0, time.perf_counter()

    def __iter__(self) -> Iterator[Any]:
        batches, end = iter(self._loader), object()
        while True:
            started = time.perf_counter()
            batch = next(batches, end)
            self._waited += time.perf_counter() - started
            if batch is end:
                return
            yield batch

    def metrics(self, image_count: int) -> dict[str, float]:
        """Images per second, and the share of the time, 0 to 1, that was spent on the data."""
        seconds = time.perf_counter() - self._started
        return {
            "images_per_second": image_count / seconds,
            "data/wait_share": self._waited / seconds,
        }


def set_epoch_of_datasets(loader: Any, epoch: int) -> None:
    """Call `set_epoch` of the dataset of a torch DataLoader, if it has that, or of the datasets
    inside of a Subset, ConcatDataset or ChainDataset."""
    datasets = [getattr(loader, "dataset", None)]
    while datasets:
        dataset = datasets.pop()
        if hasattr(dataset, "set_epoch"):
            dataset.set_epoch(epoch)
        elif isinstance(dataset, Subset):
            datasets.append(dataset.dataset)
        elif isinstance(dataset, ConcatDataset | ChainDataset):
            datasets += dataset.datasets


def is_time(step: int, interval: int) -> bool:
    """Whether something that happens every `interval` steps, 0 for never, happens after `step`."""
    return interval > 0 and step % interval == 0


def groups_of(size: int, items: Iterable) -> Iterator[tuple[list, bool]]:
    """Lists of `size` successive items, the last of which may be shorter, each with whether it is
    the last; so one item behind it is fetched first."""
    iterator = iter(items)
    following = list(itertools.islice(iterator, 1))
    while following:
        group = following + list(itertools.islice(iterator, size - 1))
        following = list(itertools.islice(iterator, 1))
        yield group, not following


def image_count(batches: list) -> int:
    """How many samples there are in some batches."""
    return sum(len(batch[0]) for batch in batches)


def sample_keys(batches: list) -> list[str]:
    """The keys of all samples, where the loader gives them."""
    return [key for batch in batches if not torch.is_tensor(batch[-1]) for key in batch[-1]]
