"""The options of the released models, and what follows from them without torch."""

from typing import Any

NORM_GROUPS = 32  # of every group normalisation in the UNet; they divide all its channels
NORM_EPS = 1e-5  # added to the variance of each group

# Channels of every level of the UNet, as multiples of num_channels, for channel_mult "".
CHANNEL_MULTIPLIERS = {
    64: (1, 2, 3, 4),
    128: (1, 1, 2, 3, 4),
    256: (1, 1, 2, 2, 4, 4),
}


def model_and_diffusion_defaults() -> dict[str, Any]:
    """The options of the released base model, which draws 64x64 images.

    `attention_resolutions` are image sizes in pixels at `image_size`; `num_head_channels` other
    than -1 overrides `num_heads`; `num_heads_upsample` -1 means the same as `num_heads`.
    """
    return {
        "image_size": 64,
        "num_channels": 192,
        "num_res_blocks": 3,
        "channel_mult": "",
        "num_heads": 1,
        "num_head_channels": 64,
        "num_heads_upsample": -1,
        "attention_resolutions": "32,16,8",
        "dropout": 0.1,
        "text_ctx": 128,
        "xf_width": 512,
        "xf_layers": 16,
        "xf_heads": 8,
        "xf_final_ln": True,
        "xf_padding": True,
        "diffusion_steps": 1000,
        "noise_schedule": "squaredcos_cap_v2",
        "timestep_respacing": "",
        "use_scale_shift_norm": True,
        "resblock_updown": True,
        "use_fp16": True,
        "cache_text_emb": False,
        "inpaint": False,
        "super_res": False,
    }


def model_and_diffusion_defaults_upsampler() -> dict[str, Any]:
    """The options of the released upsampler, which turns 64x64 images into 256x256 ones."""
    return model_and_diffusion_defaults() | {
        "image_size": 256,
        "num_res_blocks": 2,
        "noise_schedule": "linear",
        "super_res": True,
    }


def channel_multipliers(image_size: int, channel_mult: str) -> tuple[int, ...]:
    """Channels of every level of the UNet, as multiples of num_channels.

    Raises ValueError for "" at a size that no released model has, and for text that is not a list
    of whole numbers; AssertionError where the number of levels does not fit the image size.
    """
    if channel_mult == "":
        if image_size not in CHANNEL_MULTIPLIERS:
            known = ", ".join(map(str, CHANNEL_MULTIPLIERS))
            raise ValueError(
                f"channel_mult '' has a meaning for image_size {known} only, not for {image_size}: "
                "give one like '1,2,3'"
            )
        return CHANNEL_MULTIPLIERS[image_size]
    multipliers = tuple(int(part) for part in channel_mult.split(","))
    if 2 ** (len(multipliers) + 2) != image_size:
        raise AssertionError(
            f"channel_mult '{channel_mult}' has {len(multipliers)} levels, which is for image_size "
            f"{2 ** (len(multipliers) + 2)}, not {image_size}"
        )
    return multipliers


def downsampling_factor(image_size: int, channel_mult: str) -> int:
    """Image sides must be multiples of this many pixels. Raises as `channel_multipliers` does."""
    return 2 ** (len(channel_multipliers(image_size, channel_mult)) - 1)
