"""The training loss against the golden numbers of the old trainer and of Improved DDPM."""

import numpy as np
import pytest
import torch

from glide_finetune.losses import (
    discretized_gaussian_log_likelihood,
    normal_kl,
    training_losses,
)
from glide_text2im.model_creation import create_model_and_diffusion
from golden_data import deviation, fill, load

SPEC, DATA = load("training")
TOLERANCE = SPEC["tolerance"]


def tensors(prefix):
    arrays = {key[len(prefix) + 1 :]: DATA[key] for key in DATA if key.startswith(f"{prefix}/")}
    return {key: torch.from_numpy(array) for key, array in arrays.items()}


def gradient_norms(model):
    return {
        k: None if p.grad is None else float(p.grad.norm()) for k, p in model.named_parameters()
    }


def assert_gradient_norms(got, want):
    floor = 1e-3 * max(norm for norm in want.values() if norm is not None)
    assert got.keys() == want.keys()
    for key, norm in want.items():
        assert (got[key] is None) == (norm is None), key
        if norm is not None:
            assert abs(got[key] - norm) <= TOLERANCE["rtol_gradient"] * (norm + floor), key


@pytest.mark.parametrize("name", SPEC["train_steps"])
def test_without_the_bound_the_loss_is_that_of_the_old_trainer(name):
    case, stored = SPEC["train_steps"][name], tensors(f"train_step/{name}")
    model, diffusion = create_model_and_diffusion(**case["options"])
    fill(model).train()
    seen = {}

    def watched(x_t, timesteps, **kwargs):
        seen["x_t"], seen["timesteps"] = x_t, timesteps
        seen["output"] = model(x_t, timesteps, **kwargs)
        return seen["output"]

    losses = training_losses(
        watched,
        diffusion,
        stored["images"],
        stored["timesteps"],
        {key: stored[key] for key in case["model_keyword_arguments"]},
        stored["noise"],
        vlb_weight=0,
    )
    losses.loss.mean().backward()

    assert losses.vb is None
    assert torch.equal(losses.loss, losses.mse)
    assert float(losses.loss.detach().mean()) == pytest.approx(case["loss"], abs=TOLERANCE["atol"])
    assert torch.equal(seen["timesteps"], stored["timesteps"])
    assert deviation(seen["x_t"], stored["x_t"].numpy()) <= TOLERANCE["atol"]
    assert deviation(seen["output"], stored["model_output"].numpy()) <= TOLERANCE["atol"]
    assert_gradient_norms(gradient_norms(model), case["grad_l2_norms"])


@pytest.mark.parametrize("loss_type", ["MSE", "RESCALED_MSE"])
@pytest.mark.parametrize("name", SPEC["hybrid"])
def test_the_hybrid_loss_and_its_gradients_are_those_of_improved_ddpm(name, loss_type):
    case, stored = SPEC["hybrid"][name], tensors(f"hybrid/{name}")
    model, diffusion = create_model_and_diffusion(**case["options"])
    fill(model).eval()
    factor = case["vb_factor"][loss_type]
    calls = []

    def watched(x_t, timesteps, **kwargs):
        calls.append((x_t, timesteps, model(x_t, timesteps, **kwargs)))
        calls[-1][-1].retain_grad()
        return calls[-1][-1]

    def losses():
        model.zero_grad()
        return training_losses(
            watched,
            diffusion,
            stored["x_start"],
            stored["timesteps"],
            {"tokens": stored["tokens"], "mask": stored["mask"]},
            stored["noise"],
            # the weight of RESCALED_MSE is 1/1000, whatever the number of timesteps
            vlb_weight=0.001 if loss_type == "RESCALED_MSE" else 1 / diffusion.num_timesteps,
        )

    same = case["results"][loss_type] == "equal to MSE (factor 1.0)"
    want = case["results"]["MSE" if same else loss_type]
    golden = {key: DATA[f"hybrid/{name}/{loss_type}/{key}"] for key in ("mse", "vb", "loss")}
    got = losses()
    for key, array in (("mse", got.mse), ("vb", factor * got.vb), ("loss", got.loss)):
        limits = [TOLERANCE["atol_t0" if t == 0 else "atol"] for t in case["timesteps"]]
        for sample, (value, reference) in enumerate(zip(array, golden[key], strict=True)):
            assert deviation(value, reference) <= limits[sample], (key, sample)
    got.loss.mean().backward()

    assert len(calls) == 1
    x_t, seen, output = calls[0]
    assert torch.equal(seen, stored["timesteps_seen_by_model"])
    assert deviation(x_t, stored["x_t"].numpy()) <= TOLERANCE["atol"]
    assert deviation(output, stored["model_output"].numpy()) <= TOLERANCE["atol"]
    gradient = DATA[f"hybrid/{name}/{'MSE' if same else loss_type}/grad_of_mean_loss_wrt_output"]
    assert deviation(output.grad, gradient) <= TOLERANCE["atol"]
    assert float(got.loss.detach().mean()) == pytest.approx(want["mean_loss"], rel=1e-5)
    assert_gradient_norms(gradient_norms(model), want["grad_l2_norms"])

    (factor * losses().vb).mean().backward()
    gradient = calls[1][2].grad
    assert not gradient[:, :3].any(), "the bound must not train the noise"
    assert not model.get_parameter("out.2.weight").grad[:3].any()
    largest = want["vb_alone"]["largest |gradient| wrt output channels 3..5 (variance)"]
    assert float(gradient[:, 3:].abs().max()) == pytest.approx(largest, rel=1e-3)
    assert_gradient_norms(gradient_norms(model), want["grad_l2_norms_of_mean_vb_alone"])


def test_the_likelihood_of_8_bit_values_and_the_divergence_are_the_reference_ones():
    stored = tensors("functions")
    log_prob = discretized_gaussian_log_likelihood(
        stored["x"], means=stored["means"], log_scales=stored["log_scales"]
    )
    kl = normal_kl(stored["mean1"], stored["logvar1"], stored["mean2"], stored["logvar2"])

    assert deviation(log_prob, DATA["functions/log_prob"]) <= TOLERANCE["atol_t0"]
    assert deviation(kl, DATA["functions/kl"]) <= TOLERANCE["atol"]


@pytest.mark.parametrize("name", SPEC["hybrid"])
def test_each_branch_of_the_bound_is_the_reference_one_for_every_sample(name):
    case, stored = SPEC["hybrid"][name], tensors(f"hybrid/{name}")
    _, diffusion = create_model_and_diffusion(**case["options"])
    x_start, x_t, t = stored["x_start"], stored["x_t"], stored["timesteps"]
    out = diffusion.p_mean_variance(lambda *_: stored["model_output"], x_t, t, clip_denoised=False)
    mean, _, log_variance = diffusion.q_posterior_mean_variance(x_start, x_t, t)
    kl = normal_kl(mean, log_variance, out["mean"], out["log_variance"])
    log_prob = discretized_gaussian_log_likelihood(x_start, out["mean"], 0.5 * out["log_variance"])

    def bits(values):
        return (values.flatten(1).mean(1, keepdim=True) / np.log(2)).float()

    assert deviation(bits(kl), DATA[f"hybrid/{name}/kl_branch"][:, None]) <= TOLERANCE["atol"]
    nll = DATA[f"hybrid/{name}/nll_branch"][:, None]
    assert deviation(bits(-log_prob), nll) <= TOLERANCE["atol_nll_unused"]
