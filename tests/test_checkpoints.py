"""Checkpoints of a run: whole or not there, found again, deleted in order."""

import itertools
import json
import multiprocessing
import os
import random
import resource
import signal
import time
import zipfile
from pathlib import Path
from unittest import mock

import pytest
import torch

from glide_finetune.atomic_files import atomic_file, remove_temporary
from glide_finetune.checkpoints import (
    damaged_checkpoints,
    files_beside,
    newest_checkpoint,
    newest_to_go_on_from,
    prune,
    read_training_state,
    save_checkpoint,
    set_aside,
)
from glide_finetune.model_options import described_model
from glide_finetune.weights import WeightsError, read_weights

# Children of a server that has torch but, unlike this process, no threads that a fork would break.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["glide_finetune.checkpoints"])


def save(run_folder, step, *, epoch=0, ema=True, size=8):
    """A checkpoint in which every tensor is full of `step`."""
    full = torch.full((size,), float(step))
    return save_checkpoint(
        run_folder,
        epoch=epoch,
        step=step,
        model_state={"weight": full},
        ema_state={"weight": full + 0.5} if ema else None,
        training_state={"step": step, "optimizer": {"state": {0: {"exp_avg": full}}}},
        description={"kind": "base", "model_options": {"dropout": 0.1}},
    )


def assert_whole(files, step):
    assert files.step == step
    assert read_weights(files.weights)["weight"].eq(step).all()
    assert read_weights(files.ema)["weight"].eq(step + 0.5).all()
    state = read_training_state(files.training_state)
    assert state["step"] == step
    assert state["optimizer"]["state"][0]["exp_avg"].eq(step).all()


def names(run_folder):
    return sorted(path.name for path in run_folder.iterdir())


def test_a_checkpoint_is_these_four_files(tmp_path):
    weights = save(tmp_path, 120, epoch=3)
    assert weights == tmp_path / "glide-ft-3x120.pt"
    assert names(tmp_path) == [
        "glide-ft-3x120-ema.pt",
        "glide-ft-3x120.json",
        "glide-ft-3x120.pt",
        "training-state-3x120.pt",
    ]


def test_without_averaged_weights_there_is_no_file_of_them(tmp_path):
    save(tmp_path, 1, ema=False)
    files = newest_checkpoint(tmp_path)
    assert files.ema is None
    assert names(tmp_path) == ["glide-ft-0x1.json", "glide-ft-0x1.pt", "training-state-0x1.pt"]


def test_the_description_tells_what_the_files_are(tmp_path):
    weights = save(tmp_path, 7, epoch=1)
    description = json.loads(weights.with_suffix(".json").read_text())
    assert description["kind"] == "base"
    assert description["model_options"] == {"dropout": 0.1}
    assert (description["epoch"], description["step"]) == (1, 7)
    assert description["files"] == {
        role: {"name": name, "bytes": (tmp_path / name).stat().st_size}
        for role, name in {
            "weights": "glide-ft-1x7.pt",
            "ema": "glide-ft-1x7-ema.pt",
            "training_state": "training-state-1x7.pt",
        }.items()
    }


def test_the_training_state_comes_back_exactly_and_without_running_code(tmp_path):
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    for _ in range(3):
        model(torch.randn(5, 3)).square().sum().backward()
        optimizer.step()
    state = {
        "optimizer": optimizer.state_dict(),
        "rng": torch.get_rng_state(),
        "scaler": {"scale": 65536.0, "growth": None},
        "counters": (1, [2, True], "three"),
    }
    save_checkpoint(
        tmp_path,
        epoch=0,
        step=3,
        model_state=model.state_dict(),
        ema_state=None,
        training_state=state,
        description={},
    )
    loaded = torch.load(tmp_path / "training-state-0x3.pt", weights_only=True)
    assert loaded.keys() == state.keys()
    assert loaded["counters"] == state["counters"]
    assert loaded["scaler"] == state["scaler"]
    assert loaded["optimizer"]["param_groups"] == state["optimizer"]["param_groups"]
    assert torch.equal(loaded["rng"], state["rng"])
    for index, moments in state["optimizer"]["state"].items():
        for name, tensor in moments.items():
            assert torch.equal(loaded["optimizer"]["state"][index][name], tensor)


