"""Files that are whole or absent, wherever the process or the machine stops. Needs no torch."""

import contextlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

TEMPORARY_SUFFIX = ".tmp"


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A binary file to write, which appears under `path` only once it is whole and on the disk.

    It is written beside `path` under a temporary name. An exception in the body removes it and
    leaves what was at `path`; a killed process leaves the temporary file, see `remove_temporary`.
    """
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        name_file(error, path)
        raise
    sync_folder(path.parent)


def write_new(paths: Iterable[Path], data: bytes) -> Path:
    """Write `data` under the first of `paths`, all of one folder, that is free, and return that.

    The file appears whole or not at all, and replaces nothing, not even what another process writes
    at the same time. A file system without hard links may keep half a file of a killed process.
    """
    for path in paths:
        temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            try:
                os.link(temporary, path)
            except FileExistsError:
                continue
            except OSError:  # there are no hard links
                if not _wrote_in_place(path, data):
                    continue
            return path
        except OSError as error:
            name_file(error, path)
            raise
        finally:
            temporary.unlink(missing_ok=True)
    raise FileExistsError("none of the names is free")


def _wrote_in_place(path: Path, data: bytes) -> bool:
    """Whether `path` was free; if so, it has the data."""
    try:
        with open(path, "xb") as file:
            file.write(data)
    except FileExistsError:
        return False
    except BaseException:  # a full disk, Ctrl-C
        path.unlink()
        raise
    return True


def name_file(error: BaseException, path: Path) -> None:
    """Have the message of a system's error tell of which file it is, as that of a full disk does
    not."""
    if isinstance(error, OSError) and error.errno is not None and error.filename is None:
        error.filename = str(path)


def sync_folder(folder: Path) -> None:
    """Make renames and deletions in `folder` outlast a power cut, where the system can."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def existing_part(folder: Path) -> Path:
    """The folder, or the nearest above it that is there, from the root."""
    folder = folder.expanduser().absolute()
    return next(parent for parent in (folder, *folder.parents) if parent.exists())


def remove_temporary(folder: Path) -> list[Path]:
    """Delete what killed writers left in `folder`; call it while nobody writes there."""
    leftovers = sorted(path for path in folder.glob(f"*{TEMPORARY_SUFFIX}") if path.is_file())
    for path in leftovers:
        path.unlink(missing_ok=True)
    return leftovers


def write_json_atomic(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` as indented JSON; non-finite numbers as in `valid_json`."""
    # in ASCII, as names of files may hold bytes that are no text in any encoding
    text = json.dumps(valid_json(content), indent=2) + "\n"
    with atomic_file(path) as file:
        file.write(text.encode("ascii"))


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; ValueError with one line if it is missing or no such thing."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a JSON {type(content).__name__}, an object is expected")
    return content


def valid_json(value: Any) -> Any:
    """`value` in JSON's types: scalars of numpy and torch become numbers, and NaN and infinities,
    which JSON lacks, the strings "NaN", "Infinity", "-Infinity" (`float()` reads them back)."""
    if isinstance(value, Mapping):
        return {str(key): valid_json(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [valid_json(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return str(value) if isinstance(value, Path) else value
