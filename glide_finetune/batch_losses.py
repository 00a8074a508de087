"""From a batch to its losses, and from many losses to the means that are logged."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from glide_finetune.losses import TrainingLosses, quartile_sums, training_losses
from glide_text2im.gaussian_diffusion import GaussianDiffusion


def batch_losses(
    model: nn.Module,
    diffusion: GaussianDiffusion,
    batch: Sequence[Tensor],
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
    losses = training_losses(
        model,
        diffusion,
        images,
        timesteps.to(device),
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
        device: where the losses are.
    """

    def __init__(self, num_timesteps: int, device: torch.device | str) -> None:
        self.num_timesteps = num_timesteps
        self._count = 0
        self._terms = torch.zeros(3, device=device)
        self._quartiles = torch.zeros(2, 4, device=device)

    def add(self, losses: TrainingLosses, timesteps: Tensor) -> None:
        """Take in the losses of a batch at its `timesteps`, int64 (B,)."""
        vb = torch.zeros_like(losses.mse) if losses.vb is None else losses.vb
        self._terms += torch.stack([losses.loss, losses.mse, vb]).detach().sum(dim=1)
        self._quartiles += torch.stack(
            quartile_sums(losses.mse, timesteps.to(losses.mse.device), self.num_timesteps)
        )
        self._count += len(timesteps)

    def means(self) -> dict[str, float]:
        """Means over all samples: loss, mse, vb in bits per dimension, and mse_q0 … mse_q3, the
        error in each quarter of the timesteps (q0 the least noisy), where a sample fell into it.
        """
        loss, mse, vb, *quartiles = torch.cat([self._terms, self._quartiles.flatten()]).tolist()
        means = {"loss": loss, "mse": mse, "vb": vb}
        means = {name: total / self._count for name, total in means.items()}
        for quarter, (total, count) in enumerate(zip(quartiles[:4], quartiles[4:], strict=True)):
            if count:
                means[f"mse_q{quarter}"] = total / count
        return means
