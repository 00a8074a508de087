"""What the samplers are called and can do. Needs no torch; the code that draws is in `samplers`."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class SamplerOptions:
    """What a way to draw needs and can do.

    stochastic: draws noise in its steps; its loop takes `noise_like`.
    follows_guess: its path follows the guess of x_0, and so `denoised_fn`, clipping and a
        `cond_fn` that expects the original timesteps. Otherwise it follows the bare noise.
    least_timesteps: that it can walk.
    """

    stochastic: bool = False
    follows_guess: bool = True
    least_timesteps: int = 2


SAMPLERS = {
    "ddpm": SamplerOptions(stochastic=True),
    "ddim": SamplerOptions(),
    "plms": SamplerOptions(follows_guess=False, least_timesteps=3),
    "prk": SamplerOptions(follows_guess=False, least_timesteps=3),
    "euler": SamplerOptions(),
    "euler_a": SamplerOptions(stochastic=True),
    "dpm++2m": SamplerOptions(),
    "dpm++2m_sde": SamplerOptions(stochastic=True),
}


def check_sampler(name: str, asked: Mapping[str, bool]) -> SamplerOptions:
    """What the sampler of that name can do.

    Args:
        asked: whether each of some things that need the guess of x_0 is wanted, by what the user
            calls it.

    Raises:
        ValueError: there is no such sampler, or it cannot do what is asked.
    """
    if name not in SAMPLERS:
        raise ValueError(f"unknown sampler {name!r}: choose one of {', '.join(SAMPLERS)}")
    for what, is_wanted in asked.items():
        if is_wanted and not SAMPLERS[name].follows_guess:
            able = ", ".join(other for other in SAMPLERS if SAMPLERS[other].follows_guess)
            raise ValueError(f"{name} does not work with {what}: choose one of {able}")
    return SAMPLERS[name]
