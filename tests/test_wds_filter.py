"""Filters by metadata: every way of writing it that data sets have."""

import json

import pytest

from glide_finetune.data.bad_samples import BadSample
from glide_finetune.data.metadata import parse_metadata
from glide_finetune.data.wds_filter import (
    PUNSAFE_LIMIT,
    LaionFilter,
    reject_other_languages,
    word_pattern,
)

LIMITS = {
    "nsfw_filter": True,
    "ar_lower": 0.5,
    "ar_upper": 2.0,
    "min_original_width": 64,
    "min_original_height": 64,
    "similarity_threshold_lower": 0.3,
    "similarity_threshold_upper": None,
}

LAION_400M = {
    "SAMPLE_ID": 2949546010312, "NSFW": "UNLIKELY", "similarity": 0.3, "LICENSE": "?",
    "caption": "a cat", "url": "https://host/cat.jpg", "key": "000000000", "status": "success",
    "error_message": None, "width": 256, "height": 256, "original_width": 640,
    "original_height": 480, "exif": "{}", "md5": "d41d8cd98f00b204e9800998ecf8427e",
}  # fmt: skip
LAION_2B = {
    "url": "https://host/cat.jpg", "caption": "a cat", "key": "000000000", "status": "success",
    "error_message": None, "width": 256, "height": 256, "original_width": 640,
    "original_height": 480, "similarity": 0.3, "hash": -4621365, "punsafe": 0.001,
    "pwatermark": 0.1, "aesthetic": 5.5, "exif": "{}", "sha256": "e3b0c44298fc1c149afbf4c8996fb924",
}  # fmt: skip
TABLE_COLUMNS = {
    "URL": "https://host/cat.jpg", "TEXT": "a cat", "WIDTH": 640, "HEIGHT": 480,
    "SIMILARITY": 0.3, "PUNSAFE": 0.001, "PWATERMARK": 0.1,
}  # fmt: skip
PRODUCERS = pytest.mark.parametrize(
    "metadata", [LAION_400M, LAION_2B, TABLE_COLUMNS], ids=["LAION-400M", "LAION-2B", "table"]
)


def verdict(metadata: dict, **limits) -> str | None:
    """By the filter, of metadata as it comes out of a shard."""
    read = parse_metadata(json.dumps(metadata).encode())
    return LaionFilter(**{**LIMITS, **limits}).reason_to_reject(read)


def names_of(metadata: dict, *spellings: str) -> list[str]:
    return [name for name in spellings if name in metadata]


@PRODUCERS
def test_what_each_producer_writes_is_found(metadata):
    assert verdict(metadata) is None
    (similarity,) = names_of(metadata, "similarity", "SIMILARITY")
    assert verdict(metadata | {similarity: 0.29}) == "similarity"
    (unsafe,) = names_of(metadata, "NSFW", "punsafe", "PUNSAFE")
    rating = "NSFW" if unsafe == "NSFW" else 0.99
    assert verdict(metadata | {unsafe: rating}) == "not safe for work"
    assert verdict(metadata | {unsafe: rating}, nsfw_filter=False) is None
    width, *_ = names_of(metadata, "original_width", "WIDTH")
    assert verdict(metadata | {width: 63}) == "too small"
    assert verdict(metadata | {width: 961}) == "aspect ratio"
    height, *_ = names_of(metadata, "original_height", "HEIGHT")
    assert verdict(metadata | {height: 63}) == "too small"
    assert verdict(metadata | {height: 1281}) == "aspect ratio"


@PRODUCERS
@pytest.mark.parametrize("nothing", [None, "", "null", float("nan"), "nan", [], {}, "?"])
def test_unknown_values_reject_nothing_but_where_a_similarity_is_asked_for(metadata, nothing):
    blank = dict.fromkeys(metadata, nothing)
    assert verdict(blank, similarity_threshold_lower=None) is None
    assert verdict(blank) == "no similarity"


@PRODUCERS
def test_numbers_may_be_written_as_text(metadata):
    as_text = {name: str(value) for name, value in metadata.items()}
    assert verdict(as_text) is None
    assert verdict(as_text, similarity_threshold_lower=0.31) == "similarity"
    assert verdict(as_text, min_original_width=641) == "too small"
    assert verdict(as_text, ar_upper=1.3) == "aspect ratio"


def test_the_size_at_the_source_counts_rather_than_after_resizing():
    resized = {"width": 256, "height": 256}
    assert verdict({**resized, "similarity": 1}, min_original_width=300) == "too small"
    assert verdict({**resized, "similarity": 1, "WIDTH": 640, "HEIGHT": 100}) == "aspect ratio"
    both = {**resized, "original_width": 640, "original_height": 480, "similarity": 1}
    assert verdict(both, min_original_width=300) is None
    unknown = both | {"original_width": None, "original_height": None}
    assert verdict(unknown, min_original_width=300) == "too small"


@pytest.mark.parametrize(
    ("metadata", "is_kept"),
    [
        ({"NSFW": "UNLIKELY"}, True), ({"NSFW": "UNSURE"}, True), ({"nsfw": " likely "}, False),
        ({"NSFW": "NSFW"}, False), ({"nsfw": "nsfw"}, False), ({"NSFW": None}, True),
        ({"punsafe": PUNSAFE_LIMIT}, False), ({"punsafe": PUNSAFE_LIMIT - 0.01}, True),
        ({"punsafe": "0.99"}, False), ({"punsafe": None}, True), ({"punsafe": 1}, False),
        ({"NSFW": "UNLIKELY", "punsafe": 0.99}, False), ({"NSFW": "NSFW", "punsafe": 0.0}, False),
    ],
)  # fmt: skip
def test_what_is_likely_not_safe_for_work_is_left_out(metadata, is_kept):
    kept = verdict(metadata, similarity_threshold_lower=None) is None
    assert kept is is_kept


@pytest.mark.parametrize("value", [1e400, -1e400, 10**400, "Infinity", "1e999"])
def test_numbers_out_of_this_world_are_unknown(value):
    metadata = {"similarity": value, "original_width": value, "punsafe": value}
    assert verdict(metadata) == "no similarity"
    assert verdict(metadata, similarity_threshold_lower=None) is None


@pytest.mark.parametrize(
    "data", [b"{'no': json}", b"", b"\xff\xfe", b"[" * 100_000, b"9" * 5000, b'{"a": ', b"\0" * 10]
)
def test_what_is_not_json_is_bad_metadata(data):
    with pytest.raises(BadSample, match="JSON") as error:
        parse_metadata(data)
    assert error.value.kind == "metadata"


@pytest.mark.parametrize("data", [b"[1]", b"null", b"1", b'"text"'])
def test_json_without_names_is_bad_metadata(data):
    with pytest.raises(BadSample, match="no JSON object"):
        parse_metadata(data)


def test_english_goes_by_many_codes():
    for code in ("en", "EN", " en-GB ", "en_US", "eng", "English"):
        assert reject_other_languages({"lc": code}) is None
    for code in ("de", "", None, "enm", 5):
        assert reject_other_languages({"lc": code}) == "not English"
    assert reject_other_languages({}) == "not English"


def test_words_are_whole_words_or_phrases_in_any_case():
    pattern = word_pattern(["stock", "for  sale", "c++", "", "M\u00dcLL"])
    for caption in ("A Stock photo", "not, for sale!", "learn C++ now", "m\u00fcll", "stock"):
        assert pattern.search(caption)
    for caption in ("stockings", "for a sale", "c+", "m\u00fcller", ""):
        assert not pattern.search(caption)
    assert word_pattern([]) is None
    assert word_pattern([" "]) is None
