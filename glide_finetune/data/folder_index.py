"""Finding the images of a folder and their captions, without reading any of them."""

import logging
import os
import sys
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from glide_finetune.data.bad_samples import KINDS, BadSample, Skipped, describe_counts, in_one_line
from glide_finetune.data.captions import read_captions
from glide_finetune.data.metadata_files import METADATA_NAMES, MetadataCaptions, MetadataFile, Row
from glide_finetune.data.path_list import PathFinder, PathList

logger = logging.getLogger(__name__)

# fmt: off
IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".jfif", ".avif", ".jp2",
)
# fmt: on
CAPTION_SUFFIXES = (".txt", ".caption")  # the first one there counts

MAX_NAMED = 100  # of what the index leaves out; the rest is only counted


class LeftOut:
    """What an index leaves out because it cannot be used; the first of it is named in the log.

    counts: how much of each kind, as in `BadSample` or "folder". named: the first `MAX_NAMED`.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.named: list[Skipped] = []

    def add(self, name: str, kind: str, reason: str) -> None:
        self.counts[kind] += 1
        if len(self.named) < MAX_NAMED:
            self.named.append(Skipped(in_one_line(name), kind, reason))
            logger.warning("skipped %s: %s", self.named[-1].name, reason)


@dataclass
class FolderIndex:
    """The images of a folder.

    images: their paths relative to the folder, sorted.
    without_caption: number of images left out because they have no caption.
    left_out: what else is left out: what is named like an image and is no file, rows of metadata,
        sub-folders.
    """

    folder: Path
    images: PathList
    without_caption: int
    left_out: LeftOut
    _caption_suffixes: list[str]  # in all spellings found; the first is "", for no caption file
    _caption_files: bytes  # of each image the place of its caption file's suffix among these
    _metadata: MetadataCaptions

    def read_captions(self, image: int) -> list[str]:
        """Those of the image at this place, at least one; none if captions are not used.

        A caption file beside the image is more specific than metadata and counts alone. Raises
        BadSample if they cannot be read.
        """
        if caption_file := self._caption_file(image):
            return read_captions(os.path.join(self.folder, caption_file))
        return self._metadata.read(image, self.images[image])

    def files(self) -> Iterator[str]:
        """The paths within the folder of all that samples are made from: images, their caption
        files, and those of metadata."""
        for image, path in enumerate(self.images):
            yield path
            if caption_file := self._caption_file(image):
                yield caption_file
        yield from self._metadata.files()

    def metrics(self) -> Counter[str]:
        """How much was left out when the files were listed, by the names of `Tally.metrics`."""
        counts = Counter({f"skipped_{kind}": count for kind, count in self.left_out.counts.items()})
        counts["filtered_no_caption"] = self.without_caption
        return +counts

    def subset(self, images: Iterable[int]) -> "FolderIndex":
        """The same of the images at these places only."""
        images = array("q", images)
        return replace(
            self,
            images=self.images.take(images),
            _caption_files=bytes(self._caption_files[image] for image in images),
            _metadata=self._metadata.take(images),
        )

    def same_stem(self, limit: int = 100) -> tuple[int, list[tuple[str, ...]]]:
        """Images that share a caption file, such as cat.jpg and cat.png, which share cat.txt.

        How many caption files that concerns, and the images of the first `limit` of these.
        """
        import numpy as np  # here, as settings are checked without it

        with_file = [image for image, suffix in enumerate(self._caption_files) if suffix]
        # First by hashes, since a dict of all the names would take much memory.
        hashes = (hash(self._caption_file(image)) for image in with_file)
        values, counts = np.unique(np.fromiter(hashes, np.int64), return_counts=True)
        shared = set(values[counts > 1].tolist())
        groups: dict[str, list[str]] = {}
        for image in with_file if shared else ():
            name = self._caption_file(image)
            if hash(name) in shared and (name in groups or len(groups) < limit):
                groups.setdefault(name, []).append(self.images[image])
        return len(shared), [tuple(group) for group in groups.values()]

    def _caption_file(self, image: int) -> str | None:
        suffix = self._caption_suffixes[self._caption_files[image]]
        return os.path.splitext(self.images[image])[0] + suffix if suffix else None

    def _add_metadata(self, names: list[str]) -> None:
        """Take in the rows of metadata files."""
        finder = PathFinder(self.images)
        for name in names:
            try:
                self._add_rows(MetadataFile(self.folder, name), finder)
            except BadSample as error:
                self.left_out.add(str(self.folder / name), "metadata", str(error))

    def _add_rows(self, file: MetadataFile, finder: PathFinder) -> None:
        for line, offset, row in file.rows():
            if isinstance(row, BadSample):
                reason, image = str(row), None
            else:
                reason, image = f"there is no image {row.image}", finder.find(row.image)
            if image is None:
                self.left_out.add(f"{file.path} line {line}", "metadata", reason)
            elif not self._caption_files[image]:
                self._metadata.add(image, file, offset)

    def _with_captions(self) -> "FolderIndex":
        """Those images that have any."""
        captioned = array("q", (i for i in range(len(self.images)) if self._has_caption(i)))
        without_caption = len(self.images) - len(captioned)
        if not without_caption:
            return self
        return replace(self.subset(captioned), without_caption=without_caption)

    def _has_caption(self, image: int) -> bool:
        return bool(self._caption_files[image]) or image in self._metadata


def index_folder(folder: str | os.PathLike, use_captions: bool) -> FolderIndex:
    """All images in a folder and its sub-folders, in any case of the suffix; hidden ones are not.

    With `use_captions` only those with a caption: in a .txt or .caption file of the same name
    beside them, or in a metadata.jsonl or metadata.csv (`MetadataFile`) of their folder or one
    above. Symbolic links are followed, each folder once. What is left out is logged. Raises
    ValueError when the folder is missing or nothing is found.
    """
    root = _existing(folder)
    left_out = LeftOut()
    images, caption_files, codes = PathList(), bytearray(), {"": 0}
    metadata_files: list[str] = []
    for path, suffix in _walk(root, metadata_files, left_out.add):
        images.append(path)
        caption_files.append(codes.setdefault(suffix, len(codes)) if use_captions else 0)
    index = FolderIndex(
        folder=root,
        images=images,
        without_caption=0,
        left_out=left_out,
        _caption_suffixes=list(codes),
        _caption_files=bytes(caption_files),
        _metadata=MetadataCaptions(len(images)),
    )
    if use_captions:
        if metadata_files:
            index._add_metadata(sorted(metadata_files))
        index = index._with_captions()
    if left_out.counts.total() > MAX_NAMED:
        counts = {KINDS[kind]: count for kind, count in left_out.counts.items()}
        logger.warning("skipped in all in %s: %s", folder, describe_counts(counts))
    if not index.images:
        raise _nothing_found(folder, index.without_caption)
    if index.without_caption:
        logger.warning(
            "%d of %d images in %s have no caption and are left out",
            index.without_caption,
            len(images),
            folder,
        )
    return index


def check_folder(folder: str | os.PathLike, use_captions: bool) -> None:
    """Raise the ValueError that `index_folder` would; stops at the first image that is usable.

    Nothing is logged, as `index_folder` will do that.
    """
    root = _existing(folder)
    images, seen, waiting = 0, set(), [""]
    faults: list[str] = []
    while waiting:
        prefix = waiting.pop()
        if use_captions and _metadata_names_image(root, prefix, faults):
            return
        uncaptioned, captions = set(), set()
        for kind, name in _scan(root, prefix, seen, lambda *_: None):
            stem = os.path.splitext(name)[0]
            if kind == "folder":
                waiting.append(f"{prefix}{name}/")
            elif kind == "image":
                if not use_captions or stem in captions:
                    return
                uncaptioned.add(stem)
                images += 1
            elif kind == "caption":
                if stem in uncaptioned:
                    return
                captions.add(stem)
    raise _nothing_found(folder, images, faults)


def _metadata_names_image(root: Path, prefix: str, faults: list[str]) -> bool:
    """Whether a metadata file does; the first fault of those that do not is put into `faults`."""
    for name in METADATA_NAMES:
        if not os.path.exists(root / prefix / name):
            continue
        fault = ""
        try:
            for placed in MetadataFile(root, prefix + name).rows():
                if not isinstance(placed.row, Row):
                    fault = fault or f"{prefix}{name}, line {placed.line}: {placed.row}"
                elif _kind(placed.row.image) == "image" and os.path.isfile(root / placed.row.image):
                    return True
                else:
                    fault = fault or (
                        f"{prefix}{name}, line {placed.line}: there is no image {placed.row.image}"
                    )
        except BadSample as error:
            fault = f"{prefix}{name}: {error}"
        if fault and not faults:
            faults.append(fault)
    return False


def _existing(folder: str | os.PathLike) -> Path:
    root = Path(folder).expanduser()
    if not root.is_dir():
        what = "is a file, not a folder" if root.exists() else "does not exist"
        raise ValueError(f"the data folder {folder} {what}")
    return root


def _nothing_found(
    folder: str | os.PathLike, without_caption: int, faults: Sequence[str] = ()
) -> ValueError:
    if without_caption and faults:
        return ValueError(
            f"no captions in {folder} for any of {without_caption} images; {faults[0]}"
            " (--no-use_captions trains without)"
        )
    if without_caption:
        return ValueError(
            f"no captions in {folder}: none of its {without_caption} images has a "
            f"{' or '.join(CAPTION_SUFFIXES)} file of the same name beside it, or a row in "
            f"{' or '.join(METADATA_NAMES)} (--no-use_captions trains without)"
        )
    suffixes = " ".join(IMAGE_SUFFIXES)
    return ValueError(f"no images in {folder} or its sub-folders (looked for {suffixes})")


_KINDS = {
    **dict.fromkeys(IMAGE_SUFFIXES, "image"),
    **dict.fromkeys(CAPTION_SUFFIXES, "caption"),
}


def _kind(name: str) -> str | None:
    """What a file is by its name: image, caption, metadata or nothing of interest."""
    if name in METADATA_NAMES:
        return "metadata"
    return _KINDS.get(name[name.rfind(".") :].lower())


Note = Callable[[str, str, str], None]  # as `LeftOut.add`


def _walk(root: Path, metadata_files: list[str], note: Note) -> Iterator[tuple[str, str]]:
    """Each image and the suffix of its caption file, "" if it has none, sorted by path.

    `metadata_files` is filled on the way. Only one folder after the other is held in memory.
    """
    seen = set()
    listings = [_list(root, "", seen, metadata_files, note)]
    while listings:
        prefix, names, captions = listings[-1]
        for name in names:
            if name.endswith("/"):
                listings.append(_list(root, prefix + name, seen, metadata_files, note))
                break
            yield prefix + name, captions.get(os.path.splitext(name)[0], "")
        else:
            listings.pop()


def _list(
    root: Path, prefix: str, seen: set, metadata_files: list[str], note: Note
) -> tuple[str, Iterator[str], dict[str, str]]:
    """(prefix, the images and folders in it, the suffixes of caption files by their stems).

    Folders end in "/", which puts what is in them at its place in the order of paths.
    """
    names, captions = [], {}
    for kind, name in _scan(root, prefix, seen, note):
        if kind == "image":
            names.append(name)
        elif kind == "folder":
            names.append(name + "/")
        elif kind == "metadata":
            metadata_files.append(prefix + name)
        else:
            stem, suffix = os.path.splitext(name)
            captions[stem] = min(captions.get(stem, suffix), sys.intern(suffix), key=_precedence)
    names.sort()
    return prefix, iter(names), captions


def _precedence(caption_suffix: str) -> tuple[int, str]:
    return CAPTION_SUFFIXES.index(caption_suffix.lower()), caption_suffix


def _scan(root: Path, prefix: str, seen: set, note: Note) -> Iterator[tuple[str, str]]:
    """(kind, name) of what is of interest in a folder, as it comes; kinds are as of `_kind`, and
    folder. Nothing if the folder is among those `seen`, by another way.
    """
    path = os.path.join(root, prefix)
    try:
        status = os.stat(path)
        if (status.st_dev, status.st_ino) in seen:
            return
        seen.add((status.st_dev, status.st_ino))
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                kind = _kind(entry.name)
                if kind == "image" and not _ask(entry.is_file):
                    note(entry.path, "image", _why_no_file(entry))
                elif kind:
                    yield kind, entry.name
                if _ask(entry.is_dir):
                    yield "folder", entry.name
    except OSError as error:
        note(path, "folder", f"the folder cannot be listed: {error.strerror}")


def _ask(question: Callable[[], bool]) -> bool:
    try:
        return question()
    except OSError:  # such as a link that leads to itself
        return False


def _why_no_file(entry: os.DirEntry) -> str:
    if _ask(entry.is_dir):
        return "a folder, not an image"
    try:
        os.stat(entry.path)
    except OSError as error:
        return f"a link that leads nowhere: {error.strerror}"
    return "not a regular file"
