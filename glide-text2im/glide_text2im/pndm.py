"""PRK and PLMS, the pseudo numerical methods of Liu et al. 2022, arXiv:2202.09778.

Both follow the deterministic path of DDIM with a higher order: PRK, a Runge-Kutta step, calls the
model four times; PLMS, a linear multistep method, once, after three PRK steps for its history.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from glide_text2im.diffusion_process import CondFn, DenoisedFn, DiffusionProcess, Model
from glide_text2im.sampling_loop import last_sample, walk

HISTORY = 3  # noises of earlier steps that PLMS combines with the present one


class PndmSamplers(DiffusionProcess):
    """The PRK and PLMS samplers.

    Their loops visit the indices num_timesteps - 2 to 1, so they need three timesteps at least,
    yield num_timesteps - 2 results, and end at the noise level of index 0. `denoised_fn` and
    `clip_denoised` shape "pred_xstart" only, never the path. `cond_fn` gets the index itself, not
    the original timestep as in the other samplers; it is an int64 tensor, but at the half steps
    of PRK, where index and timestep lie half-way between two others, float32.
    """

    def prk_sample(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFn | None = None,
        cond_fn: CondFn | None = None,
        model_kwargs: dict[str, Any] | None = None,
    ) -> dict[str, Tensor]:
        """One PRK step from index `t` >= 1 to t - 1.

        Returns "sample", "eps", the weighted noise of the four calls, and "pred_xstart" of it.
        """

        def noise(x_s: Tensor, s: Tensor) -> Tensor:
            return self._noise(model, x_s, s, cond_fn, model_kwargs)

        middle, before = t - 0.5, t - 1
        eps1 = noise(x, t)
        eps2 = noise(self._transfer(x, eps1, t, middle), middle)
        eps3 = noise(self._transfer(x, eps2, t, middle), middle)
        eps4 = noise(self._transfer(x, eps3, t, before), before)
        eps = (eps1 + 2 * eps2 + 2 * eps3 + eps4) / 6
        return {
            "sample": self._transfer(x, eps, t, before),
            "pred_xstart": self._restrict(self._xstart(x, eps, t), clip_denoised, denoised_fn),
            "eps": eps,
        }

    def plms_sample(
        self,
        model: Model,
        x: Tensor,
        old_eps: Sequence[Tensor],
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: DenoisedFn | None = None,
        cond_fn: CondFn | None = None,
        model_kwargs: dict[str, Any] | None = None,
    ) -> dict[str, Tensor]:
        """One PLMS step from index `t` >= 1 to t - 1.

        `old_eps` are the "eps" of the earlier steps, the latest last; three are used. Returns
        "sample", "eps", the noise of the one call (not the multistep mixture), and
        "pred_xstart" of it.

        Raises:
            ValueError: `old_eps` has fewer than three items.
        """
        if len(old_eps) < HISTORY:
            raise ValueError(
                f"plms_sample needs the eps of {HISTORY} earlier steps, got {len(old_eps)}: "
                "make the first steps with prk_sample"
            )
        eps = self._noise(model, x, t, cond_fn, model_kwargs)
        mixed = (55 * eps - 59 * old_eps[-1] + 37 * old_eps[-2] - 9 * old_eps[-3]) / 24
        return {
            "sample": self._transfer(x, mixed, t, t - 1),
            "pred_xstart": self._restrict(self._xstart(x, eps, t), clip_denoised, denoised_fn),
            "eps": eps,
        }

    def prk_sample_loop_progressive(
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
        """Yield the result of every `prk_sample`."""

        def step(x: Tensor, t: Tensor) -> dict[str, Tensor]:
            return self.prk_sample(model, x, t, clip_denoised, denoised_fn, cond_fn, model_kwargs)

        return walk(step, self._inner_indices(), model, shape, noise, device, progress)

    def plms_sample_loop_progressive(
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
        """Yield the results of three `prk_sample`, then of every `plms_sample`."""
        options = (clip_denoised, denoised_fn, cond_fn, model_kwargs)
        history: deque[Tensor] = deque(maxlen=HISTORY)

        def step(x: Tensor, t: Tensor) -> dict[str, Tensor]:
            if len(history) < HISTORY:
                result = self.prk_sample(model, x, t, *options)
            else:
                result = self.plms_sample(model, x, history, t, *options)
            history.append(result["eps"])
            return result

        return walk(step, self._inner_indices(), model, shape, noise, device, progress)

    def prk_sample_loop(self, *args: Any, **kwargs: Any) -> Tensor:
        """The last sample of `prk_sample_loop_progressive`, with the same arguments."""
        return last_sample(self.prk_sample_loop_progressive(*args, **kwargs))

    def plms_sample_loop(self, *args: Any, **kwargs: Any) -> Tensor:
        """The last sample of `plms_sample_loop_progressive`, with the same arguments."""
        return last_sample(self.plms_sample_loop_progressive(*args, **kwargs))

    def _inner_indices(self) -> range:
        if self.num_timesteps < 3:
            raise ValueError(
                f"PRK and PLMS need at least 3 timesteps, this diffusion has {self.num_timesteps}: "
                "choose a longer timestep_respacing"
            )
        return range(self.num_timesteps - 2, 0, -1)

    def _noise(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        cond_fn: CondFn | None,
        model_kwargs: dict[str, Any] | None,
    ) -> Tensor:
        """The predicted noise, moved by `cond_fn` as `condition_score` does it."""
        kwargs = model_kwargs or {}
        eps, _, _ = self.split_output(model(x, self._between("timestep_map", t), **kwargs), x)
        if cond_fn is not None:
            eps = eps - self._noise_level(t, x) * cond_fn(x, t, **kwargs).float()
        return eps

    def _transfer(self, x: Tensor, eps: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """x at index `s` of the path that has noise `eps` at index `t` (equation (11))."""
        x_start = self._xstart(x, eps, t)
        return x_start * self._signal_level(s, x) + eps * self._noise_level(s, x)

    def _xstart(self, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        return (x - eps * self._noise_level(t, x)) / self._signal_level(t, x)

    def _signal_level(self, t: Tensor, like: Tensor) -> Tensor:
        return self._between("alphas_cumprod", t).sqrt().view(-1, *(1,) * (like.ndim - 1))

    def _noise_level(self, t: Tensor, like: Tensor) -> Tensor:
        return (1 - self._between("alphas_cumprod", t)).sqrt().view(-1, *(1,) * (like.ndim - 1))

    def _between(self, name: str, t: Tensor) -> Tensor:
        """Entries `t` of a table; those of a fractional t are interpolated linearly, float32."""
        table = self._table(name, t.device)
        if not t.is_floating_point():
            return table[t]
        lower = t.floor()
        return torch.lerp(table[lower.long()].float(), table[t.ceil().long()].float(), t - lower)
