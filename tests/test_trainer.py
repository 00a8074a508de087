"""The training loop."""

import logging
from collections import Counter
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch._dynamo.exc import TorchDynamoException

from glide_finetune import bad_steps, checkpoint_writer, steps, training_run
from glide_finetune import trainer as trainer_module
from glide_finetune.bad_steps import TrainingDiverged
from glide_finetune.batch_losses import batch_losses
from glide_finetune.checkpoints import newest_checkpoint, read_training_state
from glide_finetune.data.dataloading import Batch
from glide_finetune.glide_finetune import base_train_step
from glide_finetune.memory import OutOfMemory
from glide_finetune.metrics import MetricsLog, read_metrics
from glide_finetune.optimization import learning_rate_factor
from glide_finetune.steps import Progress, StepTimer
from glide_finetune.weights import read_weights
from tiny_training import (
    assert_same_weights,
    tiny_batch,
    tiny_model,
    tiny_trainer,
    weights_of,
)


class Batches:
    """A loader as `make_dataloader` gives one: other batches in every epoch, enterable anywhere."""

    def __init__(self, count, **keywords):
        self.count, self.keywords, self.epoch, self.start = count, keywords, 0, 0
        self.given = []

    def set_epoch(self, epoch, start_batch=0):
        self.epoch, self.start = epoch, start_batch

    def __len__(self):
        return self.count

    def __iter__(self):
        for place in range(self.start, self.count):
            self.given.append((self.epoch, place))
            yield tiny_batch(2, seed=100 * self.epoch + place, **self.keywords)


class Stream(Batches):
    """One whose length is not known."""

    __len__ = None


def fixed_draws(monkeypatch):
    """Let timesteps and noise follow from the sample instead of the place in the batch."""

    def losses(model, diffusion, batch, device, **keywords):
        keywords["timesteps"], keywords["noise"] = batch[0][:, 0], batch[2].flip(3) * 2
        return batch_losses(model, diffusion, batch, device, **keywords)

    monkeypatch.setattr(trainer_module, "batch_losses", losses)


def gradients_of_step(trainer, batches):
    """Metrics and gradients of one step, which is not made."""
    found = {}

    def remember(optimizer, *_):
        for name, parameter in trainer.model.named_parameters():
            found[name] = parameter.grad.clone()

    trainer.optimizer.register_step_pre_hook(remember)
    return trainer.train_step(batches), found


# ------------------------------------------------------------------------------------ one step


@pytest.mark.parametrize("sizes", [(2, 2), (3, 1), (1, 1, 1, 1)])
def test_accumulated_batches_have_the_loss_and_gradient_of_one_large_batch(
    tmp_path, monkeypatch, sizes
):
    fixed_draws(monkeypatch)
    whole = tiny_batch(4)
    parts = [list(part) for part in zip(*(part.split(sizes) for part in whole), strict=True)]
    settings = {"load": {"options": {"dropout": 0.0}}, "max_grad_norm": 0.0}
    want_metrics, want = gradients_of_step(tiny_trainer(tmp_path, **settings), [whole])
    got_metrics, got = gradients_of_step(tiny_trainer(tmp_path, **settings), parts)
    for name, metric in want_metrics.items():
        assert got_metrics[name] == pytest.approx(metric, rel=1e-4), name
    largest = max(gradient.abs().max() for gradient in want.values())
    for name, gradient in want.items():
        assert torch.allclose(got[name], gradient, atol=1e-6 * largest), name


def test_every_accumulated_batch_has_draws_of_its_own(tmp_path, monkeypatch):
    seen = []

    def watched(*args, **keywords):
        losses, timesteps = batch_losses(*args, **keywords)
        seen.append(tuple(timesteps.tolist()))
        return losses, timesteps

    monkeypatch.setattr(trainer_module, "batch_losses", watched)
    trainer = tiny_trainer(tmp_path)
    for _ in range(2):
        trainer.train_step([tiny_batch(), tiny_batch()])
    assert len(set(seen)) == 4


