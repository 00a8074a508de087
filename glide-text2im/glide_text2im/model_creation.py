"""Models and diffusion processes from options."""

from glide_text2im.defaults import (
    channel_multipliers,
    model_and_diffusion_defaults,
    model_and_diffusion_defaults_upsampler,
)
from glide_text2im.gaussian_diffusion import get_named_beta_schedule
from glide_text2im.respace import SpacedDiffusion
from glide_text2im.text2im_model import (
    InpaintText2ImUNet,
    SuperResInpaintText2ImUnet,
    SuperResText2ImUNet,
    Text2ImUNet,
)
from glide_text2im.timesteps import space_timesteps

__all__ = [
    "create_gaussian_diffusion",
    "create_model",
    "create_model_and_diffusion",
    "model_and_diffusion_defaults",
    "model_and_diffusion_defaults_upsampler",
]


def create_model_and_diffusion(
    *, diffusion_steps: int, noise_schedule: str, timestep_respacing: str, **model_options
) -> tuple[Text2ImUNet, SpacedDiffusion]:
    """The model and the diffusion process for the options of `model_and_diffusion_defaults`."""
    model = create_model(**model_options)
    return model, create_gaussian_diffusion(diffusion_steps, noise_schedule, timestep_respacing)


def create_model(
    *,
    image_size: int,
    num_channels: int,
    num_res_blocks: int,
    channel_mult: str,
    num_heads: int,
    num_head_channels: int,
    num_heads_upsample: int,
    attention_resolutions: str,
    dropout: float,
    text_ctx: int,
    xf_width: int,
    xf_layers: int,
    xf_heads: int,
    xf_final_ln: bool,
    xf_padding: bool,
    use_scale_shift_norm: bool,
    resblock_updown: bool,
    use_fp16: bool,
    cache_text_emb: bool,
    inpaint: bool,
    super_res: bool,
    use_checkpoint: bool = False,
) -> Text2ImUNet:
    """The model for the options, with untrained float32 weights.

    It takes images of any size whose sides are multiples of its `downsampling_factor`:
    `image_size` only says what `channel_mult` and `attention_resolutions` mean. `use_fp16` is
    accepted and changes nothing: the precision follows autocast, or the weights after
    `convert_to_fp16`. `use_checkpoint` switches `activation_checkpointing` on. Under
    `torch.device("meta")` no memory is taken. Raises as `channel_multipliers` does.
    """
    model_class = {
        (False, False): Text2ImUNet,
        (True, False): SuperResText2ImUNet,
        (False, True): InpaintText2ImUNet,
        (True, True): SuperResInpaintText2ImUnet,
    }[super_res, inpaint]
    model = model_class(
        out_channels=6,  # three of noise, three that interpolate the log-variance
        model_channels=num_channels,
        num_res_blocks=num_res_blocks,
        channel_mult=channel_multipliers(image_size, channel_mult),
        attention_rates={image_size // int(size) for size in attention_resolutions.split(",")},
        num_heads=num_heads,
        num_head_channels=num_head_channels,
        num_heads_upsample=num_heads_upsample,
        dropout=dropout,
        use_scale_shift_norm=use_scale_shift_norm,
        resblock_updown=resblock_updown,
        text_ctx=text_ctx,
        xf_width=xf_width,
        xf_layers=xf_layers,
        xf_heads=xf_heads,
        xf_final_ln=xf_final_ln,
        xf_padding=xf_padding,
        cache_text_emb=cache_text_emb,
    )
    model.activation_checkpointing = use_checkpoint
    return model


def create_gaussian_diffusion(
    steps: int, noise_schedule: str, timestep_respacing: str
) -> SpacedDiffusion:
    """The diffusion process of `steps` timesteps, of which `timestep_respacing` keeps some.

    `noise_schedule` is a name that `get_named_beta_schedule` knows, `timestep_respacing` what
    `space_timesteps` takes; "" keeps all steps.
    """
    return SpacedDiffusion(
        use_timesteps=space_timesteps(steps, timestep_respacing or [steps]),
        betas=get_named_beta_schedule(noise_schedule, steps),
    )
