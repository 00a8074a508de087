"""Which options a model is built with: the released sizes, smaller presets, single changes.

Nothing here imports torch.
"""

import contextlib
import logging
import re
from pathlib import Path, PurePosixPath
from typing import Any

from glide_finetune.atomic_files import read_json
from glide_text2im.defaults import (
    NORM_GROUPS,
    channel_multipliers,
    model_and_diffusion_defaults,
    model_and_diffusion_defaults_upsampler,
)

logger = logging.getLogger(__name__)

RELEASED = "released"  # in place of a path: OpenAI's weights

MODEL_TYPES = ("base", "upsample", "base-inpaint", "upsample-inpaint")
# An inpainting model may start from the weights of a kind that has all its layers, with fewer
# channels in the first.
WIDENED_FROM = {"base-inpaint": "base", "upsample-inpaint": "upsample"}
NOISE_SCHEDULES = ("squaredcos_cap_v2", "linear")

# How to compute, and the kind of model, as opposed to the sizes of the network.
_NOT_OF_SIZE = ("use_fp16", "cache_text_emb", "super_res", "inpaint", "timestep_respacing")

_NUMBERS = r"[1-9][0-9]*(,[1-9][0-9]*)*"

_SMALL = {
    "num_channels": 64,
    "num_head_channels": 32,
    "attention_resolutions": "16,8",
    "xf_width": 160,
    "xf_layers": 4,
    "xf_heads": 5,
}

# What each preset changes of the released options, for the base model and for the upsampler.
MODEL_PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "glide": {"base": {}, "upsample": {}},
    "small": {
        "base": {**_SMALL, "num_res_blocks": 2, "channel_mult": "1,2,2,3"},
        "upsample": {**_SMALL, "num_res_blocks": 1, "channel_mult": "1,1,2,2,2,3"},
    },
    "tiny": {
        "base": {
            "image_size": 16,
            "channel_mult": "1,2",
            "num_channels": 32,
            "num_res_blocks": 1,
            "num_head_channels": 16,
            "attention_resolutions": "8",
            "text_ctx": 32,
            "xf_width": 32,
            "xf_layers": 2,
            "xf_heads": 2,
        },
    },
}
MODEL_PRESETS["tiny"]["upsample"] = MODEL_PRESETS["tiny"]["base"]


def released_options(model_type: str) -> dict[str, Any]:
    """The options of a released architecture, with the full noise schedule and dropout.

    Args:
        model_type: base, upsample, base-inpaint or upsample-inpaint.

    Raises:
        ValueError: another model_type.
    """
    if model_type not in MODEL_TYPES:
        raise ValueError(f"model_type {model_type!r} is unknown; it is one of {MODEL_TYPES}")
    upsample = model_type.startswith("upsample")
    options = (
        model_and_diffusion_defaults_upsampler() if upsample else model_and_diffusion_defaults()
    )
    options["inpaint"] = model_type.endswith("-inpaint")
    return options


def type_of_model(*, upsample: bool, inpaint: bool) -> str:
    """The one of `MODEL_TYPES` that upsamples, inpaints, or does both or neither."""
    return ("upsample" if upsample else "base") + ("-inpaint" if inpaint else "")


def can_start_from(kind: str, model_type: str) -> bool:
    """Whether weights of this kind, "" for an unknown one, can be trained on as `model_type`."""
    return kind in ("", model_type, WIDENED_FROM.get(model_type))


def training_options(model_type: str, preset: str, changes: dict[str, Any]) -> dict[str, Any]:
    """Every option of the model to train: released ones, the preset's, then single changes."""
    size = MODEL_PRESETS[preset]["upsample" if model_type.startswith("upsample") else "base"]
    return {**released_options(model_type), **size, **changes}


def described_model(weights: Path) -> tuple[str, dict[str, Any]]:
    """The kind of model and its options from the JSON beside a checkpoint's weights.

    Of the options those are left out that say how to compute or to draw, or what the kind says.
    ("", {}) where there is no such JSON, with a warning if there is one that cannot be used.
    """
    path = description_path(weights)
    if not path.exists():
        return "", {}
    try:
        description = read_json(path)
        kind, options = description["kind"], dict(description["model_options"])
    except (ValueError, LookupError, TypeError):
        logger.warning("%s describes no model: the weights are used without it", path)
        return "", {}
    return kind, {key: value for key, value in options.items() if key not in _NOT_OF_SIZE}


def description_path(weights: Path) -> Path:
    """Where the JSON beside a checkpoint's weights, plain or averaged, is or would be."""
    return weights.with_name(weights.stem.removesuffix("-ema") + ".json")


