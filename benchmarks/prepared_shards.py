"""How much faster training reads prepared shards than photographs, and how alike their crops are.

    uv run python benchmarks/prepared_shards.py FOLDER_OF_PHOTOGRAPHS

Makes JPEGs of 1-4 megapixels from the photographs in a temporary folder, prepares them as
`python -m glide_finetune.prepare` does, for the base model and for the upsampler, and measures on
one core and in one process, in turn:

- old: decode a photograph in full, convert, cut out, resize;
- shards: batches of `glide_wds_loader` over the prepared shards;

and, over crops drawn alike from prepared pictures and photographs, the smallest ones too, the PSNR
between the two. The photographs' crops are resampled from the full decode.
"""

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from load_images import RESIZE_RATIO, SIZES, full_quality, old_way, psnr, write_photos

from glide_finetune.config import TrainConfig
from glide_finetune.data.dataloading import make_dataloader
from glide_finetune.data.images import read_crop
from glide_finetune.data.metadata import parse_metadata
from glide_finetune.data.tar_samples import shard_samples
from glide_finetune.preparation import prepare
from glide_finetune.wds_loader import glide_wds_loader

REPETITIONS = 7
PASSES = 5  # over the shards in one repetition, as they are read so fast


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare prepared shards with photographs.")
    parser.add_argument("folder", type=Path, help="photographs, the larger the better")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "photos")
        files = write_photos(args.folder, source, SIZES["1-4 megapixels"])
        print(f"{len(files)} JPEGs of 1-4 megapixels, {mean_kilobytes(files):.0f} KB each")
        for upsample in (False, True):
            out = Path(folder, "upsampler" if upsample else "base")
            config = TrainConfig(
                data_dir=str(source), train_upsample=upsample, resize_ratio=RESIZE_RATIO
            )
            prepare(config, out, shard_size=1000, num_workers=0)
            report_speed(files, out, config)
            report_pixels(files, out, (config.image_width, config.image_height))


def mean_kilobytes(files: Sequence[Path]) -> float:
    return statistics.mean(file.stat().st_size for file in files) / 1000


def report_speed(files: Sequence[Path], shards: Path, config: TrainConfig) -> None:
    size = config.image_width, config.image_height
    stream = glide_wds_loader(
        shards,
        dataset_name="generic",
        enable_upsample=config.train_upsample,
        resize_ratio=RESIZE_RATIO,
        shuffle_buffer=len(files) // 2,
    )
    batches = make_dataloader(stream, min(len(files), 13), seed=0, num_workers=0, device="cpu")
    old, new = [], []
    for repetition in range(REPETITIONS + 1):
        start = time.perf_counter()
        for number, path in enumerate(files):
            old_way(path, size, random.Random(number))
        middle = time.perf_counter()
        images = 0
        for epoch in range(PASSES):
            batches.set_epoch(PASSES * repetition + epoch)
            images += sum(len(batch[0]) for batch in batches)
        end = time.perf_counter()
        if repetition:  # the first one only warms up
            old.append((middle - start) / len(files))
            new.append((end - middle) / images)
    old_time, new_time = statistics.median(old), statistics.median(new)
    print(
        f"{size[0]}x{size[1]}: images/s: old {1 / old_time:.0f}, shards {1 / new_time:.0f};", end=""
    )
    print(f" {old_time / new_time:.1f} x the old way")


class Smallest(random.Random):
    """Draws the smallest windows there are, anywhere."""

    def uniform(self, low: float, high: float) -> float:
        return low


def report_pixels(files: Sequence[Path], shards: Path, size: tuple[int, int]) -> None:
    values, kilobytes = [], []
    for shard in sorted(shards.glob("*.tar")):
        for sample in shard_samples(str(shard), {"jpg", "json"}):
            name = parse_metadata(sample.members["json"])["prepared_from"]
            photo, image = files[0].parent / name, sample.members["jpg"]
            kilobytes.append(len(image) / 1000)
            for draw in range(3):
                for kind in (random.Random, Smallest):
                    seed = f"{name} {draw}"
                    crop = read_crop(image, size, RESIZE_RATIO, kind(seed))
                    values.append(psnr(crop, full_quality(photo, size, kind(seed))))
    print(f"  prepared pictures of {statistics.mean(kilobytes):.0f} KB;", end=" ")
    print(f"PSNR {min(values):.1f} dB at least, median {statistics.median(values):.1f} dB")


if __name__ == "__main__":
    main()
