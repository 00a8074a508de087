"""How much memory training takes."""

import sys

import torch

try:
    import resource
except ImportError:  # Windows
    resource = None


def peak_memory(device: torch.device) -> dict[str, float]:
    """The largest memory in use so far: {"memory_gb": …}, on a CPU that of the whole process.

    Empty where the system does not tell.
    """
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    elif resource:
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    else:
        return {}
    return {"memory_gb": peak / 1e9}
