"""Checkpoints that are written while training goes on."""

import errno
import logging
import threading

import pytest
import torch

from glide_finetune import checkpoint_writer
from glide_finetune.checkpoint_writer import CheckpointWriter
from glide_finetune.checkpoints import newest_checkpoint, read_training_state, save_checkpoint
from glide_finetune.weights import read_weights


def checkpoint(step, tensor):
    return {
        "epoch": 0,
        "step": step,
        "model_state": {"weight": tensor},
        "ema_state": {"weight": tensor + 1},
        "training_state": {"step": step, "moments": [tensor * 2, None, "text"]},
        "description": {"kind": "base"},
    }


@pytest.fixture
def gate(monkeypatch):
    """Writing waits until this event is set."""
    opened = threading.Event()

    def save(*arguments, **keywords):
        assert opened.wait(30)
        return save_checkpoint(*arguments, **keywords)

    monkeypatch.setattr(checkpoint_writer, "save_checkpoint", save)
    yield opened
    opened.set()


def test_training_goes_on_while_a_checkpoint_is_written_as_it_was(tmp_path, gate):
    writer, weight = CheckpointWriter(tmp_path), torch.full((3,), 5.0)
    writer.save(**checkpoint(1, weight))
    weight.fill_(-1)  # the next step
    assert newest_checkpoint(tmp_path) is None
    assert writer.saved_step == 0
    gate.set()
    assert writer.wait() is None
    assert writer.saved_step == 1
    files = newest_checkpoint(tmp_path)
    assert read_weights(files.weights)["weight"].tolist() == [5, 5, 5]
    assert read_weights(files.ema)["weight"].tolist() == [6, 6, 6]
    moments, *rest = read_training_state(files.training_state)["moments"]
    assert moments.tolist() == [10, 10, 10]
    assert rest == [None, "text"]


def test_checkpoints_are_written_one_at_a_time_and_all_of_them(tmp_path, gate):
    writer = CheckpointWriter(tmp_path)
    writer.save(**checkpoint(1, torch.ones(3)))
    second = threading.Thread(target=lambda: writer.save(**checkpoint(2, torch.full((3,), 2.0))))
    second.start()
    second.join(0.1)
    assert second.is_alive()
    gate.set()
    second.join(30)
    writer.wait()
    for step in (1, 2):
        weights = read_weights(tmp_path / f"glide-ft-0x{step}.pt")
        assert weights["weight"].tolist() == [step] * 3


def test_older_checkpoints_stay_until_the_new_one_is_whole(tmp_path, gate):
    gate.set()
    writer = CheckpointWriter(tmp_path, keep=1)
    writer.save(**checkpoint(1, torch.ones(3)))
    writer.wait()
    gate.clear()
    writer.save(**checkpoint(2, torch.ones(3)))
    assert newest_checkpoint(tmp_path).step == 1
    gate.set()
    writer.wait()
    assert [path.name for path in tmp_path.glob("*.json")] == ["glide-ft-0x2.json"]


def test_a_checkpoint_that_fails_is_an_error_in_the_log_and_the_next_one_is_tried(
    tmp_path, monkeypatch, caplog
):
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    run.mkdir()
    writer = CheckpointWriter(run)
    run.rename(elsewhere)  # as if the disk had gone
    writer.save(**checkpoint(1, torch.ones(3)))
    error = writer.wait()
    assert isinstance(error, OSError)
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert record.getMessage() == str(error)
    assert writer.saved_step == 0
    elsewhere.rename(run)
    writer.save(**checkpoint(2, torch.ones(3)))
    assert writer.wait() is None
    assert newest_checkpoint(run).step == 2


def test_checkpoints_that_fail_one_after_the_other_do_not_fill_the_disk(tmp_path, monkeypatch):
    writer = CheckpointWriter(tmp_path, keep=1)
    save, full = torch.save, iter([False, True, False, True])

    def save_while_there_is_room(content, file):
        if next(full, False):
            raise OSError(errno.ENOSPC, "No space left on device")
        save(content, file)

    monkeypatch.setattr(torch, "save", save_while_there_is_room)
    for step in (1, 2):
        writer.save(**checkpoint(step, torch.ones(3)) | {"ema_state": None})
        assert isinstance(writer.wait(), OSError)
    # the newest weights stay, which may be all that there is of a long run
    assert [path.name for path in tmp_path.iterdir()] == ["glide-ft-0x2.pt"]
    writer.save(**checkpoint(3, torch.ones(3)))
    assert writer.wait() is None
    assert newest_checkpoint(tmp_path).step == 3
    assert not list(tmp_path.glob("*0x2*"))


def test_a_mistake_of_ours_is_not_lost_in_the_thread(tmp_path, caplog):
    writer = CheckpointWriter(tmp_path)
    writer.save(**checkpoint(1, torch.ones(3)) | {"training_state": {"bad": object()}})
    assert isinstance(writer.wait(), TypeError)
    assert "training_state['bad'] is a object" in caplog.text


def test_where_no_copies_can_be_made_training_waits_instead(tmp_path, monkeypatch, caplog):
    """As where a system lets little memory be pinned."""

    def fail(*_, **__):
        raise RuntimeError("CUDA error: out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_writer.CheckpointWriter, "_copy", fail)
        writer = CheckpointWriter(tmp_path)
        writer.save(**checkpoint(1, torch.ones(3)))
        assert newest_checkpoint(tmp_path).step == 1  # without `wait`
    assert "training waits" in caplog.text
    writer.save(**checkpoint(2, torch.ones(3)))
    assert writer.wait() is None
    assert newest_checkpoint(tmp_path).step == 2


def test_where_memory_is_short_training_waits_instead(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(checkpoint_writer, "available_memory", lambda device: 10)
    writer = CheckpointWriter(tmp_path)
    writer.save(**checkpoint(1, torch.ones(3)))
    assert newest_checkpoint(tmp_path).step == 1  # without `wait`
    assert "little memory is left" in caplog.text
