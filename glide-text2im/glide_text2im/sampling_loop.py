"""What the loops of all samplers share: where they run, where they start, how they are walked."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Step = Callable[[Tensor, Tensor], dict[str, Any]]


def walk(
    step: Step,
    indices: Sequence[int],
    model: Any,
    shape: Sequence[int],
    noise: Tensor | None,
    device: torch.device | str | None,
    progress: bool,
) -> Iterator[dict[str, Any]]:
    """Yield the result of `step(x, t)` for every index, each starting from the last "sample".

    Starts from `noise`, or from fresh standard normal noise of `shape`. With `device` None runs
    on the device of the model's parameters; where `model` is a plain function, on that of
    `noise`, or else on the CPU. Steps run without gradients.

    Raises:
        ValueError: `noise` has another shape than `shape`.
    """
    if noise is not None and tuple(noise.shape) != tuple(shape):
        raise ValueError(f"noise has shape {tuple(noise.shape)}, but shape is {tuple(shape)}")
    device = torch.device(device) if device is not None else _device_of(model, noise)
    x = torch.randn(*shape, device=device) if noise is None else noise.to(device)
    for index in _with_progress(indices) if progress else indices:
        t = torch.full((len(x),), index, dtype=torch.int64, device=device)
        with torch.no_grad():
            result = step(x, t)
        yield result
        x = result["sample"]


def last_sample(results: Iterator[dict[str, Any]]) -> Tensor:
    """The "sample" of the last result of a `walk`, which has at least one."""
    for result in results:
        sample = result["sample"]
    return sample


def _device_of(model: Any, noise: Tensor | None) -> torch.device:
    parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    reference = noise if parameter is None else parameter
    return torch.device("cpu") if reference is None else reference.device


def _with_progress(indices: Sequence[int]) -> Iterable[int]:
    from tqdm.auto import tqdm  # only here, as most sampling shows no bar

    return tqdm(indices)
