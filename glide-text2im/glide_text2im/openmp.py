"""Python functions on the threads of torch's own operators.

Those threads keep a processor busy for some milliseconds after each operator, waiting for the next
one: work on threads of one's own would have to share the processors with them.
"""

import ctypes
import sys
from collections.abc import Callable

import torch

_Body = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def _find_region() -> Callable | None:
    """OpenMP's entry to a parallel region, of the library that torch has loaded for itself."""
    if sys.platform != "linux":
        return None
    region = getattr(ctypes.CDLL(None), "GOMP_parallel", None)
    if region is not None:
        region.argtypes = (_Body, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
        region.restype = None
    return region


_region = _find_region()
HAS_THREADS = _region is not None  # on Linux


def run_on_torch_threads(task: Callable[[int], None], count: int) -> None:
    """Call task(0) to task(count - 1), on as many threads as torch's operators have.

    They run at the same time only where they let go of Python's lock, as compiled code does.

    Raises:
        BaseException: what a task, or a signal that came meanwhile, raised first.
    """
    left = iter(range(count))
    failures: list[BaseException] = []

    @_Body
    def work(_: int | None) -> None:
        try:
            for index in left:
                task(index)
        except BaseException as failure:  # which would be lost here
            failures.append(failure)

    threads = min(count, torch.get_num_threads())
    if threads > 1 and HAS_THREADS:
        _region(work, None, threads, 0)
    if failures:
        raise failures[0]
    for index in left:
        task(index)
