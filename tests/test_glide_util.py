"""Making models, reading their input, and sampling."""

import json
from unittest import mock

import pytest
import torch
from PIL import Image

from glide_finetune import glide_util
from glide_finetune.glide_util import (
    get_tokens_and_mask,
    get_uncond_tokens_mask,
    load_model,
    read_image,
    sample,
)
from glide_finetune.guidance import guided
from glide_text2im.text2im_model import (
    InpaintText2ImUNet,
    SuperResInpaintText2ImUnet,
    SuperResText2ImUNet,
    Text2ImUNet,
)
from stub_tokenizer import StubTokenizer
from tiny_training import OPTIONS, SIDE, assert_same_weights, tiny_model, tiny_trainer

TYPES = {
    "base": Text2ImUNet,
    "upsample": SuperResText2ImUNet,
    "base-inpaint": InpaintText2ImUNet,
    "upsample-inpaint": SuperResInpaintText2ImUnet,
}


# ------------------------------------------------------------------------------------ load_model


@pytest.mark.parametrize("model_type", TYPES)
def test_every_type_of_model_is_made_with_its_options(model_type):
    model, diffusion, options = load_model(
        model_type=model_type, init="scratch", model_options=OPTIONS
    )
    assert type(model) is TYPES[model_type]
    assert diffusion.num_timesteps == 1000
    assert options["super_res"] == model_type.startswith("upsample")
    assert options["inpaint"] == model_type.endswith("inpaint")
    assert options["xf_width"] == OPTIONS["xf_width"]
    schedule = "linear" if options["super_res"] else "squaredcos_cap_v2"
    assert options["noise_schedule"] == schedule
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_fp16_is_recorded_while_the_weights_stay_float32():
    model, _, options = tiny_model(use_fp16=True)
    assert options["use_fp16"] is True
    assert tiny_model()[2]["use_fp16"] is False
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_a_checkpoint_is_loaded_with_the_options_beside_it(tmp_path):
    trainer = tiny_trainer(tmp_path, "upsample")
    trainer.train_step([upsample_batch()])
    trainer.finish()
    path = tmp_path / "glide-ft-0x1.pt"
    model, _, options = load_model(str(path), model_type="upsample")
    assert options["xf_width"] == OPTIONS["xf_width"]
    assert_same_weights(model.state_dict(), trainer.model.state_dict())
    assert all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(ValueError, match=r"kind upsample, wanted is base"):
        load_model(str(path))


def upsample_batch():
    return (
        torch.ones(1, OPTIONS["text_ctx"], dtype=torch.int64),
        torch.ones(1, OPTIONS["text_ctx"], dtype=torch.bool),
        torch.zeros(1, 3, 2, 2),
        torch.zeros(1, 3, SIDE, SIDE),
    )


def test_plain_weights_are_loaded_with_the_options_given(tmp_path):
    model, _, _ = tiny_model()
    path = tmp_path / "weights.pt"
    torch.save(model.state_dict(), path)
    loaded, _, _ = load_model(str(path), model_options=OPTIONS)
    assert_same_weights(loaded.state_dict(), model.state_dict())
    with pytest.raises(ValueError, match=r"weights\.pt does not fit"):
        load_model(str(path), model_options={**OPTIONS, "xf_layers": 2})


@pytest.mark.parametrize(
    ("name", "description", "stale"),
    [
        ("glide-ft-0x1.pt", {"vlb_weight": 0.001}, False),
        ("glide-ft-0x1-ema.pt", {"vlb_weight": 0.0}, True),
        ("glide-ft-0x1.pt", None, True),  # of trainers that know the noise error alone
        ("base.pt", None, False),  # as OpenAI released it
        ("base.pt", {"vlb_weight": 0.0}, True),
    ],
)
def test_a_variance_that_was_not_trained_is_known_from_the_description(
    tmp_path, name, description, stale
):
    model, _, _ = tiny_model()
    path = tmp_path / name
    torch.save(model.state_dict(), path)
    if description is not None:
        description |= {"kind": "base", "model_options": OPTIONS}
        path.with_name(path.stem.removesuffix("-ema") + ".json").write_text(json.dumps(description))
    assert load_model(str(path), model_options=OPTIONS)[0].variance_is_stale is stale


