"""How much memory training takes, how much there is, and what to do when it runs out."""

import contextlib
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from glide_finetune.config import TrainConfig

try:
    import resource
except ImportError:  # Windows
    resource = None

_CGROUP = Path("/sys/fs/cgroup")  # the limits of the container


class OutOfMemory(RuntimeError):
    """There is less memory than is needed; the message says what to lower."""


def peak_memory(device: torch.device) -> dict[str, float]:
    """The largest memory in use so far: {"memory_gb": …}, on a CPU that of the whole process.

    Empty where the system does not tell.
    """
    peak = peak_bytes(device)
    return {} if peak is None else {"memory_gb": peak / 1e9}


def peak_bytes(device: torch.device) -> int | None:
    """The largest memory in use so far, or since `restart_peak`; None if the system does not tell.
    On a CPU that of the whole process."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _process_peak()


def restart_peak(device: torch.device) -> None:
    """Forget the peak so far. Where a system does not allow that, it stays."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # of Linux: see proc(5)


def bytes_in_use(device: torch.device) -> int:
    """Of a card what tensors take, of main memory what this process takes; 0 if nothing tells."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return _of_process("VmRSS") or 0


def available_memory(device: torch.device) -> int | None:
    """Bytes that this process can still take of the device's memory; None if nothing tells."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + unused
    found = _main_memory()
    return found and found[0]


def total_memory(device: torch.device) -> int | None:
    """Bytes of the device's memory, or that the container may use of it; None if nothing tells."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    found = _main_memory()
    return found and found[1]


def _main_memory() -> tuple[int, int] | None:
    """(available, total): the least of what the machine has and what its container may use."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    text = meminfo.read_text()
    available, total = (
        1024 * int(re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE)[1])
        for name in ("MemAvailable", "MemTotal")
    )
    limit = _CGROUP / "memory.max"
    if limit.exists() and (text := limit.read_text().strip()) != "max":
        statistics = (_CGROUP / "memory.stat").read_text()
        file_cache = int(re.search(r"^inactive_file (\d+)", statistics, re.MULTILINE)[1])
        used = int((_CGROUP / "memory.current").read_text()) - file_cache
        available, total = min(available, int(text) - used), min(total, int(text))
    return available, total


def training_state_bytes(parameters: Iterable[torch.nn.Parameter], with_ema: bool) -> int:
    """What weights, gradients, AdamW's moments and averaged weights take, whatever the batch."""
    total = 0
    for parameter in parameters:
        total += parameter.nbytes
        if parameter.requires_grad:
            total += 3 * parameter.nbytes + (4 * parameter.numel() if with_ema else 0)
    return total


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch or Python could not get memory on any kind of device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    words = ("DefaultCPUAllocator", "out of memory", "ALLOC_FAILED")  # the last of cuBLAS and cuDNN
    return isinstance(error, RuntimeError) and any(w.lower() in str(error).lower() for w in words)


@contextlib.contextmanager
def out_of_memory_explained(
    config: TrainConfig, step: int, state_bytes: int, device: torch.device
) -> Iterator[None]:
    """Turns what torch or Python raises in the body when memory runs out into `OutOfMemory`.

    Args:
        step: the number of the step that is made.
        state_bytes: those of `training_state_bytes`.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(_advice(config, step, state_bytes, device, error)) from error


@contextlib.contextmanager
def lack_for_the_model_explained(config: TrainConfig) -> Iterator[None]:
    """As `out_of_memory_explained`, where the model is made and its training state read."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        advice = [*config.state_advice, "choose a smaller --model_preset or another --device"]
        raise OutOfMemory(
            "not enough memory for the model and its training state. What helps most first: free "
            f"what other programs hold; {'; '.join(advice)} ({_reason(error)})"
        ) from error


def _reason(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _advice(
    config: TrainConfig, step: int, state_bytes: int, device: torch.device, cause: BaseException
) -> str:
    """One line: what the step needs memory for, and which settings make it less."""
    total = total_memory(device)
    of_total = f"of {total / 1e9:.1f} GB " if total else ""
    average = ", moments and average" if config.ema_rate else " and moments"
    return (
        f"not enough memory for step {step}: {of_total}weights, gradients{average} take "
        f"{state_bytes / 1e9:.2f} GB whatever the batch, a batch of {config.batch_size} at "
        f"{config.image_width}x{config.image_height} the rest. What helps most first: "
        f"{'; '.join(config.memory_advice)} ({_reason(cause)})"
    )


def _process_peak() -> int | None:
    """Bytes of main memory."""
    # where it is there, since getrusage counts what the process that started this one had in use
    if peak := _of_process("VmHWM"):
        return peak
    if resource is None:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _of_process(name: str) -> int | None:
    """Bytes that Linux tells of this process under `name`, None elsewhere."""
    status = Path("/proc/self/status")
    found = status.exists() and re.search(rf"{name}:\s+(\d+) kB", status.read_text())
    return 1024 * int(found[1]) if found else None
