"""What steers a sampler: guidance and its rescaling, thresholds, the variance, known pixels."""

import numpy as np
import pytest
import torch
from PIL import Image

from glide_finetune.glide_util import sample
from glide_finetune.guidance import dynamic_threshold, guided, with_posterior_variance
from glide_finetune.repainting import KnownPixels, read_known_pixels
from glide_finetune.sampler_options import SAMPLERS
from glide_text2im.model_creation import create_gaussian_diffusion
from tiny_training import SIDE, tiny_model

ALPHA_BAR = create_gaussian_diffusion(1000, "squaredcos_cap_v2", "").alphas_cumprod
FOLLOWING = [name for name, sampler in SAMPLERS.items() if sampler.follows_guess]


def draw(model, options, **keywords):
    keywords = {"prompt": "a cat", "prediction_respacing": "6", "seeds": [1], **keywords}
    return sample(model, options, SIDE, SIDE, **keywords)


# --------------------------------------------------------------------------------------- rescaling


def velocity(eps, x, timestep):
    a, s = ALPHA_BAR[timestep] ** 0.5, (1 - ALPHA_BAR[timestep]) ** 0.5
    return (eps - s * x) / a


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_rescaling_brings_the_velocity_back_to_its_deviation_without_guidance(share):
    generator = torch.Generator().manual_seed(0)
    x, cond, uncond = torch.randn(3, 2, 3, 8, 8, generator=generator)
    timesteps = torch.tensor([300, 700])

    def model(x, timesteps):
        eps = torch.cat([cond, uncond])
        return torch.cat([eps, torch.zeros_like(eps)], dim=1)

    plain = guided(model, 5.0)(x, timesteps)[:, :3]
    rescaled = guided(model, 5.0, share, ALPHA_BAR)(x, timesteps)[:, :3]
    for image, timestep in enumerate(timesteps.tolist()):
        v, v_cond, got = (
            velocity(eps[image], x[image], timestep) for eps in (plain, cond, rescaled)
        )
        want = share * v * (v_cond.std() / v.std()) + (1 - share) * v
        assert torch.allclose(got, want, atol=1e-4)


def test_rescaling_knows_the_noise_levels_of_half_steps():
    x = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))

    def model(x, timesteps):
        return torch.cat([x.pow(2), x], dim=1)

    low, middle, high = (
        guided(model, 3.0, 1.0, ALPHA_BAR)(x, torch.tensor([t])) for t in (400, 400.5, 401)
    )
    assert torch.allclose(middle, (low + high) / 2, atol=1e-4)


# -------------------------------------------------------------------------------------- thresholds


def test_dynamic_threshold_clips_at_the_quantile_of_each_image_and_divides_by_it():
    image = torch.linspace(-4, 4, 3 * 101 * 1).view(1, 3, 101, 1)
    got = dynamic_threshold(torch.cat([image, image / 8]), 0.5)
    assert torch.allclose(got[0], (image[0] / 2).clamp(-1, 1), atol=0.02)
    assert torch.equal(got[1], image[0] / 8)  # nothing above 1


@pytest.mark.parametrize("sampler", FOLLOWING)
def test_a_threshold_changes_the_pictures(sampler):
    model, _, options = tiny_model()
    plain, limited = (
        draw(model, options, sampler=sampler, guidance_scale=8, threshold=threshold)
        for threshold in (0.0, 0.5)
    )
    assert not torch.allclose(plain, limited)


@pytest.mark.parametrize("sampler", ["plms", "prk"])
@pytest.mark.parametrize("option", [{"threshold": 0.9}, {"cond_fn": lambda x, ts, **_: x}])
def test_samplers_that_follow_the_bare_noise_refuse_what_they_cannot_do(sampler, option):
    model, _, options = tiny_model()
    with pytest.raises(ValueError, match=f"{sampler} does not work with a .*: choose one of ddpm,"):
        draw(model, options, sampler=sampler, **option)