def test_metrics_of_a_step_are_means_over_its_samples(tmp_path, monkeypatch):
    fixed_draws(monkeypatch)
    trainer = tiny_trainer(tmp_path, load={"options": {"dropout": 0.0}})
    batch = tiny_batch(4)
    batch[0][:, 0] = torch.tensor([249, 250, 999, 600])
    losses, _ = trainer_module.batch_losses(trainer.model, trainer.diffusion, batch, "cpu")
    metrics = trainer.train_step([batch])
    assert metrics["loss"] == pytest.approx(losses.loss.mean().item(), rel=1e-5)
    assert metrics["vb"] == pytest.approx(losses.vb.mean().item(), rel=1e-5)
    assert metrics["mse_q0"] == pytest.approx(losses.mse[0].item(), rel=1e-5)
    assert metrics["mse_q1"] == pytest.approx(losses.mse[1].item(), rel=1e-5)
    assert metrics["mse_q2"] == pytest.approx(losses.mse[3].item(), rel=1e-5)
    assert metrics["mse_q3"] == pytest.approx(losses.mse[2].item(), rel=1e-5)
    assert metrics["loss_q3"] == pytest.approx(losses.loss[2].item(), rel=1e-5)
    assert metrics["vb_q0"] == pytest.approx(losses.vb[0].item(), rel=1e-5)
    assert "vb" not in tiny_trainer(tmp_path, vlb_weight=0.0).train_step([batch])


@pytest.mark.parametrize(("limit", "want"), [(0.01, 0.01), (0.0, None), (1e6, None)])
def test_gradients_are_shortened_to_the_largest_norm(tmp_path, limit, want):
    metrics, gradients = gradients_of_step(
        tiny_trainer(tmp_path, max_grad_norm=limit), [tiny_batch()]
    )
    norm = torch.cat([gradient.flatten() for gradient in gradients.values()]).norm().item()
    assert metrics["grad_norm"] > 0.02  # before it is shortened
    assert norm == pytest.approx(want or metrics["grad_norm"], rel=1e-3)


def test_the_learning_rate_follows_warm_up_and_cosine_to_the_last_step(tmp_path):
    trainer = tiny_trainer(
        tmp_path,
        learning_rate=0.1,
        warmup_steps=2,
        lr_schedule="cosine",
        epochs=3,
        gradient_accumulation_steps=2,
        log=MetricsLog(tmp_path),
    )
    trainer.train(Batches(3))  # two steps an epoch, the second of one batch
    rates = [line["lr"] for line in read_metrics(tmp_path)]
    assert rates == pytest.approx([0.05, 0.1, 0.1, 0.0853553, 0.05, 0.0146447], rel=1e-5)


def test_a_checkpointed_model_has_the_same_gradients_with_dropout_on(tmp_path, monkeypatch):
    settings = {"dropout": 0.3, "xf_layers": 2}
    found = {}
    for checkpointing in (False, True):
        model, diffusion, _ = tiny_model(options=settings, activation_checkpointing=checkpointing)
        assert model.activation_checkpointing == checkpointing
        saved_bytes = 0

        def count(tensor):
            nonlocal saved_bytes
            if not isinstance(tensor, torch.nn.Parameter):
                saved_bytes += tensor.nbytes
            return tensor

        torch.manual_seed(3)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = base_train_step(model, diffusion, tiny_batch(), "cpu", vlb_weight=0.001)
        forward_bytes = saved_bytes
        loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        found[checkpointing] = loss.item(), forward_bytes, gradients
    (loss, kept, want), (same_loss, kept_less, got) = found[False], found[True]
    print(
        f"saved for the backward pass: {kept / 1e6:.2f} MB, checkpointed {kept_less / 1e6:.2f} MB"
    )
    assert same_loss == loss
    assert kept_less < 0.5 * kept
    for name, gradient in want.items():
        assert torch.allclose(got[name], gradient, rtol=1e-5, atol=1e-7), name


