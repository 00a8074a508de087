"""The four models against the golden reference numbers: names, shapes, outputs and gradients."""

import ast
from pathlib import Path

import numpy as np
import pytest
import torch

import glide_text2im
from glide_text2im.model_creation import (
    create_model_and_diffusion,
    model_and_diffusion_defaults,
    model_and_diffusion_defaults_upsampler,
)
from golden_data import deviation, fill, load, rnd

MANIFEST, _ = load("manifest")
TINY, TINY_ARRAYS = load("unet_tiny")
FULL, FULL_ARRAYS = load("unet_full")


def arrays_of(arrays: dict[str, np.ndarray], case: str) -> dict[str, torch.Tensor]:
    prefix = f"{case}/"
    return {
        key.removeprefix(prefix): torch.from_numpy(np.array(value))
        for key, value in arrays.items()
        if key.startswith(prefix)
    }


def keys_and_shapes(model: torch.nn.Module) -> list[list]:
    return [[key, list(tensor.shape)] for key, tensor in model.state_dict().items()]


def tiny_model(case: str = "plain", **options) -> torch.nn.Module:
    model, _ = create_model_and_diffusion(**TINY["cases"][case]["options"] | options)
    return fill(model).eval()


@pytest.mark.parametrize("name", MANIFEST["models"])
def test_a_released_model_has_the_golden_options_keys_and_shapes_in_order(name):
    want = MANIFEST["models"][name]
    upsampler = name.startswith("upsample")
    options = (
        model_and_diffusion_defaults_upsampler() if upsampler else model_and_diffusion_defaults()
    ) | {"inpaint": name.endswith("inpaint")}
    assert options == want["options"]
    with torch.device("meta"):
        model, _ = create_model_and_diffusion(**options)
    assert type(model).__name__ == want["class"]
    assert keys_and_shapes(model) == want["keys"]
    assert sum(p.numel() for p in model.parameters()) == want["total_parameters"]

    model.convert_to_fp16()
    half = [t for t in model.state_dict().values() if t.dtype == torch.float16]
    assert len(half) == want["float16_tensors_after_convert_to_fp16"]
    assert sum(t.numel() for t in half) == want["float16_parameters_after_convert_to_fp16"]
    model.convert_to_fp32()
    assert {t.dtype for t in model.state_dict().values()} == {torch.float32}


@pytest.mark.parametrize("case", TINY["cases"])
def test_a_tiny_model_gives_the_golden_output_and_gradients(case):
    spec, tolerance = TINY["cases"][case], TINY["tolerance"]
    arrays = arrays_of(TINY_ARRAYS, case)
    model = tiny_model(case)
    assert keys_and_shapes(model) == spec["keys"]
    limit = tolerance["atol"]
    if spec.get("fp16"):
        model.convert_to_fp16()
        limit = tolerance["atol_half"]
        half = {key for key, t in model.state_dict().items() if t.dtype == torch.float16}
        assert half == set(spec["float16_keys"])

    out = model(arrays["x"], arrays["timesteps"], **{key: arrays[key] for key in spec["kwargs"]})
    assert out.dtype == torch.float32
    assert deviation(out, arrays["out"].numpy()) <= limit
    if "tokens" in arrays:
        text = model.get_text_emb(arrays["tokens"], arrays["mask"])
        for key in ("xf_proj", "xf_out"):
            assert deviation(text[key], arrays[key].numpy()) <= limit

    if spec["grad"]:
        loss = torch.nn.functional.mse_loss(out[:, :3], arrays["noise"])
        assert float(loss.detach()) == pytest.approx(spec["loss"], abs=tolerance["atol"])
        loss.backward()
        floor = 1e-3 * max(spec["grad_l2_norms"].values())
        for key, parameter in model.named_parameters():
            want = spec["grad_l2_norms"][key]
            error = abs(float(parameter.grad.double().norm()) - want) / (want + floor)
            assert error <= tolerance["rtol_gradient"], key


@pytest.fixture
def plain():
    """A call of the tiny base model: the positional inputs, tokens and mask."""
    arrays = arrays_of(TINY_ARRAYS, "plain")
    return (arrays["x"], arrays["timesteps"]), arrays["tokens"], arrays["mask"]


