"""How the samplers behave where no golden numbers are needed."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn

from glide_text2im.gaussian_diffusion import GaussianDiffusion, get_named_beta_schedule
from glide_text2im.respace import SpacedDiffusion, space_timesteps

SHAPE = (2, 3, 4, 4)
SAMPLERS = ("p", "ddim", "ddim_reverse", "prk", "plms")
DATA_STD = 0.3  # of the Gaussian images that `exact_model` knows


def spaced(respacing, schedule="squaredcos_cap_v2"):
    betas = get_named_beta_schedule(schedule, 1000)
    return SpacedDiffusion(space_timesteps(1000, respacing), betas=betas)


ALPHA_BAR = torch.from_numpy(spaced("1000").alphas_cumprod)


def level(ts):
    """alpha-bar of original timesteps, also fractional ones."""
    low, high = ALPHA_BAR[ts.long()], ALPHA_BAR[ts.ceil().long() if ts.is_floating_point() else ts]
    return torch.lerp(low, high, ts.double() % 1).view(-1, 1, 1, 1)


def exact_model(x, ts):
    """The optimal denoiser of images whose values are independent normals of std DATA_STD."""
    alpha_bar = level(ts)
    eps = torch.sqrt(1 - alpha_bar) * x / (alpha_bar * DATA_STD**2 + 1 - alpha_bar)
    return torch.cat([eps, torch.ones_like(eps)], dim=1)


def std_at(alpha_bar):
    return math.sqrt(alpha_bar * DATA_STD**2 + 1 - alpha_bar)


class TinyModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(3, 6, 1)

    def forward(self, x, ts):
        assert not torch.is_grad_enabled()
        return self.convolution(x)


def run(diffusion, sampler, model=exact_model, noise=None, **options):
    return getattr(diffusion, f"{sampler}_sample_loop")(model, SHAPE, noise=noise, **options)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_loop_returns_the_last_sample_of_its_progressive_form(sampler):
    diffusion, noise = spaced("10"), torch.randn(SHAPE)
    torch.manual_seed(0)
    progressive = getattr(diffusion, f"{sampler}_sample_loop_progressive")
    *_, last = progressive(exact_model, SHAPE, noise, False, progress=False)
    torch.manual_seed(0)
    loop = getattr(diffusion, f"{sampler}_sample_loop")

    assert torch.equal(loop(exact_model, SHAPE, noise, False, progress=False), last["sample"])


@pytest.mark.parametrize("sampler", ["p", "ddim", "prk", "plms"])
def test_the_seed_decides_the_images(sampler):
    images = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        images.append(run(spaced("10"), sampler))
    assert torch.equal(images[0], images[1])
    assert not torch.allclose(images[0], images[2])


def test_without_noise_the_start_is_torch_randn_of_the_shape():
    torch.manual_seed(3)
    drawn = run(spaced("10"), "plms")
    torch.manual_seed(3)
    assert torch.equal(drawn, run(spaced("10"), "plms", noise=torch.randn(*SHAPE)))


def test_progress_shows_one_bar_over_all_steps(capsys):
    run(spaced("10"), "ddim", progress=False)
    assert capsys.readouterr().err == ""
    run(spaced("10"), "ddim", progress=True)
    assert "10/10" in capsys.readouterr().err


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_module_is_sampled_on_its_own_device_without_gradients(sampler):
    noise = torch.zeros(SHAPE, device="cpu")
    sample = run(spaced("10"), sampler, model=TinyModel(), noise=noise)
    assert not sample.requires_grad

    # "meta" stands in for an accelerator: shapes without values
    sample = run(spaced("10"), sampler, model=TinyModel().to("meta"), noise=noise)
    assert sample.device.type == "meta"


def test_a_function_is_sampled_on_the_device_of_the_noise_or_the_cpu():
    def model(x, ts):
        assert ts.device == x.device
        return torch.zeros(2, 6, 4, 4, device=x.device)

    noise = torch.zeros(SHAPE, device="meta")
    assert run(spaced("10"), "ddim", model, noise).device.type == "meta"
    assert run(spaced("10"), "ddim", model).device.type == "cpu"
    assert run(spaced("10"), "ddim", model, device="meta").device.type == "meta"


def test_ddim_leads_back_to_the_image_from_which_reverse_ddim_came():
    image = DATA_STD * torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    diffusion = spaced("250")

    noise = run(diffusion, "ddim_reverse", noise=image, clip_denoised=False)
    back = run(diffusion, "ddim", noise=noise, clip_denoised=False)

    assert float((noise - image).abs().max()) > 0.5
    assert float((back - image).abs().max()) < 0.02


def test_reverse_ddim_needs_an_image_and_no_randomness():
    with pytest.raises(ValueError, match="give it as noise"):
        run(spaced("10"), "ddim_reverse")
    with pytest.raises(ValueError, match="eta must be 0"):
        spaced("10").ddim_reverse_sample(
            exact_model, torch.zeros(SHAPE), torch.tensor([0, 0]), eta=0.5
        )


def error(sampler, steps):
    """Against the exact solution, on which x is proportional to its standard deviation."""
    diffusion = spaced(f"ddim{steps}")
    inner = sampler != "ddim"
    start = std_at(diffusion.alphas_cumprod[steps - 2 if inner else steps - 1])
    end = std_at(diffusion.alphas_cumprod[0]) if inner else DATA_STD
    noise = start * torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    got = run(diffusion, sampler, noise=noise, clip_denoised=False)
    return float((got - noise * end / start).abs().max())


def test_the_error_of_ddim_falls_in_proportion_to_the_step():
    assert error("ddim", 50) / error("ddim", 100) == pytest.approx(2, abs=0.3)


@pytest.mark.parametrize("sampler", ["prk", "plms"])
def test_prk_and_plms_come_nearer_to_the_exact_solution_than_ddim(sampler):
    assert error(sampler, 50) < error("ddim", 50) / 30
    assert error(sampler, 100) < error(sampler, 50) / 2


@pytest.mark.parametrize(("sampler", "options"), [("p", {}), ("ddim", {"eta": 1.0})])
def test_random_samples_have_the_spread_of_the_data(sampler, options):
    torch.manual_seed(0)
    loop = getattr(spaced("250"), f"{sampler}_sample_loop")
    samples = loop(exact_model, (64, 3, 8, 8), clip_denoised=False, **options)
    assert float(samples.std()) == pytest.approx(DATA_STD, rel=0.05)


@pytest.mark.parametrize("respacing", ["2", "10", "27", "1000"])
@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
def test_fully_random_ddim_stays_finite_at_every_timestep(schedule, respacing):
    diffusion = spaced(respacing, schedule)
    t = torch.arange(diffusion.num_timesteps)
    x = torch.randn(len(t), 3, 1, 1)
    for eta in (0.0, 0.5, 1.0):
        out = diffusion.ddim_sample(lambda x, ts: torch.cat([x, x], dim=1), x, t, eta=eta)
        assert out["sample"].isfinite().all()


def test_plms_combines_the_latest_three_noises():
    diffusion, x, t = spaced("10"), torch.randn(SHAPE), torch.tensor([5, 5])
    eps = exact_model(x, diffusion.original_timesteps(t))[:, :3].float()
    with pytest.raises(ValueError, match="eps of 3 earlier steps, got 2"):
        diffusion.plms_sample(exact_model, x, [eps, eps], t)

    # with a constant noise the multistep mixture is that noise: one DDIM step
    out = diffusion.plms_sample(exact_model, x, [torch.full_like(x, 9.0), eps, eps, eps], t)
    ddim = diffusion.ddim_sample(exact_model, x, t, clip_denoised=False)
    assert torch.allclose(out["sample"], ddim["sample"], atol=1e-5)


@pytest.mark.parametrize("sampler", ["prk", "plms"])
def test_prk_and_plms_say_that_two_timesteps_are_too_few(sampler):
    assert run(spaced("3"), sampler).isfinite().all()
    with pytest.raises(ValueError, match="at least 3 timesteps, this diffusion has 2"):
        run(spaced("2"), sampler)


def test_an_output_without_variance_channels_is_refused():
    with pytest.raises(ValueError, match="returned 3 channels for images of 3; 6 are needed"):
        run(spaced("10"), "p", model=lambda x, ts: x)


def test_noise_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"noise has shape \(1, 3, 8, 8\), but shape is"):
        run(spaced("10"), "p", noise=torch.zeros(1, 3, 8, 8))


@pytest.mark.parametrize("betas", [[], [0.1], [[0.1, 0.2]], [0.0, 0.1], [0.1, 1.5]])
def test_betas_out_of_range_are_refused(betas):
    with pytest.raises(ValueError, match="at least two values in"):
        GaussianDiffusion(betas=betas)


def test_an_unknown_schedule_or_timestep_is_refused():
    with pytest.raises(ValueError, match="choose linear or squaredcos_cap_v2"):
        get_named_beta_schedule("cosine", 1000)
    with pytest.raises(ValueError, match="at least 2 of the timesteps 0 to 1"):
        SpacedDiffusion([0, 2], betas=[0.1, 0.2])


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda d: pickle.loads(pickle.dumps(d))])
def test_a_used_diffusion_can_be_copied_and_pickled(duplicate):
    diffusion = spaced("10")
    noise = torch.randn(SHAPE)
    images = run(diffusion, "plms", noise=noise)
    assert torch.equal(run(duplicate(diffusion), "plms", noise=noise), images)


def test_tables_first_used_in_inference_mode_serve_training():
    diffusion = spaced("10")
    with torch.inference_mode():
        run(diffusion, "p")
    x = torch.randn(SHAPE, requires_grad=True)
    diffusion.q_sample(x, torch.tensor([3, 4])).sum().backward()
    assert x.grad is not None


def test_half_precision_outputs_are_taken_in_float32():
    diffusion, x, t = spaced("10"), torch.randn(SHAPE), torch.tensor([9, 0])
    out = diffusion.p_mean_variance(lambda x, ts: exact_model(x, ts).to(torch.bfloat16), x, t)
    assert {out[key].dtype for key in ("mean", "log_variance", "pred_xstart")} == {torch.float32}
