"""Millions of paths in little memory."""

import operator
import os
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise


class PathList(Sequence[str]):
    """Paths in one block of bytes; items are made as they are asked for.

    A list of str takes three times as much, and its counts of references are written to whenever
    an item is looked at, so that in time each forked worker has a copy of it all.
    """

    def __init__(self, paths: Iterable[str] = ()) -> None:
        self._bytes = bytearray()
        self._ends = array("Q", [0])
        for path in paths:
            self.append(path)

    def append(self, path: str) -> None:
        self._bytes += os.fsencode(path)
        self._ends.append(len(self._bytes))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int | slice) -> "str | PathList":
        place = range(len(self))[index]
        if isinstance(place, range):
            return self.take(place)
        return os.fsdecode(bytes(self._bytes[self._ends[place] : self._ends[place + 1]]))

    def __iter__(self) -> Iterator[str]:
        for start, end in pairwise(self._ends):
            yield os.fsdecode(bytes(self._bytes[start:end]))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or len(other) != len(self):
            return False
        return all(map(operator.eq, self, other))

    def take(self, indices: Iterable[int]) -> "PathList":
        """The paths at these places."""
        return PathList(self[i] for i in indices)

    def find(self, path: str, guess: int = 0) -> int | None:
        """Where a path is in a list that is sorted; `guess` is tried first."""
        if guess >= len(self) or self[guess] != path:
            guess = bisect_left(self, path)
        return guess if guess < len(self) and self[guess] == path else None
