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
        self._names: list[str] = []
        self._sums: Tensor | int = 0  # (terms, quarters of the timesteps)
        self._counts: Tensor | int = 0  # (quarters,)

    def add(self, losses: TrainingLosses, timesteps: Tensor) -> None:
        """Take in the losses of a batch at its `timesteps`, int64 (B,) on their device."""
        terms = {"loss": losses.loss, "mse": losses.mse}
        if losses.vb is not None:
            terms["vb"] = losses.vb
        quarters = [quartile_sums(term, timesteps, self.num_timesteps) for term in terms.values()]
        sums, counts = zip(*quarters, strict=True)
        self._names = list(terms)
        self._sums = self._sums + torch.stack(sums)
        self._counts = self._counts + counts[0]

    def means(self, **further: Tensor) -> dict[str, float]:
        """Means of the terms: loss, mse, and vb in bits per dimension where it is trained.

        Each over all samples, under its name, and in those quarters of the timesteps that occurred,
        as in mse_q0 … mse_q3 (q0 the least noisy). The `further` scalars come as they are, read
        from the device in the same wait.
        """
        scalars = [value.reshape(1) for value in further.values()]
        figures = torch.cat([*scalars, self._counts, self._sums.flatten()]).tolist()
        given, figures = figures[: len(further)], figures[len(further) :]
        counts, *rows = (figures[i : i + 4] for i in range(0, len(figures), 4))
        means = {name: sum(row) / sum(counts) for name, row in zip(self._names, rows, strict=True)}
        for name, row in zip(self._names, rows, strict=True):
            for quarter, (total, count) in enumerate(zip(row, counts, strict=True)):
                if count:
                    means[f"{name}_q{quarter}"] = total / count
        return means | dict(zip(further, given, strict=True))
