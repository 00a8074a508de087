"""The training steps and epochs that notebooks call."""

import itertools
import json
from unittest import mock

import pytest
import torch
import wandb
from PIL import Image
from torch.utils.data import DataLoader

from glide_finetune import train_util, wandb_run
from glide_finetune.batch_losses import batch_losses
from glide_finetune.glide_finetune import (
    base_train_step,
    run_glide_finetune_epoch,
    upsample_train_step,
)
from glide_finetune.glide_util import load_model
from glide_finetune.loader import TextImageDataset
from glide_finetune.metrics import read_metrics
from glide_finetune.optimization import make_optimizer
from glide_text2im.model_creation import create_model_and_diffusion
from golden_data import fill, load
from tiny_training import SIDE, assert_same_weights, tiny_batch, tiny_model

SPEC, DATA = load("training")
TOLERANCE = SPEC["tolerance"]
STEPS = {"base_train_step": base_train_step, "upsample_train_step": upsample_train_step}


@pytest.mark.parametrize("name", SPEC["train_steps"])
def test_train_steps_equal_the_old_trainers_for_the_same_timesteps_and_noise(name):
    case = SPEC["train_steps"][name]
    stored = {key: torch.from_numpy(DATA[f"train_step/{name}/{key}"]) for key in case["batch"]}
    model, diffusion = create_model_and_diffusion(**case["options"])
    fill(model).train()
    loss = STEPS[case["function"]](
        model,
        diffusion,
        [stored[key] for key in case["batch"]],
        "cpu",
        timesteps=torch.tensor(case["timesteps"]),
        noise=torch.from_numpy(DATA[f"train_step/{name}/noise"]),
    )
    loss.backward()

    assert loss.shape == ()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(case["loss"], abs=TOLERANCE["atol"])
    want = case["grad_l2_norms"]
    floor = 1e-3 * max(norm for norm in want.values() if norm is not None)
    for key, parameter in model.named_parameters():
        if want[key] is None:
            assert parameter.grad is None, key
        else:
            off = abs(float(parameter.grad.norm()) - want[key])
            assert off <= TOLERANCE["rtol_gradient"] * (want[key] + floor), key


def test_timesteps_are_drawn_uniformly_from_all_of_them_with_the_last():
    _, diffusion, _ = tiny_model()

    def perfect(x, timesteps, **_):
        return torch.zeros(len(x), 6, *x.shape[2:])

    torch.manual_seed(0)
    batch = (torch.zeros(20000, 1), torch.zeros(20000, 1), torch.zeros(20000, 3, 1, 1))
    _, timesteps = batch_losses(perfect, diffusion, batch, "cpu", vlb_weight=0)
    counts = timesteps.bincount(minlength=1000)
    assert counts.shape == (1000,)  # 0 … 999
    assert counts.min() > 0
    hundreds = counts.view(10, 100).sum(1)
    assert hundreds.min() > 1800
    assert hundreds.max() < 2200


def test_the_variance_channels_are_trained_by_the_bound_alone():
    model, diffusion, _ = tiny_model()
    for vlb_weight in (0.0, 0.001):
        model.zero_grad()
        base_train_step(model, diffusion, tiny_batch(), "cpu", vlb_weight=vlb_weight).backward()
        gradient = model.out[2].weight.grad.flatten(1).norm(dim=1)
        assert (gradient[:3] > 0).all()
        assert (gradient[3:] > 0).all() == (vlb_weight > 0)


def test_train_steps_draw_from_torch_and_take_a_loss_weighting():
    model, diffusion, _ = tiny_model()
    losses = []
    for weighting in ("none", "none", "soft_min_snr"):
        torch.manual_seed(1)
        losses.append(
            base_train_step(model, diffusion, tiny_batch(), "cpu", loss_weighting=weighting).item()
        )
    assert losses[0] == losses[1]
    assert losses[2] < losses[0]


# ------------------------------------------------------------------------------------- epochs


def loader(batches=4, upsample=False):
    items = [tiny_batch(1, seed, upsample=upsample) for seed in range(2 * batches)]
    return DataLoader([[part[0] for part in item] for item in items], batch_size=2)


def run_epoch(tmp_path, dataloader, model_type="base", model=None, **keywords):
    model, diffusion, options = model or tiny_model(model_type)
    run_glide_finetune_epoch(
        model,
        diffusion,
        options,
        dataloader,
        keywords.pop("optimizer", None) or make_optimizer(model, 1e-3, 0.0),
        2,
        sample_respacing="5",
        prompt="a cat",
        side_x=SIDE,
        side_y=SIDE,
        outputs_dir=str(tmp_path / "outputs"),
        checkpoints_dir=str(tmp_path / "checkpoints"),
        **keywords,
    )
    return model


