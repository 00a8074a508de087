"""Random generators derived from what they are for, never from what was drawn before.

Every draw of the data side (order, crop, caption, dropout, flip) comes from a generator whose seed
is a hash of names and numbers such as (seed, epoch, sample key). So the sample at a given place of
a given epoch is the same for any number of workers, and after resuming. In loops of others, which
set no epoch, torch's random state stands for it.
"""

import hashlib
import random


def derived_seed(*parts: object) -> int:
    """A 64-bit seed in [0, 2**64) from the `repr` of the parts (numbers and strings)."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big")


def derived_random(*parts: object) -> random.Random:
    """A generator of its own for these parts."""
    return random.Random(derived_seed(*parts))
