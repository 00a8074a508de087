"""Batches in a reproducible order.

A batch at a given place of a given epoch is always the same: for local folders whatever the number
of workers, for shards with the same number of workers; and also when an epoch is entered in the
middle, where what lies before is not decoded.
"""

import contextlib
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain, count, cycle, islice
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset, IterableDataset

from glide_finetune.data.bad_samples import BadSample, Tally
from glide_finetune.data.folder_dataset import TextImageDataset
from glide_finetune.data.shard_stream import RawSample, ShardStream, nothing_left
from glide_finetune.data.shared_integer import SharedInteger
from glide_finetune.data.workers import (
    place_among_workers,
    received_from,
    start_workers,
    to_send,
    worker_loader,
)
from glide_finetune.seeds import derived_seed


def make_dataloader(
    dataset: TextImageDataset | ShardStream,
    batch_size: int,
    *,
    seed: int,
    num_workers: int,
    device: torch.device | str,
    epoch_samples: int = 0,
    batches_a_step: int = 1,
) -> "FolderBatches | ShardBatches":
    """Batches of a dataset: tuples of stacked tensors, and a list of keys last if it gives them.

    Call `start_workers()` before a model is loaded, then `set_epoch(epoch, start_batch=0)`, and
    iterate; without a new call the same epoch comes again. `device` is where the batches will be
    used: for CUDA they come in pinned memory. `seed` is for the order of folders; a stream of
    shards has its own. An incomplete last batch is left out. `epoch_samples` is for streams of
    shards: how many samples make up an epoch, over all processes of a distributed run; 0 for those
    of one pass. Workers have the next `batches_a_step` ready, two each at least.

    A folder with fewer samples than a batch gives one batch, in which samples occur again with
    other crops. Raises ValueError for fewer `epoch_samples` than a batch has, and while iterating
    if no sample can be used.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    workers = {
        "num_workers": num_workers,
        "pin_memory": torch.device(device).type == "cuda",
        "items_ahead": batches_a_step,
    }
    if isinstance(dataset, ShardStream):
        return ShardBatches(dataset, batch_size, epoch_samples, **workers)
    return FolderBatches(dataset, _FolderEpoch(len(dataset), batch_size, seed), **workers)


class _Draw(NamedTuple):
    """One use of a sample; travels to the worker instead of a bare index."""

    index: int
    epoch: int
    repeat: int  # further uses in the same epoch, when a folder is smaller than a batch


class Batch(tuple):
    """A batch as the train steps take it.

    left_out: how many samples were left out on the way to it and why, how many captions were cut
        and how many samples had no metadata, as in `Tally.metrics`; on the way to the first batch
        of an epoch also what was left out when the folder was listed.
    """

    left_out: Counter[str]


class _Message(NamedTuple):
    """From a worker to the main process."""

    batch: tuple | None  # None for one that a resumed epoch has behind it, and with an error
    tally: Tally  # noted since the last message
    error: str = ""  # so that the user sees one line and no worker's traceback
    is_end: bool = False  # of the worker's share of the epoch; the batch is its rest, None for none


def _collate(items: Sequence[tuple]) -> tuple:
    return tuple(
        list(values) if isinstance(values[0], str) else to_send(torch.stack(values))
        for values in zip(*items, strict=True)
    )


def _joined(batches: Sequence[tuple]) -> tuple:
    return tuple(
        list(chain.from_iterable(values)) if isinstance(values[0], list) else torch.cat(values)
        for values in zip(*batches, strict=True)
    )


def _picked(batch: tuple, places: Sequence[int]) -> tuple:
    return tuple(
        [values[place] for place in places] if isinstance(values, list) else values[list(places)]
        for values in batch
    )


def _received(message: _Message) -> Batch:
    batch = Batch(message.batch)
    batch.left_out = message.tally.metrics()
    return batch


class _FolderEpoch:
    """The batches of draws of one epoch, from `start_batch` on."""

    def __init__(self, samples: int, batch_size: int, seed: int) -> None:
        self.samples, self.batch_size, self.seed = samples, batch_size, seed
        self.epoch = self.start_batch = 0
        self.batches = max(1, samples // batch_size)

    def __iter__(self) -> Iterator[list[_Draw]]:
        draws = self.batches * self.batch_size
        rounds = math.ceil(draws / self.samples)
        order = torch.cat([self._order(repeat) for repeat in range(rounds)])
        for start in range(self.start_batch * self.batch_size, draws, self.batch_size):
            places = range(start, start + self.batch_size)
            yield [_Draw(int(order[i]), self.epoch, repeat=i // self.samples) for i in places]

    def _order(self, repeat: int) -> torch.Tensor:
        seed = derived_seed(self.seed, self.epoch, "order", repeat)
        return torch.randperm(self.samples, generator=torch.Generator().manual_seed(seed))


class _FolderDraws(Dataset):
    """What the workers of a folder hold: batches of draws in, batches of tensors out."""

    def __init__(self, dataset: TextImageDataset) -> None:
        self.dataset = dataset

    def __getitems__(self, draws: list[_Draw]) -> _Message:
        tally = Tally()
        try:
            items = [self.dataset.draw(*draw, tally=tally) for draw in draws]
        except ValueError as error:
            return _Message(None, tally, error=str(error))
        return _Message(_collate(items), tally)


class FolderBatches:
    """The batches of a local dataset; its length is the number of batches of an epoch."""

    def __init__(self, dataset: TextImageDataset, order: _FolderEpoch, **workers: Any) -> None:
        self._epoch = order
        self._account = dataset.account.again(order.batches * order.batch_size)
        self._left_out_by_index = dataset.index.metrics()
        self._loader = worker_loader(_FolderDraws(dataset), batch_sampler=self._epoch, **workers)

    def start_workers(self) -> None:
        """As `workers.start_workers`; without it the first epoch starts them."""
        start_batch, self._epoch.start_batch = self._epoch.start_batch, self._epoch.batches
        try:
            start_workers(self._loader)
        finally:
            self._epoch.start_batch = start_batch

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        self._epoch.epoch, self._epoch.start_batch = epoch, start_batch

    def __len__(self) -> int:
        return self._epoch.batches

    def __iter__(self) -> Iterator[Batch]:
        is_whole = self._epoch.start_batch == 0
        left_out = self._left_out_by_index if is_whole else Counter()
        for message in received_from(self._loader):
            self._account.add(message.tally)
            if message.error:
                raise ValueError(message.error)
            batch = _received(message)
            batch.left_out += left_out
            left_out = Counter()
            yield batch
        self._account.end_epoch(is_whole=is_whole)


NO_BATCHES = -1  # as the start of an epoch in which there are none


class _ShardShare(IterableDataset):
    """What the workers of a stream hold: the batches of a worker's share of an epoch.

    start_batch: of the epoch, where it is entered, or `NO_BATCHES`.
    endless: go through the share again and again.
    """

    def __init__(self, stream: ShardStream, batch_size: int, endless: bool) -> None:
        super().__init__()
        self.stream, self.batch_size, self.endless = stream, batch_size, endless
        self.start_batch = SharedInteger()

    def __iter__(self) -> Iterator[_Message]:
        """A message for every batch; for those that are surely before `start_batch` one without.

        The batches of all workers are taken in turn, so batch n of worker w is batch
        n * workers + w of the epoch, or an earlier one where another worker has run out. Hence
        what is skipped by that rule is never needed, and the receiver drops the few too many.
        """
        if self.start_batch.value == NO_BATCHES:
            return
        worker, workers = place_among_workers()
        skip = max(0, math.ceil((self.start_batch.value - worker) / workers))
        epoch, tally = self.stream.epoch, Tally()
        raw_samples = self._raw_samples(epoch, worker, workers, tally)
        # A share without one good sample makes no batch at all, so skipped batches count only once
        # such a sample is found.
        stand_in, unconfirmed = None, 0
        for _ in range(skip):
            skipped = list(islice(raw_samples, self.batch_size))
            tally.take()  # which the process that trained on these has logged
            if stand_in is None:
                stand_in = self._first_item(skipped, epoch)
            is_rest = len(skipped) < self.batch_size
            unconfirmed += not is_rest
            if stand_in is not None:
                yield from [_Message(None, Tally())] * unconfirmed
                unconfirmed = 0
            if is_rest:
                raw_samples = iter(skipped)
                break
        batch: list[tuple] = []
        gaps = unconfirmed * self.batch_size
        for item in self._items(raw_samples, epoch, tally, stand_in, gaps):
            batch.append(item)
            if len(batch) == self.batch_size:
                yield _Message(_collate(batch), tally.take())
                batch = []
        yield _Message(_collate(batch) if batch else None, tally, is_end=True)

    def _raw_samples(
        self, epoch: int, worker: int, workers: int, tally: Tally
    ) -> Iterator[RawSample]:
        for repeat in count() if self.endless else (0,):
            raw = None
            for raw in self.stream.raw_samples(epoch, worker, workers, tally, repeat):
                yield raw
            if raw is None:  # so there will be none in the next pass either
                return

    def _first_item(self, raw_samples: Sequence[RawSample], epoch: int) -> tuple | None:
        for raw in raw_samples:
            with contextlib.suppress(BadSample):
                return self.stream.make(raw, epoch, Tally())
        return None

    def _items(
        self,
        raw_samples: Iterator[RawSample],
        epoch: int,
        tally: Tally,
        stand_in: tuple | None,
        gaps: int,
    ) -> Iterator[tuple]:
        """An item for each sample; the next readable one also stands in for an unreadable one,
        and the first one of the share for those at its end.

        Leaving a gap instead would move all that follows, and where an epoch is entered in the
        middle nobody knows which of the samples before were unreadable.

        Args:
            stand_in: the first readable one, None if it is still to come.
            gaps: how many are to be stood in for already.
        """
        for raw in raw_samples:
            if stand_in is None and raw.repeat:
                return  # a whole pass has given nothing
            try:
                item = self.stream.make(raw, epoch, tally)
            except BadSample as error:
                tally.skip(raw.key, error)
                gaps += 1
                continue
            yield from [item] * (gaps + 1)
            gaps = 0
            stand_in = item if stand_in is None else stand_in
        if stand_in is not None:
            yield from [stand_in] * gaps


class ShardBatches:
    """The batches of a stream of shards.

    An epoch is one pass over the shards, and how many batches it has is not known; with
    `epoch_samples` it has so many samples, for which each worker goes through its share again and
    again, and the length is the number of batches.

    At most as many workers are started as there are shards. What is left at the ends of their
    shares makes the last batches. A rest of less than a batch is left out; if it is all there is,
    it is filled by repeating its items. After an epoch the log tells what was left out for which
    reason.
    """

    def __init__(
        self,
        stream: ShardStream,
        batch_size: int,
        epoch_samples: int,
        *,
        num_workers: int,
        **workers: Any,
    ) -> None:
        self._batches = epoch_samples // (batch_size * stream.nodes)
        if epoch_samples and not self._batches:
            raise ValueError(
                f"an epoch of {epoch_samples} samples makes no batch of {batch_size} in each of "
                f"{stream.nodes} processes"
            )
        self._share = _ShardShare(stream, batch_size, endless=self._batches > 0)
        self._account = stream.account.again(self._batches * batch_size or None)
        self._left_out: Counter[str] = Counter()  # since the last batch
        num_workers = min(num_workers, stream.shards_here)
        self._loader = worker_loader(
            self._share, num_workers=num_workers, batch_size=None, **workers
        )

    def __len__(self) -> int:
        if not self._batches:
            raise TypeError("how many batches the shards make is known only after an epoch")
        return self._batches

    def start_workers(self) -> None:
        """As `workers.start_workers`; without it the first epoch starts them."""
        start_batch, self._share.start_batch.value = self._share.start_batch.value, NO_BATCHES
        try:
            start_workers(self._loader)
        finally:
            self._share.start_batch.value = start_batch

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        self._share.stream.set_epoch(epoch)
        self._share.start_batch.value = start_batch

    def __iter__(self) -> Iterator[Batch]:
        start_batch = self._share.start_batch.value
        for place, batch in enumerate(islice(self._all_batches(), self._batches or None)):
            if place >= start_batch and batch is not None:
                batch = Batch(batch)
                batch.left_out, self._left_out = self._left_out, Counter()
                yield batch
        self._account.end_epoch(is_whole=start_batch == 0)

    def _all_batches(self) -> Iterator[tuple | None]:
        """Those of the workers in turn, None for those before `start_batch`, then their rests."""
        rests, is_empty = [], True
        for message in received_from(self._loader):
            self._account.add(message.tally)
            self._left_out += message.tally.metrics()
            if not message.is_end:
                is_empty = False
                yield message.batch
            elif message.batch is not None:
                rests.append(message.batch)
        if rests:
            rest = _joined(rests)
            places, size = range(len(rest[0])), self._share.batch_size
            for start in range(0, len(places) - size + 1, size):
                yield _picked(rest, places[start : start + size])
            if is_empty and len(places) < size:
                yield _picked(rest, list(islice(cycle(places), size)))
        elif is_empty:
            raise ValueError(nothing_left(self._account, self._share.stream.caption_in_metadata))
