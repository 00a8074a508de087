"""The loss on pictures that are not trained on, measured the same way every time."""

import itertools
from collections.abc import Iterable

import torch

from glide_finetune.batch_losses import LossMeter, batch_losses
from glide_finetune.config import TrainConfig
from glide_finetune.glide_util import sampling_mode

# Enough that the curve is smooth, few enough that looking is quick.
MOST_IMAGES = 256


class Validator:
    """Loss over a fixed set of images, each with a noise and a timestep of its own for ever.

    Args:
        dataset: gives items as `TextImageDataset` does, without random crops or dropped captions.
        config: batch size, loss and seed.
        num_timesteps: of the diffusion process.
    """

    def __init__(self, dataset: Iterable, config: TrainConfig, num_timesteps: int) -> None:
        self.config = config
        items = [
            [part for part in item if isinstance(part, torch.Tensor)]
            for item in itertools.islice(dataset, MOST_IMAGES)
        ]
        generator = torch.Generator().manual_seed(config.seed)
        # evenly over all timesteps, so that every quartile has its share of the images
        places = torch.randperm(len(items), generator=generator) + 0.5
        timesteps = (places * num_timesteps / len(items)).long()
        noise = torch.randn((len(items), *items[0][-1].shape), generator=generator)
        self._batches = [
            (
                [torch.stack(part) for part in zip(*items[i : i + config.batch_size], strict=True)],
                timesteps[i : i + config.batch_size],
                noise[i : i + config.batch_size],
            )
            for i in range(0, len(items), config.batch_size)
        ]

    def __call__(self, trainer) -> dict[str, float]:
        """The mean losses of a trainer's weights and, where it keeps one, of their average."""
        metrics = self._losses(trainer, "val")
        if trainer.ema:
            with trainer.ema.applied():
                metrics |= self._losses(trainer, "val_ema")
        return metrics

    def _losses(self, trainer, name: str) -> dict[str, float]:
        meter = LossMeter(trainer.diffusion.num_timesteps, trainer.device)
        with sampling_mode(trainer.model), trainer.precision.autocast():
            for batch, timesteps, noise in self._batches:
                meter.add(
                    *batch_losses(
                        trainer.model, trainer.diffusion, batch, trainer.device,
                        timesteps=timesteps, noise=noise, vlb_weight=self.config.vlb_weight,
                        loss_weighting=self.config.loss_weighting,
                    )
                )  # fmt: skip
        return {f"{name}/{key}": value for key, value in meter.means().items()}
