"""Both tokenizers against the reference ids, and what data loaders rely on."""

import copy
import pickle
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

from glide_text2im.tokenizer.bpe import get_encoder
from glide_text2im.tokenizer.simple_tokenizer import SimpleTokenizer
from glide_text2im.tokenizer.vocab import vocabulary_file
from golden_data import load

GOLDEN, _ = load("tokenizer")
STRINGS = GOLDEN["strings"]
SMILEY = "\U0001f600"


@pytest.fixture(scope="module")
def encoder():
    return get_encoder()


@pytest.fixture(scope="module")
def simple():
    return SimpleTokenizer()


@pytest.mark.parametrize("row", STRINGS, ids=range(len(STRINGS)))
def test_glide_tokens_equal_the_reference(encoder, row):
    assert encoder.encode(row["text"]) == row["ids"]
    assert encoder.decode(row["ids"]) == row["decoded"]


@pytest.mark.parametrize("row", STRINGS, ids=range(len(STRINGS)))
def test_clip_tokens_equal_the_reference(simple, row):
    assert simple.encode(row["text"]) == row["clip_ids"]
    assert simple.decode(row["clip_ids"]) == row["clip_decoded"]
    padded = simple.padded_tokens_and_len(row["clip_ids"], GOLDEN["clip_text_ctx"])
    assert padded == (row["clip_padded_77"], row["clip_len_77"])


@pytest.mark.parametrize("row", GOLDEN["padded_128"], ids=lambda row: row["string"])
def test_glide_padding_equals_the_reference(encoder, row):
    tokens, mask = encoder.padded_tokens_and_mask(STRINGS[row["string"]]["ids"], GOLDEN["text_ctx"])
    assert tokens == row["tokens"]
    assert mask == [bool(kept) for kept in row["mask"]]
    assert {type(token) for token in tokens} == {int}
    assert {type(kept) for kept in mask} == {bool}


def test_short_contexts_cut_and_pad(encoder):
    cut, padded = GOLDEN["small_padding"]
    assert encoder.padded_tokens_and_mask([10, 20, 30], 2) == tuple(cut)
    assert encoder.padded_tokens_and_mask([10], 3) == tuple(padded)


def test_the_constants_of_the_glide_tokenizer(encoder):
    assert encoder.n_vocab == GOLDEN["n_vocab"]
    assert encoder.end_token == GOLDEN["end_token"]
    assert encoder.decode([encoder.end_token]) == GOLDEN["decode_of_end_token"]
    assert encoder.decode(encoder.encode(SMILEY)[:1]) == GOLDEN["decode_of_partial_utf8"]


def test_the_constants_of_the_clip_tokenizer(simple):
    assert simple.start_token == GOLDEN["clip_start_token"]
    assert simple.end_token == GOLDEN["clip_end_token"]
    assert len(simple.encoder) == GOLDEN["clip_entries"]
    assert sorted(simple.encoder.values()) == list(range(GOLDEN["clip_entries"]))
    specials = simple.decode([simple.start_token, simple.end_token])
    assert specials == GOLDEN["clip_decode_of_specials"]


def test_special_literals_count_only_as_whole_words_of_clip(simple):
    assert simple.encode("a<|endoftext|>b") == [320, simple.end_token, 321]
    assert simple.end_token not in simple.encode("!<|endoftext|>")
    assert simple.end_token not in simple.encode("<| endoftext |>")


def test_text_that_is_not_valid_unicode_is_encoded_with_a_replacement_character(encoder):
    assert encoder.encode("a\ud800b") == encoder.encode("a\ufffdb")


@pytest.mark.parametrize("run", [" ", "\n", "a", "9", "!", "\u4e16"])
def test_long_runs_of_one_character_are_encoded_and_come_back(encoder, run):
    text = run * 100_000
    assert encoder.decode(encoder.encode(text)) == text


def test_all_callers_share_one_encoder_also_after_copying_and_pickling(encoder):
    assert get_encoder() is encoder
    assert copy.deepcopy(encoder) is encoder
    assert pickle.loads(pickle.dumps(encoder)) is encoder
    assert len(pickle.dumps(encoder)) < 200


def test_both_tokenizers_work_in_a_spawned_worker_process(encoder, simple):
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        glide = pool.submit(encoder.encode, "A corgi").result(timeout=60)
        clip = pool.submit(simple.encode, "A corgi").result(timeout=60)
    assert (glide, clip) == (encoder.encode("A corgi"), simple.encode("A corgi"))


@pytest.mark.parametrize(
    ("distribution", "name"), [("openai-clip", "clip/no_such_file"), ("no-such-package", "x")]
)
def test_a_missing_vocabulary_is_named_with_its_package(distribution, name):
    with pytest.raises(FileNotFoundError, match=rf"{name} of the package {distribution}"):
        vocabulary_file(distribution, name)
