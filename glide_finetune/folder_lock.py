"""Folders that one process at a time writes into. Needs no torch."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK_NAME = ".lock"


@contextlib.contextmanager
def locked(folder: Path, otherwise: str) -> Iterator[None]:
    """While open, no other process can do the same with this folder.

    The lock ends with the process, however it ends; data workers do not inherit it. File systems
    without locks are used without.

    Args:
        otherwise: what to do instead of waiting, for the message.

    Raises:
        ValueError: another process has it.
    """
    if fcntl is None:
        yield
        return
    with open(folder / LOCK_NAME, "ab+", buffering=0) as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            holder = file.read().decode(errors="replace").strip()
            raise ValueError(
                f"{folder} is in use by process {holder or '?'}: wait until that has ended or "
                f"stop it, or {otherwise}"
            ) from None
        except OSError:
            pass
        with contextlib.suppress(OSError):  # a full disk, which others will meet
            file.truncate(0)
            file.write(f"{os.getpid()} on {os.uname().nodename}\n".encode())
        yield
