"""The diffusion process: its tables, q (noising), p (the model's denoising) and guidance of p.

Notation as in DDPM (Ho et al. 2020, arXiv:2006.11239): `alphas_cumprod[t]` is alpha-bar_t, and
x_t = sqrt(alpha-bar_t) x_0 + sqrt(1 - alpha-bar_t) noise, with t = 0 the least noisy timestep.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

# model(x, timesteps, **model_kwargs) -> [B, 2C, H, W], or a tuple of that and anything else
Model = Callable[..., Any]
# cond_fn(x, timesteps, **model_kwargs) -> gradient of a log probability, shaped like x
CondFn = Callable[..., Tensor]
DenoisedFn = Callable[[Tensor], Tensor]
# noise_like(x) -> standard normal noise, shaped like x
NoiseFn = Callable[[Tensor], Tensor]


class DiffusionProcess:
    """Gaussian diffusion with a model that predicts the noise and a range-bound log-variance.

    Images are float32 [B, C, H, W] in [-1, 1]. `t` is an int64 tensor [B] of indices into the
    tables, 0 to `num_timesteps - 1`; the model is called with `timestep_map[t]`.

    Args:
        betas: noise variance added by each timestep, 1-D, at least two values in (0, 1].

    Raises:
        ValueError: `betas` are not as above.

    All tables are float64 numpy arrays of length `num_timesteps`.
    """

    def __init__(self, *, betas: Sequence[float] | np.ndarray):
        betas = np.array(betas, dtype=np.float64)
        if betas.ndim != 1 or len(betas) < 2 or not ((betas > 0) & (betas <= 1)).all():
            raise ValueError(
                "betas must be a 1-D array of at least two values in (0, 1], "
                f"got {betas.size} value(s) of shape {betas.shape}"
            )
        alphas = 1.0 - betas
        self.betas = betas
        self.num_timesteps = len(betas)
        self.timestep_map = list(range(len(betas)))  # the timesteps that the model knows

        self.alphas_cumprod = np.cumprod(alphas)
        self.alphas_cumprod_prev = np.append(1.0, self.alphas_cumprod[:-1])
        self.alphas_cumprod_next = np.append(self.alphas_cumprod[1:], 0.0)
        self.sqrt_alphas_cumprod = np.sqrt(self.alphas_cumprod)
        self.sqrt_one_minus_alphas_cumprod = np.sqrt(1.0 - self.alphas_cumprod)
        self.log_one_minus_alphas_cumprod = np.log(1.0 - self.alphas_cumprod)
        self.sqrt_recip_alphas_cumprod = np.sqrt(1.0 / self.alphas_cumprod)
        self.sqrt_recipm1_alphas_cumprod = np.sqrt(1.0 / self.alphas_cumprod - 1.0)

        # q(x_{t-1} | x_t, x_0), DDPM equations (6) and (7)
        self.posterior_variance = (
            betas * (1.0 - self.alphas_cumprod_prev) / (1.0 - self.alphas_cumprod)
        )
        # its variance at t = 0 is 0, which has no logarithm: that of t = 1 stands in
        self.posterior_log_variance_clipped = np.log(
            np.append(self.posterior_variance[1], self.posterior_variance[1:])
        )
        self.posterior_mean_coef1 = (
            betas * np.sqrt(self.alphas_cumprod_prev) / (1.0 - self.alphas_cumprod)
        )
        self.posterior_mean_coef2 = (
            (1.0 - self.alphas_cumprod_prev) * np.sqrt(alphas) / (1.0 - self.alphas_cumprod)
        )
        self.log_betas = np.log(betas)
        self.signal_to_noise = self.alphas_cumprod / (1.0 - self.alphas_cumprod)
        self._on_device: dict[tuple[str, torch.device], Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_on_device": {}}

    def _table(self, name: str, device: torch.device) -> Tensor:
        """A table on a device: float32, or int64 for `timestep_map`; copied there only once."""
        key = (name, device)
        if key not in self._on_device:
            table = torch.tensor(getattr(self, name), device="cpu")
            if table.is_floating_point():
                table = table.float()
            self._on_device[key] = table.to(device)
        return self._on_device[key]

    def _at(self, name: str, t: Tensor, like: Tensor) -> Tensor:
        """Entries `t` of a table, float32, shaped [B, 1, ...] to broadcast over `like`."""
        return self._table(name, t.device)[t].view(-1, *(1,) * (like.ndim - 1))

    def original_timesteps(self, t: Tensor) -> Tensor:
        """The int64 [B] timesteps by which the model knows the indices `t`."""
        return self._table("timestep_map", t.device)[t]

    def snr(self, t: Tensor) -> Tensor:
        """Signal-to-noise ratio alpha-bar / (1 - alpha-bar) of the indices `t`, float32 [B]."""
        return self._table("signal_to_noise", t.device)[t]

    # ------------------------------------------------------------------ q, the noising process

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """x_t of the images `x_start`, with the given or fresh standard normal noise."""
        if noise is None:
            noise = torch.randn_like(x_start)
        return (
            self._at("sqrt_alphas_cumprod", t, x_start) * x_start
            + self._at("sqrt_one_minus_alphas_cumprod", t, x_start) * noise
        )

    def q_mean_variance(self, x_start: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and log-variance of q(x_t | x_0), each shaped like `x_start`."""
        mean = self._at("sqrt_alphas_cumprod", t, x_start) * x_start
        variance = 1.0 - self._at("alphas_cumprod", t, x_start)
        log_variance = self._at("log_one_minus_alphas_cumprod", t, x_start)
        return mean, variance.expand_as(x_start), log_variance.expand_as(x_start)

    def q_posterior_mean_variance(
        self, x_start: Tensor, x_t: Tensor, t: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and clipped log-variance of q(x_{t-1} | x_t, x_0), shaped like `x_t`."""
        mean = (
            self._at("posterior_mean_coef1", t, x_t) * x_start
            + self._at("posterior_mean_coef2", t, x_t) * x_t
        )
        variance = self._at("posterior_variance", t, x_t)
        log_variance = self._at("posterior_log_variance_clipped", t, x_t)
        return mean, variance.expand_as(x_t), log_variance.expand_as(x_t)

    # ------------------------------------------------------- p, the denoising that is learned

    def split_output(self, output: Any, x: Tensor) -> tuple[Tensor, Tensor, Any]:
        """What a model returned for `x`, as (noise, variance channels, extra).

        This is where half-precision outputs become float32. `extra` is the second item of a
        tuple output, otherwise None.

        Raises:
            ValueError: the output has not twice the channels of `x`.
        """
        output, extra = output if isinstance(output, tuple) else (output, None)
        channels = x.shape[1]
        if output.shape[1] != 2 * channels:
            raise ValueError(
                f"the model returned {output.shape[1]} channels for images of {channels}; "
                f"{2 * channels} are needed, noise and variance"
            )
        noise, variance = output.float().split(channels, dim=1)
        return noise, variance, extra

    def p_mean_variance(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFn | None = None,
        model_kwargs: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """The model's p(x_{t-1} | x_t) and its guess of x_0.

        `denoised_fn` is applied to the guess, then the guess is clipped to [-1, 1] if
        `clip_denoised`. Returns "mean", "variance", "log_variance" and "pred_xstart", shaped
        like `x`, and "extra", the second item if the model returned a tuple.
        """
        output = model(x, self.original_timesteps(t), **(model_kwargs or {}))
        eps, variance_range, extra = self.split_output(output, x)
        pred_xstart = self._restrict(self.xstart_from_eps(x, t, eps), clip_denoised, denoised_fn)
        mean, log_variance = self.reverse_mean_log_variance(pred_xstart, variance_range, x, t)
        return {
            "mean": mean,
            "variance": log_variance.exp(),
            "log_variance": log_variance,
            "pred_xstart": pred_xstart,
            "extra": extra,
        }

    def reverse_mean_log_variance(
        self, pred_xstart: Tensor, variance_range: Tensor, x: Tensor, t: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of p(x_{t-1} | x_t) from x_0 and the variance channels.

        The channels, nominally in [-1, 1], interpolate the log-variance between those of the
        posterior and of beta (Nichol & Dhariwal 2021, arXiv:2102.09672, equation (15)).
        """
        fraction = (variance_range + 1) / 2
        log_variance = (
            fraction * self._at("log_betas", t, x)
            + (1 - fraction) * self._at("posterior_log_variance_clipped", t, x)
        )  # fmt: skip
        mean, _, _ = self.q_posterior_mean_variance(pred_xstart, x, t)
        return mean, log_variance

    @staticmethod
    def _restrict(x_start: Tensor, clip: bool, denoised_fn: DenoisedFn | None) -> Tensor:
        if denoised_fn is not None:
            x_start = denoised_fn(x_start)
        return x_start.clamp(-1, 1) if clip else x_start

    def xstart_from_eps(self, x: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """x_0 from x_t and its noise."""
        return (
            self._at("sqrt_recip_alphas_cumprod", t, x) * x
            - self._at("sqrt_recipm1_alphas_cumprod", t, x) * eps
        )

    def eps_from_xstart(self, x: Tensor, t: Tensor, x_start: Tensor) -> Tensor:
        """The noise in x_t, given its x_0."""
        return (self._at("sqrt_recip_alphas_cumprod", t, x) * x - x_start) / self._at(
            "sqrt_recipm1_alphas_cumprod", t, x
        )

    # ----------------------------------------------------------------------- guidance of p

    def condition_mean(
        self,
        cond_fn: CondFn,
        p_mean_var: dict[str, Any],
        x: Tensor,
        t: Tensor,
        model_kwargs: dict[str, Any] | None = None,
    ) -> Tensor:
        """The mean of `p_mean_var` moved by variance * gradient.

        Sohl-Dickstein et al. 2015, arXiv:1503.03585. `cond_fn` gets the original timesteps.
        """
        gradient = cond_fn(x, self.original_timesteps(t), **(model_kwargs or {}))
        return p_mean_var["mean"] + p_mean_var["variance"] * gradient.float()

    def condition_score(
        self,
        cond_fn: CondFn,
        p_mean_var: dict[str, Any],
        x: Tensor,
        t: Tensor,
        model_kwargs: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """A copy of `p_mean_var` whose x_0 and mean follow the noise moved by the gradient.

        Song et al. 2020, arXiv:2011.13456; `cond_fn` gets the original timesteps. x_0 is not
        clipped again.
        """
        gradient = cond_fn(x, self.original_timesteps(t), **(model_kwargs or {}))
        eps = self.eps_from_xstart(x, t, p_mean_var["pred_xstart"])
        eps = eps - self._at("sqrt_one_minus_alphas_cumprod", t, x) * gradient.float()
        pred_xstart = self.xstart_from_eps(x, t, eps)
        mean, _, _ = self.q_posterior_mean_variance(pred_xstart, x, t)
        return {**p_mean_var, "pred_xstart": pred_xstart, "mean": mean}