def test_without_a_file_the_released_weights_of_the_type_are_fetched(monkeypatch):
    model, _, _ = tiny_model("base-inpaint")
    fetch = mock.Mock(return_value=model.state_dict())
    monkeypatch.setattr(glide_util, "load_checkpoint", fetch)
    loaded, _, _ = load_model(model_type="base-inpaint", model_options=OPTIONS)
    assert fetch.call_args.args == ("base-inpaint", "cpu")
    assert_same_weights(loaded.state_dict(), model.state_dict())


def test_an_unknown_type_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'big' is unknown.*upsample-inpaint"):
        load_model(model_type="big", init="scratch")


def test_scratch_follows_from_torchs_seed():
    first, second = tiny_model(seed=1)[0], tiny_model(seed=1)[0]
    assert_same_weights(first.state_dict(), second.state_dict())
    assert not torch.equal(tiny_model(seed=2)[0].out[2].weight, first.out[2].weight)


# -------------------------------------------------------------------------------- tokens, images


@pytest.mark.parametrize("length", [128, 16, 4])
def test_captions_have_the_asked_length(length):
    tokenizer = tiny_model()[0].tokenizer
    tokens, mask = get_tokens_and_mask(tokenizer, "a red Cube on a blue sphere", length)
    words = tokenizer.encode("a red cube on a blue sphere")
    count = min(len(words), length)
    assert (tokens.shape, mask.shape) == ((length,), (length,))
    assert (tokens.dtype, mask.dtype) == (torch.int64, torch.bool)
    assert tokens[:count].tolist() == words[:count]
    assert mask.tolist() == [True] * count + [False] * (length - count)


def test_no_caption_is_end_tokens_under_an_empty_mask():
    tokenizer = tiny_model()[0].tokenizer
    tokens, mask = get_uncond_tokens_mask(tokenizer)
    assert tokens.tolist() == [50256] * 128
    assert not mask.any()
    assert get_uncond_tokens_mask(tokenizer, 16)[0].shape == (16,)
    assert [part.tolist() for part in get_tokens_and_mask(tokenizer)] == [
        tokens.tolist(), mask.tolist(),
    ]  # fmt: skip


def test_an_image_is_cropped_to_width_and_height_in_the_models_range(tmp_path):
    image = Image.new("RGB", (30, 10), "black")
    image.paste("white", (10, 0, 20, 10))  # the middle third
    image.save(tmp_path / "stripes.png")
    tensor = read_image(str(tmp_path / "stripes.png"), (8, 8))
    assert tensor.dtype == torch.float32
    assert tensor.shape == (1, 3, 8, 8)
    assert (tensor[..., 1:-1] == 1).all()  # resampling reaches over the edges
    assert read_image(tmp_path / "stripes.png", shape=(12, 4)).shape == (1, 3, 4, 12)


# ---------------------------------------------------------------------------------------- sample


def calls_of(model):
    """What the model is called with from now on, as (batch, arguments by name)."""
    calls = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append((len(args[0]), kwargs)), with_kwargs=True
    )
    return calls


def draw(model, options, side_x=SIDE, side_y=SIDE, prompt="a cat", *args, **keywords):
    return sample(
        model, options, side_x, side_y, prompt, *args, prediction_respacing="6", **keywords
    )


@pytest.mark.parametrize(("side_x", "side_y"), [(8, 8), (16, 8), (6, 10)])
def test_base_samples_have_the_asked_size_and_range(side_x, side_y):
    model, _, options = tiny_model()
    pictures = draw(model, options, side_x, side_y, batch_size=3)
    assert pictures.shape == (3, 3, side_y, side_x)
    assert pictures.dtype == torch.float32
    assert pictures.abs().max() <= 1