# ------------------------------------------------------------------------------ numbers gone wrong


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_is_skipped_counted_and_named(tmp_path, caplog, bad):
    trainer = tiny_trainer(tmp_path, ema_rate=0.9)
    good = tiny_batch(2, seed=1, keys=True)
    poisoned = tiny_batch(2, seed=2, keys=True)
    poisoned[2][1, 0, 0, 0] = bad
    assert trainer.train_step([good])["skipped_steps"] == 0
    weights, average = weights_of(trainer.model), weights_of_average(trainer)
    moments = read_moments(trainer)

    metrics = trainer.train_step([good, poisoned])

    assert metrics["skipped_steps"] == 1
    assert not torch.tensor(metrics["loss"]).isfinite()
    assert_same_weights(weights_of(trainer.model), weights)
    assert_same_weights(weights_of_average(trainer), average)
    assert_same_weights(read_moments(trainer), moments)
    assert trainer.ema.updates == 1
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "step 2 skipped" in record.getMessage()
    assert "1-0.png, 1-1.png, 2-0.png, 2-1.png" in record.getMessage()

    metrics = trainer.train_step([good])
    assert metrics["skipped_steps"] == 1
    assert not torch.equal(trainer.model.out[2].weight, weights["out.2.weight"])
    assert trainer.progress == Progress(
        batch=4, step=3, images=8, skipped_steps=1, skipped_in_a_row=0
    )


def weights_of_average(trainer):
    return {name: tensor.clone() for name, tensor in trainer.ema.model_state().items()}


def read_moments(trainer):
    return {
        f"{index} {name}": tensor.clone()
        for index, state in trainer.optimizer.state_dict()["state"].items()
        for name, tensor in state.items()
    }


def test_a_run_that_stays_bad_stops_with_advice_and_its_last_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(bad_steps, "MAX_BAD_STEPS", 4)

    class Poisoned(Batches):
        def __iter__(self):
            for place, batch in enumerate(super().__iter__()):
                if place >= 2:
                    batch[2].fill_(float("nan"))
                yield batch

    trainer = tiny_trainer(tmp_path, save_checkpoint_interval=2, keep_checkpoints=0)
    with pytest.raises(TrainingDiverged, match="lower --learning_rate"):
        trainer.train(Poisoned(100))
    assert trainer.progress.step == 5
    weights = torch.load(tmp_path / "glide-ft-0x2.pt", weights_only=True)
    assert_same_weights(weights, weights_of(trainer.model))


def spiking_losses(monkeypatch):
    """Let batches of three have a loss a million times as high as others."""

    def losses(model, diffusion, batch, device, **keywords):
        if len(batch[0]) == 3:
            keywords["noise"] = 1000 * torch.randn(batch[2].shape)
        return batch_losses(model, diffusion, batch, device, **keywords)

    monkeypatch.setattr(trainer_module, "batch_losses", losses)