@pytest.mark.parametrize("option", [{"threshold": 1.5}, {"guidance_rescale": -0.1}])
def test_shares_out_of_range_are_refused(option):
    model, _, options = tiny_model()
    with pytest.raises(ValueError, match=r"(threshold|guidance_rescale) is .*: give a number from"):
        draw(model, options, sampler="ddim", **option)


# -------------------------------------------------------------------------------- negative prompts


def test_a_negative_prompt_takes_the_place_of_the_empty_caption():
    model, _, options = tiny_model()
    empty, negative, twice = (
        draw(model, options, sampler="ddim", negative_prompt=text)
        for text in ("", "a dog", "a cat")
    )
    assert not torch.equal(empty, negative)
    # away from the prompt itself is nowhere
    alone = draw(model, options, sampler="ddim", guidance_scale=1)
    assert torch.allclose(twice, alone, atol=1e-4)
    with_negative = draw(model, options, sampler="ddim", guidance_scale=1, negative_prompt="a dog")
    assert torch.equal(with_negative, alone)


# ----------------------------------------------------------------------------------------- cond_fn


@pytest.mark.parametrize("sampler", FOLLOWING)
def test_a_cond_fn_moves_the_pictures_where_it_points(sampler):
    model, _, options = tiny_model()
    seen = []

    def brighter(x, timesteps, **_):
        seen.append(timesteps)
        return torch.full_like(x, 2.0)

    plain, moved = (
        draw(model, options, sampler=sampler, cond_fn=cond_fn, prediction_respacing="15")
        for cond_fn in (None, brighter)
    )
    assert moved.mean() > plain.mean() + 0.01
    assert int(seen[0][0]) == 999
    assert {timesteps.dtype for timesteps in seen} == {torch.int64}


def test_a_cond_fn_is_for_all_images_of_one_pass():
    model, _, options = tiny_model()
    with pytest.raises(ValueError, match="cond_fn guides 2 images at once, 3 are asked for"):
        draw(
            model, options, batch_size=3, seeds=[1, 2, 3], pictures_a_pass=2, sampler="ddim",
            cond_fn=lambda x, ts, **_: x,
        )  # fmt: skip


# ------------------------------------------------------------------------------------ the variance


def test_a_stale_variance_is_replaced_by_that_of_the_posterior(caplog):
    model, _, options = tiny_model()
    with torch.no_grad():  # what the variance head says, as it was never trained
        variance = model.out[2].weight[3:]
        variance.copy_(torch.randn(variance.shape))  # in any memory layout
    keywords = {"sampler": "ddpm", "guidance_scale": 1}
    learned = draw(model, options, **keywords)
    fixed = draw(model, options, learned_variance=False, **keywords)
    assert learned.isfinite().all()
    assert not torch.allclose(fixed, learned)
    ancestral = draw(model, options, **{**keywords, "sampler": "euler_a"})
    assert torch.allclose(fixed, ancestral, atol=0.01)
    # what load_model found out
    model.variance_is_stale = True
    with caplog.at_level("INFO"):
        assert torch.equal(draw(model, options, **keywords), fixed)
    assert [record.message for record in caplog.records] == [
        "ddpm takes the posterior's variance, since the model's own is untrained"
    ]
    assert torch.equal(draw(model, options, learned_variance=True, **keywords), learned)


def test_the_posterior_variance_leaves_the_noise_alone():
    x = torch.randn(2, 6, 4, 4, generator=torch.Generator().manual_seed(0))
    diffusion = create_gaussian_diffusion(1000, "linear", "10")
    t = torch.tensor([3, 7])
    out = diffusion.p_mean_variance(
        with_posterior_variance(lambda noisy, timesteps: x), x[:, :3], t
    )
    plain = diffusion.p_mean_variance(lambda noisy, timesteps: x, x[:, :3], t)
    assert torch.equal(out["pred_xstart"], plain["pred_xstart"])
    want = torch.from_numpy(diffusion.posterior_variance[[3, 7]]).float().view(-1, 1, 1, 1)
    assert torch.allclose(out["variance"], want.expand_as(x[:, :3]), rtol=1e-4)


