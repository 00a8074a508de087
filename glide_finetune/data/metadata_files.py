"""Captions from metadata.jsonl and metadata.csv, by the ImageFolder convention."""

import codecs
import contextlib
import csv
import posixpath
from array import array
from collections.abc import Iterable, Iterator, Mapping
from copy import copy
from pathlib import Path
from typing import BinaryIO, NamedTuple

from glide_finetune.data.bad_samples import BadSample
from glide_finetune.data.captions import decode_caption, is_visible, single_spaced
from glide_finetune.data.metadata import parse_metadata
from glide_finetune.data.regular_files import open_regular

METADATA_NAMES = ("metadata.jsonl", "metadata.csv")
CAPTION_FIELDS = ("text", "caption")  # the first that is not blank counts

MAX_LINE_BYTES = 2**20  # of a longer one only the start is looked at


class Row(NamedTuple):
    """What a metadata file says of an image."""

    image: str  # its path within the data folder
    captions: list[str]  # at least one, each in one line


class PlacedRow(NamedTuple):
    """A row, or what is wrong with it, and where it begins."""

    line: int  # counted from 1
    offset: int  # in bytes
    row: Row | BadSample


class MetadataFile:
    """A metadata.jsonl or metadata.csv in a data folder or one of its sub-folders.

    Its rows have the fields `file_name`, relative to the file's own folder, and `text` or
    `caption`, which in JSON may be a list of several.

    name: its path within the data folder. Raises BadSample if it cannot be read or, of a .csv, if
    the first line does not name these fields.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.path, self.name = folder / name, name
        self._prefix = posixpath.dirname(name)
        self._columns: list[str] = []
        self._first = (1, 0)  # the line and the offset of the first row
        with self._opened() as lines:
            if name.endswith(".csv"):
                with contextlib.suppress(csv.Error):  # NUL bytes, up to Python 3.10
                    self._columns = next(_csv_reader(lines), [])
                if "file_name" not in self._columns:
                    raise BadSample("its first line names no column file_name", "metadata")
                self._first = (lines.number, lines.offset)

    def rows(self) -> Iterator[PlacedRow]:
        """All of its rows; blank lines are none. Raises BadSample when reading fails."""
        with self._opened(*self._first) as lines:
            yield from self._rows(lines)

    def captions(self, image: str, offset: int) -> list[str]:
        """The captions of an image, from its row at this offset. Raises BadSample if it is gone."""
        with self._opened(1, offset) as lines:
            found = next(self._rows(lines), None)
        if not found or not isinstance(found.row, Row) or found.row.image != image:
            raise BadSample(f"{self.path} has changed since it was indexed", "metadata")
        return found.row.captions

    @contextlib.contextmanager
    def _opened(self, number: int = 1, offset: int = 0) -> Iterator["_Lines"]:
        try:
            with open_regular(self.path) as file:
                file.seek(offset)
                yield _Lines(file, number, offset)
        except OSError as error:
            raise BadSample(f"{self.path} cannot be read: {error.strerror}", "metadata") from error

    def _rows(self, lines: "_Lines") -> Iterator[PlacedRow]:
        reader = _csv_reader(lines)
        while True:
            line, offset = lines.number, lines.offset
            try:
                fields = self._csv_fields(reader, lines) if self._columns else _json_fields(lines)
                if fields is not None:
                    yield PlacedRow(line, offset, self._row(fields))
            except StopIteration:
                return
            except BadSample as error:
                yield PlacedRow(line, offset, error)
                if isinstance(error, _BrokenRow):  # whose other lines may well be rows
                    lines.go_to(line, offset)
                    next(lines, None)
                    reader = _csv_reader(lines)

    def _csv_fields(self, reader: Iterator[list[str]], lines: "_Lines") -> Mapping | None:
        first = lines.number
        try:
            cells = next(reader)
        except csv.Error as error:
            raise _BrokenRow(f"no row of a CSV file: {error}", "metadata") from error
        inner = (line for cell in cells for line in cell.splitlines()[1:])
        if lines.number - first > 1 and any(map(self._is_row, inner)):
            raise _BrokenRow("a quotation mark is not closed, so that it holds rows", "metadata")
        return dict(zip(self._columns, cells, strict=False)) if cells else None

    def _is_row(self, line: str) -> bool:
        """Whether a line, here of a caption, names a file that is there where rows name theirs."""
        with contextlib.suppress(csv.Error, OSError, ValueError):
            cells = next(csv.reader([line]), [])
            name = dict(zip(self._columns, cells, strict=False)).get("file_name")
            return bool(name) and (self.path.parent / name).is_file()
        return False

    def _row(self, fields: Mapping) -> Row:
        name = fields.get("file_name")
        if not isinstance(name, str) or not name:
            raise BadSample("no file_name", "metadata")
        image = posixpath.normpath(posixpath.join(self._prefix, name))
        if image.startswith(("../", "/")):
            raise BadSample(f"{name} lies outside of the data folder", "metadata")
        for field in CAPTION_FIELDS:
            if captions := _captions(fields.get(field)):
                return Row(image, captions)
        raise BadSample(f"{name} has no {' or '.join(CAPTION_FIELDS)}", "metadata")


def _json_fields(lines: "_Lines") -> Mapping | None:
    line = next(lines)
    return parse_metadata(line) if line.strip() else None


def _captions(value: object) -> list[str]:
    """Those in a field; line breaks in them are no more than spaces."""
    texts = value if isinstance(value, list) else [value]
    # Encoded, as lone surrogates in JSON, and in CSV bytes that are not UTF-8, become bad captions.
    texts = [decode_caption(t.encode("utf-8", "surrogatepass")) for t in texts if _is_text(t)]
    return [single_spaced(text) for text in texts if is_visible(text)]


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


class _BrokenRow(BadSample):
    """Lines of a CSV file that are no row."""


class _Lines:
    """The lines of a file; `number` and `offset` are those of the next one."""

    def __init__(self, file: BinaryIO, number: int, offset: int) -> None:
        self._file, self.number, self.offset = file, number, offset

    def go_to(self, number: int, offset: int) -> None:
        """Have the line at this place come next."""
        self._file.seek(offset)
        self.number, self.offset = number, offset

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> bytes:
        line = part = self._file.readline(MAX_LINE_BYTES)
        if not line:
            raise StopIteration
        is_first = self.offset == 0
        self.number += 1
        self.offset += len(line)
        while len(part) == MAX_LINE_BYTES and not part.endswith(b"\n"):
            part = self._file.readline(MAX_LINE_BYTES)
            self.offset += len(part)
        return line.removeprefix(codecs.BOM_UTF8) if is_first else line


def _csv_reader(lines: _Lines) -> Iterator[list[str]]:
    return csv.reader(line.decode("utf-8", "surrogateescape") for line in lines)


class MetadataCaptions:
    """Which rows of metadata files belong to which image; their captions stay in the files.

    Images are numbers below `images`.
    """

    def __init__(self, images: int) -> None:
        self._files: list[MetadataFile] = []
        self._rows = array("q")  # of each row its file, its offset and the image's row before it
        self._last_row = array("q", [-1]) * images  # -1 is none

    def add(self, image: int, file: MetadataFile, offset: int) -> None:
        """Give an image one more row; rows of a file come after one another."""
        if not self._files or self._files[-1] is not file:
            self._files.append(file)
        row = len(self._rows)
        self._rows.extend((len(self._files) - 1, offset, self._last_row[image]))
        self._last_row[image] = row

    def files(self) -> Iterator[str]:
        """The paths within the data folder of the files that have rows of images."""
        return (file.name for file in self._files)

    def __contains__(self, image: int) -> bool:
        return self._last_row[image] >= 0

    def read(self, image: int, path: str) -> list[str]:
        """All captions of an image, whose path is given too; none if it has no row.

        Raises BadSample if a metadata file has changed.
        """
        captions, row = [], self._last_row[image]
        while row >= 0:
            file, offset, row = self._rows[row : row + 3]
            captions[:0] = self._files[file].captions(path, offset)
        return captions

    def take(self, images: Iterable[int]) -> "MetadataCaptions":
        """The same of these images, numbered anew."""
        taken = copy(self)
        taken._last_row = array("q", (self._last_row[image] for image in images))
        return taken