def test_moments_are_written_as_they_lie_since_there_may_be_no_room_for_another_copy(tmp_path):
    moment = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    save_checkpoint(
        tmp_path,
        epoch=0,
        step=1,
        model_state={"weight": moment},
        ema_state=None,
        training_state={"moment": moment, "part": torch.zeros(1_000_000)[:10]},
        description={},
    )
    path = tmp_path / "training-state-0x1.pt"
    loaded = read_training_state(path)["moment"]
    assert torch.equal(loaded, moment)
    assert loaded.stride() == moment.stride()
    assert path.stat().st_size < 5_000


def test_a_training_state_of_other_objects_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(TypeError, match=r"training_state\['rng'\]\[1\] is a Random"):
        save_checkpoint(
            tmp_path,
            epoch=0,
            step=1,
            model_state={},
            ema_state=None,
            training_state={"rng": [0, random.Random(0)]},
            description={},
        )
    assert names(tmp_path) == []


def test_the_newest_checkpoint_is_the_one_of_the_highest_step(tmp_path):
    assert newest_checkpoint(tmp_path) is None
    for epoch, step in ((0, 9), (1, 100), (0, 20)):
        save(tmp_path, step, epoch=epoch)
    assert_whole(newest_checkpoint(tmp_path), 100)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda run: (run / "glide-ft-0x2.json").unlink(),
        lambda run: (run / "glide-ft-0x2.json").write_text('{"step": 2, "fil'),
        lambda run: (run / "glide-ft-0x2.json").write_text("[]"),
        lambda run: (run / "glide-ft-0x2.json").write_text('{"files": {"weights": 3}}'),
        lambda run: (run / "glide-ft-0x2-ema.pt").unlink(),
        lambda run: os.truncate(run / "training-state-0x2.pt", 100),
        lambda run: (run / "glide-ft-0x2.pt").write_bytes(b""),
    ],
)
def test_a_checkpoint_that_is_not_whole_is_passed_over(tmp_path, spoil):
    save(tmp_path, 1)
    save(tmp_path, 2)
    spoil(tmp_path)
    assert_whole(newest_checkpoint(tmp_path), 1)


def test_damaged_checkpoints_are_told_and_unfinished_ones_are_none(tmp_path):
    for step in (1, 2, 3, 4, 5):
        save(tmp_path, step)
    assert damaged_checkpoints(tmp_path) == {}
    (tmp_path / "glide-ft-0x5.json").unlink()  # killed before it was written
    (tmp_path / "glide-ft-0x1.json").unlink()  # killed while it was deleted
    assert damaged_checkpoints(tmp_path) == {}
    (tmp_path / "training-state-0x4.pt").unlink()
    os.truncate(tmp_path / "glide-ft-0x3-ema.pt", 100)
    (tmp_path / "glide-ft-0x2.json").write_text("{")
    (tmp_path / "glide-ft-0x1.json").unlink(missing_ok=True)
    size = (tmp_path / "glide-ft-0x4-ema.pt").stat().st_size
    assert [(path.name, damage) for path, damage in damaged_checkpoints(tmp_path).items()] == [
        ("glide-ft-0x1.pt", "glide-ft-0x1.json is missing"),
        ("glide-ft-0x2.pt", "glide-ft-0x2.json is damaged"),
        ("glide-ft-0x3.pt", f"glide-ft-0x3-ema.pt has 100 bytes instead of {size}"),
        ("glide-ft-0x4.pt", "training-state-0x4.pt is missing"),
    ]


@pytest.mark.parametrize(
    "name", ["glide-ft-0x3.pt", "glide-ft-0x3-ema.pt", "training-state-0x3.pt"]
)
def test_one_wrong_bit_makes_a_checkpoint_none_to_go_on_from(tmp_path, name):
    for step in (1, 2, 3, 4):
        save(tmp_path, step, size=1000)
    (tmp_path / "glide-ft-0x4-ema.pt").unlink()
    content = bytearray((tmp_path / name).read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / name).write_bytes(content)
    files, damaged = newest_to_go_on_from(tmp_path)
    assert_whole(files, 2)
    assert [path.name for path in damaged] == ["glide-ft-0x3.pt", "glide-ft-0x4.pt"]
    assert f"{name} is damaged, it holds other bytes" in damaged[tmp_path / "glide-ft-0x3.pt"]


