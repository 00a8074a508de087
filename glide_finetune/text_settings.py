"""Settings that are texts, and files of texts, one a line."""

from pathlib import Path

from glide_finetune.config import ConfigError, TrainConfig


def read_prompts(config: TrainConfig) -> list[str]:
    """The captions of the samples: the lines of --prompt_file, or else --test_prompt.

    Raises:
        ConfigError: the file cannot be read or holds none.
    """
    if not config.prompt_file:
        return [text_of("test_prompt", config.test_prompt)]
    return read_lines("prompt_file", config.prompt_file, "prompt")


def read_skip_words(config: TrainConfig) -> list[str]:
    """The lines of --wds_skip_words, if it is given.

    Raises:
        ConfigError: the file cannot be read or holds none.
    """
    if not config.wds_skip_words:
        return []
    return read_lines("wds_skip_words", config.wds_skip_words, "word")


def text_of(name: str, text: str) -> str:
    """What the flag `name` gives.

    Raises:
        ConfigError: it holds bytes that are no text, as a command line may.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ConfigError(
            f"--{name} is {text!r}, which is not UTF-8; if it was, set LC_ALL=C.UTF-8"
        ) from None
    return text


def read_lines(name: str, file: str, what: str) -> list[str]:
    """The lines of a text file that are not blank, of which there must be some.

    Args:
        name: the flag that gave the file, what: what a line holds; for messages.

    Raises:
        ConfigError: the file cannot be read or holds none.
    """
    path = Path(file).expanduser()
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"--{name}: cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"--{name}: {path} is not text in UTF-8") from None
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise ConfigError(f"--{name}: {path} holds no {what}, write one a line")
    return lines
