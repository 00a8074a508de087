"""From a batch to its losses, and from many losses to the means that are logged."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from glide_finetune.inpaint_masks import random_masks
from glide_finetune.losses import TrainingLosses, quarter_sums, training_losses
from glide_text2im.gaussian_diffusion import GaussianDiffusion


def batch_losses(
    model: nn.Module,
    diffusion: GaussianDiffusion,
    batch: Sequence[Any],
    device: torch.device | str,
    *,
    timesteps: Tensor | None = None,
    noise: Tensor | None = None,
    inpaint_mask: Tensor | None = None,
    vlb_weight: float = 0.001,
    loss_weighting: str = "none",
) -> tuple[TrainingLosses, Tensor]:
    """The losses of every sample of a batch, and the timesteps they were taken at.

    An inpainting model sees of every image what a mask leaves of it. Its loss is over all pixels
    like that of any other model, since sampling needs the noise of the known ones too.

    Args:
        model: any of the four kinds of model on `device`.
        diffusion: the process it is trained on.
        batch: tokens int64 (B, T), mask bool (B, T), for an upsampler low_res float32
            (B, 3, h, w), then images float32 (B, 3, H, W) in [-1, 1]; keys after them are ignored.
        device: where to compute.
        timesteps: int64 (B,); None draws them uniformly from all timesteps.
        noise: like the images; None draws it.
        inpaint_mask: for an inpainting model, float32 (B, 1, H, W), 1 where a pixel is known; None
            draws `random_masks`.
        vlb_weight, loss_weighting: as in `training_losses`.

    Raises:
        ValueError: the noise has another shape than the images.
    """
    tensors = [part.to(device, non_blocking=True) for part in batch if isinstance(part, Tensor)]
    tokens, mask, *low_res, images = tensors
    if noise is not None and noise.shape != images.shape:
        raise ValueError(f"noise has shape {tuple(noise.shape)}, the images {tuple(images.shape)}")
    if timesteps is None:
        timesteps = torch.randint(0, diffusion.num_timesteps, (len(images),), device=device)
    timesteps = timesteps.to(device)
    conditions = {"tokens": tokens, "mask": mask}
    if low_res:
        conditions["low_res"] = low_res[0]
    if inpaint_mask is None and getattr(_unwrapped(model), "inpaints", False):
        inpaint_mask = random_masks(len(images), *images.shape[2:])
    if inpaint_mask is not None:
        conditions |= {"inpaint_image": images, "inpaint_mask": inpaint_mask.to(device)}
    losses = training_losses(
        model,
        diffusion,
        images,
        timesteps,
        conditions,
        None if noise is None else noise.to(device),
        vlb_weight=vlb_weight,
        loss_weighting=loss_weighting,
    )
    return losses, timesteps


def _unwrapped(model: nn.Module) -> nn.Module:
    """What DataParallel and the like hold, whose own attributes do not show."""
    while isinstance(inner := getattr(model, "module", None), nn.Module):
        model = inner
    return model


class Losses(Protocol):
    """What is trained, float32 [B], and all terms that are worth a line in the log, by name."""

    loss: Tensor
    terms: Mapping[str, Tensor]


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

    def add(self, losses: Losses, timesteps: Tensor) -> None:
        """Take in the losses of a batch at its `timesteps`, int64 (B,) on their device."""
        terms = losses.terms
        quarters = [quarter_sums(term, timesteps, self.num_timesteps) for term in terms.values()]
        sums, counts = zip(*quarters, strict=True)
        self._names = list(terms)
        self._sums = self._sums + torch.stack(sums)
        self._counts = self._counts + counts[0]

    def means(self, **further: Tensor) -> dict[str, float]:
        """Means of the terms; GLIDE's are loss, mse, and vb in bits per dimension if trained.

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
