"""Tells colour and shape of a demo picture by classical means, also of a noisy or blurred one."""

from functools import cache

import numpy as np
from PIL import Image, ImageDraw

from glide_finetune.demo_data import COLOURS, SHAPES, draw_shape

SIDE = 32  # pixels; pictures are judged at this size
_PADDED = 2 * SIDE  # so that shapes wrap around nowhere
_TEMPLATE_SIZES = np.arange(8, 24, 1)  # pixels


def judge(image: Image.Image | np.ndarray) -> tuple[str, str]:
    """(colour name, shape name) of the shape in a square RGB picture (H, W, 3), uint8."""
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX)
    pixels = np.asarray(image).astype(np.float64)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    background = np.median(border, axis=0)
    difference = pixels - background
    distance = np.linalg.norm(difference, axis=-1)
    peak = np.quantile(distance, 0.97)
    core = distance > 0.7 * peak
    return _nearest_colour(difference[core].mean(axis=0), background), _nearest_shape(
        distance / peak
    )


def _nearest_colour(difference: np.ndarray, background: np.ndarray) -> str:
    """By direction from the background, which stays when a colour is pale or blurred."""

    def similarity(name: str) -> float:
        direction = np.array(COLOURS[name]) - background
        return float(difference @ direction / np.linalg.norm(direction))

    return max(COLOURS, key=similarity)


def _nearest_shape(distance: np.ndarray) -> str:
    """The template of the largest overlap (intersection over union) at any size and place."""
    cover = np.clip((distance - 0.25) / 0.5, 0.0, 1.0)
    spectrum = np.fft.rfft2(cover, (_PADDED, _PADDED))
    shapes, spectra, areas = _templates()
    intersection = np.fft.irfft2(spectrum * spectra.conj(), (_PADDED, _PADDED)).max(axis=(-2, -1))
    overlap = intersection / (cover.sum() + areas - intersection)
    return shapes[int(overlap.argmax())]


@cache
def _templates() -> tuple[list[str], np.ndarray, np.ndarray]:
    """Shape names, spectra of their soft masks at every size, and the masks' areas."""
    shapes, masks = [], []
    for shape in SHAPES:
        for size in _TEMPLATE_SIZES:
            canvas = Image.new("L", (SIDE * 8, SIDE * 8))
            draw_shape(ImageDraw.Draw(canvas), shape, (SIDE * 4, SIDE * 4), size * 8, 255)
            shapes.append(shape)
            masks.append(np.asarray(canvas.reduce(8)) / 255.0)
    stack = np.stack(masks)
    return shapes, np.fft.rfft2(stack, (_PADDED, _PADDED)), stack.sum(axis=(-2, -1))
