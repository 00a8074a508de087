"""From what a user types for WebDataset shards to the list of them, without opening any."""

import glob
import os
from collections.abc import Iterable
from pathlib import Path

from braceexpand import braceexpand

SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz")

Urls = str | os.PathLike | Iterable[str | os.PathLike]


def is_remote(url: str) -> bool:
    """Whether it is a URL or a `pipe:` command rather than a path."""
    return url.startswith("pipe:") or "://" in url


def expand_shards(urls: Urls) -> list[str]:
    """The shards meant by a file, folder, glob, brace pattern or URL, or by several of them.

    A folder stands for the shards in it and its sub-folders, by name; `shard-{0000..0099}.tar` for
    a hundred of them. URLs only have their braces expanded. Each shard comes once. Raises
    ValueError for local files that do not exist and folders and globs without shards.
    """
    entries = [urls] if isinstance(urls, str | os.PathLike) else list(urls)
    if not entries:
        raise ValueError("no shards: the list of them is empty")
    shards = [shard for entry in entries for shard in _expand(os.fspath(entry))]
    return list(dict.fromkeys(shards))


def _expand(entry: str) -> list[str]:
    if is_remote(entry):
        return list(braceexpand(entry))
    path = Path(entry).expanduser()
    if path.is_file():
        return [str(path)]
    if path.is_dir():
        found = [str(p) for p in path.rglob("*") if p.name.endswith(SHARD_SUFFIXES)]
        if not found:
            raise ValueError(f"no shards in {entry} (looked for *{' *'.join(SHARD_SUFFIXES)})")
        return sorted(shard for shard in found if os.path.isfile(shard))
    names = list(braceexpand(str(path)))
    if len(names) > 1:
        return [shard for name in names for shard in _expand(name)]
    found = sorted(glob.glob(str(path), recursive=True))
    if not found:
        raise ValueError(f"no shard {entry}: there is no such file or folder, and nothing matches")
    return found