def test_an_epoch_leaves_grids_metrics_and_a_checkpoint_that_loads(tmp_path):
    model = run_epoch(tmp_path, loader(), log_frequency=2)
    grids = sorted((tmp_path / "outputs").iterdir())
    assert [path.name for path in grids] == ["00000002.png", "00000004.png"]
    lines = read_metrics(tmp_path / "checkpoints")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    saved, _, _ = load_model(str(tmp_path / "checkpoints" / "glide-ft-1x4.pt"))
    assert_same_weights(saved.state_dict(), model.state_dict())


@pytest.mark.parametrize(
    "spelling", ["gradient_accumualation_steps", "gradient_accumulation_steps"]
)
def test_gradients_accumulate_with_both_spellings_of_the_keyword(tmp_path, spelling):
    run_epoch(tmp_path, loader(batches=5), log_frequency=0, **{spelling: 2})
    assert [line["step"] for line in read_metrics(tmp_path / "checkpoints")] == [1, 2, 3]
    assert (tmp_path / "checkpoints" / "glide-ft-1x3.pt").exists()
    assert not (tmp_path / "outputs").exists()


def test_steps_are_counted_over_all_epochs_and_draws_differ(tmp_path):
    model = tiny_model()
    optimizer = make_optimizer(model[0], 0.0, 0.0)
    torch.manual_seed(0)
    for epoch in range(2):
        run_epoch(tmp_path, loader(3), model=model, optimizer=optimizer, epoch=epoch)
    lines = read_metrics(tmp_path / "checkpoints")
    assert [(line["step"], line["epoch"]) for line in lines] == [
        (1, 0), (2, 0), (3, 0), (4, 1), (5, 1), (6, 1),
    ]  # fmt: skip
    assert len({line["mse"] for line in lines}) == 6  # same data and weights, other noise
    assert (tmp_path / "checkpoints" / "glide-ft-2x6.pt").exists()


def test_metrics_are_only_ever_added_also_where_epochs_begin_again(tmp_path):
    for _ in range(2):
        run_epoch(tmp_path, loader(2), log_frequency=0)
    assert [line["step"] for line in read_metrics(tmp_path / "checkpoints")] == [1, 2, 3, 4]


def test_other_draws_of_the_caller_stay_as_they_are(tmp_path):
    numbers = []
    for batches in (1, 3):
        model = tiny_model()
        torch.manual_seed(0)
        run_epoch(tmp_path, loader(batches), model=model, log_frequency=0)
        numbers.append(torch.rand(()).item())
    assert numbers[0] == numbers[1]


def test_every_epoch_over_a_folder_has_crops_of_its_own(tmp_path):
    (tmp_path / "data").mkdir()
    Image.effect_noise((40, 40), 80).convert("RGB").save(tmp_path / "data" / "0.png")
    dataset = TextImageDataset(
        tmp_path / "data", side_x=SIDE, side_y=SIDE, resize_ratio=0.2, text_ctx_len=8
    )
    seen = []

    class Watched(DataLoader):
        def __iter__(self):
            for batch in super().__iter__():
                seen.append(batch[2])
                yield batch

    for epoch in range(2):
        run_epoch(tmp_path, Watched(dataset), log_frequency=0, epoch=epoch)
    assert not torch.equal(*seen)


def test_a_failing_wandb_run_does_not_end_the_epoch(tmp_path, caplog):
    wandb_run = mock.Mock(spec=["log"])
    wandb_run.log.side_effect = RuntimeError("no network")
    run_epoch(tmp_path, loader(2), log_frequency=1, wandb_run=wandb_run)
    assert len(read_metrics(tmp_path / "checkpoints")) == 2
    assert [record.getMessage() for record in caplog.records] == [
        "wandb is off for this run (RuntimeError: no network)"
    ]


def test_the_learning_rate_of_the_optimizer_is_left_as_it_is(tmp_path):
    model = tiny_model()
    parameters = list(model[0].parameters())
    optimizer = torch.optim.AdamW(
        [{"params": parameters[:5], "lr": 1e-5}, {"params": parameters[5:], "lr": 1e-4}]
    )
    run_epoch(tmp_path, loader(1), model=model, optimizer=optimizer)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-5, 1e-4]


def test_a_wandb_run_gets_every_step_and_the_pictures(tmp_path):
    wandb_run = mock.Mock(spec=["log"])
    run_epoch(tmp_path, loader(2), log_frequency=2, wandb_run=wandb_run)
    (first, first_step), (second, _), (pictures, picture_step) = (
        call.args for call in wandb_run.log.call_args_list
    )
    assert first_step == 1
    assert {"loss", "lr", "grad_norm", "images_per_second"} <= first.keys()
    assert second["loss"] > 0
    assert picture_step == 2
    assert [picture._caption for picture in pictures["samples"]] == ["a cat", "a cat"]


