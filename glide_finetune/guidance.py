"""What steers a sampler on its way: wrappers around the model, and what to make of its x_0."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

NetworkLike = Callable[..., Tensor]  # (x, timesteps, **kwargs) -> noise and variance, 6 channels


def guided(
    model: NetworkLike,
    scale: float,
    rescale: float = 0.0,
    alphas_cumprod: np.ndarray | None = None,
) -> NetworkLike:
    """Classifier-free guidance (Ho and Salimans 2021) in one pass over a double batch.

    Guidance also adds contrast, which overexposes the pictures. `rescale` takes it back (Lin et
    al. 2023, arXiv:2305.08891, equations (14) to (16)): the guided velocity
    v = a eps - s x_0 = (eps - s x) / a, which is what their networks predict, is scaled to the
    deviation that it has without guidance.

    Args:
        model: a GLIDE network.
        scale: s in eps = eps_uncond + s (eps_cond - eps_uncond).
        rescale: how much of the rescaled velocity to take, 0 to 1; 0 is none.
        alphas_cumprod: with `rescale`, alpha-bar of every timestep that the model knows.

    Returns:
        A function of (x, timesteps, **kwargs) with x of batch B and all else of batch 2 B: `tokens`
        and `mask` of the captions, then those of as many empty ones. The variance is that of the
        captions.
    """

    def double_pass(x: Tensor, timesteps: Tensor, **kwargs) -> Tensor:
        out = model(torch.cat([x, x]), torch.cat([timesteps, timesteps]), **kwargs)
        cond, uncond = out.float().chunk(2)
        eps = uncond[:, :3] + scale * (cond[:, :3] - uncond[:, :3])
        if rescale:
            alpha_bar = _alpha_bar(alphas_cumprod, timesteps).to(x)
            eps = _rescaled(eps, cond[:, :3], x, alpha_bar, rescale)
        return torch.cat([eps, cond[:, 3:]], dim=1)

    return double_pass


def _rescaled(eps: Tensor, eps_cond: Tensor, x: Tensor, alpha_bar: Tensor, share: float) -> Tensor:
    signal, noise = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    velocity = (eps - noise * x) / signal
    wanted = ((eps_cond - noise * x) / signal).flatten(1).std(dim=1)
    factor = share * wanted / velocity.flatten(1).std(dim=1) + 1 - share
    return signal * factor.view(-1, 1, 1, 1) * velocity + noise * x


def _alpha_bar(table: np.ndarray, timesteps: Tensor) -> Tensor:
    """alpha-bar of the timesteps, [B, 1, 1, 1]; between two of them, as PRK asks, interpolated."""
    values = np.interp(timesteps.cpu().double().numpy(), np.arange(len(table)), table)
    return torch.from_numpy(values).view(-1, 1, 1, 1)


def with_posterior_variance(model: NetworkLike) -> NetworkLike:
    """`model` with its variance replaced by the posterior's, the smallest one it could choose.

    For networks whose variance is not trained along with their noise.
    """

    def fixed(x: Tensor, timesteps: Tensor, **kwargs) -> Tensor:
        eps, variance_range = model(x, timesteps, **kwargs).split(3, dim=1)
        return torch.cat([eps, torch.full_like(variance_range, -1.0)], dim=1)

    return fixed


def dynamic_threshold(x_start: Tensor, quantile: float) -> Tensor:
    """Pull an over-saturated guess of x_0 back into [-1, 1], each image by itself.

    Dynamic thresholding (Saharia et al. 2022, arXiv:2205.11487, section 2.3): everything is
    clipped at that `quantile` of an image's absolute values, if it is above 1, and divided by it.

    Args:
        x_start: (B, C, H, W).
        quantile: in (0, 1], such as 0.995.
    """
    limit = x_start.abs().flatten(1).float().quantile(quantile, dim=1).clamp(min=1)
    limit = limit.view(-1, 1, 1, 1).to(x_start)
    return x_start.clamp(-limit, limit) / limit