def test_a_loss_spike_is_skipped_once_the_loss_has_settled(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(bad_steps, "STEPS_BEFORE_SPIKES", 3)
    spiking_losses(monkeypatch)
    settings = {"loss_spike_factor": 3.0, "learning_rate": 1e-6}
    good, spike = tiny_batch(2, seed=1, keys=True), tiny_batch(3, seed=2, keys=True)

    trainer = tiny_trainer(tmp_path, **settings)
    assert trainer.train_step([spike])["skipped_steps"] == 0  # nothing is known yet
    trainer = tiny_trainer(tmp_path, **settings)
    for _ in range(3):
        trainer.train_step([good])
    trainer.finish()
    weights = weights_of(trainer.model)
    metrics = trainer.train_step([spike])
    assert metrics["skipped_steps"] == 1
    assert_same_weights(weights_of(trainer.model), weights)
    assert "times its running mean" in caplog.text
    assert "2-0.png, 2-1.png, 2-2.png" in caplog.text
    assert trainer.train_step([good])["skipped_steps"] == 1  # the spike is not in the mean

    again = resumed(tmp_path, **settings)
    assert again.train_step([spike]) == metrics
    without_limit = resumed(tmp_path, learning_rate=1e-6)
    assert without_limit.train_step([spike])["skipped_steps"] == 0
    on_other_data = tiny_trainer(tmp_path, **settings)
    on_other_data.restore(newest_checkpoint(tmp_path), new_run=True)
    assert on_other_data.train_step([spike])["skipped_steps"] == 0


def test_spikes_in_a_row_stop_a_run_with_advice(tmp_path, monkeypatch):
    monkeypatch.setattr(bad_steps, "MAX_BAD_STEPS", 2)
    monkeypatch.setattr(bad_steps, "STEPS_BEFORE_SPIKES", 1)
    spiking_losses(monkeypatch)
    trainer = tiny_trainer(tmp_path, loss_spike_factor=2.0, learning_rate=1e-6)
    spike = tiny_batch(3)
    trainer.train_step([tiny_batch(2)])
    trainer.train_step([spike])
    with pytest.raises(TrainingDiverged, match="higher --loss_spike_factor"):
        trainer.train_step([spike])


def test_a_step_that_does_not_fit_into_memory_says_what_to_lower(tmp_path, monkeypatch):
    def losses(*arguments, **keywords):
        torch.empty(2**55)  # no machine has that, so torch refuses at once

    monkeypatch.setattr(trainer_module, "batch_losses", losses)
    trainer = tiny_trainer(tmp_path, batch_size=8, ema_rate=0.9)
    with pytest.raises(OutOfMemory) as caught:
        trainer.train(Batches(2))
    text = str(caught.value)
    state = 20 * sum(p.numel() for p in trainer.model.parameters())
    assert text.startswith("not enough memory for step 1: ")
    assert f"moments and average take {state / 1e9:.2f} GB whatever the batch" in text
    for part in (
        "lower --batch_size (now 8)",
        "--gradient_accumulation_steps (now 1)",
        "--activation_checkpointing",
        "--precision bf16",
        "--low_memory",
    ):
        assert part in text
    assert "\n" not in text


def test_samples_that_do_not_fit_into_memory_are_left_out(tmp_path, caplog):
    trainer = tiny_trainer(
        tmp_path, max_steps=2, log_frequency=1, draw_samples=lambda trainer: torch.empty(2**55)
    )
    trainer.train(Batches(2))
    assert trainer.progress.step == 2
    assert "lower --test_batch_size (now 1)" in caplog.text


@pytest.mark.parametrize("where", ["draw_samples", "validate"])
def test_what_fails_between_two_steps_loses_none_of_them(tmp_path, where):
    """And the run that goes on begins with it."""
    settings = {"max_steps": 4, "log_frequency": 2, "eval_interval": 2}
    action = mock.Mock(side_effect=RuntimeError("bug"))
    log = MetricsLog(tmp_path)
    trainer = tiny_trainer(tmp_path, log=log, **settings, **{where: action})
    with pytest.raises(RuntimeError, match="bug"):
        trainer.train(Batches(8))
    log.close()
    files = newest_checkpoint(tmp_path)
    assert files.step == 2
    action = mock.Mock(return_value={})
    resumed = tiny_trainer(tmp_path, **settings, **{where: action})
    resumed.model.load_state_dict(read_weights(files.weights))
    resumed.restore(files)
    resumed.log = log = MetricsLog(tmp_path, resume_step=resumed.reported_step)
    resumed.train(Batches(8))
    log.close()
    assert action.call_count == 2
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4]


@pytest.mark.parametrize("where", ["losses", "update"])
def test_a_step_that_does_not_fit_any_more_loses_none_before_it(tmp_path, monkeypatch, where):
    """Unless it was about to change the weights."""
    trainer = tiny_trainer(tmp_path, max_steps=4)

    def fail_at_the_third(function):
        def call(*arguments, **keywords):
            if trainer.progress.step == 2:
                torch.empty(2**55)
            return function(*arguments, **keywords)

        return call

    if where == "losses":
        losses = fail_at_the_third(trainer_module.batch_losses)
        monkeypatch.setattr(trainer_module, "batch_losses", losses)
    else:
        trainer.optimizer.step = fail_at_the_third(trainer.optimizer.step)
    with pytest.raises(OutOfMemory, match="not enough memory for step 3"):
        trainer.train(Batches(8))
    found = newest_checkpoint(tmp_path)
    assert (found and found.step) == (2 if where == "losses" else None)


@pytest.mark.parametrize("low_memory", [False, True])
def test_little_memory_is_told_of_what_is_still_to_come(tmp_path, monkeypatch, caplog, low_memory):
    """A run that goes on has its moments already."""
    trainer = tiny_trainer(tmp_path, low_memory=low_memory)
    gradients = sum(p.nbytes for p in trainer.model.parameters())
    monkeypatch.setattr(training_run, "available_memory", lambda device: 2 * gradients)
    training_run.warn_of_little_memory(trainer)
    assert "the first step will probably fail" in caplog.text
    caplog.clear()
    trainer.train_step([tiny_batch()])
    training_run.warn_of_little_memory(trainer)
    assert caplog.text == ""