def test_guidance_is_one_pass_over_captions_and_empty_captions():
    model, _, options = tiny_model()
    calls = calls_of(model)
    draw(model, options, batch_size=2, guidance_scale=3.0)
    tokenizer, length = model.tokenizer, options["text_ctx"]
    cat = get_tokens_and_mask(tokenizer, "a cat", length)
    empty = get_uncond_tokens_mask(tokenizer, length)
    assert len(calls) == 3 * 4 + 1  # three steps of Runge-Kutta, one of PLMS
    for count, kwargs in calls:
        assert count == 4
        assert torch.equal(kwargs["tokens"], torch.stack([cat[0], cat[0], empty[0], empty[0]]))
        assert torch.equal(kwargs["mask"], torch.stack([cat[1], cat[1], empty[1], empty[1]]))


def test_a_guidance_scale_of_1_needs_no_second_half():
    model, _, options = tiny_model()
    calls = calls_of(model)
    torch.manual_seed(0)
    single = draw(model, options, batch_size=2, guidance_scale=1)
    assert {count for count, _ in calls} == {2}
    torch.manual_seed(0)
    double = draw(model, options, batch_size=2, guidance_scale=1 + 1e-7)
    assert {count for count, _ in calls[13:]} == {4}
    assert torch.allclose(single, double, atol=1e-4)


def test_guidance_moves_the_noise_away_from_that_of_no_caption():
    def model(x, timesteps, **_):
        half = len(x) // 2
        eps = torch.cat([torch.full_like(x[:half], 3.0), torch.full_like(x[half:], 1.0)])
        variance = torch.cat([torch.full_like(x[:half], 7.0), torch.full_like(x[half:], 9.0)])
        return torch.cat([eps, variance], dim=1).to(torch.bfloat16)

    out = guided(model, 4.0)(torch.zeros(2, 3, 4, 4), torch.zeros(2))
    assert out.dtype == torch.float32
    assert (out[:, :3] == 1 + 4 * (3 - 1)).all()
    assert (out[:, 3:] == 7).all()


def test_every_prompt_is_drawn_batch_size_times():
    model, _, options = tiny_model()
    calls = calls_of(model)
    pictures = draw(model, options, prompt=["a cat", "a dog"], batch_size=2, guidance_scale=1)
    assert len(pictures) == 4
    rows = [
        get_tokens_and_mask(model.tokenizer, text, options["text_ctx"])[0]
        for text in ("a cat", "a cat", "a dog", "a dog")
    ]
    assert torch.equal(calls[0][1]["tokens"], torch.stack(rows))


def test_the_caption_is_encoded_once_for_all_steps():
    model, _, options = tiny_model()
    encoded = mock.Mock(return_value=None)
    model.transformer.register_forward_hook(encoded)
    draw(model, options)
    assert encoded.call_count == 1


def test_a_model_without_text_draws_too():
    model, _, options = tiny_model(options={"xf_width": 0})
    assert draw(model, options).shape == (1, 3, SIDE, SIDE)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_sampling_leaves_the_model_as_it_was(fails, cached):
    model, _, options = tiny_model()
    model.cache_text_emb = cached
    model.middle_block.eval()
    model.out[2].bias.grad = torch.ones(6)
    modes = [module.training for module in model.modules()]
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    in_eval = []
    model.out.register_forward_hook(
        lambda *_: (
            in_eval.append(not any(m.training for m in model.modules()))
            or (1 / 0 if fails else None)
        )
    )
    if fails:
        with pytest.raises(ZeroDivisionError):
            draw(model, options)
    else:
        assert not draw(model, options).requires_grad
    assert all(in_eval)
    assert [module.training for module in model.modules()] == modes
    assert_same_weights(model.state_dict(), weights)
    assert torch.equal(model.out[2].bias.grad, torch.ones(6))
    assert model.out[2].weight.grad is None
    assert model.cache_text_emb == cached
    assert model._cached_tokens is None
    assert torch.is_grad_enabled()


def test_the_same_seed_gives_the_same_pictures():
    model, _, options = tiny_model()
    pictures = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        pictures.append(draw(model, options))
    assert torch.equal(pictures[0], pictures[1])
    assert not torch.equal(pictures[0], pictures[2])


