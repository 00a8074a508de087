"""Sample pictures of a training run: drawn from the averaged weights, shown in a labelled grid."""

import contextlib
import math
import textwrap
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont

from glide_finetune import images
from glide_finetune.config import TrainConfig, read_prompts
from glide_finetune.glide_util import sample, seeded

PADDING = 4
LABEL_LINES = 3


def labelled_grid(pictures: torch.Tensor, labels: list[str], columns: int = 0) -> Image.Image:
    """Pictures side by side, each above its label.

    Args:
        pictures: (n, 3, height, width) in [-1, 1].
        labels: one for each picture.
        columns: pictures in a row; 0 makes the grid about square.
    """
    count, _, height, width = pictures.shape
    columns = columns or math.ceil(math.sqrt(count))
    scale = max(1, 128 // width)  # small pictures are shown larger, in whole pixels
    cell_width, picture_height = width * scale, height * scale
    font = ImageFont.load_default(size=11)
    line_height = 13
    cell_height = picture_height + LABEL_LINES * line_height
    rows = math.ceil(count / columns)
    grid = Image.new(
        "RGB",
        (
            columns * (cell_width + PADDING) + PADDING,
            rows * (cell_height + PADDING) + PADDING,
        ),
        "white",
    )
    draw = ImageDraw.Draw(grid)
    characters = max(8, int(cell_width / font.getlength("n")))
    for index, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
        row, column = divmod(index, columns)
        x = PADDING + column * (cell_width + PADDING)
        y = PADDING + row * (cell_height + PADDING)
        cell = images.to_pil(picture).resize((cell_width, picture_height), Image.Resampling.NEAREST)
        grid.paste(cell, (x, y))
        lines = textwrap.wrap(label, characters, max_lines=LABEL_LINES, placeholder=" …")
        draw.multiline_text((x, y + picture_height), "\n".join(lines), "black", font, spacing=1)
    return grid


class SampleDrawer:
    """Draws the same samples again and again as a model learns.

    Args:
        config: its prompts, guidance, sizes and seed.
        options: what the model was made with.
        folder: where the grids go, named by step.
        low_res: what the upsampler starts from, (1, 3, h, w) in [-1, 1].
        respacing: timesteps of a sampling run.
    """

    def __init__(
        self,
        config: TrainConfig,
        options: dict[str, Any],
        folder: Path,
        low_res: torch.Tensor | None = None,
        respacing: str = "",
    ) -> None:
        self.config = config
        self.options = options
        self.folder = folder
        self.low_res = low_res
        self.respacing = respacing or ("fast27" if config.train_upsample else "50")
        self.prompts = read_prompts(config)

    def __call__(self, trainer) -> Path:
        """Draw, save and log a grid; the trainer's model and torch's random state stay as is."""
        with contextlib.ExitStack() as stack:
            if trainer.ema:
                stack.enter_context(trainer.ema.applied())
            stack.enter_context(seeded(self.config.seed, trainer.device))
            stack.enter_context(trainer.precision.autocast())
            pictures = sample(
                trainer.model,
                self.options,
                self.config.image_width,
                self.config.image_height,
                self.prompts,
                self.config.test_batch_size,
                self.config.test_guidance_scale,
                trainer.device,
                self.respacing,
                upsample_enabled=self.config.train_upsample,
                image_to_upsample="" if self.low_res is None else self.low_res,
            )
        labels = [prompt for prompt in self.prompts for _ in range(self.config.test_batch_size)]
        grid = labelled_grid(pictures, labels)
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{trainer.progress.step:08d}.png"
        grid.save(path)
        trainer.log.log_images(
            "samples", [images.to_pil(picture) for picture in pictures], labels,
            trainer.progress.step,
        )  # fmt: skip
        return path
