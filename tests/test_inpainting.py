"""Training of the inpainting models, from nothing and from models that know nothing of masks."""

import json
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from glide_finetune.batch_losses import batch_losses
from glide_finetune.config import TrainConfig
from glide_finetune.data import images
from glide_finetune.evaluation import evaluation_mode
from glide_finetune.glide_finetune import (
    base_train_step,
    run_glide_finetune_epoch,
    upsample_train_step,
)
from glide_finetune.glide_util import load_model
from glide_finetune.optimization import make_optimizer
from glide_finetune.samples import SampleDrawer
from glide_finetune.validation import Validator
from glide_finetune.weights import write_weights
from glide_text2im.model_creation import create_gaussian_diffusion
from golden_data import deviation, fill
from test_trainer import gradients_of_step
from tiny_training import (
    OPTIONS,
    SIDE,
    assert_same_weights,
    tiny_batch,
    tiny_model,
    tiny_trainer,
    weights_of,
)

KINDS = ["base-inpaint", "upsample-inpaint"]
STEPS = {"base-inpaint": base_train_step, "upsample-inpaint": upsample_train_step}


def batch_of(kind, size=4, seed=0):
    return tiny_batch(size, seed, upsample=kind.startswith("upsample"))


def conditions_of(model):
    """A list that takes the keywords of every call of the model."""
    seen = []
    model.register_forward_pre_hook(
        lambda module, args, keywords: seen.append(keywords), with_kwargs=True
    )
    return seen


# ---------------------------------------------------------------------------------- what is trained


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_sees_the_image_and_a_random_mask_of_it(tmp_path, kind):
    trainer = tiny_trainer(tmp_path, kind)
    seen = conditions_of(trainer.model)
    batch = batch_of(kind)
    trainer.train_step([batch])
    (conditions,) = seen
    assert torch.equal(conditions["inpaint_image"], batch[-1])
    masks = conditions["inpaint_mask"]
    assert masks.shape == (4, 1, SIDE, SIDE)
    assert masks.unique().tolist() == [0.0, 1.0]
    if "low_res" in conditions:  # which is never erased
        assert torch.equal(conditions["low_res"], batch[2])


def test_every_step_and_accumulated_batch_has_masks_of_its_own_that_follow_from_the_seed(tmp_path):
    masks = []
    for _ in range(2):
        trainer = tiny_trainer(tmp_path, "base-inpaint", seed=4)
        seen = conditions_of(trainer.model)
        for _ in range(2):
            torch.manual_seed(len(masks))  # of no account
            trainer.train_step([tiny_batch(), tiny_batch()])
        masks.append([conditions["inpaint_mask"] for conditions in seen])
    assert all(map(torch.equal, *masks))
    assert len({mask.numpy().tobytes() for mask in masks[0]}) == 4


