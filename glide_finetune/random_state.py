"""Torch's random state: set from a seed, and kept from what draws in between."""

import contextlib
from collections.abc import Iterator

import torch


def seed_draws(seed: int, device: torch.device) -> None:
    """Let what torch draws on the CPU and on `device` follow from `seed`; other devices stay.

    Args:
        seed: in [0, 2**64).
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)


@contextlib.contextmanager
def random_state_kept(device: torch.device) -> Iterator[None]:
    """Afterwards, torch's random numbers on the CPU and on `device` go on as if nothing had been
    drawn meanwhile."""
    mps_state = torch.mps.get_rng_state() if device.type == "mps" else None
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        if mps_state is not None:
            torch.mps.set_rng_state(mps_state)


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """While open, random numbers are those of `seed_draws`; then the state is as before."""
    with random_state_kept(device):
        seed_draws(seed, device)
        yield
