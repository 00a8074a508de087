"""The samplers of glide_finetune, on images whose exact denoiser is known in closed form.

The values of the images are independent normals of mean MEAN and standard deviation STD. At noise
level sigma, y = x / a is a normal of variance STD^2 + sigma^2, and the expected x_0 of a y is
(STD^2 y + sigma^2 MEAN) / (STD^2 + sigma^2). On the probability flow y - MEAN stays proportional
to its own standard deviation.
"""

import math

import numpy as np
import pytest
import torch

from glide_finetune.sampler_options import SAMPLERS
from glide_finetune.samplers import (
    LOOPS,
    NoisePerImage,
    dpm_solver_2m,
    dpm_solver_2m_sde,
    euler,
    euler_a,
)
from glide_text2im.gaussian_diffusion import GaussianDiffusion
from glide_text2im.model_creation import create_gaussian_diffusion

MEAN, STD = 0.4, 0.3
SHAPE = (2, 3, 4, 4)
LOWEST, HIGHEST = 0.02, 20.0  # noise levels
ORDERS = {euler: 1, dpm_solver_2m: 2}
RESPACINGS = ("10", "100", "ddim50", "fast27")


def diffusion_of(sigmas):
    """The process whose timesteps have these noise levels, rising."""
    alpha_bar = 1 / (1 + np.array(sigmas, dtype=np.float64) ** 2)
    return GaussianDiffusion(betas=1 - alpha_bar / np.append(1.0, alpha_bar[:-1]))


def even_steps(count):
    """`count` levels, evenly spaced in their logarithm."""
    return np.geomspace(LOWEST, HIGHEST, count)


def exact_model(diffusion):
    """The optimal network for a process; its variance channels hold nonsense."""

    def model(x, index):
        alpha_bar = torch.from_numpy(diffusion.alphas_cumprod)[index].view(-1, 1, 1, 1)
        variance = 1 / alpha_bar - 1
        x_start = (STD**2 * x / alpha_bar.sqrt() + variance * MEAN) / (STD**2 + variance)
        eps = (x - alpha_bar.sqrt() * x_start) / (1 - alpha_bar).sqrt()
        return torch.cat([eps, torch.full_like(eps, 0.3)], dim=1)

    return model


def start_noise(shape=SHAPE, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def run(sampler, diffusion, noise, **keywords):
    keywords = {"clip_denoised": False, **keywords}
    return sampler(diffusion, exact_model(diffusion), noise.shape, noise, **keywords)


def exact_result(noise):
    """Along the probability flow from the highest level to the lowest, and from there to x_0."""
    y = noise * math.sqrt(1 + HIGHEST**2)
    y = MEAN + (y - MEAN) * math.sqrt((STD**2 + LOWEST**2) / (STD**2 + HIGHEST**2))
    return (STD**2 * y + LOWEST**2 * MEAN) / (STD**2 + LOWEST**2)


def error(sampler, steps):
    noise = start_noise()
    got = run(sampler, diffusion_of(even_steps(steps)), noise)
    return float((got - exact_result(noise)).abs().max())


# ------------------------------------------------------------------------------ the exact solution


@pytest.mark.parametrize("sampler", ORDERS)
def test_twice_the_steps_divide_the_error_by_two_to_the_order(sampler):
    expected = 2 ** ORDERS[sampler]
    for steps in (100, 200):
        assert error(sampler, steps) / error(sampler, 2 * steps) == pytest.approx(expected, rel=0.1)
    assert error(sampler, 400) < 0.02 / expected**2


def test_the_second_order_also_holds_where_steps_are_uneven():
    """A constant in place of the ratio of the steps would leave an error of the first order."""
    noise = start_noise()
    errors = []
    for steps in (100, 200):
        place = np.linspace(0, 1, steps)
        place = place + 0.6 / (2 * math.pi) * np.sin(2 * math.pi * place)
        levels = LOWEST * (HIGHEST / LOWEST) ** place
        got = run(dpm_solver_2m, diffusion_of(levels), noise)
        errors.append(float((got - exact_result(noise)).abs().max()))
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.15)


@pytest.mark.parametrize(("sampler", "steps"), [(euler_a, 400), (dpm_solver_2m_sde, 100)])
def test_random_samples_have_the_mean_and_spread_of_the_data(sampler, steps):
    noise = start_noise((8, 3, 32, 32)).float()
    draw = NoisePerImage(range(len(noise)))
    drawn = run(sampler, diffusion_of(even_steps(steps)), noise, noise_like=draw)
    assert float(drawn.mean()) == pytest.approx(MEAN, abs=0.005)
    assert float(drawn.std()) == pytest.approx(STD, rel=0.02)


