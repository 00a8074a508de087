"""Opening files that data names, without waiting for ever on what is no file."""

import errno
import os
import stat
from typing import BinaryIO


def open_regular(path: str | os.PathLike) -> BinaryIO:
    """A regular file, or a link to one, opened for reading bytes; raises OSError for others.

    Opening a FIFO would wait for somebody to write to it.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))
    return open(path, "rb")