def test_other_errors_of_a_step_stay_as_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer_module, "batch_losses", mock.Mock(side_effect=RuntimeError("bug")))
    with pytest.raises(RuntimeError, match=r"^bug$"):
        tiny_trainer(tmp_path).train(Batches(2))


# --------------------------------------------------------------------------------- a whole run


def test_a_run_logs_saves_and_looks_at_its_samples_when_it_is_time(tmp_path):
    drawn, validated = [], []
    trainer = tiny_trainer(
        tmp_path,
        epochs=2,
        log_frequency=4,
        eval_interval=3,
        save_checkpoint_interval=5,
        keep_checkpoints=0,
        log=MetricsLog(tmp_path),
        draw_samples=lambda t: drawn.append(t.progress.step),
        validate=lambda t: validated.append(t.progress.step) or {"val/loss": 0.5},
    )
    trainer.train(Batches(5))
    assert drawn == [4, 8, 10]  # the last is the end
    assert validated == [3, 6, 9, 10]
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, 11))
    assert [line["epoch"] for line in lines] == [0] * 5 + [1] * 5
    assert [line["step"] for line in lines if "val/loss" in line] == validated
    assert lines[-1]["images_per_second"] > 0
    assert lines[-1]["memory_gb"] > 0
    assert sorted(path.name for path in tmp_path.glob("glide-ft-*.pt")) == [
        "glide-ft-1x5.pt",  # saved when its epoch is complete
        "glide-ft-2x10.pt",
    ]


def test_intervals_of_zero_mean_never(tmp_path):
    drawn = []
    trainer = tiny_trainer(tmp_path, log_frequency=0, epochs=1, save_checkpoint_interval=0)
    trainer.train(Stream(2))
    assert drawn == []
    assert [path.name for path in tmp_path.glob("glide-ft-*.pt")] == ["glide-ft-1x2.pt"]


def test_a_stream_that_ends_is_validated_and_drawn_at_its_last_step_too(tmp_path):
    drawn = []
    trainer = tiny_trainer(
        tmp_path,
        epochs=2,
        log=MetricsLog(tmp_path),
        draw_samples=lambda t: drawn.append(t.progress.step),
        validate=lambda t: {"val/loss": 0.5},
    )
    trainer.train(Stream(3))
    assert drawn == [6]
    assert [line["step"] for line in read_metrics(tmp_path) if "val/loss" in line] == [6]


@pytest.mark.parametrize("kind", [Batches, Stream])
def test_max_steps_ends_a_run_in_the_middle_of_an_epoch(tmp_path, kind):
    drawn = []
    trainer = tiny_trainer(
        tmp_path, max_steps=4, draw_samples=lambda t: drawn.append(t.progress.step)
    )
    trainer.train(kind(3))
    assert trainer.progress == Progress(epoch=1, batch=1, step=4, images=8)
    assert drawn == [4]


def test_a_short_last_group_makes_a_step_of_its_own(tmp_path):
    trainer = tiny_trainer(tmp_path, epochs=2, gradient_accumulation_steps=2)
    trainer.train(Batches(3))
    assert trainer.progress == Progress(epoch=2, batch=0, step=4, images=12)


def test_a_request_to_stop_saves_after_the_step_without_drawing(tmp_path):
    drawn = []
    trainer = tiny_trainer(tmp_path, draw_samples=lambda t: drawn.append(t), log_frequency=100)
    step = trainer.train_step

    def stop_in_third(batches):
        trainer.stop_requested = trainer.progress.step == 2
        return step(batches)

    with mock.patch.object(trainer, "train_step", stop_in_third):
        trainer.train(Batches(10))
    assert trainer.progress.step == 3
    assert drawn == []
    assert newest_checkpoint(tmp_path).step == 3


class Failing(Batches):
    """Data that can no longer be read after some batches."""

    def __iter__(self):
        yield from super().__iter__()
        raise OSError("the data is gone")


