"""Sampling: pictures from a trained model, a caption, and what else is to guide it."""

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from glide_finetune.data.captions import caption_tensors
from glide_finetune.data.images import read_image
from glide_finetune.evaluation import evaluation_mode
from glide_finetune.guidance import dynamic_threshold, guided, with_posterior_variance
from glide_finetune.repainting import KnownPixels, read_known_pixels
from glide_finetune.sampler_options import check_sampler
from glide_finetune.samplers import LOOPS, NoisePerImage
from glide_text2im.diffusion_process import CondFn, DenoisedFn
from glide_text2im.model_creation import create_gaussian_diffusion

logger = logging.getLogger(__name__)

STALE_VARIANCE = "ddpm takes the posterior's variance, since the model's own is untrained"

PICTURES_A_PASS = 16  # drawn at once, so that memory does not depend on how many there are


@contextlib.contextmanager
def text_cached(model: nn.Module) -> Iterator[None]:
    """While open, `model` encodes its captions once and keeps the result between its calls."""
    before = model.cache_text_emb
    model.cache_text_emb = True
    model.del_cache()
    try:
        yield
    finally:
        model.cache_text_emb = before
        model.del_cache()


def sample(
    glide_model: nn.Module,
    glide_options: dict[str, Any],
    side_x: int,
    side_y: int,
    prompt: str | Sequence[str] = "",
    batch_size: int = 1,
    guidance_scale: float = 4,
    device: torch.device | str = "cpu",
    prediction_respacing: str = "100",
    upsample_enabled: bool = False,
    image_to_upsample: str | Path | torch.Tensor = "",
    upsample_temp: float = 0.997,
    *,
    upscale_factor: int = 4,
    sampler: str = "",
    negative_prompt: str = "",
    guidance_rescale: float = 0.0,
    threshold: float = 0.0,
    seeds: Sequence[int] | None = None,
    pictures_a_pass: int = PICTURES_A_PASS,
    inpaint_image: str | Path | torch.Tensor = "",
    inpaint_mask: str | Path | torch.Tensor = "",
    cond_fn: CondFn | None = None,
    learned_variance: bool | None = None,
    progress: bool = False,
) -> torch.Tensor:
    """Draw images.

    The model's mode, its gradients and whether it caches its text are the same afterwards.

    Args:
        glide_model: a base model or, with `upsample_enabled`, an upsampler, on `device`.
        glide_options: the options it was made with.
        side_x: width of the images that come out, for the upsampler too; side_y their height.
        prompt: the caption, or several, each drawn `batch_size` times.
        batch_size: images of each caption.
        guidance_scale: of classifier-free guidance; 1 is none. The upsampler goes without.
        prediction_respacing: the timesteps to use, as for `space_timesteps`.
        image_to_upsample: for the upsampler, a file, or float32 (n, 3, h, w) in [-1, 1] with n
            equal to 1 or to the number of images that come out.
        upsample_temp: the upsampler's start noise is multiplied by it.
        upscale_factor: a file is read at the output size divided by it.
        sampler: a name in `sampler_options.SAMPLERS`; by default plms for the base model, and ddim
            for the upsampler and on known pixels, of which plms takes no notice. ddpm alone uses
            the learned variance.
        negative_prompt: what guidance leads away from, instead of the empty caption. Without
            guidance it has no effect.
        guidance_rescale: see `guided`; 0 is none.
        threshold: quantile of `dynamic_threshold`, such as 0.995; 0 is none.
        seeds: one for each image that comes out. All its noise then follows from its own seed,
            so it is the same whatever it is drawn with. None draws from torch's random state.
        pictures_a_pass: images that are drawn at once; more take several passes.
        inpaint_image, inpaint_mask: for inpainting models, what is known of the images, see
            `read_known_pixels`; these pixels come out as they are.
        cond_fn: guides as in `GaussianDiffusion`, such as that of a noise-aware CLIP, for all
            images in one pass.
        learned_variance: whether ddpm trusts the model's variance or takes the posterior's. None
            trusts it unless `load_model` found that it was left untrained, which is then logged.
        progress: show a bar for every pass.

    Returns:
        float32 (captions times batch_size, 3, side_y, side_x) in [-1, 1].

    Raises:
        ValueError: an unknown sampler, or one that cannot do what is asked; a share out of range;
            a wrong number of seeds or low-res images; an upsampler without an image; known pixels
            for a model that is not made for inpainting, or of another size.
    """
    paints_on_picture = torch.is_tensor(inpaint_image) or bool(inpaint_image)
    name = sampler or ("ddim" if upsample_enabled or paints_on_picture else "plms")
    chosen = check_sampler(name, {"a cond_fn": cond_fn is not None, "a threshold": bool(threshold)})
    _check_ranges(
        {"guidance_rescale": guidance_rescale, "threshold": threshold},
        {
            "batch_size": batch_size,
            "side_x": side_x,
            "side_y": side_y,
            "pictures_a_pass": pictures_a_pass,
        },
    )
    if glide_options.get("super_res", upsample_enabled) != upsample_enabled:
        kind = "a base model" if upsample_enabled else "an upsampler"
        raise ValueError(f"upsample_enabled is {upsample_enabled}, but the model is {kind}")
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not prompts:
        raise ValueError("there is no caption: give prompt a text, which may be empty, or several")
    captions = [caption for caption in prompts for _ in range(batch_size)]
    count = len(captions)
    if seeds is not None and len(seeds) != count:
        raise ValueError(f"seeds holds {len(seeds)} seeds for {count} images: give {count}")
    if cond_fn is not None and count > pictures_a_pass:
        raise ValueError(
            f"cond_fn guides {pictures_a_pass} images at once, {count} are asked for: raise "
            "pictures_a_pass, or draw fewer at once"
        )
    full, diffusion = (
        create_gaussian_diffusion(
            glide_options["diffusion_steps"], glide_options["noise_schedule"], respacing
        )
        for respacing in ("", prediction_respacing)
    )
    with_guidance = guidance_scale != 1 and not upsample_enabled
    network: Callable[..., torch.Tensor] = glide_model
    if with_guidance:
        network = guided(glide_model, guidance_scale, guidance_rescale, full.alphas_cumprod)
    if name == "ddpm" and not _trusts_variance(glide_model, learned_variance):
        network = with_posterior_variance(network)

    given: dict[str, torch.Tensor] = {}
    if upsample_enabled:
        given["low_res"] = _low_res(image_to_upsample, side_x, side_y, upscale_factor, count)
    known = _known_pixels(glide_options, inpaint_image, inpaint_mask, (side_x, side_y), count)
    if known:
        given |= {"inpaint_image": known.image * known.mask, "inpaint_mask": known.mask}
    shape = (count, 3, side_y, side_x)
    noise = torch.randn(shape, device=device) if seeds is None else None
    pictures = []
    with evaluation_mode(glide_model):
        for first in range(0, count, pictures_a_pass):
            part = slice(first, first + pictures_a_pass)
            keywords: dict[str, Any] = {}
            if seeds is None:
                start = noise[part]
            else:
                draw_noise = NoisePerImage(seeds[part])
                start = draw_noise(torch.empty(shape, device=device)[part])
                if chosen.stochastic:
                    keywords["noise_like"] = draw_noise
            conditions = _text(
                glide_model, glide_options, captions[part], device,
                instead=negative_prompt if with_guidance else None,
            )  # fmt: skip
            for key, value in given.items():
                rows = value[part].to(device)
                conditions[key] = torch.cat([rows, rows]) if with_guidance else rows
            with text_cached(glide_model):
                drawn = LOOPS[name](
                    diffusion,
                    network,
                    start.shape,
                    noise=start * upsample_temp if upsample_enabled else start,
                    denoised_fn=_denoised_fn(threshold, known and known.part(part).to(device)),
                    cond_fn=cond_fn,
                    model_kwargs=conditions,
                    device=device,
                    progress=progress,
                    **keywords,
                )
            pictures.append(drawn.clamp(-1, 1))
    drawn = torch.cat(pictures)
    return known.put_back(drawn) if known else drawn


