"""How much of main memory tensors take that come and go: glibc's heap, on paper.

torch asks for addresses that are multiples of 64. For those glibc looks for a free block that is 96
bytes larger than the tensor, and splits off what it does not need at both ends; small objects then
take these pieces. So the hole that a freed tensor leaves is too short for another tensor of its
size, until a neighbour is free as well, and a process takes up to twice as much as all that is
alive in it.
"""

import random
from bisect import bisect_left, insort
from collections.abc import Sequence

HEADER = 8  # bytes in front of each block
UNIT = 16  # block sizes are multiples of it
SPARE = 64 + 32  # of a free block for a tensor: the alignment, and the smallest block

# This share of the blocks at the end of the heap lose what is spare to small objects that stay.
# Found by comparing with processes: small and full-size models of both kinds, batches of 1 to 32,
# with and without recomputed activations, in float32 and bf16.
LOSE_SPARE = 0.9
HEAPS = 8  # which blocks do is chance, and makes a difference of several per cent


class Heap:
    """Places for blocks: the smallest hole that is large enough, or else the end of the heap.

    Args:
        lose_spare: the share of the blocks at the end that lose what is spare.
        seed: of the chance that chooses them.

    Attributes:
        end: bytes from the first block to the last.
        peak: the most that `end` has been.
    """

    def __init__(self, lose_spare: float, seed: int = 0) -> None:
        self.end = self.peak = 0
        self._lose_spare = lose_spare
        self._chance = random.Random(seed)
        self._sizes: dict[int, int] = {}  # of blocks in use, by where they start
        self._holes: list[tuple[int, int]] = []  # (size, start), sorted
        self._hole_starts: dict[int, int] = {}  # where each one ends
        self._hole_ends: dict[int, int] = {}  # where each one starts

    def allocate(self, size: int) -> int:
        """Where a tensor of `size` bytes starts."""
        block = -(-(size + HEADER) // UNIT) * UNIT
        place = bisect_left(self._holes, (block + SPARE, 0))
        if place < len(self._holes):
            hole, start = self._holes[place]
            self._remove_hole(start, start + hole)
            self._add_hole(start + block, start + hole)
        else:
            start = self.end
            self.end += block + SPARE * (self._chance.random() < self._lose_spare)
            self.peak = max(self.peak, self.end)
        self._sizes[start] = block
        return start

    def free(self, start: int) -> None:
        """Make a hole of the tensor that starts there, and one with the holes beside it."""
        end = start + self._sizes.pop(start)
        if start in self._hole_ends:
            before = self._hole_ends[start]
            self._remove_hole(before, start)
            start = before
        if end in self._hole_starts:
            behind = self._hole_starts[end]
            self._remove_hole(end, behind)
            end = behind
        if end == self.end:
            self.end = start
        else:
            self._add_hole(start, end)

    def _add_hole(self, start: int, end: int) -> None:
        insort(self._holes, (end - start, start))
        self._hole_starts[start] = end
        self._hole_ends[end] = start

    def _remove_hole(self, start: int, end: int) -> None:
        self._holes.pop(bisect_left(self._holes, (end - start, start)))
        del self._hole_starts[start], self._hole_ends[end]


class Heaps:
    """Heaps for the same tensors, as chance makes them."""

    def __init__(self) -> None:
        self._heaps = [Heap(LOSE_SPARE, seed) for seed in range(HEAPS)]

    @property
    def peak(self) -> int:
        """The most bytes that a heap takes, on average."""
        return sum(heap.peak for heap in self._heaps) // HEAPS

    def allocate(self, size: int) -> list[int]:
        """Where a tensor of `size` bytes starts in each of them."""
        return [heap.allocate(size) for heap in self._heaps]

    def free(self, starts: Sequence[int]) -> None:
        """Make holes of the tensor that starts there."""
        for heap, start in zip(self._heaps, starts, strict=True):
            heap.free(start)