@pytest.mark.parametrize("steps", [0, 2])
def test_a_run_whose_data_fails_saves_what_is_made(tmp_path, caplog, steps):
    caplog.set_level(logging.INFO)
    trainer = tiny_trainer(tmp_path, epochs=1)
    # the batch after the one to train on is fetched first
    with pytest.raises(OSError, match="the data is gone"):
        trainer.train(Failing(steps + 1))
    assert trainer.progress.step == steps
    saved = newest_checkpoint(tmp_path)
    assert (saved.step if saved else 0) == steps
    assert (f"saved at step {steps} in {tmp_path}" in caplog.text) == (steps > 0)


def test_a_checkpoint_that_cannot_be_written_does_not_hide_why_the_run_ends(
    tmp_path, monkeypatch, caplog
):
    caplog.set_level(logging.INFO)
    trainer = tiny_trainer(tmp_path, epochs=1)

    def fail(*_, **__):
        raise OSError("the disk is full")

    monkeypatch.setattr(checkpoint_writer, "save_checkpoint", fail)
    with pytest.raises(OSError, match="the data is gone"):
        trainer.train(Failing(2))
    assert "the disk is full" in caplog.text
    assert "saved at" not in caplog.text


@pytest.mark.parametrize("kind", [Batches, Stream])
def test_data_without_a_batch_is_a_clear_error(tmp_path, kind):
    with pytest.raises(ValueError, match="gave no batch"):
        tiny_trainer(tmp_path).train(kind(0))


@pytest.mark.parametrize("save_checkpoint_interval", [0, 2])
def test_a_run_that_is_finished_says_so_and_stays_as_it_is(
    tmp_path, caplog, save_checkpoint_interval
):
    trainer = tiny_trainer(tmp_path, epochs=1, save_checkpoint_interval=save_checkpoint_interval)
    trainer.train(Batches(2))
    assert [path.name for path in tmp_path.glob("glide-ft-*.pt")] == ["glide-ft-1x2.pt"]
    again = resumed(tmp_path, epochs=1)
    loader = Batches(2)
    again.train(loader)
    assert loader.given == []
    assert "raise --max_steps or --epochs" in caplog.text
    assert again.progress == trainer.progress


# -------------------------------------------------------------------------------------- resuming


def resumed(folder, model_type="base", **settings):
    trainer = tiny_trainer(folder, model_type, **settings)
    files = newest_checkpoint(folder)
    trainer.model.load_state_dict(read_weights(files.weights))
    trainer.restore(files)
    return trainer


@pytest.mark.parametrize(
    ("model_type", "precision", "stop_at"),
    [
        ("base", "fp32", 1),
        ("base", "bf16", 3),  # at the end of an epoch
        ("base", "fp16", 2),
        ("upsample", "fp32", 4),
    ],
)
def test_a_resumed_run_ends_bit_for_bit_where_one_that_never_stopped_does(
    tmp_path, model_type, precision, stop_at
):
    settings = {
        "precision": precision,
        "epochs": 2,
        "gradient_accumulation_steps": 2,
        "ema_rate": 0.99,
        "lr_schedule": "cosine",
        "warmup_steps": 2,
        "adam_weight_decay": 0.01,
    }
    upsample = model_type == "upsample"
    folders = [tmp_path / name for name in ("whole", "parts")]
    for folder in folders:
        folder.mkdir()
    whole = tiny_trainer(folders[0], model_type, log=MetricsLog(folders[0]), **settings)
    whole.train(Batches(5, upsample=upsample))  # three steps an epoch

    first = tiny_trainer(folders[1], model_type, log=MetricsLog(folders[1]), **settings)
    step = first.train_step

    def stop(batches):
        first.stop_requested = first.progress.step + 1 == stop_at
        return step(batches)

    first.train_step = stop
    first.train(Batches(5, upsample=upsample))
    assert first.progress.step == stop_at

    torch.manual_seed(999)
    log = MetricsLog(folders[1], resume_step=stop_at)
    second = resumed(folders[1], model_type, log=log, **settings)
    second.train(Batches(5, upsample=upsample))

    assert second.progress == whole.progress
    assert second.scaler.state_dict() == whole.scaler.state_dict()
    assert_same_weights(weights_of(second.model), weights_of(whole.model))
    assert_same_weights(weights_of_average(second), weights_of_average(whole))
    assert_same_weights(read_moments(second), read_moments(whole))
    histories = [
        [(line["step"], line["loss"], line["grad_norm"]) for line in read_metrics(folder)]
        for folder in folders
    ]
    assert histories[0] == histories[1]


