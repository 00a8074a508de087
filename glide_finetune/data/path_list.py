"""Millions of paths in little memory."""

import operator
import sys
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

# As os.fsdecode has it: bytes that are no text come out as they went in.
_ENCODING = sys.getfilesystemencoding(), sys.getfilesystemencodeerrors()


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
        self._bytes += path.encode(*_ENCODING)
        self._ends.append(len(self._bytes))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int | slice) -> "str | PathList":
        place = range(len(self))[index]
        if isinstance(place, range):
            return self.take(place)
        return self._text(self._ends[place], self._ends[place + 1])

    def __iter__(self) -> Iterator[str]:
        for start, end in pairwise(self._ends):
            yield self._text(start, end)

    def _text(self, start: int, end: int) -> str:
        return self._bytes[start:end].decode(*_ENCODING)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or len(other) != len(self):
            return False
        return all(map(operator.eq, self, other))

    def take(self, indices: Iterable[int]) -> "PathList":
        """The paths at these places."""
        return PathList(self[i] for i in indices)


class PathFinder:
    """Tells where in a list a path is; needs 16 bytes for each path, where a dict needs 150."""

    def __init__(self, paths: PathList) -> None:
        import numpy as np  # here, as settings are checked without it

        hashes = np.fromiter(map(hash, paths), np.int64, len(paths))
        order = hashes.argsort()
        self._paths, self._places = paths, array("q", order.tobytes())
        self._hashes = array("q", hashes[order].tobytes())

    def find(self, path: str) -> int | None:
        wanted = hash(path)
        start = bisect_left(self._hashes, wanted)
        for i in range(start, bisect_right(self._hashes, wanted, start)):
            if self._paths[self._places[i]] == path:
                return self._places[i]
        return None
