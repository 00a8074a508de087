"""Memory of the loaders over several epochs, and how they speed up with a second worker.

python benchmarks/data_loading.py                     # draws its own pictures
python benchmarks/data_loading.py --photos FOLDER     # for the speed: photographs of yours

Memory is that of this process and its workers together (proportional set size), at the end of each
epoch over 20,000 small pictures, from a folder and from shards. Speeds are medians of runs that
take turns, so that a noisy moment touches both.
"""

import argparse
import io
import multiprocessing
import random
import statistics
import tarfile
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image

from glide_finetune.data.dataloading import make_dataloader
from glide_finetune.loader import TextImageDataset
from glide_finetune.wds_loader import glide_wds_loader

MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=Path, help="folder of pictures for the speed")
    parser.add_argument("--samples", type=int, default=20_000, help="for the memory")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5, help="runs of each number of workers")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder, shards = Path(temporary, "folder"), Path(temporary, "shards")
        draw_pictures(folder, args.samples)
        pack(folder, shards)
        for name, dataset in (
            ("folder", TextImageDataset(folder, use_captions=True, return_keys=True)),
            ("shards", glide_wds_loader(shards, dataset_name="generic", return_keys=True)),
        ):
            report_memory(name, dataset, args.epochs)
        photos = args.photos or folder
        report_workers(photos, args.rounds, use_captions=args.photos is None)


def draw_pictures(folder: Path, count: int) -> None:
    """Blobs of colour with noise: pictures that compress about as photographs do."""
    rng = random.Random(0)
    for index in range(count):
        directory = folder / f"{index // 1000:03}"
        directory.mkdir(parents=True, exist_ok=True)
        small = Image.frombytes("RGB", (12, 9), rng.randbytes(12 * 9 * 3))
        path = directory / f"{index:06}.jpg"
        small.resize((128, 96), Image.Resampling.BICUBIC).save(path, quality=90)
        path.with_suffix(".txt").write_text(f"picture number {index}\nsome blobs of colour")


def pack(folder: Path, shards: Path) -> None:
    shards.mkdir()
    for directory in sorted(folder.iterdir()):
        with tarfile.open(shards / f"{directory.name}.tar", "w") as tar:
            for path in sorted(directory.iterdir()):
                data = path.read_bytes()
                member = tarfile.TarInfo(path.name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def report_memory(name: str, dataset, epochs: int) -> None:
    loader = make_dataloader(dataset, 16, seed=0, num_workers=2, device="cpu")
    sizes = []
    for epoch in range(epochs):
        loader.set_epoch(epoch)
        samples = sum(len(batch[0]) for batch in loader)
        sizes.append(memory())
        print(f"{name}: epoch {epoch}, {samples} samples, {sizes[-1] / MIB:.0f} MiB", flush=True)
    print(f"{name}: growth after the first epoch {(sizes[-1] - sizes[0]) / MIB:+.1f} MiB")


def memory() -> int:
    """Bytes of this process and its workers, what they share counted once (Linux)."""
    total = 0
    for pid in ("self", *(child.pid for child in multiprocessing.active_children())):
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total * 1024


def report_workers(folder: Path, rounds: int, use_captions: bool) -> None:
    dataset = TextImageDataset(folder, use_captions=use_captions)
    if len(dataset) < 1000:  # else an epoch is little more than its start
        dataset = dataset.subset([i % len(dataset) for i in range(1000)])
    loaders = {
        workers: make_dataloader(dataset, 16, seed=0, num_workers=workers, device="cpu")
        for workers in (1, 2)
    }
    speeds: dict[int, list[float]] = {workers: [] for workers in loaders}
    for loader in loaders.values():
        next(iter(loader))  # starts the workers
    for _ in range(rounds):
        for workers, loader in loaders.items():
            started, samples = time.perf_counter(), 0
            for batch in loader:
                samples += len(batch[0])
                if time.perf_counter() - started > 10:
                    break
            speeds[workers].append(samples / (time.perf_counter() - started))
    one, two = (statistics.median(speeds[workers]) for workers in (1, 2))
    print(f"one worker {one:.0f} images/s, two {two:.0f}: {two / one:.2f} times")


if __name__ == "__main__":
    main()
