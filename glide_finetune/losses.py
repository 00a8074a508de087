"""The training loss: how far the predicted noise and variance are from the true ones."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from glide_finetune.config import LOSS_WEIGHTINGS
from glide_text2im.diffusion_process import DiffusionProcess, Model

SNR_GAMMA = 5.0  # the signal-to-noise ratio from which on less noisy timesteps count less


@dataclass(frozen=True)
class TrainingLosses:
    """The terms of the loss of every sample, each float32 [B].

    mse: mean squared error of the predicted noise, unweighted.
    vb: the timestep's term of the variational bound in bits per dimension, unweighted; its only
        gradient is that of the variance channels. None where `vlb_weight` is 0.
    loss: what is trained: weight(t) * mse + vlb_weight * num_timesteps * vb.
    """

    mse: Tensor
    vb: Tensor | None
    loss: Tensor

    @property
    def terms(self) -> dict[str, Tensor]:
        """All that there are, by their names in the log."""
        terms = {"loss": self.loss, "mse": self.mse}
        return terms if self.vb is None else {**terms, "vb": self.vb}


def training_losses(
    model: Model,
    diffusion: DiffusionProcess,
    x_start: Tensor,
    timesteps: Tensor,
    model_kwargs: dict[str, Any] | None = None,
    noise: Tensor | None = None,
    *,
    vlb_weight: float = 0.001,
    loss_weighting: str = "none",
) -> TrainingLosses:
    """The hybrid loss of GLIDE and Improved DDPM (Nichol & Dhariwal 2021, arXiv:2102.09672).

    The model is called once, as model(x_t, original timesteps, **model_kwargs). All arithmetic
    on its output is float32, under autocast too.

    Args:
        x_start: images in [-1, 1], [B, C, H, W]; the bound takes them as 8-bit images.
        timesteps: int64 [B], indices into the tables of `diffusion`.
        noise: the standard normal noise to add; fresh noise if None.
        vlb_weight: weight of the bound, scaled by the number of timesteps. At 0 the loss is the
            plain noise MSE and the variance channels are not trained.
        loss_weighting: weight of the noise MSE by timestep, see `timestep_weights`.

    Raises:
        ValueError: unknown `loss_weighting`, or a model output without variance channels.
    """
    if noise is None:
        noise = torch.randn_like(x_start)
    x_t = diffusion.q_sample(x_start, timesteps, noise)
    output = model(x_t, diffusion.original_timesteps(timesteps), **(model_kwargs or {}))
    eps, variance_range, _ = diffusion.split_output(output, x_t)

    mse = _mean_per_sample((noise - eps) ** 2)
    loss = timestep_weights(diffusion.snr(timesteps), loss_weighting) * mse
    if vlb_weight == 0:
        return TrainingLosses(mse=mse, vb=None, loss=loss)
    vb = variational_bound(diffusion, x_start, x_t, timesteps, eps.detach(), variance_range)
    return TrainingLosses(mse, vb, loss + vlb_weight * diffusion.num_timesteps * vb)


def timestep_weights(snr: Tensor, loss_weighting: str) -> Tensor:
    """Weights of the noise MSE for signal-to-noise ratios `snr`, of the same shape.

    "none": 1. "min_snr": min(snr, gamma) / snr (Hang et al. 2023, arXiv:2303.09556).
    "soft_min_snr": gamma / (snr + gamma), its smooth form (Crowson et al. 2024,
    arXiv:2401.11605). gamma is 5.

    Raises:
        ValueError: another name.
    """
    if loss_weighting == "none":
        return torch.ones_like(snr)
    if loss_weighting == "min_snr":
        return snr.clamp(max=SNR_GAMMA) / snr
    if loss_weighting == "soft_min_snr":
        return SNR_GAMMA / (snr + SNR_GAMMA)
    raise ValueError(
        f"unknown loss weighting {loss_weighting!r}: choose one of {', '.join(LOSS_WEIGHTINGS)}"
    )


def variational_bound(
    diffusion: DiffusionProcess,
    x_start: Tensor,
    x_t: Tensor,
    timesteps: Tensor,
    eps: Tensor,
    variance_range: Tensor,
) -> Tensor:
    """The term of the variational bound of every sample's timestep, in bits per dimension, [B].

    At t = 0 the negative log-likelihood of the 8-bit image, elsewhere the KL divergence of the
    model's p(x_{t-1} | x_t) from the true posterior. x_0 is not clipped.
    """
    pred_xstart = diffusion.xstart_from_eps(x_t, timesteps, eps)
    mean, log_variance = diffusion.reverse_mean_log_variance(
        pred_xstart, variance_range, x_t, timesteps
    )
    true_mean, _, true_log_variance = diffusion.q_posterior_mean_variance(x_start, x_t, timesteps)
    kl = normal_kl(true_mean, true_log_variance, mean, log_variance)
    nll = -discretized_gaussian_log_likelihood(x_start, mean, 0.5 * log_variance)
    nats = torch.where(timesteps == 0, _mean_per_sample(nll), _mean_per_sample(kl))
    return nats / math.log(2)


def normal_kl(mean1: Tensor, logvar1: Tensor, mean2: Tensor, logvar2: Tensor) -> Tensor:
    """KL(N(mean1, exp(logvar1)) || N(mean2, exp(logvar2))) per value, in nats."""
    return 0.5 * (
        logvar2
        - logvar1
        - 1.0
        + torch.exp(logvar1 - logvar2)
        + (mean1 - mean2) ** 2 * torch.exp(-logvar2)
    )


def discretized_gaussian_log_likelihood(x: Tensor, means: Tensor, log_scales: Tensor) -> Tensor:
    """Log-probability of 8-bit values under Gaussians, per value, in nats.

    `x` is on the 256 levels -1, -1 + 2/255, ..., 1, each the middle of a bin of width 2/255; the
    outer two bins are open (DDPM, equation (13)). Probabilities are at least 1e-12.
    """
    offset = x - means
    inverse_scale = torch.exp(-log_scales)
    below_upper = _standard_normal_cdf((offset + 1 / 255) * inverse_scale)
    below_lower = _standard_normal_cdf((offset - 1 / 255) * inverse_scale)
    probability = torch.where(
        x < -0.999,
        below_upper,
        torch.where(x > 0.999, 1 - below_lower, below_upper - below_lower),
    )
    return probability.clamp(min=1e-12).log()


def quarter_sums(losses: Tensor, timesteps: Tensor, num_timesteps: int) -> tuple[Tensor, Tensor]:
    """Sum of the losses and number of samples in each quarter of the timesteps.

    Of losses [B] at indices `timesteps` [B], as two float32 tensors [4] on their device, without
    gradient; sums / counts are the means, and both add up over batches. The first quarter is the
    least noisy.
    """
    quarter = timesteps * 4 // num_timesteps
    member = quarter[:, None] == torch.arange(4, device=timesteps.device)
    # where, not a product: a loss that is not finite must not spoil the other quarters
    sums = torch.where(member, losses.detach().float()[:, None], 0.0).sum(dim=0)
    return sums, member.float().sum(dim=0)


def _mean_per_sample(values: Tensor) -> Tensor:
    return values.flatten(1).mean(dim=1)


def _standard_normal_cdf(z: Tensor) -> Tensor:
    """The usual tanh approximation of the standard normal distribution function."""
    return 0.5 * (1.0 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
