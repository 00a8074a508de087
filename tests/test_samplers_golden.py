"""Whole sampling runs of the tiny models against the golden numbers."""

import json

import numpy as np
import pytest
import torch

from glide_text2im.clip.model_creation import create_clip_model
from glide_text2im.model_creation import create_model_and_diffusion
from golden_data import deviation, fill, load, seeded_randn_like

SPEC, DATA = load("sampling")
PNDM_SPEC, PNDM_DATA = load("sampling_pndm")
BATCH = SPEC["batch_size"]
INPUTS = ("tokens", "mask", "low_res", "inpaint_image", "inpaint_mask")


def inputs_of(data, name):
    """The start noise and the model's keyword arguments of a case."""
    found = {key: data[f"{name}/{key}"] for key in ("noise", *INPUTS) if f"{name}/{key}" in data}
    tensors = {key: torch.from_numpy(value) for key, value in found.items()}
    return tensors.pop("noise"), tensors


def build(options):
    model, diffusion = create_model_and_diffusion(**options)
    return fill(model).eval(), diffusion


def guided(model, scale):
    """Classifier-free guidance over a double batch, as in OpenAI's text2im notebook."""

    def run(x, ts, **kwargs):
        first = x[: len(x) // 2]
        eps, rest = model(torch.cat([first, first]), ts, **kwargs).split(3, dim=1)
        cond, uncond = eps.chunk(2)
        eps = uncond + scale * (cond - uncond)
        return torch.cat([torch.cat([eps, eps]), rest], dim=1)

    return run


def clip_cond_fn(config, prompts, scale, folder):
    path = folder / "clip.yaml"
    path.write_text(json.dumps(config))  # JSON is YAML too
    clip = create_clip_model(str(path), device=torch.device("cpu"))
    fill(clip.text_encoder)
    fill(clip.image_encoder)
    return clip.cond_fn(prompts, scale)


def repaint(kwargs):
    image, mask = kwargs["inpaint_image"], kwargs["inpaint_mask"]
    return lambda x: x * (1 - mask) + image * mask


def trace(results):
    """The arrays that the golden files keep of a run."""
    arrays = {
        "step1": results[0]["sample"],
        "step2": results[1]["sample"],
        "final": results[-1]["sample"],
        **{f"{key}_step2": results[1][key] for key in results[1] if key != "sample"},
        **{f"{key}_final": results[-1][key] for key in results[-1] if key != "sample"},
    }
    norms = np.array([float(r["sample"][:BATCH].double().norm()) for r in results])
    return {**{key: value[:BATCH] for key, value in arrays.items()}, "step_l2_norms": norms}


def assert_golden(got, data, name, tolerance):
    want = {key.split("/")[1]: array for key, array in data.items() if key.startswith(f"{name}/")}
    want = {key: array for key, array in want.items() if key not in ("noise", *INPUTS)}
    assert len(want) >= 5
    for key, array in want.items():
        first = key in ("step1", "step2", "eps_step2")
        limit = tolerance["atol_first_steps" if first else "atol"]
        assert deviation(got[key], array) <= limit, key


@pytest.mark.parametrize("name", SPEC["cases"])
def test_a_sampling_run_gives_the_reference_images(name, tmp_path):
    case = SPEC["cases"][name]
    model, diffusion = build(case["options"])
    noise, kwargs = inputs_of(DATA, name)
    options = {"clip_denoised": case.get("clip_denoised", True), "model_kwargs": kwargs}
    if "eta" in case:
        options["eta"] = case["eta"]
    if "inpaint_mask" in kwargs:
        options["denoised_fn"] = repaint(kwargs)
    if "clip" in case:
        options["cond_fn"] = clip_cond_fn(
            SPEC["clip_configs"][case["clip"]], SPEC["prompts"], case["clip_grad_scale"], tmp_path
        )
    if "guidance_scale" in case:
        model = guided(model, case["guidance_scale"])
    sampler = {"reverse": "ddim_reverse"}.get(case["sampler"], case["sampler"])
    progressive = getattr(diffusion, f"{sampler}_sample_loop_progressive")

    with seeded_randn_like(f"sampling/{name}") as randn_like:
        results = list(progressive(model, noise.shape, noise=noise, device="cpu", **options))

    assert (len(results), randn_like.call_count) == (case["steps"], case["randn_like_calls"])
    assert_golden(trace(results), DATA, name, case.get("tolerance", SPEC["tolerance"]))


@pytest.mark.parametrize("name", PNDM_SPEC["cases"])
def test_a_prk_or_plms_run_gives_the_reference_images_and_calls(name):
    case = PNDM_SPEC["cases"][name]
    model, diffusion = build(case["options"])
    noise, kwargs = inputs_of(PNDM_DATA, case["start"])
    seen_by_model, seen_by_cond_fn = [], []

    def watched(x, ts, **kwargs):
        seen_by_model.append(ts)
        return model(x, ts, **kwargs)

    def cond_fn(x, ts, **kwargs):
        seen_by_cond_fn.append(ts)
        return 0.1 * x * (1 + 0.001 * ts.float().view(-1, 1, 1, 1))

    options = {"clip_denoised": case.get("clip_denoised", True), "model_kwargs": kwargs}
    if "cond_fn" in case:
        options["cond_fn"] = cond_fn
    if "denoised_fn" in case:
        options["denoised_fn"] = lambda x: 0.5 * x + 0.1
    if "guidance_scale" in case:
        watched = guided(watched, case["guidance_scale"])
    progressive = getattr(diffusion, f"{case['sampler']}_sample_loop_progressive")

    results, calls = [], []
    with seeded_randn_like("sampling_pndm") as randn_like:
        for result in progressive(watched, noise.shape, noise=noise, device="cpu", **options):
            results.append(result)
            calls.append(len(seen_by_model) - sum(calls))

    assert randn_like.call_count == 0
    assert len(results) == case["steps"]
    assert calls == case["model_calls_per_step"]
    assert_timesteps(seen_by_model, case["timesteps_seen_by_model"], calls)
    if "cond_fn" in case:
        assert_timesteps(seen_by_cond_fn, case["timesteps_seen_by_cond_fn"], calls)
    assert_golden(trace(results), PNDM_DATA, name, PNDM_SPEC["tolerance"])


def assert_timesteps(seen, want, calls_per_step):
    """The values are those of the reference, and only the half steps of PRK are not int64."""
    limit = PNDM_SPEC["tolerance"]["atol_timesteps"]
    whole, half = torch.int64, torch.float32
    dtypes = {4: [whole, half, half, whole], 1: [whole]}
    assert [ts.dtype for ts in seen] == [d for calls in calls_per_step for d in dtypes[calls]]
    assert [ts.tolist() for ts in seen] == [
        pytest.approx([t] * len(seen[0]), rel=limit) for t in want
    ]
