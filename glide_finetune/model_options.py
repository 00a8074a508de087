"""Which options a model is built with: the released sizes, smaller presets, single changes.

Nothing here imports torch.
"""

from typing import Any

from glide_text2im.defaults import (
    model_and_diffusion_defaults,
    model_and_diffusion_defaults_upsampler,
)

MODEL_TYPES = ("base", "upsample", "base-inpaint", "upsample-inpaint")

# What each preset changes of the released options, for the base model and for the upsampler.
MODEL_PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "glide": {"base": {}, "upsample": {}},
    "small": {
        "base": {
            "num_channels": 64,
            "num_res_blocks": 2,
            "num_head_channels": 32,
            "attention_resolutions": "16,8",
            "xf_width": 192,
            "xf_layers": 4,
            "xf_heads": 6,
        },
        "upsample": {
            "num_channels": 64,
            "num_res_blocks": 1,
            "num_head_channels": 32,
            "attention_resolutions": "16,8",
            "xf_width": 192,
            "xf_layers": 4,
            "xf_heads": 6,
        },
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


def training_options(model_type: str, preset: str, changes: dict[str, Any]) -> dict[str, Any]:
    """Every option of the model to train: released ones, the preset's, then single changes."""
    size = MODEL_PRESETS[preset]["upsample" if model_type.startswith("upsample") else "base"]
    return {**released_options(model_type), **size, **changes}


def parse_model_option(text: str) -> tuple[str, Any]:
    """One KEY=VALUE of --model_options, the value in the type of the key's default.

    Raises:
        ValueError: no "=", an unknown key, or a value of another type.
    """
    defaults = model_and_diffusion_defaults()
    key, separator, value = text.partition("=")
    if not separator or key not in defaults:
        raise ValueError(f"{text!r} is not KEY=VALUE with a KEY of {', '.join(sorted(defaults))}")
    kind = type(defaults[key])
    if kind is bool:
        if value.lower() not in ("true", "false"):
            raise ValueError(f"{key} is True or False, not {value!r}")
        return key, value.lower() == "true"
    return key, kind(value)
