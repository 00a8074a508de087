"""Image files before their pixels: which formats, how large, which way up. Needs Pillow alone."""

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterator

from PIL import Image

from glide_finetune.data.bad_samples import BadSample
from glide_finetune.data.regular_files import open_regular

MAX_PIXELS = 2**27  # 134 million: above it a file is taken for a decompression bomb

# It logs what the exception that follows tells too.
logging.getLogger("PIL.TiffImagePlugin").setLevel(logging.CRITICAL)

# Pillow knows more formats, but some hand their data to other programs (EPS to Ghostscript).
Image.init()
FORMATS = [
    name
    for name in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "MPO", "PPM")
    if name in Image.OPEN
]

ImageSource = str | os.PathLike | bytes


@contextlib.contextmanager
def opened(source: ImageSource) -> Iterator[Image.Image]:
    """The image, not decoded yet. What goes wrong here or in the body is raised as BadSample."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow's about what does no harm here
            file = io.BytesIO(source) if isinstance(source, bytes) else open_regular(source)
            with file, Image.open(file, formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise BadSample(f"too many pixels ({image.width}x{image.height})")
                _scale_transparency(image)
                yield image
    except BadSample:
        raise
    except Exception as error:  # Pillow's decoders raise about a dozen types on broken files
        raise BadSample(_reason(error)) from error


def _scale_transparency(image: Image.Image) -> None:
    """Make the transparent value or colour of a PNG what Pillow makes of pixels that have it.

    Of the depths other than 8 bits it does so only for 1; 16-bit grey keeps its depth.
    """
    if image.format != "PNG" or "transparency" not in image.info or not image.tile:
        return
    stored, value = image.tile[0].args, image.info["transparency"]
    if stored == "RGB;16B":
        image.info["transparency"] = tuple(channel >> 8 for channel in value)
    elif stored in ("L;2", "L;4"):
        image.info["transparency"] = value * {"L;2": 85, "L;4": 17}[stored]


def _reason(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image that Pillow can read"
    if isinstance(error, Image.DecompressionBombError):
        return f"too many pixels ({error})"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__


# What to do with the stored pixels for each value of EXIF's orientation.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = (TURNS[5], TURNS[6], TURNS[7], TURNS[8])


def turn_of(image: Image.Image) -> Image.Transpose | None:
    """What to do with the stored pixels; after this the image's size is that of these."""
    if image.format in ("PNG", "TIFF"):
        # EXIF may come after the pixels; and TIFFs Pillow turns itself, in some versions only now.
        image.load()
    try:
        return TURNS.get(image.getexif().get(0x0112))
    except Exception:  # broken EXIF data raise all sorts; the picture may be fine all the same
        return None


def turned_size(stored_size: tuple[int, int], turn: Image.Transpose | None) -> tuple[int, int]:
    """(width, height) of an image of that size once it is turned."""
    return stored_size[::-1] if turn in SIDEWAYS else stored_size


def upright_size(source: ImageSource) -> tuple[int, int]:
    """(width, height) of an image as it is to be seen. Raises BadSample if that cannot be told."""
    with opened(source) as image:
        turn = turn_of(image)
        return turned_size(image.size, turn)


def readable_size(source: ImageSource) -> tuple[int, int]:
    """As `upright_size`, of an image that can be decoded to its end."""
    with opened(source) as image:
        turn = turn_of(image)
        image.load()
        return turned_size(image.size, turn)
