"""From a shard to its samples as bytes. Nothing in it is decoded, unpacked to disk or unpickled."""

import contextlib
import hashlib
import logging
import os
import shutil
import subprocess
import tarfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import requests
from requests.adapters import HTTPAdapter
from urllib3 import Retry
from urllib3.exceptions import HTTPError
from webdataset.gopen import gopen
from webdataset.tariterators import base_plus_ext

from glide_finetune.data.bad_samples import in_one_line
from glide_finetune.data.regular_files import open_regular
from glide_finetune.data.shards import is_remote

MAX_MEMBER_BYTES = 2**29  # no image is larger; where a header says so, it is damaged or hostile
_MAX_HEADER_BYTES = 2**20  # of names and attributes that tars keep in members of their own

_RETRIES = Retry(3, backoff_factor=0.1, status_forcelist=(429, 500, 502, 503, 504))
_TIMEOUT_SECONDS = 60
# Of connections that fail it tells each retry, at length; what came of them, DamagedShard tells.
logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
_ENDED_AS_NOBODY_READ_ON = (-13, 128 + 13)  # SIGPIPE, of a command itself and of a shell's


class TarSample(NamedTuple):
    """The neighbouring members of a tar file that have the same name up to its first dot.

    members: their content by the rest of the name in lower case; None for those that were not
        wanted.
    """

    key: str
    members: dict[str, bytes | None]


class DamagedShard(Exception):
    """A shard that cannot be read, or not to its end; its text is the reason in one line."""


def shard_samples(
    shard: str, wanted: Collection[str], cache_path: str | os.PathLike | None = None
) -> Iterator[TarSample]:
    """The samples of a shard, with the content of the members whose suffix is `wanted`.

    What is hidden, is no regular file or has no suffix is passed over. `cache_path` is a folder in
    which shards at URLs are kept. Raises DamagedShard after the last sample that is whole, and
    where a further part of an earlier sample comes up.
    """
    try:
        with _open(shard, cache_path) as stream:
            yield from _samples(stream, wanted)
    except Exception as error:  # whatever tarfile, zlib, the network or a tool comes up with
        raise DamagedShard(_reason(error)) from error


def _samples(stream: BinaryIO, wanted: Collection[str]) -> Iterator[TarSample]:
    sample = None
    places = {suffix: 1 << place for place, suffix in enumerate(wanted)}
    found: dict[int, int] = {}  # by the hash of a key, which of those were there

    def whole(sample: TarSample) -> TarSample:
        here = sum(places.get(suffix, 0) for suffix in sample.members)
        before = found.get(hash(sample.key), 0)
        if here and before and not here & before:
            raise tarfile.ReadError(
                f"the files of sample {sample.key} do not lie next to each other: pack it anew by "
                "name, as tar --sort=name does"
            )
        found[hash(sample.key)] = here | before
        return sample

    with tarfile.open(
        fileobj=stream, mode="r|*", tarinfo=_Member, errors="backslashreplace"
    ) as tar:
        for member in tar:
            tar.members = []  # where it would collect the headers of the whole shard
            key, suffix = base_plus_ext(member.name)
            if key is None or not member.isreg() or _is_hidden(member.name):
                continue
            key, suffix = in_one_line(key.removeprefix("./")), suffix.lower()
            if sample is None or key != sample.key or suffix in sample.members:
                if sample is not None:
                    yield whole(sample)
                sample = TarSample(key, {})
            content = tar.extractfile(member).read() if suffix in wanted else None
            sample.members[suffix] = content
    if sample is not None:
        yield whole(sample)


def _is_hidden(name: str) -> bool:
    """Whether it is what systems put beside the files they pack, as a Mac does for each of them."""
    *folders, base = name.split("/")
    return "__MACOSX" in folders or base.startswith(".")


class _Member(tarfile.TarInfo):
    """A header that raises ReadError where tarfile would take damage for the archive's end, and
    for a size that nobody means and that tarfile would read or pass over at any length."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> tarfile.TarInfo:
        try:
            return super().fromtarfile(tar)._of_possible_size()
        except tarfile.HeaderError as error:
            if tar.offset == 0 or isinstance(error, tarfile.EOFHeaderError):
                raise  # an empty file or none of this kind, which tarfile tells, and the end
            is_cut = isinstance(error, tarfile.EmptyHeaderError | tarfile.TruncatedHeaderError)
            reason = "unexpected end of data" if is_cut else f"{error} in the middle"
            raise tarfile.ReadError(reason) from None

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> tarfile.TarInfo:
        return super().frombuf(buf, encoding, errors)._of_possible_size()

    def _of_possible_size(self) -> tarfile.TarInfo:
        limit = MAX_MEMBER_BYTES if self.isreg() else _MAX_HEADER_BYTES
        if not 0 <= self.size <= limit:
            raise tarfile.ReadError(f"a member of {self.size} bytes")
        return self


def _open(
    shard: str, cache_path: str | os.PathLike | None
) -> contextlib.AbstractContextManager[BinaryIO]:
    if shard.startswith("pipe:"):
        return _command_output(shard.removeprefix("pipe:"))
    if not is_remote(shard):
        return open_regular(shard)
    if cache_path is not None:
        return open(_cached(shard, Path(cache_path)), "rb")
    return _open_url(shard)


def _open_url(url: str) -> contextlib.AbstractContextManager[BinaryIO]:
    return _download(url) if url.startswith(("http://", "https://")) else gopen(url)


@contextlib.contextmanager
def _download(url: str) -> Iterator[BinaryIO]:
    try:
        with requests.Session() as session:
            session.mount("http://", HTTPAdapter(max_retries=_RETRIES))
            session.mount("https://", HTTPAdapter(max_retries=_RETRIES))
            headers = {"Accept-Encoding": "identity"}
            with session.get(url, headers=headers, stream=True, timeout=_TIMEOUT_SECONDS) as answer:
                if not answer.ok:
                    raise OSError(f"the server answered {answer.status_code} {answer.reason}")
                yield answer.raw
    except (requests.RequestException, HTTPError) as error:
        root: BaseException = error  # what these wrap in several layers of names and addresses
        while inner := root.__cause__ or root.__context__:
            root = inner
        raise OSError(_reason(root)) from error


@contextlib.contextmanager
def _command_output(command: str) -> Iterator[BinaryIO]:
    with subprocess.Popen(command, shell=True, stdout=subprocess.PIPE) as process:
        try:
            yield process.stdout
        except tarfile.TarError as error:
            process.stdout.close()
            if process.wait() not in (0, *_ENDED_AS_NOBODY_READ_ON):
                reason = f"the command ended with status {process.returncode}"
                raise OSError(reason) from error
            raise


def _cached(url: str, folder: Path) -> Path:
    """The copy of a shard in `folder`, made first if it is not there."""
    name = url.partition("?")[0].rpartition("/")[2]
    path = folder / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{name}"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            with _open_url(url) as source, open(temporary, "wb") as copy:
                shutil.copyfileobj(source, copy)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    return path


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__
