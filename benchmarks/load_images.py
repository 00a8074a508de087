"""How fast photographs become training samples, on one core, and how good their pixels are.

    uv run python benchmarks/load_images.py FOLDER_OF_PHOTOGRAPHS

Makes JPEGs of 1-4 megapixels, and of 512 and 256 pixels on the short side, from the photographs (as
large as possible ones, straight from a camera) in a temporary folder. For 64x64 crops of each size
it measures, in turn in one process:

- old: decode in full, convert, cut out, resize;
- bare: only decode, at the smallest scale that gives the crop its 64 pixels;
- loader: `TextImageDataset` without workers, from opening the file to tensors and tokens;

and how close the loader's crops are to a careful resampling of the fully decoded photograph; also
for 256x256 crops, as the upsampler gets them.
"""

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from glide_finetune.data.folder_index import IMAGE_SUFFIXES
from glide_finetune.data.images import crop_box, read_crop
from glide_finetune.loader import TextImageDataset

RESIZE_RATIO = 0.8
REPETITIONS = 7
CAPTIONS = (
    "a photograph of a quiet valley with a river in the last light of an evening in autumn\n"
    "the same valley\n"
)
Size = tuple[int, int]


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure loading of photographs on one core.")
    parser.add_argument("folder", type=Path, help="photographs, the larger the better")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for name, shrink in SIZES.items():
            files = write_photos(args.folder, Path(folder, name), shrink)
            print(f"{len(files)} JPEGs of {name}:")
            report_speed(files)
            for side in (64, 256):
                report_pixels(files, (side, side))


def megapixels(width: int, height: int, number: int) -> float:
    """From one to four megapixels, in turn."""
    return ((1 + number % 4) * 1e6 / (width * height)) ** 0.5


SIZES: dict[str, Callable[[int, int, int], float]] = {
    "1-4 megapixels": megapixels,
    "512 pixels": lambda width, height, number: 512 / min(width, height),
    "256 pixels": lambda width, height, number: 256 / min(width, height),
}


def write_photos(
    source: Path, folder: Path, shrink: Callable[[int, int, int], float]
) -> list[Path]:
    """The photographs at another size, as JPEGs of quality 90 with captions beside them.

    Those below a megapixel are left out, those that would have to grow stay as large as they are.
    """
    folder.mkdir()
    files = []
    Image.MAX_IMAGE_PIXELS = None
    for path in sorted(source.rglob("*")):
        if path.suffix.lower() not in IMAGE_SUFFIXES:
            continue
        with Image.open(path) as image:
            if image.width * image.height < 1e6:
                continue
            image = ImageOps.exif_transpose(image).convert("RGB")
        scale = min(1.0, shrink(*image.size, len(files)))
        size = round(image.width * scale), round(image.height * scale)
        files.append(folder / f"{len(files):03}.jpg")
        image.resize(size, Image.Resampling.LANCZOS).save(files[-1], quality=90)
        files[-1].with_suffix(".txt").write_text(CAPTIONS, encoding="utf-8")
    if not files:
        raise SystemExit(f"no photographs of at least a megapixel in {source}")
    return files


def old_way(path: Path, size: Size, rng: random.Random) -> Image.Image:
    """Decode in full, cut out, resize."""
    with Image.open(path) as image:
        image = image.convert("RGB")
    box = crop_box(image.size, size, RESIZE_RATIO, rng)
    return image.crop(tuple(map(round, box))).resize(size, Image.Resampling.BICUBIC)


def bare_decode(path: Path, size: Size, rng: random.Random) -> None:
    """Decode at the smallest sufficient scale and do nothing with it."""
    with Image.open(path) as image:
        left, _, right, _ = crop_box(image.size, size, RESIZE_RATIO, rng)
        shrink = (right - left) / size[0]
        image.draft(None, (int(image.width / shrink), int(image.height / shrink)))
        image.load()


def full_quality(path: Path, size: Size, rng: random.Random) -> Image.Image:
    """The window cut from all the pixels with antialiasing."""
    with Image.open(path) as image:
        image = image.convert("RGB")
    box = crop_box(image.size, size, RESIZE_RATIO, rng)
    return image.resize(size, Image.Resampling.BICUBIC, box=box)


def report_speed(files: Sequence[Path]) -> None:
    dataset = TextImageDataset(
        files[0].parent, 64, 64, resize_ratio=RESIZE_RATIO, uncond_p=0.2, use_captions=True
    )

    def each(action: Callable[[Path, Size, random.Random], object]) -> Callable[[], None]:
        def go_through() -> None:
            for number, path in enumerate(files):
                action(path, (64, 64), random.Random(number))

        return go_through

    ways = {
        "old": each(old_way),
        "bare": each(bare_decode),
        "loader": lambda: [dataset[index] for index in range(len(dataset))],
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repetition in range(REPETITIONS + 1):
        dataset.set_epoch(repetition)
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if repetition:  # the first one only warms up
                seconds[name].append((time.perf_counter() - start) / len(files))
    old, bare, loader = (statistics.median(seconds[name]) for name in ("old", "bare", "loader"))
    print(f"  images/s: old {1 / old:.0f}, bare {1 / bare:.0f}, loader {1 / loader:.0f}", end="")
    print(f"; the loader is {old / loader:.2f} x the old way, {bare / loader:.2f} x the bare cost")


def report_pixels(files: Sequence[Path], size: Size) -> None:
    values = [
        psnr(
            read_crop(path, size, RESIZE_RATIO, random.Random(f"{path.name} {draw}")),
            full_quality(path, size, random.Random(f"{path.name} {draw}")),
        )
        for path in files
        for draw in range(3)
    ]
    print(f"  {size[0]}x{size[1]} crops: PSNR", end=" ")
    print(f"{min(values):.1f} dB at least, median {statistics.median(values):.1f} dB")


def psnr(image: Image.Image, other: Image.Image) -> float:
    """In dB; 99 for equal ones."""
    error = np.mean((np.asarray(image, dtype=float) - np.asarray(other, dtype=float)) ** 2)
    return min(99.0, float(10 * np.log10(255**2 / max(error, 1e-9))))


if __name__ == "__main__":
    main()
