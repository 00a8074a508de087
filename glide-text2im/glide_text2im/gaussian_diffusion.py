"""The noise schedules and the diffusion with all its samplers."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glide_text2im.diffusion_process import CondFn, DenoisedFn, Model, NoiseFn
from glide_text2im.pndm import PndmSamplers
from glide_text2im.sampling_loop import last_sample, walk


def get_named_beta_schedule(schedule_name: str, num_diffusion_timesteps: int) -> np.ndarray:
    """The float64 betas [num_diffusion_timesteps] of a schedule.

    "linear": DDPM's, from 1e-4 to 0.02 at 1000 timesteps, scaled for other numbers.
    "squaredcos_cap_v2": cosine (Nichol & Dhariwal 2021, arXiv:2102.09672, equation (17)), no
    beta above 0.999.

    Raises:
        ValueError: unknown name.
    """
    steps = num_diffusion_timesteps
    if schedule_name == "linear":
        return np.linspace(1e-4, 0.02, steps, dtype=np.float64) * (1000 / steps)
    if schedule_name == "squaredcos_cap_v2":
        time = np.arange(steps + 1, dtype=np.float64) / steps
        alphas_cumprod = np.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2
        return np.minimum(1 - alphas_cumprod[1:] / alphas_cumprod[:-1], 0.999)
    raise ValueError(
        f"unknown noise schedule {schedule_name!r}: choose linear or squaredcos_cap_v2"
    )


class GaussianDiffusion(PndmSamplers):
    """The diffusion process with its samplers: ancestral, DDIM, reversed DDIM, PRK and PLMS.

    Each sampler has three forms. `X_sample` makes one step from indices `t`; of its result,
    "sample" is the next x and "pred_xstart" the present guess of x_0. `X_sample_loop_progressive`
    yields the results of a whole run, and `X_sample_loop` returns its last sample.

    Arguments that they share:
        model: called as model(x, timesteps, **model_kwargs) with the int64 original timesteps;
            a module or any function. Returns [B, 2C, H, W], noise and variance.
        shape, noise: size of the images, (B, C, H, W), and optionally x at the first index.
        clip_denoised: clip the guess of x_0 to [-1, 1].
        denoised_fn: applied to the guess of x_0, before clipping.
        cond_fn: called like the model; returns the gradient of a log probability that guides the
            sampling. Steps run without gradients: it turns them on itself.
        device: default is the device of the model's parameters.
        progress: show a progress bar.
    """

    def p_sample(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFn | None = None,
        cond_fn: CondFn | None = None,
        model_kwargs: dict[str, Any] | None = None,
        *,
        noise_like: NoiseFn | None = None,
    ) -> dict[str, Tensor]:
        """One step of ancestral sampling (DDPM, algorithm 2); no noise is added at t = 0.

        `noise_like(x)` draws the noise; by default `torch.randn_like` does.
        """
        out = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        noise = (noise_like or torch.randn_like)(x)
        mean = out["mean"]
        if cond_fn is not None:
            mean = self.condition_mean(cond_fn, out, x, t, model_kwargs)
        sample = mean + _unless_first(t, x) * torch.exp(0.5 * out["log_variance"]) * noise
        return {"sample": sample, "pred_xstart": out["pred_xstart"]}

    def ddim_sample(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFn | None = None,
        cond_fn: CondFn | None = None,
        model_kwargs: dict[str, Any] | None = None,
        eta: float = 0.0,
    ) -> dict[str, Tensor]:
        """One DDIM step (Song et al. 2021, arXiv:2010.02502, equations (12) and (16)).

        `eta` 0 is deterministic, although one noise is drawn all the same; 1 is as random as
        ancestral sampling.
        """
        pred_xstart, eps = self._xstart_and_eps(
            model, x, t, clip_denoised, denoised_fn, cond_fn, model_kwargs
        )
        alpha_bar_prev = self._at("alphas_cumprod_prev", t, x)
        sigma = eta * self._at("posterior_variance", t, x).sqrt()
        # 1 - alpha_bar_prev - sigma^2, as a sum: the difference cancels in float32 where sigma is
        # large, and may come out negative. At eta 1 it is the square of `at_eta_1`.
        at_eta_1 = self._at("posterior_mean_coef2", t, x) * self._at(
            "sqrt_one_minus_alphas_cumprod", t, x
        )
        eps_level = torch.sqrt((1 - eta**2) * (1 - alpha_bar_prev) + (eta * at_eta_1) ** 2)
        noise = torch.randn_like(x)
        mean = pred_xstart * torch.sqrt(alpha_bar_prev) + eps_level * eps
        sample = mean + _unless_first(t, x) * sigma * noise
        return {"sample": sample, "pred_xstart": pred_xstart}

    def ddim_reverse_sample(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFn | None = None,
        model_kwargs: dict[str, Any] | None = None,
        eta: float = 0.0,
        *,
        cond_fn: CondFn | None = None,
    ) -> dict[str, Tensor]:
        """One DDIM step upwards, from index `t` to the noisier t + 1.

        Raises:
            ValueError: `eta` is not 0; only the deterministic path can be walked backwards.
        """
        if eta != 0:
            raise ValueError(f"ddim_reverse_sample is deterministic: eta must be 0, got {eta}")
        pred_xstart, eps = self._xstart_and_eps(
            model, x, t, clip_denoised, denoised_fn, cond_fn, model_kwargs
        )
        alpha_bar_next = self._at("alphas_cumprod_next", t, x)
        sample = pred_xstart * torch.sqrt(alpha_bar_next) + torch.sqrt(1 - alpha_bar_next) * eps
        return {"sample": sample, "pred_xstart": pred_xstart}

    def p_sample_loop_progressive(
        self,
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
        noise_like: NoiseFn | None = None,
    ) -> Iterator[dict[str, Tensor]]:
        """Yield the result of `p_sample` at every index, from the noisiest down to 0."""

        def step(x: Tensor, t: Tensor) -> dict[str, Tensor]:
            return self.p_sample(
                model, x, t, clip_denoised, denoised_fn, cond_fn, model_kwargs,
                noise_like=noise_like,
            )  # fmt: skip

        return walk(step, self._downwards(), model, shape, noise, device, progress)

    def ddim_sample_loop_progressive(
        self,
        model: Model,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFn | None = None,
        cond_fn: CondFn | None = None,
        model_kwargs: dict[str, Any] | None = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        eta: float = 0.0,
    ) -> Iterator[dict[str, Tensor]]:
        """Yield the result of `ddim_sample` at every index, from the noisiest down to 0."""

        def step(x: Tensor, t: Tensor) -> dict[str, Tensor]:
            return self.ddim_sample(
                model, x, t, clip_denoised, denoised_fn, cond_fn, model_kwargs, eta
            )

        return walk(step, self._downwards(), model, shape, noise, device, progress)

    def ddim_reverse_sample_loop_progressive(
        self,
        model: Model,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFn | None = None,
        cond_fn: CondFn | None = None,
        model_kwargs: dict[str, Any] | None = None,
        device: torch.device | str | None = None,
        progress: bool = False,
    ) -> Iterator[dict[str, Tensor]]:
        """Yield the result of `ddim_reverse_sample` from index 0 up to num_timesteps - 2.

        `noise` is the image to start from. The last sample is at the noisiest index, so that
        `ddim_sample_loop` leads back from it.

        Raises:
            ValueError: `noise` is None.
        """
        if noise is None:
            raise ValueError("ddim_reverse_sample_loop starts from an image: give it as noise")

        def step(x: Tensor, t: Tensor) -> dict[str, Tensor]:
            return self.ddim_reverse_sample(
                model, x, t, clip_denoised, denoised_fn, model_kwargs, cond_fn=cond_fn
            )

        upwards = range(self.num_timesteps - 1)
        return walk(step, upwards, model, shape, noise, device, progress)

    def p_sample_loop(self, *args: Any, **kwargs: Any) -> Tensor:
        """The last sample of `p_sample_loop_progressive`, with the same arguments."""
        return last_sample(self.p_sample_loop_progressive(*args, **kwargs))

    def ddim_sample_loop(self, *args: Any, **kwargs: Any) -> Tensor:
        """The last sample of `ddim_sample_loop_progressive`, with the same arguments."""
        return last_sample(self.ddim_sample_loop_progressive(*args, **kwargs))

    def ddim_reverse_sample_loop(self, *args: Any, **kwargs: Any) -> Tensor:
        """The last sample of `ddim_reverse_sample_loop_progressive`, with the same arguments."""
        return last_sample(self.ddim_reverse_sample_loop_progressive(*args, **kwargs))

    def _downwards(self) -> range:
        return range(self.num_timesteps - 1, -1, -1)

    def _xstart_and_eps(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool,
        denoised_fn: DenoisedFn | None,
        cond_fn: CondFn | None,
        model_kwargs: dict[str, Any] | None,
    ) -> tuple[Tensor, Tensor]:
        """The guided guess of x_0, and the noise derived again from it, which clipping changed."""
        out = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        if cond_fn is not None:
            out = self.condition_score(cond_fn, out, x, t, model_kwargs)
        pred_xstart = out["pred_xstart"]
        return pred_xstart, self.eps_from_xstart(x, t, pred_xstart)


def _unless_first(t: Tensor, like: Tensor) -> Tensor:
    """1 where t > 0, otherwise 0, shaped to broadcast over `like`."""
    return (t != 0).to(like.dtype).view(-1, *(1,) * (like.ndim - 1))