def test_an_upsampler_epoch_draws_from_the_given_image(tmp_path):
    Image.new("RGB", (40, 30), "red").save(tmp_path / "low.png")
    run_epoch(
        tmp_path,
        loader(2, upsample=True),
        "upsample",
        train_upsample=True,
        upsample_factor=4,
        image_to_upsample=str(tmp_path / "low.png"),
        log_frequency=2,
    )
    (path,) = (tmp_path / "outputs").iterdir()
    with Image.open(path) as grid:
        assert grid.width > 2 * SIDE * 4


def test_an_upsampler_epoch_without_an_image_trains_without_grids(tmp_path):
    run_epoch(tmp_path, loader(2, upsample=True), "upsample", train_upsample=True, log_frequency=1)
    assert not (tmp_path / "outputs").exists()
    assert json.loads((tmp_path / "checkpoints" / "glide-ft-1x2.json").read_text())["kind"] == (
        "upsample"
    )


def test_an_empty_loader_is_a_clear_error(tmp_path):
    with pytest.raises(ValueError, match="gave no batch"):
        run_epoch(tmp_path, [])


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"train_upsample": True}, "train_upsample is True, but the model is a base model"),
        (
            {"gradient_accumualation_steps": 2, "gradient_accumulation_steps": 3},
            "is given twice",
        ),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps is 0"),
    ],
)
def test_arguments_of_an_epoch_that_contradict_each_other_are_refused(tmp_path, keywords, message):
    with pytest.raises(ValueError, match=message):
        run_epoch(tmp_path, loader(), **keywords)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("timestep", [-1, 1000])
def test_timesteps_out_of_range_are_refused(timestep):
    model, diffusion, _ = tiny_model()
    timesteps = torch.tensor([0, 1, timestep, 999])
    with pytest.raises(ValueError, match="give some from 0 to 999"):
        base_train_step(model, diffusion, tiny_batch(4), "cpu", timesteps=timesteps)


def test_noise_of_another_shape_is_refused():
    model, diffusion, _ = tiny_model()
    with pytest.raises(ValueError, match=r"noise has shape \(4, 3, 1, 1\), the images"):
        base_train_step(model, diffusion, tiny_batch(4), "cpu", noise=torch.zeros(4, 3, 1, 1))


# ---------------------------------------------------------------------------------- train_util


def test_save_model_writes_plain_weights_under_the_usual_name(tmp_path):
    model, _, _ = tiny_model()
    path = train_util.save_model(model, str(tmp_path / "new"), 12, 3)
    assert path == tmp_path / "new" / "glide-ft-3x12.pt"
    assert_same_weights(torch.load(path, weights_only=True), model.state_dict())
    again, _, _ = load_model(str(path))  # of its size, not the released one
    assert_same_weights(again.state_dict(), model.state_dict())


def test_pictures_and_tensors_turn_into_each_other():
    image = Image.new("RGB", (3, 2), (255, 0, 51))
    tensor = train_util.pil_image_to_norm_tensor(image)
    assert tensor.shape == (3, 2, 3)
    assert tensor[:, 0, 0].tolist() == pytest.approx([1.0, -1.0, -0.6])
    row = train_util.pred_to_pil(torch.stack([tensor, -tensor]))
    assert row.size == (6, 2)
    assert row.getpixel((0, 0)) == (255, 0, 51)
    assert row.getpixel((5, 1)) == (0, 255, 204)


def test_transparency_is_white_in_a_notebook_as_in_training():
    clear = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    assert (train_util.pil_image_to_norm_tensor(clear) == 1).all()


def test_a_base_model_takes_no_notice_of_an_image_to_upsample(tmp_path):
    run_epoch(tmp_path, loader(), image_to_upsample="low_res_face.png")


@pytest.mark.parametrize("mode", ["disabled", "offline"])
def test_wandb_setup_takes_the_old_arguments_and_begins_wandbs_own_run(tmp_path, monkeypatch, mode):
    monkeypatch.setenv("WANDB_MODE", mode)
    run = train_util.wandb_setup(1, 64, 64, 1e-4, False, "cpu", "data", str(tmp_path / "runs"))
    run.config.update({"note": "mine"})
    run_epoch(tmp_path, loader(1), log_frequency=0, wandb_run=run)
    wandb.log({"loss": 1.0})
    run.finish()
    again = train_util.wandb_setup(8, 64, 64, 1e-4, False, "cpu", "data", str(tmp_path / "runs"))
    assert again is not run
    again.finish()
    if mode == "offline":
        assert len(list(tmp_path.glob("runs/wandb/offline-run-*"))) == 2
    wandb.teardown()  # it keeps the mode of its first run