def test_an_upsampler_draws_from_a_file_or_a_tensor(tmp_path):
    model, _, options = tiny_model("upsample")
    calls = calls_of(model)
    Image.new("RGB", (8, 4), (255, 0, 0)).save(tmp_path / "low.png")
    low_res = torch.tensor([1.0, -1.0, -1.0]).view(1, 3, 1, 1).expand(1, 3, 4, 8)
    for image in (str(tmp_path / "low.png"), tmp_path / "low.png", low_res):
        torch.manual_seed(0)
        pictures = draw(
            model, options, 32, 16, batch_size=2, upsample_enabled=True, image_to_upsample=image
        )
        assert pictures.shape == (2, 3, 16, 32)
    assert {count for count, _ in calls} == {2}  # no guidance
    for _, kwargs in calls:
        assert torch.equal(kwargs["low_res"], low_res.expand(2, -1, -1, -1))


def test_the_low_res_image_is_rounded_to_8_bits():
    model, _, options = tiny_model("upsample")
    calls = calls_of(model)
    draw(model, options, upsample_enabled=True, image_to_upsample=torch.full((1, 3, 2, 2), 0.3))
    levels = (calls[0][1]["low_res"] + 1) * 127.5
    assert torch.allclose(levels, torch.full((1, 3, 2, 2), 166.0), atol=1e-4)


def test_the_start_noise_of_an_upsampler_is_tempered(monkeypatch):
    model, _, options = tiny_model("upsample")
    starts = []
    model.register_forward_pre_hook(lambda _, args: starts.append(args[0].clone()))
    for temperature in (1.0, 0.5):
        torch.manual_seed(0)
        first = len(starts)
        draw(
            model, options, upsample_enabled=True, upsample_temp=temperature,
            image_to_upsample=torch.zeros(1, 3, 2, 2),
        )  # fmt: skip
        starts[:] = [*starts[:first], starts[first]]
    assert torch.allclose(starts[1], starts[0] * 0.5)


def test_an_upsampler_without_an_image_is_a_clear_error():
    model, _, options = tiny_model("upsample")
    with pytest.raises(ValueError, match="needs an image to upsample"):
        draw(model, options, upsample_enabled=True)


@pytest.mark.parametrize(
    ("kind", "keywords", "message"),
    [
        ("base", {"batch_size": 0}, "batch_size is 0"),
        ("base", {"side_x": 0}, "side_x is 0"),
        ("base", {"prompt": []}, "there is no caption"),
        ("base", {"upsample_enabled": True}, "upsample_enabled is True, but the model is a base"),
        ("upsample", {}, "upsample_enabled is False, but the model is an upsampler"),
    ],
)
def test_what_cannot_be_drawn_is_a_clear_error(kind, keywords, message):
    model, _, options = tiny_model(kind)
    with pytest.raises(ValueError, match=message):
        draw(model, options, **keywords)


def test_a_respacing_may_be_a_number():
    model, _, options = tiny_model()
    torch.manual_seed(0)
    text = sample(model, options, SIDE, SIDE, prediction_respacing="3")
    torch.manual_seed(0)
    assert torch.equal(sample(model, options, SIDE, SIDE, prediction_respacing=3), text)


def test_a_wrong_number_of_low_res_images_is_a_clear_error():
    model, _, options = tiny_model("upsample")
    with pytest.raises(ValueError, match="holds 2 images for 3 to draw: give 1 or 3"):
        draw(
            model, options, batch_size=3, upsample_enabled=True,
            image_to_upsample=torch.zeros(2, 3, 2, 2),
        )  # fmt: skip


def test_any_tokenizer_of_that_kind_will_do():
    tokens, mask = get_tokens_and_mask(StubTokenizer(), "ab", 4)
    assert tokens.tolist() == [97, 98, 0, 0]
    assert mask.tolist() == [True, True, False, False]


def test_an_unknown_way_to_begin_is_refused():
    with pytest.raises(ValueError, match="init is 'pretraind': give pretrained or scratch"):
        load_model(init="pretraind")
