"""The one way from an image file to pixels, for every loader and for single images.

Open the file (`image_files`), put transparency on white, convert to RGB, cut a window of the
target's shape (never squashing), resize with antialiasing, turn as EXIF says.
"""

import math
import os
import random
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from glide_finetune.data.bad_samples import BadSample
from glide_finetune.data.image_files import (
    SIDEWAYS,
    TURNS,
    ImageSource,
    opened,
    turn_of,
    turned_size,
)

MIN_SIDE = 8  # pixels; what is narrower shows nothing

# JPEGs may be decoded at a half, a quarter or an eighth that is still this many times as large as
# the window's final size: on photographs the result is within 39 dB (PSNR) of the full decode's.
DRAFT_GAP = 1.5
# A whole image may be shrunk to this multiple of what its smallest window needs; with less,
# resampling twice would blur: at 1.25 photographs come down to 36 dB, at 1 to 32 dB.
PREPARED_GAP = 1.4
# Averaging whole blocks may stop at this multiple of the final size before the last, careful
# resampling step; Pillow calls 2 hard to tell from resampling the full image.
REDUCING_GAP = 2.0

Box = tuple[float, float, float, float]  # left, upper, right, lower in pixels


def crop_box(
    image_size: tuple[int, int],
    target_size: tuple[int, int],
    resize_ratio: float = 1.0,
    rng: random.Random | None = None,
) -> Box:
    """The window of the target's shape to cut from an image; sizes are (width, height).

    With `rng`, its area is drawn from [resize_ratio, 1] times that of the largest window of this
    shape, and its place from all places; without, it is the largest window, centred.
    """
    width, height = image_size
    target_width, target_height = target_size
    scale = min(width / target_width, height / target_height)
    place_x = place_y = 0.5
    if rng is not None:
        scale *= rng.uniform(resize_ratio, 1.0) ** 0.5
        place_x, place_y = rng.random(), rng.random()
    # The limits only keep rounding from ending a hair outside of the image.
    box_width, box_height = min(scale * target_width, width), min(scale * target_height, height)
    left, upper = place_x * (width - box_width), place_y * (height - box_height)
    return left, upper, min(left + box_width, width), min(upper + box_height, height)


