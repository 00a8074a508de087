"""Ways to do the same, measured in turn on the same machine, and the table that compares them."""

import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

import torch

from glide_finetune.memory import peak_memory


class Measured(NamedTuple):
    """What one process found out about one way.

    seconds: of every repetition, the warm-up excepted; first: of that.
    memory_gb: the most that the process, on CUDA the device, had in use.
    """

    seconds: list[float]
    first: float
    memory_gb: float


def repeated(action: Callable[[], object], times: int, device: torch.device) -> Measured:
    """Do it once to warm up and then `times` times."""
    seconds = []
    for _ in range(1 + times):
        seconds.append(_seconds(action, device))
    return Measured(seconds[1:], seconds[0], peak_memory(device).get("memory_gb", 0.0))


def _seconds(action: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def compare(
    measure: Callable[..., Measured],
    ways: Mapping[str, Mapping[str, Any]],
    names: Sequence[str],
    rounds: int,
    **common: Any,
) -> None:
    """Print a table of medians and their ratios to the first of `names`.

    Args:
        measure: called as measure(**common, **ways[name]) in a new process for every way and
            round, so that none meets the memory or the compiled code of another.
        rounds: all ways are gone through so many times, for what else goes on on the machine to
            meet all of them.
    """
    found: dict[str, list[Measured]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(1, mp_context=context) as process:
                found[name].append(process.submit(measure, **common, **ways[name]).result())
    _print_table(found)


def _print_table(found: Mapping[str, Sequence[Measured]]) -> None:
    print("| way | seconds | times as fast | peak memory | of it | first one |")
    print("|---|---|---|---|---|---|")
    base_seconds = base_memory = None
    for name, rounds in found.items():
        seconds = statistics.median(_all(one.seconds for one in rounds))
        memory = statistics.median(one.memory_gb for one in rounds)
        first = statistics.median(one.first for one in rounds)
        base_seconds, base_memory = base_seconds or seconds, base_memory or memory
        print(
            f"| {name} | {seconds:.2f} | {base_seconds / seconds:.2f} | {memory:.2f} GB | "
            f"{memory / base_memory:.1%} | {first:.1f} s |",
            flush=True,
        )


def _all(lists: Iterable[Sequence[float]]) -> list[float]:
    return [value for values in lists for value in values]
