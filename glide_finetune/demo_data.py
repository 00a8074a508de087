"""A captioned set of drawn shapes to learn from in minutes: colours x shapes x positions.

Nothing here imports torch.
"""

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, ImageDraw

from glide_finetune.seeds import derived_random

# At least 35 degrees of hue apart, so that pale and blurred ones can still be told.
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 35, 35),
    "yellow": (240, 205, 20),
    "green": (30, 160, 60),
    "cyan": (30, 195, 205),
    "blue": (40, 75, 220),
    "purple": (130, 50, 190),
    "pink": (245, 105, 190),
    "black": (25, 25, 25),
}
SHAPES = ("circle", "square", "triangle", "cross", "star")
# Offset of the shape's centre from the image's, in sides.
POSITIONS: dict[str, tuple[float, float]] = {
    "on the left": (-0.18, 0.0),
    "on the right": (0.18, 0.0),
    "at the top": (0.0, -0.18),
    "at the bottom": (0.0, 0.18),
    "in the middle": (0.0, 0.0),
}

IMAGE_SIZE = 64  # pixels
SIZE_RANGE = (0.44, 0.56)  # of a shape, in sides
PLACE_JITTER = 0.03  # in sides
MARKER = "demo_set.json"
_OVERSAMPLING = 4


def demo_captions() -> list[tuple[str, str, str, str]]:
    """(caption, colour, shape, position) of every kind of image, as in "a red star at the top"."""
    return [
        (f"a {colour} {shape} {position}", colour, shape, position)
        for colour in COLOURS
        for shape in SHAPES
        for position in POSITIONS
    ]


def draw_shape(
    draw: ImageDraw.ImageDraw,
    shape: str,
    centre: tuple[float, float],
    size: float,
    fill: int | tuple[int, int, int],
) -> None:
    """Draw one of SHAPES, `size` pixels high."""
    x, y = centre
    half = size / 2
    if shape == "circle":
        draw.ellipse((x - half, y - half, x + half, y + half), fill=fill)
    elif shape == "square":
        draw.rectangle((x - half, y - half, x + half, y + half), fill=fill)
    elif shape == "cross":
        arm = size / 6
        draw.rectangle((x - half, y - arm, x + half, y + arm), fill=fill)
        draw.rectangle((x - arm, y - half, x + arm, y + half), fill=fill)
    elif shape == "triangle":
        draw.polygon([(x, y - half), (x + half, y + half), (x - half, y + half)], fill=fill)
    elif shape == "star":
        draw.polygon(list(_star_corners(x, y, half)), fill=fill)
    else:
        raise ValueError(f"unknown shape {shape!r}: choose one of {', '.join(SHAPES)}")


def _star_corners(x: float, y: float, half: float) -> Iterator[tuple[float, float]]:
    """Five points; the lowest ones are not as far from the centre as the top one."""
    outer = 2 * half / (1 + math.cos(math.pi / 5))
    y += outer - half
    for corner in range(10):
        radius = outer if corner % 2 == 0 else 0.38 * outer
        angle = math.pi * corner / 5
        yield x + radius * math.sin(angle), y - radius * math.cos(angle)


def draw_image(
    colour: str,
    shape: str,
    position: str,
    seed: int = 0,
    number: int = 0,
    image_size: int = IMAGE_SIZE,
) -> Image.Image:
    """An RGB picture of that shape on a light background; size, place and background jitter."""
    rng = derived_random(seed, "demo", number)
    background = tuple(rng.randrange(240, 256) for _ in range(3))
    size = rng.uniform(*SIZE_RANGE)
    centre = [
        0.5 + offset + rng.uniform(-PLACE_JITTER, PLACE_JITTER) for offset in POSITIONS[position]
    ]
    side = image_size * _OVERSAMPLING
    canvas = Image.new("RGB", (side, side), background)
    x, y = (side * c for c in centre)
    draw_shape(ImageDraw.Draw(canvas), shape, (x, y), side * size, COLOURS[colour])
    return canvas.reduce(_OVERSAMPLING)


def write_demo_set(
    folder: str | os.PathLike, count: int = 1000, seed: int = 0, image_size: int = IMAGE_SIZE
) -> Path:
    """Draw `count` PNG images with caption files into a new folder; returns it.

    Every kind of `demo_captions` occurs equally often, give or take one. The folder appears when it
    is complete; one that was written with the same settings is used again. Raises ValueError for a
    folder that holds anything else.
    """
    folder = Path(folder)
    marker = {"what": "glide-finetune demo set", "count": count, "seed": seed, "side": image_size}
    if folder.exists():
        if _is_complete(folder, marker):
            return folder
        if not folder.is_dir() or any(folder.iterdir()):
            raise ValueError(
                f"{folder} is not a complete demo set of these settings: "
                "delete it or name another folder"
            )
        folder.rmdir()
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        draft.chmod(0o755)  # mkdtemp's folders are closed to other users
        kinds = demo_captions()
        for number in range(count):
            caption, *kind = kinds[number % len(kinds)]
            image = draw_image(*kind, seed, number, image_size)
            image.save(draft / f"{number:05}.png", compress_level=1)
            (draft / f"{number:05}.txt").write_text(caption + "\n", encoding="utf-8")
        (draft / MARKER).write_text(json.dumps(marker) + "\n", encoding="utf-8")
        draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def _is_complete(folder: Path, marker: dict) -> bool:
    try:
        found = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    names = set(os.listdir(folder))
    stems = (f"{number:05}" for number in range(marker["count"]))
    return found == marker and all({f"{stem}.png", f"{stem}.txt"} <= names for stem in stems)
