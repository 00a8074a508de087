"""Random masks to train inpainting with: which part of a picture the model gets to see.

GLIDE (Nichol et al. 2021, arXiv:2112.10741, section 4.3) erases random regions of its training
images and does not say which. Here they are like those that people erase: boxes, strokes of a
brush, all around what is kept; and part of the time everything, so that the model goes on learning
to draw whole pictures.
"""

from random import Random

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from glide_finetune.seeds import derived_random

# How often which region is erased.
SHARES = {"everything": 0.2, "surroundings": 0.1, "boxes": 0.35, "strokes": 0.35}

BOX_SIDES = (1 / 8, 3 / 4)  # shares of the image's width and height, before its edges cut them
MOST_BOXES = 3
BRUSH_WIDTHS = (1 / 16, 1 / 4)  # shares of the image's shorter side
MOST_STROKES = 3
TURNS = (2, 8)  # of a stroke, its end among them
STRIDE = 1 / 3  # share of the image's sides that a stroke goes at most before it turns


def random_masks(count: int, height: int, width: int) -> Tensor:
    """`random_mask` as often as asked; follows from torch's random state on the CPU alone.

    Returns:
        float32 (count, 1, height, width) on the CPU.
    """
    seed = int(torch.randint(2**62, (), device="cpu"))
    masks = [random_mask(derived_random(seed, index), height, width) for index in range(count)]
    return torch.stack(masks)


def random_mask(rng: Random, height: int, width: int) -> Tensor:
    """A mask with one of the regions of `SHARES` erased.

    Returns:
        float32 (1, height, width), 1 where a pixel is known and 0 where it is erased.
    """
    (region,) = rng.choices(list(SHARES), list(SHARES.values()))
    return mask_without(region, rng, height, width)


def mask_without(region: str, rng: Random, height: int, width: int) -> Tensor:
    """A mask as `random_mask` gives them, with this of the regions of `SHARES` erased.

    Of boxes there are one to `MOST_BOXES`, and of strokes one to `MOST_STROKES`, which may overlap.
    """
    known = Image.new("L", (width, height), 1 if region in ("boxes", "strokes") else 0)
    draw = ImageDraw.Draw(known)
    if region == "surroundings":
        draw.rectangle(_box(rng, width, height), fill=1)
    elif region == "boxes":
        for _ in range(rng.randint(1, MOST_BOXES)):
            draw.rectangle(_box(rng, width, height), fill=0)
    elif region == "strokes":
        for _ in range(rng.randint(1, MOST_STROKES)):
            brush = max(1, round(rng.uniform(*BRUSH_WIDTHS) * min(width, height)))
            draw.line(_stroke(rng, width, height), fill=0, width=brush, joint="curve")
    return torch.from_numpy(np.array(known, dtype=np.float32)).unsqueeze(0)


def _box(rng: Random, width: int, height: int) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of a box, both ends included."""
    left, right = _span(rng, width)
    top, bottom = _span(rng, height)
    return left, top, right, bottom


def _span(rng: Random, size: int) -> tuple[int, int]:
    """First and last pixel of a stretch whose middle is anywhere, so that edges get their share."""
    middle, half = rng.uniform(0, size - 1), rng.uniform(*BOX_SIDES) * size / 2
    return max(0, round(middle - half)), min(size - 1, round(middle + half))


def _stroke(rng: Random, width: int, height: int) -> list[tuple[float, float]]:
    """The ends and turns of a stroke within the image."""
    x, y = rng.uniform(0, width - 1), rng.uniform(0, height - 1)
    points = [(x, y)]
    for _ in range(rng.randint(*TURNS)):
        x += rng.uniform(-STRIDE, STRIDE) * width
        y += rng.uniform(-STRIDE, STRIDE) * height
        x, y = min(max(x, 0.0), width - 1.0), min(max(y, 0.0), height - 1.0)
        points.append((x, y))
    return points
