"""From a batch to its losses, and from many losses to the means that are logged."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from glide_finetune.losses import TrainingLosses, quartile_sums, training_losses
from glide_text2im.gaussian_diffusion import GaussianDiffusion


def batch_losses(
    model: nn.Module,
    diffusion: GaussianDiffusion,
    batch: Sequence[Any],
    device: torch.device | str,
    *,
    timesteps: Tensor | None = None,
    noise: Tensor | None = None,
    vlb_weight: float = 0.001,
    loss_weighting: str = "none",
) -> tuple[TrainingLosses, Tensor]:
    """The losses of every sample of a batch, and the timesteps they were taken at.

    Args:
        model: a base model or an upsampler on `device`.
        diffusion: the process it is trained on.
        batch: tokens int64 (B, T), mask bool (B, T), for an upsampler low_res float32
            (B, 3, h, w), then images float32 (B, 3, H, W) in [-1, 1]; keys after them are ignored.
        device: where to compute.
        timesteps: int64 (B,); None draws them uniformly from all timesteps.
        noise: like the images; None draws it.
        vlb_weight, loss_weighting: as in `training_losses`.
    """
    tensors = [part.to(device, non_blocking=True) for part in batch if isinstance(part, Tensor)]
    tokens, mask, *low_res, images = tensors
    if timesteps is None:
        timesteps = torch.randint(0, diffusion.num_timesteps, (len(images),), device=device)
    timesteps = timesteps.to(device)
    losses = training_losses(
        model,
        diffusion,
        images,
        timesteps,
        {"tokens": tokens, "mask": mask} | ({"low_res": low_res[0]} if low_res else {}),
        None if noise is None else noise.to(device),
        vlb_weight=vlb_weight,
        loss_weighting=loss_weighting,
    )
    return losses, timesteps


class LossMeter:
    """Adds up losses on their device; nothing waits for it before `means` is asked.

    Args:
        num_timesteps: of the diffusion process, for the quartiles.
    """

    def __init__(self, num_timesteps: int) -> None:
        self.num_timesteps = num_timesteps
        self._count = 0
        self._terms: Tensor | int = 0
        self._quartiles: Tensor | int = 0

    def add(self, losses: TrainingLosses, timesteps: Tensor) -> None:
        """Take in the losses of a batch at its `timesteps`, int64 (B,) on their device."""
        terms = [losses.loss, losses.mse] + ([] if losses.vb is None else [losses.vb])
        self._count += len(timesteps)
        self._terms = self._terms + torch.stack(terms).detach().sum(dim=1)
        self._quartiles = self._quartiles + torch.stack(
            quartile_sums(losses.mse, timesteps, self.num_timesteps)
        )

    def means(self, **further: Tensor) -> dict[str, float]:
        """Means over all samples: loss, mse, vb in bits per dimension where it is trained, and
        mse_q0 … mse_q3, the error in those quarters of the timesteps that occurred (q0 the least
        noisy). The `further` scalars come as they are, read from the device in the same wait.
        """
        scalars = [value.reshape(1) for value in further.values()]
        figures = torch.cat([self._quartiles.flatten(), *scalars, self._terms]).tolist()
        totals, counts, figures = figures[:4], figures[4:8], figures[8:]
        rest, terms = figures[: len(further)], figures[len(further) :]
        names = ("loss", "mse", "vb")[: len(terms)]
        means = {name: total / self._count for name, total in zip(names, terms, strict=True)}
        for quarter, (total, count) in enumerate(zip(totals, counts, strict=True)):
            if count:
                means[f"mse_q{quarter}"] = total / count
        return means | dict(zip(further, rest, strict=True))
