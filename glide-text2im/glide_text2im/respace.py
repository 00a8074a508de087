"""Diffusion over a part of the timesteps that the model was trained with."""

import reprlib
from collections.abc import Iterable
from typing import Any

import numpy as np

from glide_text2im.gaussian_diffusion import GaussianDiffusion
from glide_text2im.timesteps import space_timesteps

__all__ = ["SpacedDiffusion", "space_timesteps"]


class SpacedDiffusion(GaussianDiffusion):
    """A diffusion over the timesteps `use_timesteps` of a base diffusion.

    Index i of its tables is timestep `timestep_map[i]` of the base, at the same noise level; the
    model is called with the latter.

    Args:
        use_timesteps: timesteps of the base to keep, at least two, in any order.
        **kwargs: the arguments of the base `GaussianDiffusion`.

    Raises:
        ValueError: too few timesteps, or some that the base has not.
    """

    def __init__(self, use_timesteps: Iterable[int], **kwargs: Any):
        base = GaussianDiffusion(**kwargs)
        kept = sorted(set(use_timesteps))
        if len(kept) < 2 or kept[0] < 0 or kept[-1] >= base.num_timesteps:
            raise ValueError(
                f"timestep respacing must keep at least 2 of the timesteps 0 to "
                f"{base.num_timesteps - 1}, got {reprlib.repr(kept)}"
            )
        alphas_cumprod = base.alphas_cumprod[kept]
        betas = 1 - alphas_cumprod / np.append(1.0, alphas_cumprod[:-1])
        super().__init__(**{**kwargs, "betas": betas})
        self.use_timesteps = set(kept)
        self.timestep_map = kept
        self.original_num_steps = base.num_timesteps
