"""What notebooks need to use GLIDE models: making them, their captions, and sampling."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from glide_finetune import weights
from glide_finetune.data import images
from glide_finetune.data.captions import caption_tensors
from glide_finetune.model_options import (
    can_start_from,
    described_model,
    released_options,
    variance_is_stale,
)
from glide_finetune.optimization import freeze
from glide_finetune.sampling import sample
from glide_text2im.download import load_checkpoint
from glide_text2im.gaussian_diffusion import GaussianDiffusion
from glide_text2im.model_creation import create_gaussian_diffusion, create_model_and_diffusion

__all__ = ["get_tokens_and_mask", "get_uncond_tokens_mask", "load_model", "read_image", "sample"]


def load_model(
    glide_path: str = "",
    use_fp16: bool = False,
    freeze_transformer: bool = False,
    freeze_diffusion: bool = False,
    activation_checkpointing: bool = False,
    model_type: str = "base",
    *,
    init: str = "pretrained",
    model_options: dict[str, Any] | None = None,
    device: torch.device | str = "cpu",
) -> tuple[nn.Module, GaussianDiffusion, dict[str, Any]]:
    """Make a GLIDE model with float32 weights, ready to train.

    Its attribute `variance_is_stale` tells `sample` that the weights were tuned without their
    variance, `glide_options` tells `save_model` what it was made with.

    Args:
        glide_path: weights to load, a .pt file; empty follows `init`.
        use_fp16: recorded in the options; training then computes under fp16 autocast.
        freeze_transformer: leave the text encoder out of training.
        freeze_diffusion: leave the UNet out of training.
        activation_checkpointing: recompute activations in the backward pass.
        model_type: base, upsample, base-inpaint or upsample-inpaint. The last two also take weights
            of the first two, and do what those did until they are trained.
        init: pretrained fetches OpenAI's weights of that type, scratch takes random ones.
        model_options: options that replace the released ones; None takes those written beside
            `glide_path`, or else the released ones.
        device: where the weights go.

    Returns:
        The model, its diffusion process of all timesteps, and every option it was made with.

    Raises:
        ValueError: unknown model_type or init, weights of another type or size, or nothing left to
            train.
        DownloadError: OpenAI's weights are neither in the cache nor to be had.
    """
    if init not in ("pretrained", "scratch"):
        raise ValueError(f"init is {init!r}: give pretrained or scratch")
    if model_options is None and glide_path:
        model_options = _options_beside(Path(glide_path).expanduser(), model_type)
    options = {**released_options(model_type), **(model_options or {}), "use_fp16": use_fp16}

    def create() -> nn.Module:
        return create_model_and_diffusion(**options)[0]

    if glide_path:
        model = weights.build_and_load(create, glide_path, device)
    elif init == "pretrained":
        model = weights.build_and_load(create, load_checkpoint(model_type, "cpu"), device)
    else:
        model = create().to(device)
    model.activation_checkpointing = activation_checkpointing
    model.glide_options = options
    model.variance_is_stale = bool(glide_path) and variance_is_stale(Path(glide_path).expanduser())
    freeze(model, transformer=freeze_transformer, diffusion=freeze_diffusion)
    diffusion = create_gaussian_diffusion(
        options["diffusion_steps"], options["noise_schedule"], options["timestep_respacing"]
    )
    return model, diffusion, options


def _options_beside(glide_path: Path, model_type: str) -> dict[str, Any]:
    """The options that a checkpoint was trained with, as far as the JSON beside it tells."""
    kind, options = described_model(glide_path)
    if not can_start_from(kind, model_type):
        raise ValueError(
            f"{glide_path} holds a model of kind {kind}, wanted is {model_type}: give "
            f'model_type="{kind}" or another file'
        )
    return options


def get_tokens_and_mask(
    tokenizer, prompt: str = "", context_len: int = 128
) -> tuple[torch.Tensor, torch.Tensor]:
    """A caption as the model reads it; what is longer than `context_len` tokens is cut.

    Returns:
        tokens, int64 (context_len,), and mask, bool (context_len,), True where a token counts.
    """
    tokens, mask, _ = caption_tensors(tokenizer, prompt, context_len)
    return tokens, mask


def get_uncond_tokens_mask(tokenizer, context_len: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    """The empty caption, which stands for no caption at all: end tokens and a mask of False."""
    return get_tokens_and_mask(tokenizer, "", context_len)


def read_image(path: str | Path, shape: tuple[int, int]) -> torch.Tensor:
    """An image file, cropped at its centre to the aspect of `shape` and resized to it.

    Args:
        path: any image file Pillow reads.
        shape: (width, height) in pixels.

    Returns:
        float32 (1, 3, height, width) in [-1, 1].
    """
    return images.read_image(path, shape)
