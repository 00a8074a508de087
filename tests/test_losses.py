"""How the training loss behaves where no golden numbers are needed."""

import pytest
import torch
from torch import nn

from glide_finetune.losses import quarter_sums, timestep_weights, training_losses
from glide_text2im.gaussian_diffusion import get_named_beta_schedule
from glide_text2im.respace import SpacedDiffusion, space_timesteps

T = torch.tensor([0, 1, 500, 999])
X_START = (torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 255).round()
X_START = X_START / 127.5 - 1
NOISE = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def diffusion(schedule="squaredcos_cap_v2", respacing="1000"):
    betas = get_named_beta_schedule(schedule, 1000)
    return SpacedDiffusion(space_timesteps(1000, respacing), betas=betas)


def output(eps, variance=0.0):
    return torch.cat([eps, torch.full_like(eps, variance)], dim=1).requires_grad_()


def losses_of(prediction, schedule="squaredcos_cap_v2", **options):
    return training_losses(
        lambda x, ts: prediction, diffusion(schedule), X_START, T, noise=NOISE, **options
    )


def test_perfect_noise_leaves_only_the_bound():
    losses = losses_of(output(NOISE))
    assert losses.mse.tolist() == [0, 0, 0, 0]
    assert (losses.vb > 0).all()
    assert torch.allclose(losses.loss, losses.vb)  # 0.001 x 1000 timesteps


def test_the_bound_falls_when_the_variance_is_the_true_one():
    # with perfect noise the posterior's variance, the lower end of the range, is the true one
    bounds = [losses_of(output(NOISE, variance)).vb[1:3] for variance in (1.0, 0.0, -1.0)]
    assert (bounds[0] > bounds[1]).all()
    assert (bounds[1] > bounds[2]).all()
    assert bounds[2].abs().max() < 1e-5


def test_a_weight_of_zero_leaves_the_variance_channels_untrained():
    prediction = output(torch.zeros_like(NOISE), 0.5)
    losses_of(prediction, vlb_weight=0).loss.mean().backward()
    assert prediction.grad[:, :3].any()
    assert not prediction.grad[:, 3:].any()


@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("size", [1.0, 100.0, 60000.0])
def test_losses_and_gradients_stay_finite_for_wild_predictions(schedule, size):
    prediction = output(size * NOISE.flip(0), variance=-3.0)
    losses = losses_of(prediction, schedule)
    losses.loss.mean().backward()
    assert losses.loss.isfinite().all()
    assert prediction.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_arithmetic_is_float32_whatever_the_model_returns(dtype):
    half = output(0.9 * NOISE, 0.3).detach().to(dtype)
    want = losses_of(half.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = losses_of(half)
    for key in ("mse", "vb", "loss"):
        assert getattr(got, key).dtype == torch.float32
        assert torch.equal(getattr(got, key), getattr(want, key))


def test_the_model_is_called_once_with_original_timesteps():
    calls = []

    class Model(nn.Module):
        def forward(self, x, ts, **kwargs):
            calls.append((ts, kwargs))
            return torch.cat([x, x], dim=1)

    t = torch.tensor([0, 1, 8, 9])
    training_losses(Model(), diffusion(respacing="10"), X_START, t, {"tokens": 7})
    [(ts, kwargs)] = calls
    assert (ts.dtype, ts.tolist()) == (torch.int64, [0, 111, 888, 999])
    assert kwargs == {"tokens": 7}


def test_noise_left_out_is_drawn_from_the_seed():
    def loss(seed):
        torch.manual_seed(seed)
        return training_losses(lambda x, ts: torch.cat([x, x], 1), diffusion(), X_START, T).mse

    assert torch.equal(loss(1), loss(1))
    assert not torch.equal(loss(1), loss(2))


def test_snr_weights_are_those_of_the_papers():
    snr = torch.tensor([0.0001, 1.0, 5.0, 20.0])
    assert timestep_weights(snr, "none").tolist() == [1, 1, 1, 1]
    assert timestep_weights(snr, "min_snr").tolist() == [1, 1, 1, 0.25]
    assert timestep_weights(snr, "soft_min_snr").tolist() == pytest.approx(
        [5 / 5.0001, 5 / 6, 0.5, 0.2]
    )
    with pytest.raises(ValueError, match="choose one of none, min_snr, soft_min_snr"):
        timestep_weights(snr, "snr")


@pytest.mark.parametrize("weighting", ["min_snr", "soft_min_snr"])
def test_snr_weighting_scales_the_noise_error_and_nothing_else(weighting):
    prediction = output(torch.zeros_like(NOISE))
    plain, weighted = losses_of(prediction), losses_of(prediction, loss_weighting=weighting)
    weights = timestep_weights(diffusion().snr(T), weighting)

    assert torch.equal(plain.mse, weighted.mse)
    assert torch.equal(plain.vb, weighted.vb)
    assert torch.allclose(weighted.loss, weights * plain.mse + plain.vb)
    assert weights[0] < 0.01  # hardly any noise: easy
    assert weights[3] == pytest.approx(1)
    assert timestep_weights(diffusion().snr(torch.arange(1000)), weighting).isfinite().all()


def test_the_signal_to_noise_ratio_is_that_of_the_noised_images():
    d, t = diffusion("linear"), torch.tensor([0, 300, 999])
    mean, variance, _ = d.q_mean_variance(torch.ones(3, 1), t)
    assert torch.allclose(d.snr(t), (mean**2 / variance)[:, 0], rtol=1e-3)


def test_quarter_sums_split_the_losses_at_quarters_of_the_timesteps():
    timesteps = torch.tensor([0, 249, 250, 499, 500, 749, 750, 999, 999])
    sums, counts = quarter_sums(torch.arange(1.0, 10.0), timesteps, 1000)
    assert sums.tolist() == [1 + 2, 3 + 4, 5 + 6, 7 + 8 + 9]
    assert counts.tolist() == [2, 2, 2, 3]


def test_quarter_sums_keep_bad_losses_and_gradients_to_themselves():
    losses = torch.tensor([1.0, float("nan"), float("inf")], requires_grad=True)
    sums, counts = quarter_sums(losses, torch.tensor([0, 30, 99]), 100)
    assert not sums.requires_grad
    assert (sums[0], counts[0]) == (1, 1)
    assert sums[1].isnan()
    assert (sums[2], counts[2]) == (0, 0)
    assert sums[3].isinf()