def test_a_new_run_takes_the_state_and_the_count_of_steps_but_goes_through_its_own_epochs(tmp_path):
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
    old = tiny_trainer(tmp_path / "old", epochs=1, ema_rate=0.9)
    old.train(Batches(3))
    new = tiny_trainer(
        tmp_path / "new", epochs=2, ema_rate=0.9, lr_schedule="cosine", warmup_steps=2
    )
    files = newest_checkpoint(tmp_path / "old")
    new.model.load_state_dict(read_weights(files.weights))
    new.restore(files, new_run=True)
    assert_same_weights(read_moments(new), read_moments(old))
    assert new.ema.updates == 3
    loader = Batches(2)
    new.log = MetricsLog(tmp_path / "new")
    new.train(loader)
    assert loader.given == [(0, 0), (0, 1), (1, 0), (1, 1)]
    rates = [line["lr"] for line in read_metrics(tmp_path / "new")]
    assert rates == [1e-3 * learning_rate_factor(step, "cosine", 2, 4) for step in range(4)]
    assert new.progress == Progress(epoch=2, step=7, first_step=3, images=8)
    assert [path.name for path in (tmp_path / "new").glob("glide*7.pt")] == ["glide-ft-2x7.pt"]
    # and so does one that goes on with it
    again = tiny_trainer(tmp_path / "new", epochs=3, ema_rate=0.9)
    again.restore(newest_checkpoint(tmp_path / "new"))
    again.train(Batches(2))
    assert again.progress.step == 9


@pytest.mark.parametrize(("batches", "accumulation"), [(12, 1), (2, 1), (6, 3)])
def test_the_learning_rate_of_a_run_that_goes_on_with_other_batches_falls_to_its_end(
    tmp_path, batches, accumulation
):
    settings = {"epochs": 4, "lr_schedule": "cosine", "log": MetricsLog(tmp_path)}
    first = tiny_trainer(tmp_path, max_steps=15, **settings)
    first.train(Batches(6))  # to the middle of the third epoch
    settings["log"] = MetricsLog(tmp_path, resume_step=15)
    again = resumed(tmp_path, gradient_accumulation_steps=accumulation, **settings)
    total = again.count_steps(Batches(batches))
    again.train(Batches(batches))
    assert again.progress.step == total
    rates = [line["lr"] for line in read_metrics(tmp_path)][15:]
    assert rates == sorted(rates, reverse=True)
    last = 1e-3 * learning_rate_factor(total - 1, "cosine", 0, total)
    assert rates[-1] == pytest.approx(last)
    assert rates[-1] > 0


@pytest.mark.parametrize("of_the_compiler", [True, False])
def test_a_compiler_that_heard_the_signal_to_stop_is_no_error(tmp_path, of_the_compiler):
    trainer = tiny_trainer(tmp_path)
    kind = TorchDynamoException if of_the_compiler else RuntimeError

    def fail(batches):
        trainer.stop_requested = True
        raise kind("interrupted")

    trainer.train_step = fail
    if of_the_compiler:
        trainer.train(Batches(2))
        assert trainer.progress.step == 0
    else:
        with pytest.raises(RuntimeError, match="interrupted"):
            trainer.train(Batches(2))


def test_nothing_is_saved_where_no_step_was_made(tmp_path):
    trainer = tiny_trainer(tmp_path)
    trainer.stop_requested = True
    trainer.train(Batches(2))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "wrap",
    [
        lambda dataset: dataset,
        lambda dataset: torch.utils.data.Subset(dataset, [0, 1]),
        lambda dataset: torch.utils.data.ConcatDataset([torch.utils.data.Subset(dataset, [1])]),
    ],
    ids=["plain", "subset", "subset_in_concat"],
)
def test_a_loader_without_epochs_passes_them_on_to_its_dataset(tmp_path, wrap):
    epochs = []

    class Items(torch.utils.data.Dataset):
        def set_epoch(self, epoch):
            epochs.append(epoch)

        def __len__(self):
            return 2

        def __getitem__(self, index):
            return tuple(part[0] for part in tiny_batch(1, seed=range(2)[index]))

    loader = torch.utils.data.DataLoader(wrap(Items()), batch_size=2)
    tiny_trainer(tmp_path, epochs=3).train(loader)
    assert epochs == [0, 1, 2]


