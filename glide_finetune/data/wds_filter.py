"""Which samples of WebDataset shards are trained on, by their caption and metadata."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

NOT_ENGLISH = "not English"
# Spellings of English in Alamy's language code.
ENGLISH = ("en", "eng", "english")


# What one thing is called in the metadata of LAION-400M, LAION-2B and img2dataset, which also takes
# over the columns of their tables by name. The first that holds a number counts: what img2dataset
# calls width and height is the size after its own resizing.
NSFW_RATING = ("NSFW", "nsfw")
UNSAFE_CHANCE = ("punsafe", "PUNSAFE")
SIMILARITY = ("similarity", "SIMILARITY")
WIDTH = ("original_width", "ORIGINAL_WIDTH", "WIDTH", "width")
HEIGHT = ("original_height", "ORIGINAL_HEIGHT", "HEIGHT", "height")

UNSAFE_RATINGS = ("NSFW", "LIKELY")
# From where on LAION's classifier takes an image for unsafe rather than safe. So it means what the
# ratings mean, of which UNSURE passes as well; lower limits lose many harmless portraits.
PUNSAFE_LIMIT = 0.5


def _number(metadata: Mapping, names: Sequence[str]) -> float | None:
    """The first of these fields that holds a finite number, perhaps as text."""
    for name in names:
        try:
            value = float(metadata[name])
        except (KeyError, TypeError, ValueError, OverflowError):
            continue
        if math.isfinite(value):
            return value
    return None


@dataclass(frozen=True, kw_only=True)
class LaionFilter:
    """Limits on LAION's metadata, bounds included.

    What is missing, null or no number rejects nothing, but for the similarity: a limit on it cannot
    hold where it is unknown.
    """

    nsfw_filter: bool
    ar_lower: float
    ar_upper: float
    min_original_width: int
    min_original_height: int
    similarity_threshold_lower: float | None
    similarity_threshold_upper: float | None

    def __post_init__(self) -> None:
        for name, lower, upper in (
            ("aspect ratio", self.ar_lower, self.ar_upper),
            ("similarity", self.similarity_threshold_lower, self.similarity_threshold_upper),
        ):
            if lower is not None and upper is not None and lower > upper:
                raise ValueError(f"the lower {name} limit {lower} is above the upper one, {upper}")

    def reason_to_reject(self, metadata: Mapping) -> str | None:
        """Why a sample is not wanted, in a few words to count by, or None."""
        if self.nsfw_filter and _is_unsafe(metadata):
            return "not safe for work"
        width, height = _number(metadata, WIDTH), _number(metadata, HEIGHT)
        if width is not None and width < self.min_original_width:
            return "too small"
        if height is not None and height < self.min_original_height:
            return "too small"
        if width and height and not self.ar_lower <= width / height <= self.ar_upper:
            return "aspect ratio"
        return self._reject_similarity(_number(metadata, SIMILARITY))

    def _reject_similarity(self, similarity: float | None) -> str | None:
        lower, upper = self.similarity_threshold_lower, self.similarity_threshold_upper
        if lower is None and upper is None:
            return None
        if similarity is None:
            return "no similarity"
        if (lower is not None and similarity < lower) or (upper is not None and similarity > upper):
            return "similarity"
        return None


def _is_unsafe(metadata: Mapping) -> bool:
    ratings = {str(metadata.get(name)).strip().upper() for name in NSFW_RATING}
    chance = _number(metadata, UNSAFE_CHANCE)
    return not ratings.isdisjoint(UNSAFE_RATINGS) or (
        chance is not None and chance >= PUNSAFE_LIMIT
    )


def reject_other_languages(metadata: Mapping) -> str | None:
    """Alamy's language code `lc` must name English: "en", also with a region as in "en-GB"."""
    language = re.split("[-_]", str(metadata.get("lc")).strip().lower())[0]
    return None if language in ENGLISH else NOT_ENGLISH


def word_pattern(words: Sequence[str]) -> re.Pattern | None:
    """Matches any of the words or phrases as whole words, in any case; None without words."""
    words = [re.escape(" ".join(word.split())) for word in words if word.strip()]
    if not words:
        return None
    return re.compile(rf"(?<!\w)(?:{'|'.join(words)})(?!\w)", re.IGNORECASE)