def test_saving_the_same_step_again_replaces_it(tmp_path):
    save(tmp_path, 1, size=8)
    save(tmp_path, 1, size=16, ema=False)
    files = newest_checkpoint(tmp_path)
    assert read_weights(files.weights)["weight"].shape == (16,)
    assert files.ema is None
    assert "glide-ft-0x1-ema.pt" not in names(tmp_path)


def test_a_checkpoint_that_is_half_replaced_is_not_whole(tmp_path, monkeypatch):
    save(tmp_path, 1)
    save(tmp_path, 2)
    monkeypatch.setattr(torch, "save", mock.Mock(side_effect=[None, OSError("disk full")]))
    with pytest.raises(OSError, match="disk full"):
        save(tmp_path, 2)
    assert_whole(newest_checkpoint(tmp_path), 1)


def test_pruning_keeps_the_newest_and_zero_keeps_all(tmp_path):
    (tmp_path / "args.json").write_text("{}")
    for step in (1, 2, 3, 10):
        save(tmp_path, step)
    prune(tmp_path, 0)
    assert len(names(tmp_path)) == 4 * 4 + 1
    prune(tmp_path, 2)
    assert {name for name in names(tmp_path) if name.endswith(".json")} == {
        "args.json",
        "glide-ft-0x10.json",
        "glide-ft-0x3.json",
    }
    assert len(names(tmp_path)) == 2 * 4 + 1
    prune(tmp_path, 5)
    assert len(names(tmp_path)) == 2 * 4 + 1


