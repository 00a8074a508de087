"""The one way from an image file to pixels, for every loader and for single images.

Open, refuse bombs, apply the EXIF orientation, put transparency on white, convert to RGB, cut a
window of the target's shape (never squashing), resize with antialiasing.
"""

import io
import os
import random
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from glide_finetune.data.bad_samples import BadSample

MAX_PIXELS = 2**27  # 134 million: above it a file is taken for a decompression bomb

# Decoding and box reduction may stop at this multiple of the final size before the last, careful
# resampling step; Pillow calls 2 hard to tell from resampling the full image.
REDUCING_GAP = 2.0

Box = tuple[float, float, float, float]  # left, upper, right, lower in pixels
ImageSource = str | os.PathLike | bytes


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


def read_crop(
    source: ImageSource,
    size: tuple[int, int],
    resize_ratio: float = 1.0,
    rng: random.Random | None = None,
) -> Image.Image:
    """The RGB image of `size` (width, height) cut from a file, or from the bytes of one.

    The window is that of `crop_box`. Smaller images are enlarged. Raises BadSample with the reason
    for anything that is no complete image.
    """
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            return _crop_opened(image, size, resize_ratio, rng)
    except BadSample:
        raise
    except Exception as error:  # Pillow's decoders raise about a dozen types on broken files
        raise BadSample(_reason(error)) from error


def upright_size(data: bytes) -> tuple[int, int]:
    """(width, height) of an encoded image as it is to be seen, from its header alone.

    For one that `read_crop` reads.
    """
    with Image.open(io.BytesIO(data)) as image:
        return _upright_size(image)


def _reason(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image that Pillow can read"
    if isinstance(error, Image.DecompressionBombError):
        return f"too many pixels ({error})"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def _crop_opened(
    image: Image.Image, size: tuple[int, int], resize_ratio: float, rng: random.Random | None
) -> Image.Image:
    if image.width * image.height > MAX_PIXELS:
        raise BadSample(f"too many pixels ({image.width}x{image.height})")
    # The window is chosen in the upright image at full size, before a pixel is decoded, so that
    # JPEGs can be decoded at the smallest scale that suffices.
    box = crop_box(_upright_size(image), size, resize_ratio, rng)
    scale = _draft(image, (box[2] - box[0]) / size[0])
    image = to_rgb(ImageOps.exif_transpose(image))
    box = tuple(edge * scale for edge in box)
    return image.resize(size, Image.Resampling.BICUBIC, box=box, reducing_gap=REDUCING_GAP)


def _upright_size(image: Image.Image) -> tuple[int, int]:
    orientation = image.getexif().get(0x0112, 1)
    return image.size[::-1] if orientation in (5, 6, 7, 8) else image.size


def _draft(image: Image.Image, shrink: float) -> float:
    """Have JPEGs decoded smaller, as they are to shrink by `shrink` anyway; the scale taken."""
    if image.format != "JPEG" or shrink <= REDUCING_GAP:
        return 1.0
    width = image.width
    wanted = [max(1, int(edge * REDUCING_GAP / shrink)) for edge in image.size]
    drafted = image.draft(None, tuple(wanted))
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
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _to_8_bit(image: Image.Image) -> Image.Image:
    """16-bit grey (modes I;16 and, in older Pillows, I) to mode L; Pillow's own would clip."""
    values = np.asarray(image)
    if values.size and (values.min() < 0 or values.max() > 0xFFFF):
        raise BadSample("an image of 32-bit values, whose range is unknown")
    return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))


def shrink(image: Image.Image, factor: int) -> Image.Image:
    """The low-resolution image of an upsampler pair: the mean of each factor x factor block."""
    return image.reduce(factor)


def to_tensor(image: Image.Image) -> torch.Tensor:
    """An RGB image as float32 (3, height, width) in [-1, 1]."""
    pixels = np.array(image.convert("RGB"), dtype=np.float32)
    return torch.from_numpy(pixels / 127.5 - 1.0).permute(2, 0, 1).contiguous()


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
