"""How much memory training takes."""

import re
import sys
from pathlib import Path

import torch

try:
    import resource
except ImportError:  # Windows
    resource = None


def peak_memory(device: torch.device) -> dict[str, float]:
    """The largest memory in use so far: {"memory_gb": …}, on a CPU that of the whole process.

    Empty where the system does not tell.
    """
    peak = _process_peak() if device.type != "cuda" else torch.cuda.max_memory_allocated(device)
    return {} if peak is None else {"memory_gb": peak / 1e9}


def _process_peak() -> int | None:
    """Bytes of main memory."""
    status = Path("/proc/self/status")
    # where it is there, since getrusage counts what the process that started this one had in use
    if status.exists() and (found := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        return 1024 * int(found[1])
    if resource is None:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
