"""The sample grids of a run."""

from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from glide_finetune import samples
from glide_finetune.data import images
from glide_finetune.glide_util import sample
from glide_finetune.samples import MOST_LABEL_LINES, PADDING, SampleDrawer, labelled_grid
from glide_finetune.seeds import derived_seed
from tiny_training import SIDE, assert_same_weights, tiny_batch, tiny_trainer, weights_of

LONG = "a very long caption " * 20


def drawer(trainer, folder, respacing="6", **keywords):
    return SampleDrawer(trainer.config, trainer.options, folder, respacing=respacing, **keywords)


def everything(trainer):
    """What drawing must leave alone, in a form that compares."""
    return {
        "modes": [module.training for module in trainer.model.modules()],
        "random": torch.get_rng_state().tolist(),
        "gradients": [
            None if p.grad is None else p.grad.sum().item() for p in trainer.model.parameters()
        ],
        "cache": trainer.model.cache_text_emb,
        "cached": trainer.model._cached_tokens,
        "grad_enabled": torch.is_grad_enabled(),
    }


def test_drawing_leaves_no_trace(tmp_path):
    trainer = tiny_trainer(tmp_path, ema_rate=0.5, test_prompt="a cat", precision="bf16")
    trainer.train_step([tiny_batch()])
    trainer.model.middle_block.eval()
    trainer.model.out[2].weight.grad = torch.ones_like(trainer.model.out[2].weight)
    before, weights = everything(trainer), weights_of(trainer.model)
    drawer(trainer, tmp_path / "samples")(trainer)
    assert everything(trainer) == before
    assert_same_weights(weights_of(trainer.model), weights)


def test_drawing_that_fails_leaves_no_trace_either(tmp_path):
    trainer = tiny_trainer(tmp_path, ema_rate=0.5)
    trainer.train_step([tiny_batch()])
    before, weights = everything(trainer), weights_of(trainer.model)
    handle = trainer.model.out.register_forward_hook(mock.Mock(side_effect=MemoryError))
    with pytest.raises(MemoryError):
        drawer(trainer, tmp_path / "samples")(trainer)
    handle.remove()
    assert everything(trainer) == before
    assert_same_weights(weights_of(trainer.model), weights)


def test_the_same_seed_gives_the_same_grid_whatever_was_drawn_before(tmp_path):
    trainer = tiny_trainer(tmp_path, test_prompt="a cat", test_batch_size=2, seed=3)
    draw = drawer(trainer, tmp_path / "samples")
    grids = []
    for step in (1, 2):
        torch.manual_seed(step)
        trainer.progress.step = step
        with Image.open(draw(trainer)) as grid:
            grids.append(np.asarray(grid))
    assert (grids[0] == grids[1]).all()
    other = tiny_trainer(tmp_path, test_prompt="a cat", test_batch_size=2, seed=4)
    with Image.open(drawer(other, tmp_path / "other")(other)) as grid:
        assert (np.asarray(grid) != grids[0]).any()


