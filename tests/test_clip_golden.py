"""The noisy CLIP against the reference numbers, and as samplers and trainers use it."""

import json

import pytest
import torch
import torch.nn.functional as F

from glide_text2im.clip.model_creation import create_clip_model
from golden_data import deviation, fill, load, rnd

GOLDEN, ARRAYS = load("clip_tiny")
MANIFEST = load("manifest")[0]["clip"]
ATOL, ATOL_GRADIENT = GOLDEN["tolerance"]["atol"], GOLDEN["tolerance"]["atol_gradient"]
PROMPTS = GOLDEN["prompts"]
TOWERS = ("text_encoder", "image_encoder")


def config_file(folder, **changes):
    """A file with the first small configuration of the reference numbers, and some changes."""
    path = folder / "config.yaml"
    path.write_text(json.dumps(GOLDEN["configs"]["a"] | changes))  # JSON is YAML
    return path


@pytest.fixture
def small(tmp_path):
    """The first small configuration with golden weights, in training mode."""
    model = create_clip_model(config_file(tmp_path))
    for tower in TOWERS:
        fill(getattr(model, tower))
    return model


@pytest.fixture
def images():
    return torch.from_numpy(ARRAYS["a/images"])


@pytest.fixture
def timesteps():
    return torch.tensor(GOLDEN["timesteps"]["a"])


def keys_and_shapes(module):
    return [[key, list(value.shape)] for key, value in module.state_dict().items()]


@pytest.mark.parametrize("name", ["a", "b"])
def test_small_models_equal_the_reference(name, tmp_path):
    model = create_clip_model(config_file(tmp_path, **GOLDEN["configs"][name]))
    for tower in TOWERS:
        assert (
            keys_and_shapes(fill(getattr(model, tower)))
            == (GOLDEN["results"][name][f"{tower}_keys"])
        )
    want = {key.partition("/")[2]: a for key, a in ARRAYS.items() if key.startswith(f"{name}/")}
    images, t = torch.from_numpy(want["images"]), torch.tensor(GOLDEN["timesteps"][name])
    tokens, lengths = model.encode_prompts(PROMPTS)
    assert tokens.tolist() == want["tokens"].tolist()
    assert lengths.tolist() == want["lens"].tolist()
    assert deviation(model.text_encoder(tokens, lengths), want["text_encoder_output"]) <= ATOL
    raw = model.image_encoder((images + 1) * 127.5, t)
    assert deviation(raw, want["image_encoder_output"]) <= ATOL
    assert deviation(model.text_embeddings(PROMPTS), want["text_embeddings"]) <= ATOL
    assert deviation(model.image_embeddings(images, t), want["image_embeddings"]) <= ATOL
    gradient = model.cond_fn(PROMPTS, GOLDEN["grad_scale"])(images, t)
    assert deviation(gradient, want["cond_grad"]) <= ATOL_GRADIENT
    assert model.logit_scale.item() == pytest.approx(GOLDEN["results"][name]["logit_scale"])


@pytest.mark.slow
def test_the_released_model_equals_the_reference():
    model = create_clip_model()
    for tower in TOWERS:
        fill(getattr(model, tower))
    prompts, t = PROMPTS[: GOLDEN["default_prompts"]], torch.tensor(GOLDEN["timesteps"]["default"])
    images = torch.from_numpy(rnd("clip_tiny/default/images", (2, 3, 64, 64)))
    pick = ARRAYS["default/index"]
    with torch.no_grad():
        text, image = model.text_embeddings(prompts), model.image_embeddings(images, t)
    assert deviation(text[:, pick], ARRAYS["default/text_embeddings"]) <= ATOL
    assert deviation(image[:, pick], ARRAYS["default/image_embeddings"]) <= ATOL
    gradient = model.cond_fn(prompts, GOLDEN["grad_scale"])(images, t)
    assert deviation(gradient[:, :, ::16, ::16], ARRAYS["default/cond_grad"]) <= ATOL_GRADIENT
    norms = gradient.double().flatten(1).norm(dim=1)
    assert deviation(norms, ARRAYS["default/cond_grad_l2_norms"]) <= ATOL_GRADIENT


def test_the_released_model_has_the_keys_of_its_checkpoints():
    model = create_clip_model(device="meta")
    assert model.config == MANIFEST["config"]
    for tower in TOWERS:
        assert keys_and_shapes(getattr(model, tower)) == MANIFEST[tower]["keys"]


def test_guidance_is_computed_where_gradients_are_off(small, images, timesteps):
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            gradient = small.cond_fn(PROMPTS, GOLDEN["grad_scale"])(images.clone(), timesteps)
        assert not gradient.requires_grad
        assert deviation(gradient, ARRAYS["a/cond_grad"]) <= ATOL_GRADIENT


def test_guidance_leaves_images_and_parameter_gradients_alone(small, images, timesteps):
    small.cond_fn(PROMPTS, 3.0)(images, timesteps, tokens=None, mask=None)
    assert not images.requires_grad
    assert all(parameter.grad is None for parameter in small.parameters())


def test_guidance_refuses_another_number_of_images_than_prompts(small, images, timesteps):
    with pytest.raises(ValueError, match="is for 1 prompts, got 4 images"):
        small.cond_fn(PROMPTS[:1], 3.0)(images, timesteps)


def test_fractional_timesteps_are_refused(small, images, timesteps):
    with pytest.raises(ValueError, match="whole timesteps only"):
        small.image_embeddings(images, timesteps + 0.5)


def test_text_after_the_end_token_does_not_matter(small):
    tokens, lengths = small.encode_prompts(["a corgi"])
    changed = tokens.clone()
    changed[0, lengths[0] :] = 7
    assert torch.equal(small.text_encoder(tokens, lengths), small.text_encoder(changed, lengths))


def test_the_constants_of_the_images_move_with_the_model_but_are_not_saved(small):
    moved = small.to("meta")
    assert {buffer.device.type for buffer in moved.buffers()} == {"meta"}
    assert set(moved.state_dict()) == {name for name, _ in moved.named_parameters()}


def test_half_precision_weights_give_nearly_the_same_embeddings(small, images, timesteps):
    exact = small.image_embeddings(images, timesteps).detach().numpy()
    half = small.bfloat16().image_embeddings(images, timesteps)
    assert half.dtype == torch.float32
    assert deviation(half, exact) < 0.05


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_the_contrastive_loss_of_a_new_model_falls_in_a_few_steps(tmp_path, precision):
    torch.manual_seed(0)
    model = create_clip_model(config_file(tmp_path, max_text_len=8))
    colours = {"red": (1, -1, -1), "green": (-1, 1, -1), "blue": (-1, -1, 1), "white": (1, 1, 1)}
    images = torch.tensor(list(colours.values()))[:, :, None, None].expand(-1, -1, 16, 16).float()
    t, target = torch.zeros(4, dtype=torch.int64), torch.arange(4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    def loss():
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            image, text = model.image_embeddings(images, t), model.text_embeddings(list(colours))
        assert image.dtype == text.dtype == torch.float32
        return F.cross_entropy(model.logit_scale.exp() * image @ text.T, target)

    before = loss().item()
    for _ in range(12):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert loss().item() < before / 2


def test_a_configuration_with_other_keys_is_refused(tmp_path):
    with pytest.raises(ValueError, match="missing or unknown n_layers"):
        create_clip_model(config_file(tmp_path, n_layers=3))


def test_an_image_size_that_the_patches_do_not_fill_is_refused(tmp_path):
    with pytest.raises(ValueError, match="image_size 18 is no multiple of patch_size 4"):
        create_clip_model(config_file(tmp_path, image_size=18))
