"""One file over HTTP: resumed where it broke off, and never half there under its final name."""

import json
import logging
import os
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import requests
from tqdm import tqdm

logger = logging.getLogger(__name__)

# Seconds before each further attempt since bytes last arrived.
_RETRY_DELAYS = (1.0, 2.0, 4.0)
# Seconds without a connection, and without a byte, after which an attempt has failed.
_TIMEOUTS = (10.0, 60.0)
# Statuses of a server that may answer better a moment later.
_PASSING_STATUSES = {408, 429, 500, 502, 503, 504}


class TransferError(Exception):
    """A file could not be fetched; the message is the reason, in one line."""


class _BrokenOff(Exception):
    """An attempt failed in a way that the next one may not."""


@dataclass(frozen=True)
class _Version:
    """Which bytes a URL stands for, as the server told: they may change between two attempts."""

    url: str
    size: int | None
    validator: str | None  # an ETag or a date, as HTTP's If-Range wants it

    @classmethod
    def of(cls, url: str, response: requests.Response) -> "_Version":
        length, validator = (response.headers.get(name) for name in ("Content-Length", "ETag"))
        if response.status_code == 206:
            size = _content_range(response)[1]
        else:
            size = int(length) if length and length.isdecimal() else None
        if validator is None or validator.startswith("W/"):  # a weak tag allows unequal bytes
            validator = response.headers.get("Last-Modified")
        return cls(url, size, validator)


class _Part:
    """What has arrived of a file so far: its bytes, and beside them the version they belong to."""

    def __init__(self, target: Path) -> None:
        self.target = target
        self.path = target.with_name(f"{target.name}.part")
        self._version_path = target.with_name(f"{target.name}.part.json")

    @property
    def size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def version(self, url: str) -> _Version | None:
        """The version of the bytes; None if they cannot be continued from this URL."""
        try:
            version = _Version(**json.loads(self._version_path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None
        known = version.url == url and version.validator and version.size
        return version if known and 0 < self.size <= version.size else None

    def restart(self, version: _Version) -> None:
        self.path.write_bytes(b"")  # first: new bytes must never stand beside an old version
        self._version_path.write_text(json.dumps(asdict(version)), encoding="utf-8")

    def discard(self) -> None:
        self.path.unlink(missing_ok=True)
        self._version_path.unlink(missing_ok=True)

    def finish(self) -> None:
        with self.path.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(self.path, self.target)
        self.discard()


def transfer(url: str, target: Path, *, progress: bool, chunk_size: int) -> None:
    """Download `url` to the path `target`, whose folder exists, with an optional progress bar.

    A broken connection is taken up again where it broke off, after growing pauses and as long as
    bytes arrive now and then. What arrived before a failure stays beside `target` and is continued
    by the next call, if the server's file is still the same. Only one process may do this for a
    target at a time. Raises TransferError.
    """
    part = _Part(target)
    version, furthest, failures = part.version(url), part.size, 0
    try:
        while True:
            try:
                _receive(url, part, progress=progress, chunk_size=chunk_size)
                break
            except _BrokenOff as error:
                if part.version(url) != version:  # which began anew
                    version, furthest = part.version(url), 0
                failures = 1 if part.size > furthest else failures + 1
                furthest = max(furthest, part.size)
                if failures > len(_RETRY_DELAYS):
                    raise TransferError(str(error)) from error
                delay = _RETRY_DELAYS[failures - 1]
                logger.warning("%s: %s; trying again in %g s", target.name, error, delay)
                time.sleep(delay)
        part.finish()
    except OSError as error:
        raise TransferError(f"cannot write {part.path}: {error}") from error


def _receive(url: str, part: _Part, *, progress: bool, chunk_size: int) -> None:
    """One attempt to get what is missing of a file."""
    headers = {"Accept-Encoding": "identity"}  # sizes and ranges are those of the file itself
    known = part.version(url)
    if known:
        if part.size == known.size:
            return
        headers |= {"Range": f"bytes={part.size}-", "If-Range": known.validator}
    try:
        with requests.get(url, headers=headers, stream=True, timeout=_TIMEOUTS) as response:
            version = _accept(url, response, part, known)
            with (
                part.path.open("ab") as file,
                tqdm(
                    desc=part.target.name,
                    initial=part.size,
                    total=version.size,
                    unit="B",
                    unit_scale=True,
                    disable=not progress,
                ) as bar,
            ):
                for chunk in response.iter_content(chunk_size):
                    file.write(chunk)
                    bar.update(len(chunk))
    except (
        requests.ConnectionError,
        requests.Timeout,
        requests.exceptions.ChunkedEncodingError,
    ) as error:
        raise _BrokenOff(_innermost_message(error)) from error
    except requests.RequestException as error:
        raise TransferError(_innermost_message(error)) from error
    if version.size not in (None, part.size):
        raise _BrokenOff(f"only {part.size} of {version.size} bytes arrived")


def _accept(url: str, response: requests.Response, part: _Part, known: _Version | None) -> _Version:
    """The version that a response brings, with `part` ready for the bytes of its body."""
    status = response.status_code
    if status in _PASSING_STATUSES:
        raise _BrokenOff(f"the server answered {status} {response.reason}")
    if status == 416:
        part.discard()
        raise _BrokenOff("the server does not continue the file")
    if status not in (200, 206):
        raise TransferError(f"the server answered {status} {response.reason}")
    if response.headers.get("Content-Type", "").startswith("text/html"):
        raise TransferError("the server answered with a web page instead of the file")
    version = _Version.of(url, response)
    if status == 200:
        part.restart(version)
    elif not _continues(version, response, part, known):
        part.discard()
        raise _BrokenOff("the server continued another file")
    return version


def _continues(
    version: _Version, response: requests.Response, part: _Part, known: _Version | None
) -> bool:
    """Whether a partial response starts where `part` ends, and belongs to the same file."""
    return (
        known is not None
        and version.size == known.size
        and version.validator in (None, known.validator)
        and _content_range(response)[0] == part.size
    )


def _content_range(response: requests.Response) -> tuple[int | None, int | None]:
    """First byte and size of the file, from the header of a partial response."""
    match = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
    return (int(match[1]), int(match[2])) if match else (None, None)


def _innermost_message(error: Exception) -> str:
    """What went wrong, without what requests and urllib3 wrap around it and write before it."""
    first = error.args[0] if error.args else None
    for inner in (getattr(error, "reason", None), first):
        if isinstance(inner, Exception):
            return _innermost_message(inner)
    message = first if isinstance(first, str) else str(error)
    return re.sub(r"^\w+\(host=.*?\): ", "", message)
