"""The noisy CLIP's tokenizer: CLIP's byte-pair encoding over cleaned, lower-cased text."""

import gzip
import html
from collections.abc import Sequence
from functools import lru_cache
from itertools import islice

import ftfy
import regex
import tiktoken

from glide_text2im.tokenizer.vocab import BYTE_SYMBOLS, token_bytes, vocabulary_file

_START_OF_TEXT = "<|startoftext|>"
_END_OF_TEXT = "<|endoftext|>"
_SPECIAL = (_START_OF_TEXT, _END_OF_TEXT)

# The vocabulary file lists more merges than CLIP was trained with.
_N_MERGES = 48_894

# Words are special literals, English contractions, runs of letters, single digits and runs of
# anything else that is not white space.
_WORD = regex.compile(
    r"<\|startoftext\|>|<\|endoftext\|>|'(?:s|t|re|ve|m|ll|d)|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+",
    regex.IGNORECASE,
)

# CLIP's merges know where a word ends: its last byte carries this suffix. No word contains a space,
# so the byte-pair encoder gets the words with a space after each, and the suffix is that space. The
# ids of "byte and suffix" come before those of all merges, hence the space joins its byte first.
_END_OF_WORD = "</w>"
_WORD_AND_SPACE = r"[^ ]+ "


class SimpleTokenizer:
    """CLIP's tokenizer, with the two literals `<|startoftext|>` and `<|endoftext|>` as special ids.

    Attributes: `start_token` (49406), `end_token` (49407), and `encoder`, the mapping of all 49,408
    vocabulary entries, as CLIP's file spells them, to their ids.
    """

    def __init__(self) -> None:
        self.encoder = _vocabulary()
        self.start_token = self.encoder[_START_OF_TEXT]
        self.end_token = self.encoder[_END_OF_TEXT]
        self._bpe = _byte_pair_encoding()

    def __reduce__(self):
        # The vocabulary is not pickled: a worker process reads its own, once.
        return SimpleTokenizer, ()

    def encode(self, text: str) -> list[int]:
        """The token ids of `text`, without start and end token.

        Broken Unicode is repaired and HTML entities are replaced, twice, so that `&amp;lt;` is `<`.
        """
        text = html.unescape(html.unescape(ftfy.fix_text(text))).lower()
        words = (word if word in _SPECIAL else word + " " for word in _WORD.findall(text))
        return self._bpe.encode("".join(words), allowed_special="all")

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of token ids with a space after every word; broken UTF-8 becomes U+FFFD.

        Raises KeyError for an id beyond the vocabulary, OverflowError for a negative one.
        """
        return self._bpe.decode(tokens)

    def padded_tokens_and_len(self, tokens: Sequence[int], text_ctx: int) -> tuple[list[int], int]:
        """Start token, `tokens`, end token, zeros up to `text_ctx`; and the length without zeros.

        Tokens that do not fit are cut; start and end token always stay.
        """
        row = [self.start_token, *tokens[: text_ctx - 2], self.end_token]
        return row + [0] * (text_ctx - len(row)), len(row)


@lru_cache(maxsize=1)
def _vocabulary() -> dict[str, int]:
    """Every vocabulary entry and its id: bytes, bytes that end a word, merges, special literals."""
    path = vocabulary_file("openai-clip", "clip/bpe_simple_vocab_16e6.txt.gz")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        merges = ["".join(line.split()) for line in islice(lines, 1, 1 + _N_MERGES)]
    final_bytes = [symbol + _END_OF_WORD for symbol in BYTE_SYMBOLS]
    return {
        entry: id_ for id_, entry in enumerate([*BYTE_SYMBOLS, *final_bytes, *merges, *_SPECIAL])
    }


@lru_cache(maxsize=1)
def _byte_pair_encoding() -> tiktoken.Encoding:
    ranks, special = {}, {}
    for entry, id_ in _vocabulary().items():
        if entry in _SPECIAL:
            special[entry] = id_
        else:
            stem = entry.removesuffix(_END_OF_WORD)
            ranks[token_bytes(stem) + (b" " if stem != entry else b"")] = id_
    return tiktoken.Encoding(
        "glide-clip", pat_str=_WORD_AND_SPACE, mergeable_ranks=ranks, special_tokens=special
    )
