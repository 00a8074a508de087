"""Which samples of WebDataset shards are trained on, by their caption and metadata."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from glide_finetune.data.bad_samples import BadSample

# Spellings of English in Alamy's language code.
ENGLISH = ("en", "eng", "english")


def parse_metadata(data: bytes) -> dict:
    """The JSON object of a sample. Raises BadSample for anything else."""
    try:
        metadata = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadSample("the metadata is not JSON") from error
    if not isinstance(metadata, dict):
        raise BadSample("the metadata is no JSON object")
    return metadata


def _number(metadata: Mapping, name: str) -> float | None:
    """A field that may be missing, null or text."""
    try:
        return float(metadata[name])
    except (KeyError, TypeError, ValueError):
        return None


@dataclass(frozen=True, kw_only=True)
class LaionFilter:
    """Limits on LAION's metadata, bounds included.

    A field that is missing or null rejects nothing, but for the similarity: a limit on it cannot
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
        if self.nsfw_filter and str(metadata.get("NSFW")).upper() in ("NSFW", "LIKELY"):
            return "not safe for work"
        width, height = _number(metadata, "original_width"), _number(metadata, "original_height")
        if width is not None and width < self.min_original_width:
            return "too small"
        if height is not None and height < self.min_original_height:
            return "too small"
        if width and height and not self.ar_lower <= width / height <= self.ar_upper:
            return "aspect ratio"
        return self._reject_similarity(_number(metadata, "similarity"))

    def _reject_similarity(self, similarity: float | None) -> str | None:
        lower, upper = self.similarity_threshold_lower, self.similarity_threshold_upper
        if lower is None and upper is None:
            return None
        if similarity is None:
            return "no similarity"
        # Written so that a similarity of NaN is within no limit.
        if (lower is None or similarity >= lower) and (upper is None or similarity <= upper):
            return None
        return "similarity"


def reject_other_languages(metadata: Mapping) -> str | None:
    """Alamy's language code `lc` must name English: "en", also with a region as in "en-GB"."""
    language = re.split("[-_]", str(metadata.get("lc")).strip().lower())[0]
    return None if language in ENGLISH else "not English"


def word_pattern(words: Sequence[str]) -> re.Pattern | None:
    """Matches any of the words or phrases as whole words, in any case; None without words."""
    words = [re.escape(word.strip()) for word in words if word.strip()]
    if not words:
        return None
    return re.compile(rf"(?<!\w)(?:{'|'.join(words)})(?!\w)", re.IGNORECASE)