def prepared_size(
    image_size: tuple[int, int], target_size: tuple[int, int], resize_ratio: float
) -> tuple[int, int]:
    """What to shrink a whole image to, so that all its windows are as good as from full size.

    Even the smallest window that `crop_box` draws keeps PREPARED_GAP times the target's size.
    Never larger than the image. All sizes are (width, height).
    """
    scale = min(image_size[0] / target_size[0], image_size[1] / target_size[1])
    shrink = scale * resize_ratio**0.5 / PREPARED_GAP
    if shrink <= 1:
        return image_size
    short, long = sorted(image_size)
    aspect, least = long / short, math.ceil(short / shrink)
    # Rounding the long side moves the windows by parts of a pixel, which shows in fine detail.
    # So of some short sides take the one that leaves least to round.
    shorts = range(least, min(least + least // 8, short) + 1)
    best = min(shorts, key=lambda side: abs(side * aspect - round(side * aspect)))
    sides = best, round(best * aspect)
    return sides if image_size[0] == short else sides[::-1]


def read_crop(
    source: ImageSource,
    size: tuple[int, int],
    resize_ratio: float = 1.0,
    rng: random.Random | None = None,
) -> Image.Image:
    """The RGB image of `size` (width, height) cut from a file, or from the bytes of one.

    The window is that of `crop_box`. Smaller images are enlarged, but not slivers. Raises BadSample
    with the reason for these and for anything that is no complete image.
    """
    with opened(source) as image:
        # The window is chosen before a pixel is decoded, so that JPEGs can be decoded small.
        turn = turn_of(image)
        upright = turned_size(image.size, turn)
        _refuse_sliver(upright, size)
        return _cut(image, turn, crop_box(upright, size, resize_ratio, rng), size, DRAFT_GAP)


def read_prepared(
    source: ImageSource, size: tuple[int, int], resize_ratio: float
) -> tuple[Image.Image, tuple[int, int]]:
    """The whole upright RGB image in a file or its bytes at `prepared_size`, and its size before.

    Raises BadSample as `read_crop` does for the same `size` and `resize_ratio`.
    """
    with opened(source) as image:
        turn = turn_of(image)
        upright = turned_size(image.size, turn)
        _refuse_sliver(upright, size)
        prepared = prepared_size(upright, size, resize_ratio)
        # Made once and used often, and to be resampled again, so with more care than a crop.
        whole = 0, 0, *upright
        resampling = Image.Resampling.LANCZOS
        return _cut(image, turn, whole, prepared, 2 * DRAFT_GAP, resampling), upright


def _refuse_sliver(image_size: tuple[int, int], target_size: tuple[int, int]) -> None:
    scale = min(image_size[0] / target_size[0], image_size[1] / target_size[1])
    if any(scale * target < min(MIN_SIDE, target) for target in target_size):
        raise BadSample(f"too small or narrow ({image_size[0]}x{image_size[1]})")


# Those whose stored pixels run from right to left, and from the bottom to the top.
MIRRORED_X = (TURNS[2], TURNS[3], TURNS[6], TURNS[7])
MIRRORED_Y = (TURNS[3], TURNS[4], TURNS[7], TURNS[8])


def _cut(
    image: Image.Image,
    turn: Image.Transpose | None,
    box: Box,
    size: tuple[int, int],
    gap: float,
    resampling: Image.Resampling = Image.Resampling.BICUBIC,
) -> Image.Image:
    """A window of the upright image at `size`, decoded at no less than `gap` times that.

    It is cut as it is stored and turned last: in a turned JPEG that was decoded small, the odd
    pixels by which its sides were rounded up could lie before the first ones.
    """
    left, upper, right, lower = box
    width, height = turned_size(image.size, turn)
    if turn in MIRRORED_X:
        left, right = width - right, width - left
    if turn in MIRRORED_Y:
        upper, lower = height - lower, height - upper
    if turn in SIDEWAYS:
        left, upper, right, lower = upper, left, lower, right
        size = size[::-1]
    scale = _draft(image, (right - left) / size[0] / gap)
    box = left * scale, upper * scale, right * scale, lower * scale
    cut = to_rgb(image).resize(size, resampling, box=box, reducing_gap=REDUCING_GAP)
    return cut if turn is None else cut.transpose(turn)


def _draft(image: Image.Image, shrink: float) -> float:
    """Have a JPEG decoded smaller, by `shrink` at most; the scale that it gets."""
    width, height = image.size
    drafted = image.draft(None, (math.ceil(width / shrink), math.ceil(height / shrink)))
    # Its second value is the whole image's box at the new scale, before rounding to pixels.
    return drafted[1][2] / width if drafted else 1.0


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode to RGB: transparency on white, 16-bit grey to 8 bits."""
    if image.mode.startswith("I"):
        image = _to_8_bit(image)
    if image.mode == "F":
        raise BadSample("an image of floating-point values, whose range is unknown")
    if image.has_transparency_data:
        if image.mode == "La":  # its only conversion
            image = image.convert("LA")
        if image.mode != "RGBA":  # a further copy, and of large images each takes half a gigabyte
            image = image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image)
        return white
    return image if image.mode == "RGB" else image.convert("RGB")


def _to_8_bit(image: Image.Image) -> Image.Image:
    """16-bit grey (modes I;16 and, in older Pillows, I) to mode L, or LA where a value stands for
    transparency; Pillow's own would clip."""
    values = np.asarray(image)
    if values.size and (values.min() < 0 or values.max() > 0xFFFF):
        raise BadSample("an image of 32-bit values, whose range is unknown")
    scaled = values.astype(np.uint32)
    scaled += 128
    scaled //= 257
    grey = Image.fromarray(scaled.astype(np.uint8))
    if "transparency" in image.info:
        opaque = values != image.info["transparency"]
        grey.putalpha(Image.fromarray(opaque.astype(np.uint8) * 255))
    return grey


def shrink(image: Image.Image, factor: int) -> Image.Image:
    """The low-resolution image of an upsampler pair: the mean of each factor x factor block."""
    return image.reduce(factor)


def to_tensor(image: Image.Image) -> torch.Tensor:
    """An image of any mode as float32 (3, height, width) in [-1, 1], as `to_rgb` makes it RGB."""
    image = to_rgb(image)
    pixels = np.asarray(image).transpose(2, 0, 1).astype(np.float32, order="C")
    pixels /= 127.5
    pixels -= 1.0
    return torch.from_numpy(pixels)


def to_pil(image: torch.Tensor) -> Image.Image:
    """A tensor (3, height, width) in [-1, 1] as an RGB image; values outside are clipped."""
    pixels = ((image.detach().float() + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().contiguous().numpy())


def read_image(path: str | os.PathLike, size: tuple[int, int]) -> torch.Tensor:
    """The centre of an image file as float32 (1, 3, height, width) in [-1, 1].

    The largest window of that shape is cut, never squashed. `size` is (width, height). Raises
    ValueError naming the file if it cannot be read.
    """
    try:
        return to_tensor(read_crop(Path(path), size)).unsqueeze(0)
    except BadSample as error:
        raise ValueError(f"cannot read the image {path}: {error}") from error


def read_mask(path: str | os.PathLike, size: tuple[int, int]) -> torch.Tensor:
    """What is marked white in a file: float32 (1, 1, height, width), 1 where there is any white.

    Cropped as `read_image` crops. Grey is what it is nearer to, black or white; transparency is
    white. `size` is (width, height). Raises ValueError naming the file if it cannot be read.
    """
    try:
        with opened(Path(path)) as image:
            turn = turn_of(image)
            white = to_rgb(image).convert("L").point(lambda value: 255 * (value >= 128))
            white = white if turn is None else white.transpose(turn)
            white = white.resize(size, Image.Resampling.BOX, box=crop_box(white.size, size))
    except BadSample as error:
        raise ValueError(f"cannot read the mask {path}: {error}") from error
    return torch.from_numpy(np.asarray(white) > 0).float()[None, None]
