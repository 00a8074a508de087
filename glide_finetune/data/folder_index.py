"""Finding the images of a folder and their captions, without reading any of them."""

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


@dataclass
class FolderIndex:
    """Images in a fixed order (by path), as paths relative to the folder.

    captions: the caption file of each image, relative as well; empty if captions are not used.
    without_caption: number of images left out because they have no caption file.
    """

    folder: Path
    images: list[str]
    captions: list[str]
    without_caption: int


def index_folder(folder: str | os.PathLike, use_captions: bool) -> FolderIndex:
    """All images in a folder and its sub-folders, in any case of the suffix; hidden ones are not.

    With `use_captions` only those with a .txt file of the same name beside them. Symbolic links are
    followed, each folder once. Raises ValueError when the folder is missing or nothing is found.
    """
    folder = Path(folder)
    images = list(_images(folder, use_captions))
    found = sorted((image, caption) for image, caption in images if caption is not None)
    without_caption = len(images) - len(found)
    if not found:
        raise _nothing_found(folder, without_caption)
    if without_caption:
        logger.warning(
            "%d of %d images in %s have no caption file and are left out",
            without_caption,
            len(images),
            folder,
        )
    return FolderIndex(
        folder.expanduser(),
        images=[image for image, _ in found],
        captions=[caption for _, caption in found] if use_captions else [],
        without_caption=without_caption,
    )


def check_folder(folder: str | os.PathLike, use_captions: bool) -> None:
    """Raise the ValueError that `index_folder` would; stops at the first image that is usable."""
    without_caption = 0
    for _, caption in _images(Path(folder), use_captions):
        if caption is not None:
            return
        without_caption += 1
    raise _nothing_found(folder, without_caption)


def _nothing_found(folder: str | os.PathLike, without_caption: int) -> ValueError:
    if without_caption:
        return ValueError(
            f"no captions in {folder}: none of its {without_caption} images has a .txt file of the "
            "same name beside it (--no-use_captions trains without)"
        )
    suffixes = " ".join(IMAGE_SUFFIXES)
    return ValueError(f"no images in {folder} or its sub-folders (looked for {suffixes})")


def _images(folder: Path, use_captions: bool) -> Iterator[tuple[str, str | None]]:
    """Each image with its caption file, None where it has none; "" if captions are not used."""
    if not folder.expanduser().is_dir():
        what = "is a file, not a folder" if folder.expanduser().exists() else "does not exist"
        raise ValueError(f"the data folder {folder} {what}")
    for directory, files in _walk(folder.expanduser()):
        texts = {stem: stem + suffix for stem, suffix in files if suffix.lower() == ".txt"}
        for stem, suffix in files:
            if suffix.lower() not in IMAGE_SUFFIXES:
                continue
            caption: str | None = ""
            if use_captions:
                caption = directory + texts[stem] if stem in texts else None
            yield directory + stem + suffix, caption


def _walk(folder: Path) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Each folder once: its relative path ("" or "a/b/"), its files as (stem, suffix)."""
    seen = set()

    def complain(error: OSError) -> None:
        logger.warning("the folder %s is left out: %s", error.filename, error.strerror)

    for path, directories, names in os.walk(folder, onerror=complain, followlinks=True):
        real = os.path.realpath(path)
        if real in seen:  # a second way to it through a symbolic link, perhaps a loop
            directories.clear()
            continue
        seen.add(real)
        directories[:] = sorted(name for name in directories if not name.startswith("."))
        relative = os.path.relpath(path, folder)
        prefix = "" if relative == "." else relative.replace(os.sep, "/") + "/"
        yield prefix, [os.path.splitext(name) for name in names if not name.startswith(".")]
