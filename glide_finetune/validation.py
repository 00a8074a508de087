"""The loss on pictures that are not trained on, measured the same way every time."""

import itertools
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch

from glide_finetune.batch_losses import LossMeter, batch_losses
from glide_finetune.config import TrainConfig
from glide_finetune.evaluation import evaluation_mode
from glide_finetune.inpaint_masks import random_mask
from glide_finetune.seeds import derived_random

if TYPE_CHECKING:
    from glide_finetune.trainer import Trainer

# Enough that the curve is smooth, few enough that looking is quick and memory holds them.
MOST_IMAGES = 256


class Validator:
    """Loss over a fixed set of images, each for ever with the same noise and timestep, and for an
    inpainting model the same mask.

    Args:
        dataset: gives items as `TextImageDataset` does, without random crops or dropped captions.
            Of more than `MOST_IMAGES`, so many are used: evenly spread ones where the dataset has
            a length, the first ones of a stream.
        config: batch size, loss and seed.
        num_timesteps: of the diffusion process.

    Raises:
        ValueError: the dataset is empty.
    """

    def __init__(self, dataset: Iterable, config: TrainConfig, num_timesteps: int) -> None:
        self.config = config
        items = [[part for part in item if torch.is_tensor(part)] for item in fixed_items(dataset)]
        if not items:
            raise ValueError("the validation data gave no image")
        size = config.batch_size
        self._batches = [
            [torch.stack(parts) for parts in zip(*items[start : start + size], strict=True)]
            for start in range(0, len(items), size)
        ]
        # evenly over all timesteps, so that every quartile has its share of the images
        generator = torch.Generator().manual_seed(config.seed)
        places = torch.randperm(len(items), generator=generator) + 0.5
        self._timesteps = (places * num_timesteps / len(items)).long().split(size)
        self._masks: Sequence[torch.Tensor | None] = [None] * len(self._batches)
        if config.train_inpaint:
            height, width = items[0][-1].shape[1:]
            rngs = (derived_random(config.seed, "mask", index) for index in range(len(items)))
            masks = torch.stack([random_mask(rng, height, width) for rng in rngs])
            self._masks = masks.split(size)

    def __call__(self, trainer: "Trainer") -> dict[str, float]:
        """The mean losses of a trainer's weights, as val/…, and of their average where it keeps
        one, as val_ema/…; all of `LossMeter.means`. Model mode and random state stay.
        """
        metrics = self._losses(trainer, "val")
        if trainer.ema:
            with trainer.ema.applied():
                metrics |= self._losses(trainer, "val_ema")
        return metrics

    def _losses(self, trainer: "Trainer", name: str) -> dict[str, float]:
        meter = LossMeter(trainer.diffusion.num_timesteps)
        generator = torch.Generator().manual_seed(self.config.seed)
        with evaluation_mode(trainer.model), trainer.precision.autocast():
            for batch, timesteps, mask in zip(
                self._batches, self._timesteps, self._masks, strict=True
            ):
                # one by one, as what torch draws at once depends on how much it is
                noise = [torch.randn(image.shape, generator=generator) for image in batch[-1]]
                losses = batch_losses(
                    trainer.model, trainer.diffusion, batch, trainer.device,
                    timesteps=timesteps, noise=torch.stack(noise),
                    inpaint_mask=mask,
                    vlb_weight=self.config.vlb_weight, loss_weighting=self.config.loss_weighting,
                )  # fmt: skip
                meter.add(*losses)
        return {f"{name}/{key}": value for key, value in meter.means().items()}


def fixed_items(dataset: Iterable) -> Iterable:
    """Up to `MOST_IMAGES` items: evenly spread ones, or of a stream the first ones."""
    if not hasattr(dataset, "__len__"):
        return itertools.islice(dataset, MOST_IMAGES)
    count = min(len(dataset), MOST_IMAGES)
    return (dataset[place * len(dataset) // count] for place in range(count))
