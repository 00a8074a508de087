"""The samplers by name, those that `glide_text2im` lacks, and noise that belongs to one image.

GLIDE's process is variance-preserving, x = a x_0 + s eps with a^2 + s^2 = 1. The samplers here are
written for x / a = x_0 + sigma eps with sigma = s / a, as in Karras et al. 2022 (arXiv:2206.00364),
where a model that tells x_0 is all that matters and every step is a mixture of three things: where
we are, what the model takes for x_0, and fresh noise. Each walks the timesteps that the respacing
keeps, with one call of the model for each, and goes from the least noisy one to x_0 itself.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from glide_text2im.diffusion_process import CondFn, DenoisedFn, Model, NoiseFn
from glide_text2im.gaussian_diffusion import GaussianDiffusion
from glide_text2im.sampling_loop import last_sample, walk


def euler(diffusion: GaussianDiffusion, *args: Any, **keywords: Any) -> Tensor:
    """Euler's method for the probability flow (Karras et al. 2022, algorithm 1 without the
    correction). In sigma this is DDIM: same steps, same pictures. Arguments of `solve`."""
    return solve(diffusion, *args, **keywords, second_order=False, stochastic=False)


def euler_a(diffusion: GaussianDiffusion, *args: Any, **keywords: Any) -> Tensor:
    """Euler's method to below the next noise level, and fresh noise up to it: the ancestral step
    of DDPM with the variance of the posterior. Arguments of `solve`."""
    return solve(diffusion, *args, **keywords, second_order=False, stochastic=True)


def dpm_solver_2m(diffusion: GaussianDiffusion, *args: Any, **keywords: Any) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv:2211.01095, algorithm 2). Arguments of `solve`."""
    return solve(diffusion, *args, **keywords, second_order=True, stochastic=False)


def dpm_solver_2m_sde(diffusion: GaussianDiffusion, *args: Any, **keywords: Any) -> Tensor:
    """SDE-DPM-Solver++(2M) (Lu et al. 2022, arXiv:2211.01095). Arguments of `solve`."""
    return solve(diffusion, *args, **keywords, second_order=True, stochastic=True)


class Level(NamedTuple):
    """A noise level: `signal` and `noise` are the a and s of x = a x_0 + s eps."""

    signal: float
    noise: float

    @property
    def sigma(self) -> float:
        """Noise relative to the signal."""
        return self.noise / self.signal


CLEAN = Level(1.0, 0.0)

# A step may be so many times longer than the one before for its middle to be extrapolated. The
# step to the least noisy timestep is longer in runs of few steps, and then overshoots by far.
LONGEST_STRETCH = 2.0


def solve(
    diffusion: GaussianDiffusion,
    model: Model,
    shape: Sequence[int],
    noise: Tensor | None = None,
    clip_denoised: bool = True,
    denoised_fn: DenoisedFn | None = None,
    cond_fn: CondFn | None = None,
    model_kwargs: dict[str, Any] | None = None,
    device: torch.device | str | None = None,
    progress: bool = False,
    *,
    second_order: bool,
    stochastic: bool,
    noise_like: NoiseFn | None = None,
) -> Tensor:
    """Walk down all noise levels of `diffusion` to x_0.

    One step from sigma to sigma', with q = sigma' / sigma, h = log(1 / q) the step in log SNR / 2,
    y = x / a, and D the model's x_0:

        deterministic   y' = q y + (1 - q) D
        stochastic      y' = q^2 y + (1 - q^2) D + sigma' sqrt(1 - q^2) noise

    Both are exact where D does not change along the step. To the second order, D is replaced by
    its straight line through the step before, taken at the middle of this one:
    D + (D - D_before) h / (2 h_before). The first step has none before it, the last one, to
    sigma' = 0, no middle, and of a much longer one the middle is too far from what the line is
    drawn through: these are of the first order.

    Args:
        second_order: look back at the step before.
        stochastic: follow the reverse SDE rather than the probability flow.
        noise_like: draws the noise of stochastic steps; by default `torch.randn_like` does.

    The other arguments are those of the loops of `GaussianDiffusion`; returns x_0 like `shape`.
    """
    draw = noise_like or torch.randn_like
    before: tuple[Tensor, float] | None = None  # D and h of the last step
    indices = range(diffusion.num_timesteps - 1, -1, -1)
    index_of_step = iter(indices)  # what `t` holds, without waiting for the device

    def step(x: Tensor, t: Tensor) -> dict[str, Tensor]:
        nonlocal before
        out = diffusion.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        if cond_fn is not None:
            out = diffusion.condition_score(cond_fn, out, x, t, model_kwargs)
        x_start = target = out["pred_xstart"]
        index = next(index_of_step)
        here, there = _level(diffusion, index), _level(diffusion, index - 1)
        kept = there.sigma / here.sigma
        at_end = there == CLEAN
        if not at_end:
            h = -math.log(kept)
            if second_order and before is not None and h < LONGEST_STRETCH * before[1]:
                target = x_start + (x_start - before[0]) * (h / (2 * before[1]))
            before = x_start, h
        share = kept**2 if stochastic else kept
        y = share * (x / here.signal) + (1 - share) * target
        if stochastic and not at_end:
            y = y + there.sigma * math.sqrt(1 - kept**2) * draw(x)
        return {"sample": there.signal * y, "pred_xstart": x_start}

    return last_sample(walk(step, indices, model, shape, noise, device, progress))


def _level(diffusion: GaussianDiffusion, index: int) -> Level:
    """The noise level at an index of the diffusion; that of x_0 below the first."""
    if index < 0:
        return CLEAN
    alpha_bar = float(diffusion.alphas_cumprod[index])
    return Level(math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar))


# Each takes (diffusion, model, shape) and the keywords of the loops of `GaussianDiffusion`, and
# returns the images.
LOOPS: dict[str, Callable[..., Tensor]] = {
    "ddpm": GaussianDiffusion.p_sample_loop,
    "ddim": GaussianDiffusion.ddim_sample_loop,
    "plms": GaussianDiffusion.plms_sample_loop,
    "prk": GaussianDiffusion.prk_sample_loop,
    "euler": euler,
    "euler_a": euler_a,
    "dpm++2m": dpm_solver_2m,
    "dpm++2m_sde": dpm_solver_2m_sde,
}


class NoisePerImage:
    """Draws noise in which every image of a batch has a generator of its own.

    So an image is the same whatever else is drawn with it. The generators are the CPU's, and the
    noise therefore the same on every device.

    Args:
        seeds: one for each image, in [0, 2**64).
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, like: Tensor) -> Tensor:
        """Standard normal noise in shape, dtype and device of `like`, (images, ...)."""
        rows = [torch.randn(like.shape[1:], generator=g) for g in self._generators]
        return torch.stack(rows).to(like)
