"""From what a user types for WebDataset shards to the list of them; without torch."""

import glob
import logging
import os
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from braceexpand import braceexpand

logger = logging.getLogger(__name__)

SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz")

# Those that can be opened, all but http(s) by the tools that webdataset starts for them.
URL_SCHEMES = ("http", "https", "gs", "htgs", "hf", "ais", "sftp", "ftps", "scp")

Urls = str | os.PathLike | Iterable[str | os.PathLike]


def is_remote(url: str) -> bool:
    """Whether it is a URL or a `pipe:` command rather than a path."""
    return url.startswith("pipe:") or "://" in url


def expand_shards(urls: Urls) -> list[str]:
    """The shards meant by a file, folder, glob, brace pattern or URL, or by several of them.

    A folder stands for the shards in it and its sub-folders, by name, hidden ones left out;
    `shard-{0000..0099}.tar` for a hundred of them; a text file for what its lines name, one of all
    these each, from the folder of that file on (blank lines and lines that begin with # say
    nothing; no `pipe:` commands, since these are run only when they are typed). URLs and commands
    only have their braces expanded. Each shard comes once.

    Raises ValueError for local files that do not exist, folders and globs without shards, and URLs
    of an unknown kind.
    """
    entries = [urls] if isinstance(urls, str | os.PathLike) else list(urls)
    if not entries:
        raise ValueError("no shards: the list of them is empty")
    shards = [shard for entry in entries for shard in _expand(os.fspath(entry))]
    return list(dict.fromkeys(shards))


def shard_names(shards: Iterable[str]) -> dict[str, str]:
    """A short name for each of some different shards: its file name, with as many of the folders
    above it as it takes to tell them all apart."""
    parts = {shard: shard.split("/") for shard in shards}
    for depth in range(1, max(map(len, parts.values()), default=0) + 1):
        names = {shard: "/".join(parts[shard][-depth:]) for shard in parts}
        if len(set(names.values())) == len(names):
            return names
    return {shard: shard for shard in parts}


def _expand(entry: str) -> list[str]:
    if is_remote(entry):
        scheme = entry.partition("://")[0]
        if not entry.startswith("pipe:") and scheme.lower() not in URL_SCHEMES:
            raise ValueError(
                f"cannot read {entry}: {scheme}:// is unknown, give a path, an http(s) URL, or a "
                "command that prints the shard as pipe:COMMAND"
            )
        return _brace_expand(entry)
    path = Path(entry).expanduser()
    if path.is_file():
        return [str(path)] if _is_shard(path) else list(_listed(path))
    if path.is_dir():
        return _in_folder(path)
    names = _brace_expand(str(path))
    if names != [str(path)]:
        return [shard for name in names for shard in _expand(name)]
    matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
    found = [shard for match in matches if match.is_dir() for shard in _in_folder(match)]
    found += [str(match) for match in matches if match.is_file() and is_named_as_shard(match)]
    if not found:
        what = "no shard matches" if matches else "there is no such file or folder"
        raise ValueError(f"no shard {entry}: {what}")
    return found


def _brace_expand(text: str) -> list[str]:
    try:
        return list(braceexpand(text, escape=False))
    except ValueError as error:
        raise ValueError(f"cannot make out the shards {text}: {error}") from None


def is_named_as_shard(path: Path) -> bool:
    """Whether a file is a shard by its name, in any case of its suffix."""
    return path.name.lower().endswith(SHARD_SUFFIXES)


def _in_folder(folder: Path) -> list[str]:
    """As images are found: links are followed, each folder once, and what is hidden is not seen."""
    found, seen, waiting = [], set(), [folder]
    while waiting:
        here = waiting.pop()
        try:
            status, paths = here.stat(), list(here.iterdir())
        except OSError as error:
            logger.warning("the folder %s cannot be listed: %s", here, error.strerror)
            continue
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        for path in paths:
            if path.name.startswith("."):
                continue
            if path.is_dir():
                waiting.append(path)
            elif is_named_as_shard(path) and path.is_file():
                found.append(str(path))
    if not found:
        raise ValueError(f"no shards in {folder} (looked for *{' *'.join(SHARD_SUFFIXES)})")
    return sorted(found)


def _is_shard(path: Path) -> bool:
    """Whether a file is to be read as a shard; those of other names are shards if they are tars."""
    if is_named_as_shard(path):
        return True
    try:
        return tarfile.is_tarfile(path)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None


def _listed(path: Path) -> Iterator[str]:
    """The shards that the lines of a text file name."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{path} is neither a tar file nor a text file that lists some") from None
    entries = [line.strip() for line in lines]
    entries = [entry for entry in entries if entry and not entry.startswith("#")]
    if not entries:
        raise ValueError(f"{path} lists no shards")
    for entry in entries:
        if entry.startswith("pipe:"):
            raise ValueError(f"{path} lists the command {entry}: commands are run only when typed")
        if not is_remote(entry):
            entry = str(path.parent / Path(entry).expanduser())
            if os.path.isfile(entry) and not _is_shard(Path(entry)):
                raise ValueError(f"{path} lists {entry}, which is no tar file")
        yield from _expand(entry)