def test_pruning_counts_whole_checkpoints_only(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    (tmp_path / "glide-ft-0x3.json").unlink()  # killed before it was written
    (tmp_path / "glide-ft-0x1.json").unlink()  # killed while it was deleted
    prune(tmp_path, 1)
    assert_whole(newest_checkpoint(tmp_path), 2)
    assert not [name for name in names(tmp_path) if "0x1" in name]


@pytest.mark.parametrize("place", [0, -30])
def test_wrong_bytes_at_either_end_make_a_checkpoint_none_to_go_on_from(tmp_path, place):
    for step in (1, 2, 3):
        save(tmp_path, step)
    for step in (2, 3):
        path = tmp_path / f"training-state-0x{step}.pt"
        content = bytearray(path.read_bytes())
        content[place] ^= 0xFF
        path.write_bytes(content if step == 2 else bytes(len(content)))
    assert newest_to_go_on_from(tmp_path)[0].step == 1


def test_a_damaged_checkpoint_that_is_set_aside_counts_as_none(tmp_path):
    for step in (1, 2, 9):
        save(tmp_path, step)
    set_aside(tmp_path / "glide-ft-0x9.pt")
    set_aside(tmp_path / "glide-ft-0x9.pt")
    assert newest_checkpoint(tmp_path).step == 2
    prune(tmp_path, 1)
    assert [name for name in names(tmp_path) if ".json" in name] == [
        "glide-ft-0x2.json",
        "glide-ft-0x9.json.damaged",
    ]
    assert (tmp_path / "glide-ft-0x9.pt").exists()


def test_a_checkpoint_that_cannot_be_looked_at_is_no_damaged_one(tmp_path, monkeypatch):
    for step in (1, 2):
        save(tmp_path, step)
    for error in (OSError(116, "Stale file handle"), MemoryError()):
        monkeypatch.setattr(zipfile.ZipFile, "open", mock.Mock(side_effect=error))
        with pytest.raises(type(error)):
            newest_to_go_on_from(tmp_path)


def test_the_files_beside_a_weights_file_are_found(tmp_path):
    weights = save(tmp_path, 5, epoch=2)
    files = files_beside(weights)
    assert (files.epoch, files.step) == (2, 5)
    assert files.weights == weights
    assert files.ema == tmp_path / "glide-ft-2x5-ema.pt"
    assert files.training_state == tmp_path / "training-state-2x5.pt"


def test_averaged_weights_have_a_step_but_no_training_state(tmp_path):
    save(tmp_path, 5)
    files = files_beside(tmp_path / "glide-ft-0x5-ema.pt")
    assert files.weights.name == "glide-ft-0x5-ema.pt"
    assert files.training_state is None
    assert files.step == 5


def test_a_weights_file_alone_has_nothing_beside_it(tmp_path):
    for name in ("base.pt", "glide-ft-0x5.pt"):
        files = files_beside(tmp_path / name)
        assert (files.ema, files.training_state) == (None, None)


def test_a_broken_description_is_warned_about_and_left_out(tmp_path, caplog):
    weights = save(tmp_path, 5)
    assert described_model(weights)[0] == "base"
    weights.with_suffix(".json").write_text("{")
    assert described_model(weights) == ("", {})
    assert "glide-ft-0x5.json" in caplog.text


def test_a_damaged_training_state_is_named(tmp_path):
    save(tmp_path, 5)
    path = tmp_path / "training-state-0x5.pt"
    os.truncate(path, 300)
    with pytest.raises(WeightsError, match=rf"^{path} is cut off"):
        read_training_state(path)


def test_an_exception_in_an_atomic_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def write_half():
        with atomic_file(path) as file:
            file.write(b"new")
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        write_half()
    assert names(tmp_path) == ["file"]
    assert path.read_bytes() == b"old"


def _save_and_prune(run_folder, deadly_call):
    """Save step 2 and keep only that; SIGKILL before call number `deadly_call` that does it."""
    calls = 0

    def deadly(function):
        def counted(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == deadly_call:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return counted

    for owner, name in ((os, "fsync"), (os, "replace"), (Path, "unlink")):
        setattr(owner, name, deadly(getattr(owner, name)))
    save(run_folder, 2)
    prune(run_folder, 1)


def _save_and_die_everywhere(folder, exit_codes):
    for deadly_call in itertools.count(1):
        run_folder = folder / str(deadly_call)
        run_folder.mkdir()
        save(run_folder, 1)
        child = os.fork()
        if child == 0:
            _save_and_prune(run_folder, deadly_call)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        exit_codes.send(code)
        if code != -signal.SIGKILL:
            return


def test_a_save_killed_at_any_of_its_file_operations_leaves_a_whole_checkpoint(tmp_path):
    exit_codes, sender = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=_save_and_die_everywhere, args=(tmp_path, sender))
    process.start()
    survivors = []
    for deadly_call in itertools.count(1):
        assert exit_codes.poll(60)
        code = exit_codes.recv()
        run_folder = tmp_path / str(deadly_call)
        files = newest_checkpoint(run_folder)
        assert_whole(files, files.step)
        survivors.append(files.step)
        remove_temporary(run_folder)
        assert not list(run_folder.glob("*.tmp"))
        save(run_folder, 3)
        prune(run_folder, 1)
        assert len(names(run_folder)) == 4  # nothing half written or half deleted stays behind
        if code != -signal.SIGKILL:
            break
    process.join()
    assert code == 0  # the last one came through
    assert survivors == sorted(survivors)
    assert survivors.count(1) > 10
    assert survivors.count(2) > 4


def _save_forever(run_folder, first_step, first_saved):
    for step in itertools.count(first_step):
        save(run_folder, step, size=500_000)
        first_saved.set()
        prune(run_folder, 2)


def test_a_process_killed_at_random_moments_leaves_a_whole_checkpoint(tmp_path):
    moments = random.Random(0)
    save(tmp_path, 0)
    step = 0
    for _ in range(8):
        first_saved = PROCESSES.Event()
        process = PROCESSES.Process(target=_save_forever, args=(tmp_path, step + 1, first_saved))
        process.start()
        assert first_saved.wait(60)
        time.sleep(moments.uniform(0.0, 0.2))
        process.kill()
        process.join()
        files = newest_checkpoint(tmp_path)
        assert files.step > step
        step = files.step
        assert_whole(files, step)
        remove_temporary(tmp_path)
        assert not list(tmp_path.glob("*.tmp"))


def _save_with_little_room(run_folder, errors):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    try:
        save(run_folder, 2, size=1_000_000)
    except OSError as error:
        errors.put(str(error))


def test_a_write_that_fails_is_explained_in_one_line_and_harms_no_older_checkpoint(tmp_path):
    save(tmp_path, 1)
    errors = PROCESSES.Queue()
    process = PROCESSES.Process(target=_save_with_little_room, args=(tmp_path, errors))
    process.start()
    message = errors.get(timeout=60)
    process.join()
    assert message.startswith(f"the checkpoint of step 2 could not be written to {tmp_path}")
    assert "File too large" in message
    assert "\n" not in message
    assert_whole(newest_checkpoint(tmp_path), 1)
    assert not list(tmp_path.glob("*.tmp"))
    save(tmp_path, 2, size=1_000_000)  # there is room again
    assert_whole(newest_checkpoint(tmp_path), 2)
