"""What tells one data set from another, wherever it lies."""

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from glide_finetune.data.shards import shard_names


def of_folder(keys: Iterable[str]) -> str:
    """Of the images of a folder, by their paths in it: hexadecimal SHA-256."""
    return _of_names(keys)


def of_shards(shards: Sequence[str]) -> str:
    """Of shards, by their names, and by the sizes of those that are files: hexadecimal SHA-256."""
    return _of_names(
        f"{name} {os.path.getsize(shard) if os.path.isfile(shard) else ''}"
        for shard, name in shard_names(shards).items()
    )


def of_files(folder: Path, names: Iterable[str]) -> str:
    """Of files, by their paths in a folder and their sizes: hexadecimal SHA-256."""
    return _of_names(f"{name} {_size(folder / name)}" for name in names)


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:  # such as a file that has been removed since
        return None


def _of_names(names: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for name in names:
        digest.update(os.fsencode(name) + b"\0")
    return digest.hexdigest()