@pytest.mark.parametrize("sampler", [euler_a, dpm_solver_2m_sde])
def test_random_samples_come_nearer_to_the_spread_of_the_data_with_more_steps(sampler):
    noise = start_noise((8, 3, 32, 32)).float()
    far = []
    for steps in (15, 60):
        draw = NoisePerImage(range(len(noise)))
        drawn = run(sampler, diffusion_of(even_steps(steps)), noise, noise_like=draw)
        far.append(abs(float(drawn.std()) / STD - 1))
    assert far[1] < far[0] / 2.5


# ------------------------------------------------------------------------------ step by step

GUESSES = (0.9, -0.3, 0.5)  # of x_0, in the order of the steps
SIGMAS = (3.0, 1.2, 0.7)


def scripted_model(diffusion):
    """A network whose guesses of x_0 are `GUESSES`, whatever it sees."""

    def model(x, index):
        alpha_bar = torch.from_numpy(diffusion.alphas_cumprod)[index].view(-1, 1, 1, 1)
        guess = GUESSES[len(GUESSES) - 1 - int(index[0])]
        eps = (x - alpha_bar.sqrt() * guess) / (1 - alpha_bar).sqrt()
        return torch.cat([eps, eps], dim=1)

    return model


def states(sampler):
    """The x of every call of the model and the result, with noises of 1."""
    diffusion = diffusion_of(SIGMAS[::-1])
    model, seen = scripted_model(diffusion), []

    def watched(x, index):
        seen.append(float(x.flatten()[0]))
        return model(x, index)

    noise = torch.full((1, 3, 1, 1), 2.0, dtype=torch.float64)
    keywords = {"noise_like": torch.ones_like} if "noise_like" in needs(sampler) else {}
    end = sampler(diffusion, watched, noise.shape, noise, False, **keywords)
    return [*seen, float(end.flatten()[0])]


def needs(sampler):
    stochastic = {LOOPS[name] for name, can in SAMPLERS.items() if can.stochastic}
    return ("noise_like",) if sampler in stochastic else ()


def expected_states(combine):
    """`combine(x, D, D_before, alpha, alpha_t, sigma, sigma_t, h, h_before)` makes an inner step,
    in the notation of Lu et al. 2022: x = alpha x_0 + sigma noise, lambda = log(alpha / sigma)."""
    alphas = [1 / math.sqrt(1 + s**2) for s in SIGMAS]
    sigmas = [s / math.sqrt(1 + s**2) for s in SIGMAS]
    lambdas = [math.log(a / s) for a, s in zip(alphas, sigmas, strict=True)]
    xs = [2.0]
    for i in range(2):
        h = lambdas[i + 1] - lambdas[i]
        before = GUESSES[i - 1] if i else None
        h_before = lambdas[i] - lambdas[i - 1] if i else None
        noise_levels = alphas[i], alphas[i + 1], sigmas[i], sigmas[i + 1]
        xs.append(combine(xs[i], GUESSES[i], before, *noise_levels, h, h_before))
    return [*xs, GUESSES[-1]]


def euler_step(x, d, before, alpha, alpha_t, sigma, sigma_t, h, h_before):
    y, level, level_t = x / alpha, sigma / alpha, sigma_t / alpha_t
    return alpha_t * (y + (level_t - level) * (y - d) / level)


def ancestral_step(x, d, before, alpha, alpha_t, sigma, sigma_t, h, h_before):
    level, level_t = sigma / alpha, sigma_t / alpha_t
    up = math.sqrt(level_t**2 * (level**2 - level_t**2) / level**2)
    down = math.sqrt(level_t**2 - up**2)
    y = x / alpha
    return alpha_t * (y + (down - level) * (y - d) / level + up)


def mixed(d, before, h, h_before):
    if before is None:
        return d
    r = h_before / h
    return (1 + 1 / (2 * r)) * d - before / (2 * r)


def step_2m(x, d, before, alpha, alpha_t, sigma, sigma_t, h, h_before):
    return sigma_t / sigma * x - alpha_t * math.expm1(-h) * mixed(d, before, h, h_before)


def step_2m_sde(x, d, before, alpha, alpha_t, sigma, sigma_t, h, h_before):
    return (
        sigma_t / sigma * math.exp(-h) * x
        - alpha_t * math.expm1(-2 * h) * mixed(d, before, h, h_before)
        + sigma_t * math.sqrt(-math.expm1(-2 * h))
    )