@pytest.mark.parametrize("known", [0.0, 1.0])
def test_the_loss_is_that_of_all_pixels_known_or_not(known):
    _, diffusion, _ = tiny_model()
    noise = torch.zeros(4, 3, SIDE, SIDE)
    noise[..., : SIDE // 2] = 2.0

    def blind(x, timesteps, **_):
        return torch.zeros(len(x), 6, *x.shape[2:])

    losses, _ = batch_losses(
        blind, diffusion, tiny_batch(), "cpu", noise=noise, vlb_weight=0,
        inpaint_mask=torch.full((4, 1, SIDE, SIDE), known),
    )  # fmt: skip
    assert losses.mse.tolist() == [2.0] * 4


def test_models_of_other_kinds_get_no_mask(tmp_path):
    trainer = tiny_trainer(tmp_path)
    seen = conditions_of(trainer.model)
    trainer.train_step([tiny_batch()])
    assert seen[0].keys() == {"tokens", "mask"}


@pytest.mark.parametrize("kind", KINDS)
def test_training_brings_the_loss_down(tmp_path, kind):
    trainer = tiny_trainer(tmp_path, kind)
    items = [tuple(part[0] for part in batch_of(kind, 1, seed)) for seed in range(8)]
    look = Validator(items, trainer.config, 1000)
    before = look(trainer)
    for step in range(15):
        trainer.train_step([batch_of(kind, seed=100 + step)])
    assert look(trainer)["val/mse"] < 0.9 * before["val/mse"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_functions_for_notebooks_draw_masks_or_take_them(kind):
    model, diffusion, _ = tiny_model(kind)
    seen = conditions_of(model)
    mask = torch.ones(4, 1, SIDE, SIDE)
    for keywords in ({}, {}, {"inpaint_mask": mask}):
        torch.manual_seed(1)
        STEPS[kind](model, diffusion, batch_of(kind), "cpu", **keywords).backward()
    drawn, again, given = (conditions["inpaint_mask"] for conditions in seen)
    assert torch.equal(drawn, again)
    assert not drawn.all()
    assert torch.equal(given, mask)
    assert model.input_blocks[0][0].weight.grad[:, 6].any()  # the mask's channel


# ------------------------------------------------------------------------- validation and samples


def test_validation_looks_at_each_image_through_the_same_mask_whatever_the_batch_size(tmp_path):
    trainer = tiny_trainer(tmp_path, "base-inpaint")
    items = [tuple(part[0] for part in tiny_batch(1, seed)) for seed in range(6)]
    seen = conditions_of(trainer.model)
    metrics = []
    for size in (1, 4, 4):
        config = TrainConfig(batch_size=size, train_inpaint=True)
        torch.manual_seed(size)
        metrics.append(Validator(items, config, 1000)(trainer))
    masks = torch.cat([conditions["inpaint_mask"] for conditions in seen]).split(6)
    assert torch.equal(masks[0], masks[1])
    assert torch.equal(masks[0], masks[2])
    assert len({mask.numpy().tobytes() for mask in masks[0]}) > 3
    assert metrics[1] == metrics[2] == pytest.approx(metrics[0], rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_samples_are_whole_pictures_with_nothing_known(tmp_path, kind):
    trainer = tiny_trainer(tmp_path, kind, test_prompt="a cat", log=mock.Mock())
    seen = conditions_of(trainer.model)
    low_res = torch.zeros(1, 3, SIDE // 4, SIDE // 4) if kind == "upsample-inpaint" else None
    SampleDrawer(trainer.config, trainer.options, tmp_path, low_res, "6")(trainer)
    with Image.open(tmp_path / "00000000.png") as grid:
        assert grid.width >= SIDE
    assert seen
    assert not any("inpaint_mask" in conditions for conditions in seen)


@pytest.mark.parametrize("kind", KINDS)
def test_the_last_sample_is_a_picture_of_the_data_with_its_middle_painted_anew(tmp_path, kind):
    trainer = tiny_trainer(tmp_path, kind, log=mock.Mock())
    _, _, *pictures = (part[0] for part in batch_of(kind, 1))
    encoder = trainer.model.tokenizer
    tokens, mask = encoder.padded_tokens_and_mask(encoder.encode("a disc"), OPTIONS["text_ctx"])
    example = (torch.tensor(tokens), torch.tensor(mask), *pictures)
    low_res = torch.zeros(1, 3, SIDE // 4, SIDE // 4) if kind == "upsample-inpaint" else None
    draw = SampleDrawer(trainer.config, trainer.options, tmp_path, low_res, "6", example)
    draw(trainer)
    draw(trainer)
    (_, drawn, labels, _), (_, again, _, _) = (
        c.args for c in trainer.log.log_images.call_args_list
    )
    assert labels == [trainer.config.test_prompt, "middle repainted: a disc"]
    assert drawn[-1].tobytes() == again[-1].tobytes()
    found, given = np.asarray(drawn[-1]), np.asarray(images.to_pil(pictures[-1]))
    middle = np.zeros((SIDE, SIDE), dtype=bool)
    middle[2:6, 2:6] = True
    assert (found[~middle] == given[~middle]).all()
    assert (found[middle] != given[middle]).any(axis=-1).mean() > 0.9


def test_an_epoch_in_a_notebook_saves_an_inpainting_model_as_one(tmp_path):
    model, diffusion, options = tiny_model("base-inpaint")
    run_glide_finetune_epoch(
        model, diffusion, options, [tiny_batch()], make_optimizer(model, 1e-3, 0.0), 1,
        checkpoints_dir=str(tmp_path), log_frequency=0,
    )  # fmt: skip
    assert json.loads((tmp_path / "glide-ft-1x1.json").read_text())["kind"] == "base-inpaint"


def test_a_checkpoint_says_its_kind_and_is_loaded_as_it(tmp_path):
    trainer = tiny_trainer(tmp_path, "base-inpaint")
    trainer.train_step([tiny_batch()])
    trainer.finish()
    assert json.loads((tmp_path / "glide-ft-0x1.json").read_text())["kind"] == "base-inpaint"
    path = str(tmp_path / "glide-ft-0x1.pt")
    model, _, options = load_model(path, model_type="base-inpaint")
    assert options["inpaint"] is True
    assert_same_weights(model.state_dict(), weights_of(trainer.model))
    with pytest.raises(ValueError, match="kind base-inpaint, wanted is base:"):
        load_model(path)


# -------------------------------------------------------------- starting from a model without masks


@pytest.mark.parametrize("source", ["base", "upsample"])
def test_a_widened_model_computes_what_its_origin_does_whatever_is_known(tmp_path, source):
    origin, _, _ = tiny_model(source)
    fill(origin)
    write_weights(tmp_path / "w.pt", origin.state_dict())
    model, _, _ = load_model(
        str(tmp_path / "w.pt"), model_type=f"{source}-inpaint", model_options=OPTIONS
    )
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 3, SIDE, SIDE, generator=generator)
    tokens, mask, *low_res, images = batch_of(source, 3)
    conditions = {"tokens": tokens, "mask": mask} | ({"low_res": low_res[0]} if low_res else {})
    timesteps = torch.tensor([0, 500, 999])
    known = torch.rand(3, 1, SIDE, SIDE, generator=generator).round()
    with evaluation_mode(origin), evaluation_mode(model):
        want = origin(x, timesteps, **conditions)
        for inpaint in ({}, {"inpaint_image": images, "inpaint_mask": known}):
            got = model(x, timesteps, **conditions, **inpaint)
            assert deviation(got, want.numpy()) < 1e-6


@pytest.mark.parametrize("source", ["base", "upsample"])
def test_a_widened_model_learns_to_look_at_what_is_known(tmp_path, source):
    write_weights(tmp_path / "w.pt", tiny_model(source)[0].state_dict())
    trainer = tiny_trainer(tmp_path, f"{source}-inpaint")
    widened, _, _ = load_model(
        str(tmp_path / "w.pt"), model_type=f"{source}-inpaint", model_options=OPTIONS
    )
    trainer.model.load_state_dict(widened.state_dict())
    _, gradients = gradients_of_step(trainer, [batch_of(source)])
    for channel in range(3, 7):
        assert gradients["input_blocks.0.0.weight"][:, channel].any()


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("base", "upsample-inpaint"),
        ("upsample", "base-inpaint"),
        ("base-inpaint", "base"),
        ("upsample-inpaint", "upsample"),
        ("base-inpaint", "upsample-inpaint"),
        ("upsample-inpaint", "base-inpaint"),
    ],
)
@pytest.mark.parametrize("described", [True, False])
def test_no_other_kind_becomes_another(tmp_path, given, wanted, described):
    model, _, options = tiny_model(given)
    path = tmp_path / "glide-ft-0x1.pt"
    write_weights(path, model.state_dict())
    if described:
        description = {"kind": given, "model_options": options}
        path.with_suffix(".json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match=f"kind {given}, wanted is {wanted}") as caught:
        load_model(str(path), model_type=wanted, model_options=None if described else OPTIONS)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------- filling a hole

STRIPES = {
    "num_head_channels": 32, "channel_mult": "1,1", "xf_width": 16, "xf_heads": 1, "dropout": 0.0
}  # fmt: skip


def striped_batch(size, seed):
    """Pictures whose every row has one of eight colours, without captions."""
    generator = torch.Generator().manual_seed(seed)
    colours = torch.randint(0, 2, (size, 3, SIDE, 1), generator=generator) * 1.6 - 0.8
    tokens = torch.zeros(size, OPTIONS["text_ctx"], dtype=torch.int64)
    return tokens, tokens.bool(), colours.repeat(1, 1, 1, SIDE)


def train_on_stripes(model, diffusion, steps, seed):
    """Some hundred steps, without the timesteps at which there is nothing to learn of stripes."""
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0, fused=True)
    for step in range(steps):
        torch.manual_seed(seed + step)
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * (1 - step / steps)
        timesteps = torch.randint(400, 900, (8,))
        batch = striped_batch(8, seed + step)
        base_train_step(model, diffusion, batch, "cpu", timesteps=timesteps).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def error_in_the_hole(model, options):
    """Mean error of the pixels that are drawn into the middle of striped pictures.

    Any model knows the rest of the pictures as far as sampling can tell it: the known pixels are
    put back at every step. An inpainting model also sees them as such.
    """
    tokens, mask, pictures = striped_batch(32, seed=10**6)
    known = torch.ones(len(pictures), 1, SIDE, SIDE)
    known[:, :, 2:6, 2:6] = 0.0
    conditions = {"tokens": tokens, "mask": mask}
    if options["inpaint"]:
        conditions |= {"inpaint_image": pictures, "inpaint_mask": known}
    generator = torch.Generator().manual_seed(0)
    with evaluation_mode(model):
        drawn = create_gaussian_diffusion(1000, options["noise_schedule"], "10").ddim_sample_loop(
            model,
            pictures.shape,
            noise=torch.randn(pictures.shape, generator=generator),
            denoised_fn=lambda x: x * (1 - known) + pictures * known,
            model_kwargs=conditions,
        )
    return ((drawn - pictures) * (1 - known)).abs().sum().item() / (1 - known).sum().item() / 3


@pytest.mark.slow
def test_some_hundred_steps_teach_a_base_model_to_fill_holes_better_than_it_could(tmp_path):
    base, diffusion, options = tiny_model(options=STRIPES)
    train_on_stripes(base, diffusion, 150, seed=0)
    write_weights(tmp_path / "base.pt", base.state_dict())
    inpaint, _, inpaint_options = load_model(
        str(tmp_path / "base.pt"),
        model_type="base-inpaint",
        model_options={**OPTIONS, **STRIPES},
    )
    train_on_stripes(inpaint, diffusion, 350, seed=1000)
    train_on_stripes(base, diffusion, 350, seed=1000)
    assert error_in_the_hole(inpaint, inpaint_options) < 0.9 * error_in_the_hole(base, options)