def test_wandb_setup_survives_that_wandb_fails(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(wandb_run, "start", mock.Mock(side_effect=RuntimeError("no such luck")))
    run = train_util.wandb_setup(1, 64, 64, 1e-4, False, "cpu", "data", str(tmp_path))
    run.log({"loss": 1.0})
    assert "wandb is off for this run (RuntimeError: no such luck)" in caplog.text


def test_an_interrupted_epoch_is_saved(tmp_path):
    def interrupted():
        yield from itertools.islice(loader(), 3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_epoch(tmp_path, interrupted(), log_frequency=0)
    names = [path.name for path in (tmp_path / "checkpoints").glob("*.json")]
    assert len(names) == 1
    assert load_model(str(tmp_path / "checkpoints" / names[0].replace(".json", ".pt")))
    with pytest.raises(KeyboardInterrupt):  # with nothing to save
        run_epoch(tmp_path, interrupted_at_once(), log_frequency=0)
    assert [path.name for path in (tmp_path / "checkpoints").glob("*.json")] == names


def interrupted_at_once():
    raise KeyboardInterrupt
    yield


def test_checkpoints_come_within_a_long_epoch(tmp_path):
    run_epoch(tmp_path, loader(), log_frequency=0, save_checkpoint_interval=2)
    names = [path.name for path in (tmp_path / "checkpoints").glob("*.json")]
    assert sorted(names) == ["glide-ft-0x2.json", "glide-ft-1x4.json"]


@pytest.mark.parametrize("use_fp16", [False, True])
def test_gradients_that_the_optimizer_knows_nothing_of_make_no_difference(tmp_path, use_fp16):
    """Such as those of a UNet that is set trainable after the optimizer was made."""
    found = []
    for requires_grad in (False, True):
        model, diffusion, options = tiny_model(use_fp16=use_fp16, freeze_diffusion=True)
        optimizer = make_optimizer(model, 1e-3, 0.0)
        for parameter in model.parameters():
            parameter.requires_grad_(requires_grad or parameter.requires_grad)
        folder = tmp_path / str(requires_grad)
        run_epoch(
            folder, loader(), model=(model, diffusion, options), optimizer=optimizer,
            log_frequency=0,
        )  # fmt: skip
        assert all(parameter.grad is None for parameter in model.parameters())
        found.append([line["grad_norm"] for line in read_metrics(folder / "checkpoints")])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_an_interrupted_step_leaves_no_gradient_to_the_next(tmp_path):
    found = []
    for is_interrupted in (False, True):
        torch.manual_seed(0)
        model, diffusion, options = tiny_model()
        if is_interrupted:
            loss = base_train_step(model, diffusion, tiny_batch(), "cpu")
            loss.backward()
        torch.manual_seed(1)
        folder = tmp_path / str(is_interrupted)
        run_epoch(folder, loader(1), model=(model, diffusion, options), log_frequency=0)
        found.append(read_metrics(folder / "checkpoints")[0]["grad_norm"])
    assert found[0] == found[1]


def test_calls_that_count_no_epochs_get_other_data_each_time(tmp_path):
    epochs = []

    class Data(list):
        def set_epoch(self, epoch):
            epochs.append(epoch)

    dataloader = DataLoader(Data(loader(4).dataset), batch_size=2)
    for _ in range(3):
        run_epoch(tmp_path, dataloader, log_frequency=0)
    run_epoch(tmp_path, dataloader, log_frequency=0, epoch=1)
    assert epochs == [0, 4, 8, 1]


def test_float16_weights_are_refused(tmp_path):
    model, diffusion, options = tiny_model()
    model.convert_to_fp16()
    with pytest.raises(ValueError, match=r"are float16.*convert_to_fp32\(\)"):
        run_epoch(tmp_path, loader(), model=(model, diffusion, options))


def test_a_wrapped_inpainting_model_gets_its_masks():
    model, diffusion, _ = tiny_model("base-inpaint")
    seen = []
    model.register_forward_pre_hook(
        lambda module, args, keywords: seen.append("inpaint_mask" in keywords), with_kwargs=True
    )
    base_train_step(torch.nn.DataParallel(model), diffusion, tiny_batch(), "cpu")
    assert seen == [True]


def test_the_newest_checkpoints_alone_are_kept_if_asked_for(tmp_path):
    for epoch in range(3):
        run_epoch(tmp_path, loader(1), log_frequency=0, epoch=epoch, keep_checkpoints=2)
    names = [path.name for path in sorted((tmp_path / "checkpoints").glob("*.json"))]
    assert names == ["glide-ft-2x2.json", "glide-ft-3x3.json"]
