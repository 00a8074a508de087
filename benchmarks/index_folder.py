"""How long finding the images of a folder and their captions takes, and how much memory it adds.

    uv run python benchmarks/index_folder.py /tmp

Makes a million empty files in the folder, in three ways: images and caption files in a thousand
sub-folders, the same in a single folder, and images with one metadata.jsonl. Measures
`index_folder` and a dict over `Path.rglob` in alternation, each time in a process of its own,
prints the medians, and deletes the files. What the system knows of the files is in memory, as they
were just made.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from glide_finetune.data.folder_index import index_folder

REPETITIONS = 3
FILES_IN_A_FOLDER = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", help="where to put the temporary files")
    parser.add_argument("--files", type=int, default=1_000_000)
    parser.add_argument("--measure", choices=WAYS, help="index the folder itself, in this process")
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(WAYS[args.measure], args.folder)))
        return
    for make in (many_folders, single_folder, with_metadata):
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            make(Path(folder), args.files)
            results = {way: [] for way in WAYS}
            for _ in range(REPETITIONS):
                for way in WAYS:
                    results[way].append(in_own_process(way, folder))
        print(f"{args.files:,} files, {make.__doc__}")
        for way, runs in results.items():
            images, seconds, megabytes = map(statistics.median, zip(*runs, strict=True))
            print(
                f"  {way:12} {seconds:6.2f} s, {args.files / seconds:9,.0f} files/s, "
                f"{megabytes:4.0f} MB added at the peak, {images:,} images"
            )


def many_folders(folder: Path, files: int) -> None:
    """images and caption files, a thousand in each sub-folder"""
    for i in range(files // 2):
        parent = folder / f"{2 * i // FILES_IN_A_FOLDER:05}"
        parent.mkdir(exist_ok=True)
        make_pair(parent, i)


def single_folder(folder: Path, files: int) -> None:
    """images and caption files in a single folder"""
    for i in range(files // 2):
        make_pair(folder, i)


def with_metadata(folder: Path, files: int) -> None:
    """images in a single folder, metadata.jsonl in another order"""
    order = list(range(files))
    for i in order:
        (folder / f"{name(i)}.jpg").touch()
    random.Random(0).shuffle(order)
    with open(folder / "metadata.jsonl", "w") as file:
        for i in order:
            row = {"file_name": f"{name(i)}.jpg", "text": "a caption of some length, " * 4}
            file.write(json.dumps(row) + "\n")


def make_pair(folder: Path, number: int) -> None:
    for suffix in (".jpg", ".txt"):
        (folder / f"{name(number)}{suffix}").touch()


def name(number: int) -> str:
    return f"photograph-{number:09}"


def index(folder: Path) -> object:
    return index_folder(folder, use_captions=True).images


def rglob_and_dict(folder: Path) -> object:
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*")}
    captions: dict[str, object] = {}
    if "metadata.jsonl" in files:
        for line in files["metadata.jsonl"].open():
            row = json.loads(line)
            captions[row["file_name"]] = row["text"]
    for path, file in files.items():
        if file.suffix == ".txt":
            captions[path.removesuffix(".txt") + ".jpg"] = file
    return sorted(path for path in files if path.endswith(".jpg") and path in captions)


WAYS: dict[str, Callable[[Path], object]] = {
    "index_folder": index,
    "rglob, dict": rglob_and_dict,
}


def measure(way: Callable[[Path], object], folder: Path) -> tuple[int, float, float]:
    """(images found, seconds, megabytes added at the peak)"""
    before = memory("VmRSS")
    start = time.perf_counter()
    found = way(folder)
    seconds = time.perf_counter() - start
    return len(found), seconds, memory("VmHWM") - before


def memory(figure: str) -> float:
    """One of this process's figures, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(figure)).split()[1]) / 1e3


def in_own_process(way: str, folder: str) -> tuple[int, float, float]:
    command = [sys.executable, __file__, folder, "--measure", way]
    return tuple(json.loads(subprocess.check_output(command)))


if __name__ == "__main__":
    main()
