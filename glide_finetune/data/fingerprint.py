"""What tells one data set from another."""

import hashlib
import os
from collections.abc import Iterable


def fingerprint(names: Iterable[str]) -> str:
    """Hexadecimal SHA-256 of the names, in their order."""
    digest = hashlib.sha256()
    for name in names:
        digest.update(os.fsencode(name) + b"\0")
    return digest.hexdigest()