def _check_ranges(shares: dict[str, float], counts: dict[str, int]) -> None:
    for name, share in shares.items():
        if not 0 <= share <= 1:
            raise ValueError(f"{name} is {share}: give a number from 0 to 1")
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} is {count}: give 1 or more")


def _trusts_variance(model: nn.Module, asked: bool | None) -> bool:
    """Whether ddpm takes the model's variance; None asks what `load_model` found of it."""
    if asked is not None:
        return asked
    if is_stale := getattr(model, "variance_is_stale", False):
        logger.info(STALE_VARIANCE)
    return not is_stale


def _denoised_fn(threshold: float, known: KnownPixels | None) -> DenoisedFn | None:
    """What to make of each guess of x_0."""
    if not threshold and known is None:
        return None

    def improved(x_start: torch.Tensor) -> torch.Tensor:
        if threshold:
            x_start = dynamic_threshold(x_start, threshold)
        return x_start if known is None else known.put_back(x_start)

    return improved


def _known_pixels(
    options: dict[str, Any],
    image: str | Path | torch.Tensor,
    mask: str | Path | torch.Tensor,
    size: tuple[int, int],
    count: int,
) -> KnownPixels | None:
    """What is known of each of `count` images of `size`; None if nothing is."""
    given = [torch.is_tensor(source) or bool(source) for source in (image, mask)]
    if not any(given):
        return None
    if not all(given):
        raise ValueError("inpaint_image and inpaint_mask go together: give both")
    if not options["inpaint"]:
        raise ValueError(
            "this model is not made for inpainting: give one of kind base-inpaint or "
            "upsample-inpaint"
        )
    return read_known_pixels(image, mask, size).expanded(count)


def _text(
    model: nn.Module,
    options: dict[str, Any],
    captions: list[str],
    device: torch.device | str,
    instead: str | None,
) -> dict[str, torch.Tensor]:
    """tokens and mask of the captions, followed by `instead` as often, if that is not None."""
    if not options["xf_width"]:
        return {}
    captions = captions if instead is None else captions + [instead] * len(captions)
    rows = [caption_tensors(model.tokenizer, c, options["text_ctx"])[:2] for c in captions]
    tokens, masks = zip(*rows, strict=True)
    return {"tokens": torch.stack(tokens).to(device), "mask": torch.stack(masks).to(device)}


def _low_res(
    image: str | Path | torch.Tensor, side_x: int, side_y: int, factor: int, count: int
) -> torch.Tensor:
    """What the upsampler starts from, one for each of `count` images."""
    if not torch.is_tensor(image):
        if not image:
            raise ValueError("the upsampler needs an image to upsample: give image_to_upsample")
        image = read_image(image, (side_x // factor, side_y // factor))
    if len(image) not in (1, count):
        raise ValueError(
            f"image_to_upsample holds {len(image)} images for {count} to draw: give 1 or {count}"
        )
    # the levels of an 8-bit image, which is what the upsampler was trained on
    image = ((image + 1) * 127.5).round() / 127.5 - 1
    return image.expand(count, -1, -1, -1)
