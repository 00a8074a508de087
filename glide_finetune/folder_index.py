"""Finding the images of a folder and their captions, without reading any of them."""

import logging
import os
from dataclasses import dataclass, field
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
    images: list[str] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    without_caption: int = 0


def index_folder(folder: str | os.PathLike, use_captions: bool) -> FolderIndex:
    """All images in a folder and its sub-folders, in any case of the suffix; hidden ones are not.

    With `use_captions` only those with a .txt file of the same name beside them. Symbolic links are
    followed, each folder once. Raises ValueError when the folder is missing or nothing is found.
    """
    index = FolderIndex(Path(folder).expanduser())
    if not index.folder.is_dir():
        what = "is a file, not a folder" if index.folder.exists() else "does not exist"
        raise ValueError(f"the data folder {folder} {what}")
    found = []
    for directory, files in _walk(index.folder):
        texts = {}
        if use_captions:
            texts = {stem: stem + suffix for stem, suffix in files if suffix.lower() == ".txt"}
        for stem, suffix in files:
            if suffix.lower() not in IMAGE_SUFFIXES:
                continue
            if use_captions and stem not in texts:
                index.without_caption += 1
            else:
                caption = directory + texts[stem] if use_captions else ""
                found.append((directory + stem + suffix, caption))
    if not found:
        if index.without_caption:
            raise ValueError(
                f"no captions in {folder}: none of its {index.without_caption} images has a .txt "
                "file of the same name beside it (--no-use_captions trains without)"
            )
        suffixes = " ".join(IMAGE_SUFFIXES)
        raise ValueError(f"no images in {folder} or its sub-folders (looked for {suffixes})")
    if index.without_caption:
        logger.warning(
            "%d of %d images in %s have no caption file and are left out",
            index.without_caption,
            index.without_caption + len(found),
            folder,
        )
    found.sort()
    index.images = [image for image, _ in found]
    index.captions = [caption for _, caption in found] if use_captions else []
    return index


def _walk(folder: Path):
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


def check_folder(folder: str | os.PathLike, use_captions: bool) -> None:
    """Raise the ValueError that `index_folder` would; stops at the first image that is usable."""
    index_folder(folder, use_captions)