def test_counts_of_skipped_steps_survive_a_resume(tmp_path):
    trainer = tiny_trainer(tmp_path)
    batch = tiny_batch()
    batch[2].fill_(float("inf"))
    trainer.train_step([batch])
    trainer.finish()
    state = read_training_state(newest_checkpoint(tmp_path).training_state)
    assert state["progress"]["skipped_steps"] == 1
    assert resumed(tmp_path).progress == trainer.progress


def test_a_run_goes_on_at_the_same_samples_with_batches_of_another_size(tmp_path):
    first = tiny_trainer(tmp_path, batch_size=2, max_steps=4)
    first.train(Batches(8))
    second = resumed(tmp_path, batch_size=4, epochs=1)
    loader = Batches(4)
    second.train(loader)
    assert loader.given == [(0, 2), (0, 3)]


def test_a_run_may_go_on_in_another_precision(tmp_path):
    trainer = tiny_trainer(tmp_path)
    trainer.train_step([tiny_batch()])
    trainer.finish()
    again = resumed(tmp_path, precision="fp16")
    assert again.train_step([tiny_batch()])["skipped_steps"] == 0


def test_a_typed_weight_decay_wins_over_that_of_the_checkpoint(tmp_path):
    trainer = tiny_trainer(tmp_path)
    trainer.train_step([tiny_batch()])
    trainer.finish()
    again = resumed(tmp_path, adam_weight_decay=0.5, learning_rate=1e-5)
    assert again.optimizer.param_groups[0]["weight_decay"] == 0.5
    assert again.train_step([tiny_batch()])["lr"] == pytest.approx(1e-5)


def left_out(batch: tuple, **counts: int) -> Batch:
    batch = Batch(batch)
    batch.left_out = Counter(counts)
    return batch


def test_what_the_data_left_out_is_counted_over_the_run_and_survives_a_resume(tmp_path):
    log = MetricsLog(tmp_path)
    trainer = tiny_trainer(tmp_path, log=log, epochs=2, gradient_accumulation_steps=2)
    trainer.train(
        [
            left_out(tiny_batch(), skipped_image=2),
            left_out(tiny_batch(seed=1), skipped_image=1, filtered_too_small=5),
            left_out(tiny_batch(seed=2)),
            tiny_batch(seed=3),
        ]
    )
    counts = [
        [record.get(f"data/{name}") for name in ("skipped_image", "filtered_too_small")]
        for record in read_metrics(tmp_path)
    ]
    assert counts == [[3, 5], [3, 5], [6, 10], [6, 10]]
    again = tiny_trainer(tmp_path)
    again.restore(newest_checkpoint(tmp_path))
    assert again.progress.left_out == {"skipped_image": 6, "filtered_too_small": 10}


def test_the_share_of_a_step_spent_waiting_for_data_is_told(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(steps.time, "perf_counter", lambda: clock.now)

    def slow_loader():
        for _ in range(3):
            clock.now += 3.0
            yield "batch"

    timer = StepTimer(slow_loader())
    batches = iter(timer)
    next(batches)
    clock.now += 1.0
    assert timer.metrics(8) == {"images_per_second": 2.0, "data/wait_share": 0.75}
    clock.now += 100.0  # for samples and checkpoints
    timer.start()
    next(batches)
    clock.now += 9.0
    assert timer.metrics(6) == {"images_per_second": 0.5, "data/wait_share": 0.25}


@pytest.mark.parametrize("what", ["draw_samples", "validate"])
def test_a_stop_after_the_samples_are_drawn_leaves_nothing_to_do(tmp_path, what):
    """It comes while they are written, say."""
    calls = []

    def action(trainer):
        calls.append(trainer.progress.step)
        trainer.stop_requested = True
        return {"val/loss": 1.0}

    trainer = tiny_trainer(
        tmp_path, max_steps=3, log_frequency=2, eval_interval=2, **{what: action}
    )
    trainer.train(Batches(9))
    assert calls == [2]
    assert trainer.reported_step == trainer.progress.step == 2
