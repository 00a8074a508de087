"""A real training process that is killed again and again ends as one that never was."""

import random
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest

from glide_finetune.checkpoints import newest_checkpoint, read_training_state
from glide_finetune.weights import read_weights
from real_runs import SMALL_MODEL, assert_same, history, load, make_data, start, train

KILLS = 30
STEPS = 300
WORDS = [
    *SMALL_MODEL,
    *shlex.split(
        "--batch_size 1 --gradient_accumulation_steps 2 --epochs 1000 --learning_rate 1e-3 "
        f"--ema_rate 0.9 --uncond_p 0.3 --random_hflip --log_frequency 0 --max_steps {STEPS} "
        "--save_checkpoint_interval 1 --keep_checkpoints 2 --data_dir data --num_workers 1"
    ),
]


def wait_until(condition, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.001)


def inode(path: Path) -> int | None:
    return path.stat().st_ino if path.exists() else None


def temporary(run: Path) -> set[Path]:
    return set(run.glob("**/*.tmp"))


def live_and_die(place: Path, run: Path, moment: str, rng: random.Random) -> None:
    """Go on with the run until a random moment of this kind."""
    metrics = run / "metrics.jsonl"
    left_before = {path: inode(path) for path in (*temporary(run), metrics)}
    files = newest_checkpoint(run) if run.exists() else None
    saved = files.step if files else 0
    process = start(place, *WORDS, "--checkpoints_dir", "killed", "--resume_ckpt", "auto")
    if moment == "start":
        time.sleep(rng.uniform(0, 6))
    else:
        # a resumed run replaces the file, less the lines that come again
        wait_until(lambda: inode(metrics) not in (None, left_before[metrics]), process)
        steps = rng.randint(1, 6)  # the checkpoint of the first is whole by the third
        wait_until(lambda: metrics.read_bytes().count(b"\n") >= saved + steps, process)
        assert not [path for path, number in left_before.items() if inode(path) == number]
        time.sleep(rng.uniform(0, 0.1))
    if moment == "write":
        wait_until(lambda: temporary(run), process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


@pytest.mark.slow
def test_a_run_killed_at_30_random_moments_ends_as_if_it_never_was(tmp_path):
    place, rng = make_data(tmp_path), random.Random(0)
    run, whole = place / "killed" / "0000", place / "whole" / "0000"
    moments = rng.sample(["start", "step", "write"] * (KILLS // 3), KILLS)
    step, killed_in_write = 0, 0
    for moment in moments:
        live_and_die(place, run, moment, rng)
        killed_in_write += bool(run.exists() and temporary(run))
        if run.exists() and (files := newest_checkpoint(run)):
            assert files.step >= step
            step = files.step
            read_weights(files.weights)
            read_weights(files.ema)
            assert read_training_state(files.training_state)["progress"]["step"] == step
    assert 0 < step < STEPS
    assert killed_in_write

    train(place, "--resume_ckpt", str(run))
    train(place, *WORDS, "--checkpoints_dir", "whole")
    assert [path.name for path in (place / "killed").iterdir()] == ["0000"]
    assert not temporary(run)
    names = sorted(path.name for path in whole.glob("*-*x*"))
    assert len(names) == 2 * 4
    assert sorted(path.name for path in run.glob("*-*x*")) == names
    for name in names:
        if name.endswith(".pt"):
            assert_same(load(run / name), load(whole / name))
    assert history(run) == history(whole)
