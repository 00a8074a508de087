"""Where the tokenizers' vocabularies lie, and how their files spell bytes."""

from importlib import metadata
from pathlib import Path

# The files write a token's bytes as visible characters: a byte that is a visible Latin-1 character
# stands for itself, the n-th of the others is written as the character with code point 256 + n.
_VISIBLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_HIDDEN = [byte for byte in range(256) if byte not in _VISIBLE]
_BYTE_OF_CODE_POINT = {256 + n: byte for n, byte in enumerate(_HIDDEN)}

# The characters for all 256 bytes, in the order in which the vocabularies number them.
BYTE_SYMBOLS = [chr(byte) for byte in _VISIBLE] + [chr(code) for code in _BYTE_OF_CODE_POINT]


def token_bytes(token: str) -> bytes:
    """The bytes that a vocabulary entry such as `Ġhello` stands for."""
    return token.translate(_BYTE_OF_CODE_POINT).encode("latin-1")


def vocabulary_file(distribution: str, name: str) -> Path:
    """The path of data file `name` of an installed distribution, which is not imported.

    Raises FileNotFoundError if the distribution or the file is not installed.
    """
    try:
        path = Path(str(metadata.distribution(distribution).locate_file(name)))
    except metadata.PackageNotFoundError:
        path = None
    if path is None or not path.is_file():
        raise FileNotFoundError(
            f"the tokenizer needs {name} of the package {distribution}, which is not installed; "
            f"reinstall glide-text2im with its dependencies"
        )
    return path
