"""Which options a noise-aware CLIP is built with, and which files it is in.

Nothing here imports torch.
"""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from glide_finetune.config import ConfigError
from glide_finetune.runs import ARGS_NAME

CLIP_KIND = "clip"  # of the models in the descriptions of checkpoints
CLIP_FILES = ("clip_image_enc.pt", "clip_text_enc.pt")
CLIP_CONFIG = "config.yaml"  # of the network's size, beside the encoders where it is another one

# The options of the released model: the keys and values of glide_text2im/clip/config.yaml.
RELEASED_OPTIONS: dict[str, Any] = {
    "logit_scale": 100.0,
    "beta_schedule": "squaredcos_cap_v2",
    "n_timesteps": 1000,
    "image_size": 64,
    "patch_size": 4,
    "n_vocab": 65536,
    "max_text_len": 77,
    "n_embd": 512,
    "n_head_state_text": 64,
    "n_head_text": 8,
    "n_xf_blocks_text": 12,
    "n_head_state_image": 64,
    "n_head_image": 12,
    "n_xf_blocks_image": 12,
}
_TOKENS = 49408  # that CLIP's tokenizer knows
FIRST_LOGIT_SCALE = 1 / 0.07  # of a model from scratch (CLIP, section 2.5)

CLIP_PRESETS: dict[str, dict[str, Any]] = {
    "released": {},
    "small": {
        "patch_size": 8,
        "n_vocab": _TOKENS,
        "n_embd": 128,
        "n_head_state_text": 32,
        "n_head_text": 2,
        "n_xf_blocks_text": 2,
        "n_head_state_image": 32,
        "n_head_image": 4,
        "n_xf_blocks_image": 4,
    },
    "tiny": {
        "image_size": 16,
        "n_vocab": _TOKENS,
        "n_embd": 16,
        "n_head_state_text": 8,
        "n_head_text": 2,
        "n_xf_blocks_text": 1,
        "n_head_state_image": 8,
        "n_head_image": 2,
        "n_xf_blocks_image": 1,
    },
}


def parse_clip_option(text: str) -> tuple[str, Any]:
    """One KEY=VALUE of --model_options, the value in the type of the key's default.

    Raises:
        ValueError: no "=", an unknown key, or a value of another type.
    """
    key, separator, value = text.partition("=")
    if not separator:
        raise ValueError(f"{text!r} is not KEY=VALUE")
    parsed: Any = value
    with contextlib.suppress(ValueError):
        parsed = type(RELEASED_OPTIONS.get(key, ""))(value)
    check_clip_options({key: parsed})
    return key, parsed


def check_clip_options(options: Mapping[str, Any]) -> None:
    """Hold options against the keys and the types that there are, and against each other.

    Raises:
        ValueError: the first that cannot work.
    """
    for key, value in options.items():
        if key not in RELEASED_OPTIONS:
            known = ", ".join(RELEASED_OPTIONS)
            raise ValueError(f"there is no option {key!r} of the noisy CLIP; there are {known}")
        if key == "beta_schedule":
            if value != RELEASED_OPTIONS[key]:
                raise ValueError(f"beta_schedule is {value!r}; GLIDE's is {RELEASED_OPTIONS[key]}")
        elif isinstance(value, bool) or not isinstance(value, int | float) or value < 1:
            raise ValueError(f"{key} is {value!r}; give a number of at least 1")
        elif key != "logit_scale" and not isinstance(value, int):
            raise ValueError(f"{key} is {value!r}; give a whole number")
    if options.get("logit_scale", 1) > 100:
        raise ValueError(f"logit_scale is {options['logit_scale']}; give 100 at most")
    if options.get("n_vocab", _TOKENS) < _TOKENS:
        raise ValueError(f"n_vocab is {options['n_vocab']}, but there are {_TOKENS} tokens")
    if options.get("max_text_len", 3) < 3:
        raise ValueError("max_text_len leaves no room for a caption; give at least 3")
    if options.get("image_size", 0) % options.get("patch_size", 1):
        raise ValueError(
            f"image_size {options['image_size']} is no multiple of patch_size "
            f"{options['patch_size']}"
        )


def clip_paths(given: list[str]) -> list[Path]:
    """The files of CLIP's image and text encoders that `--clip` names, or the one path of a run
    folder or of a checkpoint in it."""
    paths = [Path(path).expanduser() for path in given]
    if len(paths) == 1:
        if paths[0].is_file() or (paths[0] / ARGS_NAME).exists():
            return paths
        paths = [paths[0] / name for name in CLIP_FILES]
    if len(paths) != 2:
        raise ConfigError(
            f"--clip has {len(paths)} paths; give a folder, or the files of the image and the text "
            "encoder"
        )
    return paths