# ------------------------------------------------------------------------- images of their own seed


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_pictures_of_seeds_do_not_depend_on_the_size_of_a_pass(sampler):
    model, _, options = tiny_model()
    keywords = {"sampler": sampler, "prompt": ["a cat", "a dog"], "batch_size": 2}
    seeds = [3, 1, 4, 1]
    torch.manual_seed(0)
    state = torch.get_rng_state()
    together = draw(model, options, seeds=seeds, **keywords)
    for size in (1, 3):
        torch.manual_seed(size)
        apart = draw(model, options, seeds=seeds, pictures_a_pass=size, **keywords)
        assert torch.allclose(together, apart, atol=1e-3)
    alone = draw(model, options, sampler=sampler, prompt="a dog", seeds=[4])
    assert torch.allclose(together[2:3], alone, atol=1e-3)
    assert not torch.allclose(together[0], together[1], atol=0.01)
    torch.set_rng_state(state)


def test_passes_limit_how_much_the_model_sees_at_once():
    model, _, options = tiny_model()
    sizes = []
    model.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    torch.manual_seed(0)
    apart = draw(model, options, batch_size=5, seeds=None, sampler="ddim", pictures_a_pass=2)
    assert set(sizes) == {4, 2}  # with as many empty captions
    torch.manual_seed(0)
    together = draw(model, options, batch_size=5, seeds=None, sampler="ddim")
    assert torch.allclose(apart, together, atol=1e-3)


def test_a_wrong_number_of_seeds_is_a_clear_error():
    model, _, options = tiny_model()
    with pytest.raises(ValueError, match="seeds holds 1 seeds for 2 images: give 2"):
        draw(model, options, batch_size=2)


# ------------------------------------------------------------------------------------ known pixels


def known(seed=0):
    generator = torch.Generator().manual_seed(seed)
    levels = torch.randint(0, 256, (1, 3, SIDE, SIDE), generator=generator)
    mask = torch.rand(1, 1, SIDE, SIDE, generator=generator) < 0.5
    return levels / 127.5 - 1, mask.float()


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("kind", ["base-inpaint", "upsample-inpaint"])
def test_known_pixels_come_out_as_they_are(kind, sampler):
    model, _, options = tiny_model(kind)
    image, mask = known()
    keywords = {"inpaint_image": image, "inpaint_mask": mask, "sampler": sampler}
    if kind.startswith("upsample"):
        keywords |= {"upsample_enabled": True, "image_to_upsample": torch.zeros(1, 3, 2, 2)}
    calls = []
    model.register_forward_pre_hook(lambda _, args, kwargs: calls.append(kwargs), with_kwargs=True)
    drawn = draw(model, options, batch_size=2, seeds=[1, 2], guidance_scale=1, **keywords)
    same = (drawn == image).all(dim=1, keepdim=True)
    assert same[mask.expand(2, 1, SIDE, SIDE) == 1].all()
    assert not same[mask.expand(2, 1, SIDE, SIDE) == 0].any()
    assert torch.equal(calls[0]["inpaint_mask"], mask.expand(2, 1, SIDE, SIDE))
    assert torch.equal(calls[0]["inpaint_image"], (image * mask).expand(2, 3, SIDE, SIDE))


def test_a_base_model_paints_on_a_picture_with_a_sampler_that_looks_at_it_by_default():
    model, _, options = tiny_model("base-inpaint")
    image, mask = known()
    keywords = {"inpaint_image": image, "inpaint_mask": mask}
    default, ddim, plms = (
        draw(model, options, sampler=sampler, **keywords) for sampler in ("", "ddim", "plms")
    )
    assert torch.equal(default, ddim)
    assert not torch.equal(default, plms)


