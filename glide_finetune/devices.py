"""Where to compute."""

import torch


def pick_device(name: str) -> torch.device:
    """The device called `name`, or for "" the best there is.

    Raises:
        ValueError: it is not there.
    """
    if not name:
        if torch.cuda.is_available():
            name = "cuda"
        else:
            name = "mps" if torch.backends.mps.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"--device {name}: torch sees {torch.cuda.device_count()} CUDA devices here; "
            "give another one or leave the flag out"
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("--device mps: it is not available here; give another one")
    return device


def is_of_the_compiler(error: BaseException) -> bool:
    """Whether torch's compiler has raised it, which does so in many ways."""
    modules = [kind.__module__ for kind in type(error).__mro__]
    return any(module.startswith(("torch._dynamo", "torch._inductor")) for module in modules)


def check_compiler(device: torch.device) -> None:
    """ValueError unless torch can compile for the device, tried with the smallest of functions."""
    try:
        torch.compile(lambda x: x + 1)(torch.ones(2, device=device))
    except RuntimeError as error:  # of many kinds, for want of a compiler or of Triton
        reason = str(error).splitlines()[0]
        missing = "Triton and a C compiler" if device.type == "cuda" else "a C++ compiler"
        raise ValueError(
            f"--compile: torch cannot compile for {device.type} here ({reason}); it takes "
            f"{missing}, such as g++; or leave the flag out"
        ) from error
