"""Caption files, and captions as tokens."""

import os
from functools import cache
from typing import TYPE_CHECKING, Protocol

from glide_finetune.data.bad_samples import BadSample
from glide_finetune.data.regular_files import open_regular

if TYPE_CHECKING:
    import torch

MAX_CAPTION_BYTES = 64 * 1024


class Tokenizer(Protocol):
    """What is needed of `glide_text2im.tokenizer.bpe.Encoder`."""

    def encode(self, text: str) -> list[int]: ...

    def padded_tokens_and_mask(
        self, tokens: list[int], text_ctx: int
    ) -> tuple[list[int], list[bool]]: ...

    def decode(self, tokens: list[int]) -> str: ...


@cache
def default_tokenizer() -> Tokenizer:
    """GLIDE's own tokenizer, made once in each process."""
    from glide_text2im.tokenizer.bpe import get_encoder

    return get_encoder()


def decode_caption(data: bytes) -> str:
    """UTF-8 text (a byte order mark is dropped) of up to `MAX_CAPTION_BYTES`.

    Raises BadSample for other bytes.
    """
    if len(data) > MAX_CAPTION_BYTES:
        raise BadSample(f"the caption is longer than {MAX_CAPTION_BYTES} bytes", "caption")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadSample("the caption is not UTF-8 text", "caption") from error
    if "\0" in text:
        raise BadSample("the caption holds NUL bytes; is it UTF-16?", "caption")
    return text


def is_visible(text: str) -> bool:
    """Whether it is more than white space and marks that show nothing, such as U+200B."""
    return any(letter.isprintable() and not letter.isspace() for letter in text)


def single_spaced(text: str) -> str:
    """With single spaces in place of all white space, as line breaks and tabs of scraped text are,
    so that a caption has the same tokens from a file as from a shard."""
    return " ".join(text.split())


def read_captions(path: str | os.PathLike) -> list[str]:
    """The captions of a text file, one for each line in which there is something to see; at least
    one.

    Raises BadSample if there is none, and for what is no regular file of UTF-8 text of up to
    `MAX_CAPTION_BYTES`.
    """
    try:
        with open_regular(path) as file:
            text = decode_caption(file.read(MAX_CAPTION_BYTES + 1))
    except OSError as error:
        raise BadSample(f"the caption file cannot be read: {error.strerror}", "caption") from error
    captions = [single_spaced(line) for line in text.splitlines() if is_visible(line)]
    if not captions:
        raise BadSample("the caption file is blank", "caption")
    return captions


def caption_tensors(
    tokenizer: Tokenizer, caption: str, text_ctx: int
) -> "tuple[torch.Tensor, torch.Tensor, bool]":
    """(tokens, mask, is_cut): int64 (text_ctx,), bool (text_ctx,), True on the caption's own
    tokens, and whether the caption was longer and had to be cut at `text_ctx` tokens.

    "" is the empty caption of classifier-free guidance, all end tokens with the mask all False.
    """
    import numpy as np  # here, as settings are checked without them
    import torch

    encoded = tokenizer.encode(caption)
    tokens, mask = tokenizer.padded_tokens_and_mask(encoded[:text_ctx], text_ctx)
    # By way of numpy, which reads lists several times as fast.
    return (
        torch.from_numpy(np.array(tokens, dtype=np.int64)),
        torch.from_numpy(np.array(mask, dtype=np.bool_)),
        len(encoded) > text_ctx,
    )