@pytest.mark.parametrize("guidance_scale", [1, 3])
def test_known_pixels_are_put_back_at_every_step(guidance_scale):
    """What the model sees where nothing is left to be drawn is the image with the right noise."""
    model, _, options = tiny_model("base-inpaint")
    image, _ = known()
    seen = []
    model.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    draw(
        model, options, sampler="dpm++2m", guidance_scale=guidance_scale, inpaint_image=image,
        inpaint_mask=torch.ones(1, 1, SIDE, SIDE),
    )  # fmt: skip
    alpha_bar = float(ALPHA_BAR[0])
    clean = alpha_bar**0.5 * image
    assert (seen[-1][:1] - clean).abs().max() < 5 * (1 - alpha_bar) ** 0.5


def test_known_pixels_need_a_model_for_inpainting_and_both_parts():
    image, mask = known()
    model, _, options = tiny_model()
    with pytest.raises(ValueError, match="this model is not made for inpainting"):
        draw(model, options, inpaint_image=image, inpaint_mask=mask)
    model, _, options = tiny_model("base-inpaint")
    with pytest.raises(ValueError, match="go together: give both"):
        draw(model, options, inpaint_image=image)
    with pytest.raises(ValueError, match=r"inpaint_mask has shape \(1, 1, 4, 4\)"):
        draw(model, options, inpaint_image=image, inpaint_mask=torch.ones(1, 1, 4, 4))
    with pytest.raises(ValueError, match="inpaint_image holds 3 for 1: give 1 or 1"):
        draw(model, options, inpaint_image=image.expand(3, -1, -1, -1), inpaint_mask=mask)


def test_files_of_image_and_mask_are_cropped_alike_and_white_is_not_known(tmp_path):
    """Left half black, right half white, on a wide image of which the centre is cut."""
    pixels = np.random.default_rng(0).integers(0, 256, (32, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    mask = np.zeros((32, 64), dtype=np.uint8)
    mask[:, 36:] = 255
    mask[0, 16] = 200  # one light pixel in the block of a dark one
    Image.fromarray(mask).save(tmp_path / "mask.png")
    got = read_known_pixels(tmp_path / "image.png", tmp_path / "mask.png", (8, 8))
    want = torch.ones(8, 8)
    want[:, 5:] = 0
    want[0, 0] = 0
    assert torch.equal(got.mask[0, 0], want)
    assert got.image.shape == (1, 3, 8, 8)


def test_a_mask_with_nothing_to_paint_is_refused(tmp_path):
    image = Image.new("RGB", (20, 10))
    image.save(tmp_path / "black.png")
    image.paste("white", (0, 0, 4, 10))  # beside the centre, which alone is drawn
    image.save(tmp_path / "outside.png")
    for name in ("black.png", "outside.png"):
        with pytest.raises(ValueError, match=f"{name} has nothing white in what is drawn"):
            read_known_pixels(tmp_path / "black.png", tmp_path / name, (4, 4))


def test_files_to_paint_on_may_lie_in_the_home_folder_and_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    Image.new("RGB", (8, 8), "white").save(tmp_path / "both.png")
    assert not read_known_pixels("~/both.png", "~/both.png", (8, 8)).mask.any()
    with pytest.raises(ValueError, match=r"cannot read .*none\.png"):
        read_known_pixels("~/none.png", "~/both.png", (8, 8))


def test_a_mask_of_another_size_is_refused(tmp_path):
    for name, size in (("image.png", (20, 10)), ("mask.png", (10, 20))):
        Image.new("RGB", size).save(tmp_path / name)
    with pytest.raises(ValueError, match=r"mask\.png has 10x20 pixels, the image .* 20x10"):
        read_known_pixels(tmp_path / "image.png", tmp_path / "mask.png", (4, 4))


def test_known_pixels_of_a_part_belong_to_its_pictures():
    image = torch.arange(3.0).view(3, 1, 1, 1).expand(3, 3, 2, 2)
    pixels = KnownPixels(image, torch.ones(1, 1, 2, 2)).expanded(3)
    part = pixels.part(slice(1, 3)).put_back(torch.zeros(2, 3, 2, 2))
    assert part[:, 0, 0, 0].tolist() == [1.0, 2.0]
