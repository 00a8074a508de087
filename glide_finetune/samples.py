"""Sample pictures of a training run: drawn from the averaged weights, shown in a labelled grid."""

import contextlib
import logging
import math
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image, ImageDraw, ImageFont

from glide_finetune.atomic_files import atomic_file
from glide_finetune.config import TrainConfig
from glide_finetune.data import images
from glide_finetune.random_state import random_state_kept
from glide_finetune.sampling import PICTURES_A_PASS, sample
from glide_finetune.seeds import derived_seed
from glide_finetune.text_settings import read_prompts

if TYPE_CHECKING:
    from glide_finetune.trainer import Trainer

logger = logging.getLogger(__name__)

PADDING = 4  # pixels around every cell
CELL_WIDTH = 192  # smaller pictures are enlarged towards it, by a whole factor
FONT_SIZE = 12
LINE_HEIGHT = 15
MOST_LABEL_LINES = 5


def labelled_grid(pictures: torch.Tensor, labels: list[str]) -> Image.Image:
    """Pictures side by side, each above its label, in a grid about square.

    Args:
        pictures: (n, 3, height, width) in [-1, 1].
        labels: one for each picture; what exceeds `MOST_LABEL_LINES` lines is cut.
    """
    count, _, height, width = pictures.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    scale = max(1, CELL_WIDTH // width)
    width, height = width * scale, height * scale
    font = _font()
    texts = [_wrapped(label, font, width) for label in labels]
    label_height = LINE_HEIGHT * max(len(lines) for lines in texts)
    step_x, step_y = width + PADDING, height + label_height + PADDING
    grid = Image.new("RGB", (columns * step_x + PADDING, rows * step_y + PADDING), "white")
    draw = ImageDraw.Draw(grid)
    for index, (picture, lines) in enumerate(zip(pictures, texts, strict=True)):
        row, column = divmod(index, columns)
        x, y = PADDING + column * step_x, PADDING + row * step_y
        cell = images.to_pil(picture).resize((width, height), Image.Resampling.NEAREST)
        grid.paste(cell, (x, y))
        for number, line in enumerate(lines):
            draw.text((x, y + height + number * LINE_HEIGHT), line, "black", font)
    return grid


def _font() -> ImageFont.FreeTypeFont:
    """A usual font of the system, or else the one within Pillow, which knows ASCII alone."""
    for name in ("DejaVuSans.ttf", "Arial.ttf"):
        with contextlib.suppress(OSError):
            return ImageFont.truetype(name, FONT_SIZE)
    return ImageFont.load_default(FONT_SIZE)


def _wrapped(label: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """The label in lines of about `width` pixels at most."""
    label = " ".join(label.split())
    pixels_a_letter = font.getlength(label) / max(1, len(label))
    letters = int(0.9 * width / max(1.0, pixels_a_letter))  # some lines have wide letters
    return textwrap.wrap(label, max(4, letters), max_lines=MOST_LABEL_LINES, placeholder=" …")


class SampleDrawer:
    """Draws the same samples again and again as a model learns.

    Args:
        config: its prompts, guidance, sizes and seed.
        options: what the model was made with.
        folder: where the grids go, named by step.
        low_res: what the upsampler starts from, (1, 3, h, w) in [-1, 1].
        respacing: timesteps of a sampling run; "" for few, or all of a model that has few.
        example: for an inpainting model, an item of the data: (tokens, mask, images) or
            (tokens, mask, low_res, high_res). Its middle is repainted below the other samples.
    """

    def __init__(
        self,
        config: TrainConfig,
        options: dict[str, Any],
        folder: Path,
        low_res: torch.Tensor | None = None,
        respacing: str = "",
        example: tuple[torch.Tensor, ...] | None = None,
    ) -> None:
        self.config = config
        self.options = options
        self.folder = folder
        self.low_res = low_res
        self.example = example
        if not respacing and options["diffusion_steps"] >= 50:  # which fast27 takes
            respacing = "fast27" if config.train_upsample else "25"
        self.respacing = respacing
        # What is nearest to what the weights say in so few steps (docs/samplers.md).
        self.sampler = config.test_sampler or ("ddim" if config.train_upsample else "dpm++2m")
        self.prompts = read_prompts(config)

    def __call__(self, trainer: "Trainer") -> Path:
        """Draw, save and log a grid; the trainer's model and torch's random state stay as is."""
        labels = [prompt for prompt in self.prompts for _ in range(self.config.test_batch_size)]
        with contextlib.ExitStack() as stack:
            if trainer.ema:
                stack.enter_context(trainer.ema.applied())
            stack.enter_context(random_state_kept(trainer.device))
            stack.enter_context(trainer.precision.autocast())
            pictures = self._draw(trainer, labels, self.low_res)
            if self.example:
                repainted, label = self._repaint(trainer, *self.example)
                pictures, labels = torch.cat([pictures, repainted]), [*labels, label]
        grid = labelled_grid(pictures, labels)
        path = self.folder / f"{trainer.progress.step:08d}.png"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with atomic_file(path) as file:
                grid.save(file, "png")
        except OSError as error:
            logger.error("the samples cannot be written to %s (%s)", path, error.strerror or error)
        trainer.log.log_images(
            "samples", [images.to_pil(picture) for picture in pictures], labels,
            trainer.progress.step,
        )  # fmt: skip
        return path

    def _repaint(
        self, trainer: "Trainer", tokens: torch.Tensor, mask: torch.Tensor, *pictures: torch.Tensor
    ) -> tuple[torch.Tensor, str]:
        """The picture of an item with its middle painted anew by its caption, and a label."""
        *low_res, image = (picture.unsqueeze(0) for picture in pictures)
        caption = trainer.model.tokenizer.decode(tokens[mask].tolist())
        height, width = image.shape[2:]
        known = torch.ones(1, 1, height, width)
        known[:, :, height // 4 : height - height // 4, width // 4 : width - width // 4] = 0.0
        drawn = self._draw(
            trainer, [caption], *(low_res or [None]), inpaint_image=image, inpaint_mask=known
        )
        return drawn, f"middle repainted: {caption}"

    def _draw(
        self,
        trainer: "Trainer",
        captions: list[str],
        low_res: torch.Tensor | None,
        **known: torch.Tensor,
    ) -> torch.Tensor:
        """A picture of each caption, from a seed of its own."""
        return sample(
            trainer.model,
            self.options,
            self.config.image_width,
            self.config.image_height,
            captions,
            1,
            self.config.test_guidance_scale,
            trainer.device,
            self.respacing,
            upsample_enabled=self.config.train_upsample,
            image_to_upsample="" if low_res is None else low_res,
            sampler=self.sampler,
            seeds=[derived_seed(self.config.seed, "samples", n) for n in range(len(captions))],
            pictures_a_pass=PICTURES_A_PASS,
            learned_variance=self.config.vlb_weight > 0,
            **known,
        )
