"""The loss on pictures that are not trained on."""

import itertools

import pytest
import torch

from glide_finetune import validation
from glide_finetune.config import TrainConfig
from glide_finetune.validation import Validator
from tiny_training import assert_same_weights, tiny_batch, tiny_trainer, weights_of

QUARTERS = {f"{term}_q{n}" for term in ("loss", "mse", "vb") for n in range(4)}


def items(count, keys=False):
    """As a dataset gives them."""
    batches = (tiny_batch(1, seed, keys=keys) for seed in range(count))
    return [tuple(part[0] for part in batch) for batch in batches]


class Stream:
    """As one of shards: no length, and it never ends."""

    def __init__(self):
        self.given = 0

    def __iter__(self):
        for item in itertools.cycle(items(10, keys=True)):
            self.given += 1
            yield item


def validator(dataset, **settings):
    return Validator(dataset, TrainConfig(batch_size=4, **settings), 1000)


def test_looking_twice_gives_the_same_numbers_and_leaves_no_trace(tmp_path):
    trainer = tiny_trainer(tmp_path, ema_rate=0.5)
    trainer.train_step([tiny_batch()])
    trainer.model.middle_block.eval()
    modes = [module.training for module in trainer.model.modules()]
    weights, look = weights_of(trainer.model), validator(items(10))
    torch.manual_seed(5)
    state = torch.get_rng_state()

    first = look(trainer)

    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in trainer.model.modules()] == modes
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    assert_same_weights(weights_of(trainer.model), weights)
    torch.manual_seed(6)
    assert look(trainer) == first == validator(items(10))(trainer)


def test_raw_and_averaged_weights_give_every_quartile(tmp_path):
    trainer = tiny_trainer(tmp_path, ema_rate=0.5)
    for step in range(3):
        trainer.train_step([tiny_batch(seed=step)])
    metrics = validator(items(4))(trainer)  # as few as there are quartiles
    names = {"loss", "mse", "vb"} | QUARTERS
    assert metrics.keys() == {f"{kind}/{name}" for kind in ("val", "val_ema") for name in names}
    assert metrics["val/mse"] != metrics["val_ema/mse"]
    for term in ("loss", "mse", "vb"):
        mean = sum(metrics[f"val/{term}_q{quarter}"] for quarter in range(4)) / 4
        assert metrics[f"val/{term}"] == pytest.approx(mean, rel=1e-5)


def test_without_an_average_there_are_only_the_losses_of_the_weights(tmp_path):
    metrics = validator(items(4))(tiny_trainer(tmp_path))
    assert not any(name.startswith("val_ema") for name in metrics)


@pytest.mark.parametrize("side", [8, 6])  # torch draws 16 numbers at a time
def test_the_batch_size_changes_nothing(tmp_path, side):
    trainer = tiny_trainer(tmp_path)
    cut = [(*text, image[:, :side, :side]) for *text, image in items(6)]
    metrics = [Validator(cut, TrainConfig(batch_size=size), 1000)(trainer) for size in (1, 4, 6)]
    for other in metrics[1:]:
        assert other == pytest.approx(metrics[0], rel=1e-4)


def test_training_brings_the_loss_down(tmp_path):
    trainer = tiny_trainer(tmp_path)
    look = validator(items(16))
    before = look(trainer)
    for step in range(25):
        trainer.train_step([tiny_batch(seed=100 + step)])
    assert look(trainer)["val/mse"] < 0.9 * before["val/mse"]


def test_a_stream_is_read_as_far_as_needed_and_its_keys_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(validation, "MOST_IMAGES", 8)
    stream = Stream()
    metrics = validator(stream)(tiny_trainer(tmp_path))
    assert stream.given == 8
    assert {name.removeprefix("val/") for name in metrics} >= QUARTERS


def test_of_a_large_folder_images_from_all_over_it_are_taken(monkeypatch):
    monkeypatch.setattr(validation, "MOST_IMAGES", 4)
    taken = []

    class Folder(list):
        def __getitem__(self, index):
            taken.append(index)
            return super().__getitem__(index)

    validator(Folder(items(12)))
    assert taken == [0, 3, 6, 9]


@pytest.mark.parametrize("dataset", [[], iter([])])
def test_no_image_is_a_clear_error(dataset):
    with pytest.raises(ValueError, match="no image"):
        validator(dataset)
