"""The released checkpoints: fetched once into a cache folder, then read from there."""

import logging
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import platformdirs
from filelock import FileLock, Timeout

from glide_text2im.transfer import TransferError, transfer

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

_RELEASE = "https://openaipublic.blob.core.windows.net/diffusion/dec-2021/"

MODEL_PATHS: dict[str, str] = {
    "base": _RELEASE + "base.pt",
    "upsample": _RELEASE + "upsample.pt",
    "base-inpaint": _RELEASE + "base_inpaint.pt",
    "upsample-inpaint": _RELEASE + "upsample_inpaint.pt",
    "clip/image-enc": _RELEASE + "clip_image_enc.pt",
    "clip/text-enc": _RELEASE + "clip_text_enc.pt",
}


class DownloadError(RuntimeError):
    """A file could not be downloaded; the message says why and where to put it."""


def default_cache_dir() -> Path:
    """The folder for downloads, which may not exist yet.

    It is the environment variable GLIDE_CACHE_DIR, else `./glide_model_cache` where that exists,
    else a folder in the user's cache.
    """
    if folder := os.environ.get("GLIDE_CACHE_DIR"):
        return Path(folder).expanduser()
    if (folder := Path.cwd() / "glide_model_cache").is_dir():
        return folder
    return platformdirs.user_cache_path("glide-text2im", appauthor=False)


def fetch_file_cached(
    url: str,
    progress: bool = True,
    cache_dir: str | os.PathLike | None = None,
    chunk_size: int = 4096,
) -> Path:
    """The path of the file at `url` in the cache folder; downloaded first if it is not there.

    A download that broke off is continued by the next call, and processes that ask for the same
    file at the same time download it once. `progress` shows a bar; `chunk_size` is in bytes.
    Raises DownloadError.
    """
    folder = default_cache_dir() if cache_dir is None else Path(cache_dir)
    target = folder / PurePosixPath(urlsplit(url).path).name
    if target.exists():
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(target):
            if not target.exists():  # another process may have fetched it in the meantime
                transfer(url, target, progress=progress, chunk_size=chunk_size)
    except (TransferError, OSError) as error:
        other_folder = ", or into a folder that GLIDE_CACHE_DIR names" if cache_dir is None else ""
        raise DownloadError(
            f"cannot download {url}: {error}. Put the file into {folder.absolute()} as "
            f"{target.name}{other_folder}"
        ) from error
    return target


def load_checkpoint(
    checkpoint_name: str,
    device: "torch.device | str",
    progress: bool = True,
    cache_dir: str | os.PathLike | None = None,
    chunk_size: int = 4096,
) -> "dict[str, torch.Tensor]":
    """The state dict of a released model, a key of MODEL_PATHS, on `device`.

    On the CPU its tensors are mapped from the file where that is possible, so they cost no memory
    until they are read. Raises ValueError for an unknown name or a file that holds no weights,
    OSError for one that cannot be opened, DownloadError.
    """
    import torch  # here, since fetching files needs no torch

    if checkpoint_name not in MODEL_PATHS:
        raise ValueError(
            f"unknown checkpoint {checkpoint_name!r}; there are {', '.join(MODEL_PATHS)}"
        )
    path = fetch_file_cached(MODEL_PATHS[checkpoint_name], progress, cache_dir, chunk_size)
    try:
        weights = torch.load(
            path,
            map_location="cpu",
            weights_only=True,
            mmap=zipfile.is_zipfile(path),  # torch's old format cannot be mapped
        )
    except OSError:
        raise
    except Exception as error:  # a damaged file can fail anywhere in the unpickler
        raise _damaged(path, str(error).partition("\n")[0]) from error
    if not isinstance(weights, dict) or not all(map(torch.is_tensor, weights.values())):
        raise _damaged(path, "it holds something else than named tensors")
    return {name: tensor.to(device) for name, tensor in weights.items()}


def _damaged(path: Path, reason: str) -> ValueError:
    return ValueError(
        f"{path} is damaged or no checkpoint, delete it to download it again ({reason})"
    )


@contextmanager
def _locked(target: Path) -> Iterator[None]:
    """Holds the lock on the download of a file; says so if it has to wait for another process."""
    lock = FileLock(f"{target}.lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        logger.warning("waiting for another process that downloads %s", target)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
