"""A moving average of the weights, which draws better pictures than the last weights do."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


class EMA:
    """An exponential moving average of a model's trainable parameters, kept in float32,
    whatever the dtype of those.

    The decay starts low and rises to `rate`, min(rate, (1 + n) / (10 + n)) at update n, so that
    the average forgets its start within a few updates even at a rate such as 0.9999.

    Args:
        model: its parameters that require gradients at this moment are averaged.
        rate: decay in [0, 1).
    """

    def __init__(self, model: nn.Module, rate: float) -> None:
        self.rate = rate
        self.updates = 0
        self._model = model
        self._live = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._average = {name: p.detach().float().clone() for name, p in self._live.items()}

    @property
    def nbytes(self) -> int:
        """What the averages take."""
        return sum(average.nbytes for average in self._average.values())

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the parameters as they are now."""
        decay = min(self.rate, (1 + self.updates) / (10 + self.updates))
        average, live = list(self._average.values()), list(self._live.values())
        if all(p.dtype == torch.float32 for p in live):
            torch._foreach_lerp_(average, live, 1 - decay)
        else:  # one by one, as all in float32 would take as much memory as the average
            for mean, p in zip(average, live, strict=True):
                mean.lerp_(p.float(), 1 - decay)
        self.updates += 1

    def model_state(self) -> dict[str, torch.Tensor]:
        """A state_dict of the whole model, the averages in the place of the parameters."""
        return {**self._model.state_dict(), **self._average}

    @torch.no_grad()
    def load(self, model_state: dict[str, torch.Tensor], updates: int) -> None:
        """Take the averages from a `model_state` of an earlier process, made after `updates`."""
        for name, average in self._average.items():
            average.copy_(model_state[name])
        self.updates = updates

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """While open, the model computes with the averages; afterwards with its own weights."""
        own = {name: p.data for name, p in self._live.items()}
        for name, p in self._live.items():
            p.data = self._average[name]
        try:
            yield
        finally:
            for name, p in self._live.items():
                p.data = own[name]
