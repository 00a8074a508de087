"""Caption files, and captions as tokens."""

import os
from functools import cache
from pathlib import Path
from typing import Protocol

import torch

from glide_finetune.data.bad_samples import BadSample


class Tokenizer(Protocol):
    """What is needed of `glide_text2im.tokenizer.bpe.Encoder`."""

    def encode(self, text: str) -> list[int]: ...

    def padded_tokens_and_mask(
        self, tokens: list[int], text_ctx: int
    ) -> tuple[list[int], list[bool]]: ...


@cache
def default_tokenizer() -> Tokenizer:
    """GLIDE's own tokenizer, made once in each process."""
    from glide_text2im.tokenizer.bpe import get_encoder

    return get_encoder()


def decode_caption(data: bytes) -> str:
    """UTF-8 text (a byte order mark is dropped). Raises BadSample for other bytes."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadSample("the caption is not UTF-8 text") from error
    if "\0" in text:
        raise BadSample("the caption holds NUL bytes; is it UTF-16?")
    return text


def read_captions(path: str | os.PathLike) -> list[str]:
    """The captions of a text file, one for each line that is not blank; at least one.

    Raises BadSample if there is none or the file cannot be read as UTF-8.
    """
    try:
        text = decode_caption(Path(path).read_bytes())
    except OSError as error:
        raise BadSample(f"the caption file cannot be read: {error.strerror}") from error
    captions = [line.strip() for line in text.splitlines() if line.strip()]
    if not captions:
        raise BadSample("the caption file is blank")
    return captions


def caption_tensors(
    tokenizer: Tokenizer, caption: str, text_ctx: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens int64 (text_ctx,) and mask bool (text_ctx,), True on the caption's own tokens.

    A longer caption is cut at `text_ctx` tokens; "" is the empty caption of classifier-free
    guidance, all end tokens with the mask all False.
    """
    tokens, mask = tokenizer.padded_tokens_and_mask(tokenizer.encode(caption)[:text_ctx], text_ctx)
    return torch.tensor(tokens, dtype=torch.int64), torch.tensor(mask, dtype=torch.bool)