@pytest.mark.parametrize(
    ("sampler", "combine"),
    [
        (euler, euler_step),
        (euler_a, ancestral_step),
        (dpm_solver_2m, step_2m),
        (dpm_solver_2m_sde, step_2m_sde),
    ],
)
def test_every_step_is_that_of_the_paper_and_the_last_one_gives_the_guess_itself(sampler, combine):
    assert states(sampler) == pytest.approx(expected_states(combine), rel=1e-5)


@pytest.mark.parametrize("sampler", [dpm_solver_2m, dpm_solver_2m_sde])
def test_a_step_much_longer_than_the_one_before_is_of_the_first_order(sampler):
    """There the second order overshoots: the sampler would do worse than Euler's method."""
    first_order = {dpm_solver_2m: euler, dpm_solver_2m_sde: euler_a}[sampler]
    noise = start_noise()
    levels = [0.01, 4.0, 5.0]  # a step of 0.2, then one of 6
    keywords = {"noise_like": torch.ones_like} if needs(sampler) else {}
    got, want = (run(s, diffusion_of(levels), noise, **keywords) for s in (sampler, first_order))
    assert torch.allclose(got, want)


# ------------------------------------------------------------------------- beside the older ones


@pytest.mark.parametrize("respacing", RESPACINGS)
@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
def test_eulers_method_in_sigma_is_ddim_and_its_ancestral_form_ddpm(respacing, schedule):
    diffusion = create_gaussian_diffusion(1000, schedule, respacing)

    def model(x, timesteps):
        eps = torch.tanh(x + timesteps.view(-1, 1, 1, 1) / 1000)
        return torch.cat([eps, -torch.ones_like(eps)], dim=1)  # the posterior's variance

    noise = start_noise().float()
    ddim = diffusion.ddim_sample_loop(model, SHAPE, noise)
    assert torch.allclose(euler(diffusion, model, SHAPE, noise), ddim, atol=2e-3)
    ddpm, ancestral = (
        loop(diffusion, model, SHAPE, noise, noise_like=NoisePerImage([1, 2]))
        for loop in (GaussianDiffusion.p_sample_loop, euler_a)
    )
    assert torch.allclose(ddpm, ancestral, atol=2e-3)


@pytest.mark.parametrize("name", SAMPLERS)
def test_all_have_one_signature_and_stay_finite(name):
    diffusion, seen = create_gaussian_diffusion(1000, "squaredcos_cap_v2", "6"), []

    def model(x, timesteps, caption):
        seen.append(timesteps)
        assert caption == "a cat"
        return torch.cat([x, x], dim=1)

    drawn = LOOPS[name](
        diffusion, model, SHAPE, noise=start_noise().float(), model_kwargs={"caption": "a cat"},
        denoised_fn=torch.tanh, cond_fn=None, device="cpu", progress=False,
    )  # fmt: skip
    assert drawn.shape == SHAPE
    assert drawn.isfinite().all()
    if name not in ("plms", "prk"):
        assert [int(ts[0]) for ts in seen] == [999, 799, 599, 400, 200, 0]
        assert {ts.dtype for ts in seen} == {torch.int64}


@pytest.mark.parametrize("sampler", [euler, euler_a, dpm_solver_2m, dpm_solver_2m_sde])
def test_a_gradient_and_a_denoised_fn_move_the_path(sampler):
    diffusion, noise = diffusion_of(even_steps(20)), start_noise()
    keywords = {"noise_like": torch.zeros_like} if needs(sampler) else {}
    plain = run(sampler, diffusion, noise, **keywords)
    pulled = run(sampler, diffusion, noise, cond_fn=lambda x, ts: torch.ones_like(x), **keywords)
    assert (pulled > plain).all()
    assert (run(sampler, diffusion, noise, denoised_fn=lambda x: 0 * x, **keywords) == 0).all()
    clipped = run(sampler, diffusion, noise, clip_denoised=True, **keywords)
    assert clipped.abs().max() <= 1


# --------------------------------------------------------------------------- noise of every image


def test_the_noise_of_an_image_depends_on_its_own_seed_alone():
    together, alone = NoisePerImage([5, 6, 7]), NoisePerImage([6])
    for _ in range(2):  # a start noise, and one of a step
        rows = together(torch.empty(3, 3, 4, 4))
        assert torch.equal(rows[1:2], alone(torch.empty(1, 3, 4, 4)))
        assert not torch.equal(rows[0], rows[2])
    assert not torch.equal(rows, together(torch.empty(3, 3, 4, 4)))
    assert NoisePerImage([2**64 - 1])(torch.empty(1, 2, dtype=torch.float16)).dtype == torch.float16