def variance_is_stale(weights: Path) -> bool:
    """Whether the variance of these weights was left untrained while their noise was tuned.

    The JSON beside them tells. Those without one are from other trainers, which commonly train the
    noise alone, unless they are called as OpenAI's files are.
    """
    from glide_text2im.download import MODEL_PATHS  # here, as it takes a while to import

    path = description_path(weights)
    if not path.exists():
        return weights.name not in {PurePosixPath(url).name for url in MODEL_PATHS.values()}
    with contextlib.suppress(ValueError):
        return read_json(path).get("vlb_weight", 0) == 0
    return True


def parse_model_option(text: str) -> tuple[str, Any]:
    """One KEY=VALUE of --model_options, the value in the type of the key's default.

    Raises:
        ValueError: no "=", an unknown key, or a value of another type.
    """
    key, separator, value = text.partition("=")
    if not separator:
        raise ValueError(f"{text!r} is not KEY=VALUE")
    kind = type(model_and_diffusion_defaults().get(key))
    parsed: Any = value
    with contextlib.suppress(ValueError):
        if kind is bool:
            parsed = {"true": True, "false": False}.get(value.lower(), value)
        elif kind in (int, float):
            parsed = kind(value)
    check_option(key, parsed)
    return key, parsed


def check_option(key: str, value: Any) -> None:
    """Hold one option against the known keys and the type of the key's default.

    Raises:
        ValueError: it does not fit.
    """
    defaults = model_and_diffusion_defaults()
    if key not in defaults:
        raise ValueError(f"there is no model option {key!r}; the options are {', '.join(defaults)}")
    kind = type(defaults[key])
    if type(value) is not kind and not (kind is float and type(value) is int):
        wanted = {bool: "True or False", int: "a whole number", float: "a number", str: "text"}
        raise ValueError(f"the model option {key} is {value!r}; give {wanted[kind]}")


def check_options(options: dict[str, Any]) -> None:
    """Hold all options of a model against what can be built.

    Raises:
        ValueError: about the first that cannot work.
    """
    for key in ("image_size", "num_channels", "num_res_blocks", "diffusion_steps", "text_ctx"):
        least = 2 if key == "diffusion_steps" else 1
        if options[key] < least:
            raise ValueError(f"{key} is {options[key]}; give a number of at least {least}")
    if not 0 <= options["dropout"] < 1:
        raise ValueError(f"dropout is {options['dropout']}; give a number of at least 0, below 1")
    if options["noise_schedule"] not in NOISE_SCHEDULES:
        known = " or ".join(NOISE_SCHEDULES)
        raise ValueError(f"noise_schedule is {options['noise_schedule']!r}; give {known}")
    if options["noise_schedule"] == "linear" and options["diffusion_steps"] <= 20:
        raise ValueError(  # the last step's share of noise is 20 / diffusion_steps
            f"diffusion_steps is {options['diffusion_steps']}, too few for noise_schedule linear; "
            "give 21 or more, or noise_schedule=squaredcos_cap_v2"
        )
    _check_text(options)
    _check_unet(options)


def _check_text(options: dict[str, Any]) -> None:
    width, heads, layers = (options[f"xf_{name}"] for name in ("width", "heads", "layers"))
    if width < 1 or layers < 0 or heads < 1 or width % heads:
        raise ValueError(
            f"xf_width is {width}, xf_layers {layers}, xf_heads {heads}; give a width that is a "
            "multiple of the heads"
        )


def _check_unet(options: dict[str, Any]) -> None:
    if options["num_channels"] % NORM_GROUPS:
        raise ValueError(
            f"num_channels is {options['num_channels']}; give a multiple of {NORM_GROUPS}"
        )
    if not re.fullmatch(_NUMBERS, options["channel_mult"] or "1"):
        raise ValueError(f"channel_mult is {options['channel_mult']!r}; give one like 1,2,3,4")
    try:
        multipliers = channel_multipliers(options["image_size"], options["channel_mult"])
    except AssertionError as error:
        raise ValueError(str(error)) from None
    sizes = options["attention_resolutions"]
    if not re.fullmatch(_NUMBERS, sizes):
        raise ValueError(f"attention_resolutions is {sizes!r}; give image sizes, such as 32,16,8")
    rates = {options["image_size"] // int(size) for size in sizes.split(",")}
    with_attention = [m for level, m in enumerate(multipliers) if 2**level in rates]
    for multiplier in [*with_attention, multipliers[-1]]:  # the last level always has some
        channels = multiplier * options["num_channels"]
        for key in _head_options(options):
            if options[key] < 1 or channels % options[key]:
                raise ValueError(
                    f"{key} is {options[key]}, which does not divide the {channels} channels of an "
                    "attention layer; give one that does"
                )


def _head_options(options: dict[str, Any]) -> list[str]:
    """The options that decide about the heads of the UNet's attention."""
    if options["num_head_channels"] != -1:
        return ["num_head_channels"]
    return ["num_heads"] + ["num_heads_upsample"] * (options["num_heads_upsample"] != -1)
