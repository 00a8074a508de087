"""A tokenizer that needs no vocabulary: a token is a character's code, the end token 0."""


class StubTokenizer:
    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]

    def padded_tokens_and_mask(
        self, tokens: list[int], text_ctx: int
    ) -> tuple[list[int], list[bool]]:
        tokens = tokens[:text_ctx]
        padding = text_ctx - len(tokens)
        return tokens + [0] * padding, [True] * len(tokens) + [False] * padding


def caption_of(tokens, mask) -> str:
    """The text behind a row of tokens and its mask."""
    return "".join(map(chr, tokens[mask].tolist()))