def test_tokens_and_mask_are_required(plain):
    inputs, tokens, _ = plain
    model = tiny_model()
    with pytest.raises(AssertionError, match="tokens"):
        model(*inputs)
    with pytest.raises(AssertionError, match="mask"):
        model(*inputs, tokens=tokens)
    with pytest.raises(AssertionError, match="low_res"):
        tiny_model("superres_inpaint")(*inputs)


@torch.no_grad()
def test_masked_tokens_do_not_matter_and_int32_tokens_are_accepted(plain):
    inputs, tokens, mask = plain
    model = tiny_model()
    want = model(*inputs, tokens=tokens, mask=mask)
    assert want.shape[1] == TINY["behaviour"]["output channels"]
    assert torch.equal(model(*inputs, tokens=tokens.where(mask, 0), mask=mask), want)
    assert torch.equal(model(*inputs, tokens=tokens.int(), mask=mask), want)


@torch.no_grad()
def test_a_cached_text_serves_the_same_tokens_until_it_is_deleted(plain):
    inputs, tokens, mask = plain
    model, cached = tiny_model(), tiny_model(cache_text_emb=True)
    want = model(*inputs, tokens=tokens, mask=mask)
    assert torch.equal(cached(*inputs, tokens=tokens, mask=mask), want)
    assert torch.equal(cached(*inputs, tokens=tokens, mask=~mask), want)
    with pytest.raises(AssertionError, match="del_cache"):
        cached(*inputs, tokens=tokens + 1, mask=mask)
    cached.del_cache()
    swapped = {"tokens": tokens.flip(0), "mask": mask.flip(0)}
    assert torch.equal(cached(*inputs, **swapped), model(*inputs, **swapped))


def test_an_unknown_channel_mult_is_refused():
    options = TINY["cases"]["plain"]["options"] | {"image_size": 32}
    with pytest.raises(ValueError, match="32"):
        create_model_and_diffusion(**options | {"channel_mult": ""})
    with pytest.raises(AssertionError, match="channel_mult '1,2'"):
        create_model_and_diffusion(**options)


def test_the_package_has_no_assert_statements_so_that_optimized_python_keeps_its_checks():
    package = Path(glide_text2im.__file__).parent
    found = [
        f"{path.name}:{node.lineno}"
        for path in sorted(package.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Assert)
    ]
    assert not found


def test_a_new_model_starts_with_the_golden_zero_weights():
    model, _ = create_model_and_diffusion(**TINY["cases"]["plain"]["options"])
    zero = {key for key, p in model.named_parameters() if p.ndim > 1 and not p.any()}
    assert zero == set(TINY["behaviour"]["weights that are zero after construction"])
    biases = {key.replace("weight", "bias") for key in zero}
    assert not any(model.get_parameter(key).any() for key in biases)


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL["cases"])
@torch.no_grad()
def test_a_full_size_model_gives_the_golden_output(name):
    spec, limit = FULL["cases"][name], FULL["tolerance"]["atol"]
    arrays = arrays_of(FULL_ARRAYS, name)
    with torch.device("meta"):
        model, _ = create_model_and_diffusion(**spec["options"])
    model = fill(model.to_empty(device="cpu")).eval()
    size, low_res_size = spec["image_size"], spec["low_res_size"]
    text = {"tokens": arrays["tokens"], "mask": arrays["mask"]}
    inputs = dict(text)
    if low_res_size:
        low_res = np.tanh(rnd(f"unet_full/{name}/low_res", (1, 3, low_res_size, low_res_size)))
        inputs["low_res"] = torch.from_numpy(low_res)
    x = torch.from_numpy(rnd(f"unet_full/{name}/x", (1, 3, size, size)))
    out = model(x, torch.tensor(spec["timesteps"]), **inputs)
    emb = model.get_text_emb(**text)

    exact = out.double()
    results = {
        "values": out.flatten()[arrays["index"]],
        "mean_std": torch.stack([exact.mean(), exact.std(correction=0)]),
        "channel_means": exact.mean(dim=(0, 2, 3)),
        "channel_stds": exact.std(dim=(0, 2, 3), correction=0),
        "xf_proj": emb["xf_proj"],
        "xf_out_first_and_last_position": emb["xf_out"][:, :, [0, -1]],
    }
    for key, got in results.items():
        assert deviation(got, arrays[key].numpy()) <= limit, key
