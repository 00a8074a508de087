"""The places that tensors take in main memory, on paper."""

import random

from glide_finetune.heap import Heap

LARGE = 1 << 20


def test_what_a_tensor_leaves_is_too_small_for_another_of_its_size():
    heap = Heap()
    first = heap.allocate(LARGE)
    heap.allocate(LARGE)
    heap.free(first)
    before = heap.end
    heap.allocate(LARGE)
    assert heap.end > before + LARGE
    end = heap.end
    assert heap.allocate(LARGE - 1000) == first
    assert heap.end == end


def test_a_tensor_takes_the_smallest_hole_that_is_large_enough():
    heap = Heap()
    places = [heap.allocate(size) for size in (3 * LARGE, 64, 2 * LARGE, 64, 4 * LARGE, 64)]
    for place in places[::2]:
        heap.free(place)
    assert heap.allocate(2 * LARGE + LARGE // 2) == places[0]
    assert heap.allocate(LARGE) == places[2]


def test_holes_beside_each_other_are_one():
    for order in ((0, 1, 2), (2, 1, 0), (0, 2, 1)):
        heap = Heap()
        heap.allocate(64)
        heap.allocate(64)
        # every second block at the end keeps what small objects took of it, so these lie in a hole
        hole = heap.allocate(4 * LARGE)
        heap.allocate(64)
        heap.free(hole)
        places = [heap.allocate(LARGE) for _ in range(3)]
        for which in order:
            heap.free(places[which])
        assert heap.allocate(4 * LARGE - 200) == hole


def test_the_end_of_the_heap_comes_back_and_its_peak_stays():
    heap = Heap()
    place = heap.allocate(LARGE)
    heap.free(place)
    assert heap.end == place == 0
    assert LARGE < heap.peak < LARGE + 100


def test_no_two_tensors_ever_share_bytes():
    drawn = random.Random(0)
    heap, alive = Heap(), {}
    for _ in range(3000):
        if alive and drawn.random() < 0.48:
            start = drawn.choice(sorted(alive))
            del alive[start]
            heap.free(start)
        else:
            size = drawn.choice([0, 7, 100, 4096, 4100, LARGE])
            alive[heap.allocate(size)] = size
        places = sorted(alive.items())
        ends = [start + size for start, size in places]
        assert all(end <= start for end, (start, _) in zip(ends, places[1:], strict=False))
        assert not ends or max(ends) <= heap.end <= heap.peak
    assert heap.peak < 2 * sum(alive.values())