def test_grids_are_named_by_step_and_logged_with_their_captions(tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\n\na dog\n")
    log = mock.Mock()
    trainer = tiny_trainer(tmp_path, prompt_file=str(prompts), test_batch_size=2, log=log)
    trainer.progress.step = 1200
    path = drawer(trainer, tmp_path / "samples")(trainer)
    assert path == tmp_path / "samples" / "00001200.png"
    name, pictures, labels, step = log.log_images.call_args.args
    assert (name, step) == ("samples", 1200)
    assert labels == ["a cat", "a cat", "a dog", "a dog"]
    assert [picture.size for picture in pictures] == [(SIDE, SIDE)] * 4


def test_many_prompts_are_drawn_in_passes_of_limited_size(tmp_path, monkeypatch):
    monkeypatch.setattr(samples, "PICTURES_A_PASS", 3)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\na dog\n")
    trainer = tiny_trainer(tmp_path, prompt_file=str(prompts), test_batch_size=4, log=mock.Mock())
    sizes = []
    trainer.model.register_forward_hook(lambda model, inputs, out: sizes.append(len(out)))
    drawer(trainer, tmp_path / "samples")(trainer)
    assert set(sizes) == {6, 4}  # with as many empty captions: 3, 3 and 2 pictures
    _, pictures, labels, _ = trainer.log.log_images.call_args.args
    assert labels == ["a cat"] * 4 + ["a dog"] * 4
    assert len({picture.tobytes() for picture in pictures}) == 8  # no pass repeats another's noise


@pytest.mark.parametrize(
    ("settings", "used"),
    [
        ({}, {"sampler": "dpm++2m"}),
        ({"test_sampler": "dpm++2m_sde"}, {"sampler": "dpm++2m_sde"}),
        ({"test_sampler": "ddpm"}, {"sampler": "ddpm", "learned_variance": True}),
        # whatever its description says, nothing trains the variance from now on
        (
            {"test_sampler": "ddpm", "vlb_weight": 0.0},
            {"sampler": "ddpm", "learned_variance": False},
        ),
    ],
)
def test_the_sampler_can_be_chosen(tmp_path, settings, used):
    trainer = tiny_trainer(tmp_path, test_prompt="a cat", log=mock.Mock(), **settings)
    drawer(trainer, tmp_path)(trainer)
    (drawn,) = trainer.log.log_images.call_args.args[1]
    seeds = [derived_seed(trainer.config.seed, "samples", 0)]
    trainer.model.eval()
    keywords = {"guidance_scale": 4.0, "prediction_respacing": "6", "seeds": seeds, **used}
    (wanted,) = sample(trainer.model, trainer.options, SIDE, SIDE, "a cat", 1, **keywords)
    assert drawn.tobytes() == images.to_pil(wanted).tobytes()


@pytest.mark.parametrize("model_type", ["base", "upsample"])
def test_a_model_of_few_timesteps_is_drawn_with_all_of_them(tmp_path, model_type):
    few = {"options": {"diffusion_steps": 40}}
    trainer = tiny_trainer(tmp_path, model_type, load=few, test_prompt="a cat")
    low_res = torch.zeros(1, 3, SIDE // 4, SIDE // 4) if model_type == "upsample" else None
    draw = SampleDrawer(trainer.config, trainer.options, tmp_path / "samples", low_res)
    assert draw(trainer).exists()


def test_grids_without_a_place_do_not_end_the_run(tmp_path, caplog):
    (tmp_path / "samples").write_text("a file")
    trainer = tiny_trainer(tmp_path, test_prompt="a cat")
    drawer(trainer, tmp_path / "samples")(trainer)
    assert "the samples cannot be written to" in caplog.text


def test_samples_come_from_the_averaged_weights(tmp_path):
    trainer = tiny_trainer(tmp_path, ema_rate=0.9999)
    draw = drawer(trainer, tmp_path)
    with Image.open(draw(trainer)) as grid:
        before = np.asarray(grid)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(torch.randn_like(parameter))
    with Image.open(draw(trainer)) as grid:
        assert (np.asarray(grid) == before).all()


def test_samples_do_not_depend_on_the_learned_variance(tmp_path):
    trainer = tiny_trainer(tmp_path)
    draw = drawer(trainer, tmp_path)
    with Image.open(draw(trainer)) as grid:
        before = np.asarray(grid)
    with torch.no_grad():
        variance = trainer.model.out[2].weight[3:]
        variance.copy_(torch.randn(variance.shape))  # in any memory layout
    with Image.open(draw(trainer)) as grid:
        assert (np.asarray(grid) == before).all()


def test_an_upsampler_draws_from_the_low_res_image(tmp_path):
    trainer = tiny_trainer(tmp_path, "upsample", test_batch_size=2)
    low_res = torch.zeros(1, 3, SIDE // 4, SIDE // 4)
    path = drawer(trainer, tmp_path, low_res=low_res)(trainer)
    with Image.open(path) as grid:
        assert grid.width == 2 * 192 + 3 * PADDING


# -------------------------------------------------------------------------------------- the grid


@pytest.mark.parametrize(
    ("count", "size", "shape"),
    [(1, (64, 64), (1, 1)), (4, (32, 32), (2, 2)), (5, (64, 32), (3, 2)), (16, (256, 256), (4, 4))],
)
def test_a_grid_shows_every_picture_whole_and_enlarged_without_blur(count, size, shape):
    height, width = size
    generator = torch.Generator().manual_seed(0)
    pictures = torch.rand(count, 3, height, width, generator=generator) * 2 - 1
    grid = labelled_grid(pictures, ["x"] * count)
    scale = max(1, 192 // width)
    step_x = (grid.width - PADDING) // shape[0]
    step_y = (grid.height - PADDING) // shape[1]
    assert step_x == width * scale + PADDING
    pixels = np.asarray(grid)
    for index, picture in enumerate(pictures):
        top = PADDING + index // shape[0] * step_y
        left = PADDING + index % shape[0] * step_x
        shown = pixels[top : top + height * scale : scale, left : left + width * scale : scale]
        want = ((picture + 1) * 127.5).round().permute(1, 2, 0).numpy()
        assert (shown == want).all()


@pytest.mark.parametrize("width", [64, 256])
@pytest.mark.parametrize(
    "label", [LONG, "W" * 300, "WIDE CAPITALS " * 9, "Größe", "", "two\nlines"]
)
def test_labels_stay_below_their_picture_and_inside_the_grid(width, label):
    grid = labelled_grid(torch.ones(2, 3, width, width), [label, ""])
    dark = np.argwhere(np.asarray(grid).min(axis=2) < 128)  # pictures are white
    assert len(dark) > 0 or not label
    if label:
        scale = max(1, 192 // width)
        assert dark[:, 0].min() >= PADDING + width * scale
        assert dark[:, 0].max() < grid.height - 1
        assert dark[:, 1].max() < PADDING + width * scale + PADDING


def test_a_long_label_is_cut_after_some_lines_and_a_short_one_takes_no_more_than_it_needs():
    heights = [
        labelled_grid(torch.ones(1, 3, 64, 64), [label]).height for label in ("cat", LONG, 2 * LONG)
    ]
    assert heights[0] < heights[1] == heights[2]
    assert (heights[1] - heights[0]) % (MOST_LABEL_LINES - 1) == 0
