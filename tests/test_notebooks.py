"""What the three published notebooks do, in their order, with small models and few steps."""

from pathlib import Path

import pytest
import torch
import yaml

from glide_text2im import download
from glide_text2im.clip.model_creation import create_clip_model
from glide_text2im.model_creation import (
    create_model_and_diffusion,
    model_and_diffusion_defaults,
    model_and_diffusion_defaults_upsampler,
)
from golden_data import fill, load

HAS_CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_CUDA else "cpu")
FILES = {
    "base": "base.pt",
    "upsample": "upsample.pt",
    "base-inpaint": "base_inpaint.pt",
    "upsample-inpaint": "upsample_inpaint.pt",
    "clip/image-enc": "clip_image_enc.pt",
    "clip/text-enc": "clip_text_enc.pt",
}
BATCH, SIZE, UPSAMPLED_SIZE = 2, 16, 64
SMALL = {
    "num_channels": 32,
    "num_res_blocks": 1,
    "num_head_channels": 16,
    "text_ctx": 12,
    "xf_width": 32,
    "xf_layers": 1,
    "xf_heads": 2,
}
SMALL_BASE = SMALL | {"image_size": SIZE, "channel_mult": "1,2", "attention_resolutions": "8"}
SMALL_UPSAMPLER = SMALL | {
    "image_size": UPSAMPLED_SIZE,
    "channel_mult": "1,1,1,2",
    "attention_resolutions": "8",
}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A folder for checkpoints; what is not in it cannot be had."""

    def no_network(url, *args, **kwargs):
        raise AssertionError(f"{url} should have been in the cache")

    monkeypatch.setattr(download, "transfer", no_network)
    return tmp_path


def release(cache, name, module):
    """Put weights for `module` where a download of `name` would; returns them."""
    weights = {key: t.clone() for key, t in fill(module.cpu()).state_dict().items()}
    torch.save(weights, cache / FILES[name])
    return weights


def create(cache, name, timestep_respacing):
    """A model with the weights of a released name, and its diffusion and options."""
    upsample, inpaint = name.startswith("upsample"), name.endswith("inpaint")
    options = (
        model_and_diffusion_defaults_upsampler() | SMALL_UPSAMPLER
        if upsample
        else model_and_diffusion_defaults() | SMALL_BASE
    )
    options["inpaint"] = inpaint
    options["use_fp16"] = HAS_CUDA
    options["timestep_respacing"] = timestep_respacing
    weights = release(cache, name, create_model_and_diffusion(**options)[0])

    model, diffusion = create_model_and_diffusion(**options)
    model.eval()
    if HAS_CUDA:
        model.convert_to_fp16()
    model.to(DEVICE)
    model.load_state_dict(download.load_checkpoint(name, DEVICE, cache_dir=cache))
    assert sum(p.numel() for p in model.parameters()) == sum(t.numel() for t in weights.values())
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor.cpu(), weights[key].to(tensor.dtype)), key
    return model, diffusion, options


def text(model, options, prompt, *, with_empty):
    """Tokens and mask of a batch of the prompt, then of as many empty prompts."""
    tokens = model.tokenizer.encode(prompt)
    tokens, mask = model.tokenizer.padded_tokens_and_mask(tokens, options["text_ctx"])
    empty_tokens, empty_mask = model.tokenizer.padded_tokens_and_mask([], options["text_ctx"])
    empty = BATCH if with_empty else 0
    return {
        "tokens": torch.tensor([tokens] * BATCH + [empty_tokens] * empty, device=DEVICE),
        "mask": torch.tensor(
            [mask] * BATCH + [empty_mask] * empty, dtype=torch.bool, device=DEVICE
        ),
    }


def guided(model, scale):
    def model_fn(x_t, ts, **kwargs):
        half = x_t[: len(x_t) // 2]
        out = model(torch.cat([half, half]), ts, **kwargs)
        eps, rest = out[:, :3], out[:, 3:]
        cond, uncond = eps.chunk(2)
        mixed = uncond + scale * (cond - uncond)
        return torch.cat([torch.cat([mixed, mixed]), rest], dim=1)

    return model_fn


def draw_base(model, diffusion, options, prompt, *, scale=3.0, denoised_fn=None, **conditions):
    torch.manual_seed(0)
    kwargs = text(model, options, prompt, with_empty=True) | conditions
    model.del_cache()
    samples = diffusion.p_sample_loop(
        guided(model, scale),
        (2 * BATCH, 3, SIZE, SIZE),
        device=DEVICE,
        clip_denoised=True,
        progress=True,
        model_kwargs=kwargs,
        cond_fn=None,
        denoised_fn=denoised_fn,
    )[:BATCH]
    model.del_cache()
    return samples


def draw_upsampled(loop, model, options, samples, denoised_fn=None, **conditions):
    torch.manual_seed(0)
    shape = (BATCH, 3, UPSAMPLED_SIZE, UPSAMPLED_SIZE)
    kwargs = text(model, options, "a corgi", with_empty=False) | conditions
    kwargs["low_res"] = ((samples + 1) * 127.5).round() / 127.5 - 1
    model.del_cache()
    upsampled = loop(
        model,
        shape,
        noise=torch.randn(shape, device=DEVICE) * 0.997,
        device=DEVICE,
        clip_denoised=True,
        progress=True,
        model_kwargs=kwargs,
        cond_fn=None,
        denoised_fn=denoised_fn,
    )
    model.del_cache()
    return upsampled


def assert_images(images, size):
    assert images.shape == (BATCH, 3, size, size)
    assert images.dtype == torch.float32
    assert images.abs().max() < 1.01  # CLIP moves the last step's mean after the clipping


def largest_difference(a, b):
    return float((a - b).abs().max())


def test_the_text_notebook_draws_and_upsamples_what_the_prompt_says(cache, capsys):
    base = create(cache, "base", "10")
    upsampler, upsampler_diffusion, upsampler_options = create(cache, "upsample", "fast27")

    samples = draw_base(*base, "an oil painting of a corgi")
    assert_images(samples, SIZE)
    assert torch.equal(draw_base(*base, "an oil painting of a corgi"), samples)
    assert largest_difference(draw_base(*base, "a red bus"), samples) > 1e-3
    assert largest_difference(draw_base(*base, "a red bus", scale=0.0), samples) > 1e-3
    assert "10/10" in capsys.readouterr().err

    loop = upsampler_diffusion.ddim_sample_loop
    upsampled = draw_upsampled(loop, upsampler, upsampler_options, samples)
    assert_images(upsampled, UPSAMPLED_SIZE)
    other = draw_upsampled(loop, upsampler, upsampler_options, -samples)
    assert largest_difference(other, upsampled) > 1e-3
    assert "27/27" in capsys.readouterr().err


def known_part(size, copies):
    """An image whose lower part is unknown, as the inpainting models take it, and a function that
    puts its known pixels back."""
    generator = torch.Generator().manual_seed(1)
    image = (2 * torch.rand(1, 3, size, size, generator=generator) - 1).to(DEVICE)
    mask = torch.ones(1, 1, size, size, device=DEVICE)
    mask[:, :, size // 2 :] = 0
    conditions = {
        "inpaint_image": (image * mask).repeat(copies, 1, 1, 1),
        "inpaint_mask": mask.repeat(copies, 1, 1, 1),
    }

    def denoised_fn(x_start):
        known = conditions["inpaint_mask"]
        return x_start * (1 - known) + conditions["inpaint_image"] * known

    return conditions, denoised_fn


def assert_filled_in(images, conditions):
    known = conditions["inpaint_mask"][:BATCH].bool().expand_as(images)
    image = conditions["inpaint_image"][:BATCH]
    assert torch.allclose(images[known], image[known], atol=1e-6)
    assert images[~known].std() > 0.01


def test_the_inpainting_notebook_keeps_the_known_pixels_in_both_stages(cache):
    base = create(cache, "base-inpaint", "10")
    upsampler, diffusion, options = create(cache, "upsample-inpaint", "fast27")

    conditions, denoised_fn = known_part(SIZE, 2 * BATCH)
    samples = draw_base(*base, "a corgi in a field", denoised_fn=denoised_fn, **conditions)
    assert_images(samples, SIZE)
    assert_filled_in(samples, conditions)

    conditions, denoised_fn = known_part(UPSAMPLED_SIZE, BATCH)
    upsampled = draw_upsampled(
        diffusion.p_sample_loop, upsampler, options, samples, denoised_fn, **conditions
    )
    assert_images(upsampled, UPSAMPLED_SIZE)
    assert_filled_in(upsampled, conditions)


def test_the_clip_guided_notebook_draws_what_clip_finds_more_similar(cache):
    model, diffusion, options = create(cache, "base", "10")
    small_clip = Path(cache, "clip.yaml")
    small_clip.write_text(yaml.safe_dump(load("clip_tiny")[0]["configs"]["a"]))
    reference = create_clip_model(small_clip)
    release(cache, "clip/image-enc", reference.image_encoder)
    release(cache, "clip/text-enc", reference.text_encoder)

    clip = create_clip_model(small_clip, device=DEVICE)
    for encoder, name in (
        (clip.image_encoder, "clip/image-enc"),
        (clip.text_encoder, "clip/text-enc"),
    ):
        encoder.load_state_dict(download.load_checkpoint(name, DEVICE, cache_dir=cache))

    def draw(cond_fn):
        torch.manual_seed(0)
        model.del_cache()
        samples = diffusion.p_sample_loop(
            model,
            (BATCH, 3, SIZE, SIZE),
            device=DEVICE,
            clip_denoised=True,
            progress=True,
            model_kwargs=text(model, options, prompt, with_empty=False),
            cond_fn=cond_fn,
        )
        model.del_cache()
        return samples

    def similarity(images):
        t = torch.zeros(BATCH, dtype=torch.int64, device=DEVICE)
        with torch.no_grad():
            embeddings = clip.image_embeddings(images, t), clip.text_embeddings([prompt] * BATCH)
        return float((embeddings[0] * embeddings[1]).sum(dim=1).mean())

    prompt = "a corgi in a field"
    plain = draw(None)
    weak, strong = (draw(clip.cond_fn([prompt] * BATCH, scale)) for scale in (3.0, 30.0))
    assert_images(weak, SIZE)
    similarities = [similarity(images) for images in (plain, weak, strong)]
    print("similarity without guidance, with it, and ten times stronger:", similarities)
    assert similarities == sorted(similarities)
    assert similarities[2] > similarities[0] + 0.02
