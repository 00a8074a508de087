"""train_glide.py from the outside: real processes where that matters, otherwise `main`."""

import json
import logging
import math
import multiprocessing
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from glide_finetune import devices, training_run
from glide_finetune.checkpoint_writer import CheckpointWriter
from glide_finetune.checkpoints import newest_checkpoint
from glide_finetune.metrics import read_metrics
from glide_finetune.model_options import training_options
from glide_finetune.samples import CELL_WIDTH, PADDING, SampleDrawer
from glide_finetune.stopping import ONE_PRESS
from glide_finetune.validation import Validator
from glide_text2im.model_creation import create_model_and_diffusion
from real_runs import (
    NOT_OF_THE_RUN,
    ROOT,
    SMALL_MODEL,
    assert_same,
    history,
    load,
    make_data,
    start,
    train,
    wait_for_steps,
)
from train_glide import main

# Five steps an epoch: one image of eleven is held back, two make a step.
EXACT = shlex.split(
    "--batch_size 1 --gradient_accumulation_steps 2 --epochs 5 --learning_rate 1e-3 --ema_rate 0.9 "
    "--warmup_steps 4 --val_fraction 1e-9 --eval_interval 5 --random_hflip --uncond_p 0.3 "
    "--log_frequency 20 --test_prompt patch --save_checkpoint_interval 7"
)
LAST_STEP = 25


@pytest.fixture(autouse=True)
def _here(place, monkeypatch):
    """In the folder, without wandb, and with as many threads as the processes get."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """The folder that commands run in."""
    return make_data(tmp_path_factory.mktemp("place"))


@pytest.fixture(scope="module")
def whole(place) -> Path:
    """A run that is never interrupted; its output is in stdout.txt."""
    out = train(place, *SMALL_MODEL, *EXACT, "--data_dir", "data", "--checkpoints_dir", "whole")
    run = place / "whole" / "0000"
    (run / "stdout.txt").write_text(out)
    return run


def assert_same_run(run: Path, whole: Path) -> None:
    for name in ("glide-ft-5x25.pt", "glide-ft-5x25-ema.pt", "training-state-5x25.pt"):
        assert_same(load(run / name), load(whole / name))
    assert history(run) == history(whole)


def as_if_killed(whole: Path, run: Path, step: int) -> Path:
    """A copy of a run as it was when its checkpoint of `step` was the newest."""
    run.mkdir(parents=True)
    for path in whole.iterdir():
        match = re.search(r"-[0-9]+x([0-9]+)", path.name)
        if path.is_file() and not (match and int(match[1]) > step):
            shutil.copy(path, run)
    return run


class TestRun:
    def test_a_run_leaves_its_settings_metrics_and_samples(self, whole):
        args = json.loads((whole / "args.json").read_text())
        assert args["learning_rate"] == 1e-3
        assert args["model_preset"] == "tiny"
        lines = read_metrics(whole)
        assert [line["step"] for line in lines] == list(range(1, LAST_STEP + 1))
        for line in lines:
            assert math.isfinite(line["loss"])
            assert {"mse", "vb", "grad_norm", "lr", "epoch", *NOT_OF_THE_RUN} <= line.keys()
            assert ("val/loss" in line) == ("val_ema/loss" in line) == (line["step"] % 5 == 0)
        assert [line["lr"] for line in lines[:5]] == [2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3]
        assert any("mse_q0" in line for line in lines)
        assert sorted(path.name for path in (whole / "samples").iterdir()) == [
            "00000020.png",
            "00000025.png",
        ]
        with Image.open(whole / "samples" / "00000025.png") as grid:
            assert grid.width >= 128  # an 8 x 8 picture, enlarged, with its label

    def test_a_run_says_what_it_does(self, whole):
        out = (whole / "stdout.txt").read_text()
        assert "base model" in out
        assert "10 images of data, at 8x8; 1 to validate on" in out
        assert "step      25/25  loss 0" in out  # as there is no terminal for a bar
        assert "it/s" not in out
        assert (
            "finished at step 25; the samples are in whole/0000/samples/00000025.png, "
            "everything else is in whole/0000" in out
        )

    def test_neither_a_new_run_nor_one_that_goes_on_imports_the_compiler(self, place):
        new_run = [*SMALL_MODEL, "--data_dir", "data", "--checkpoints_dir", "quick"]
        more = ["--resume_ckpt", "quick/0000"]
        for argv in ([*new_run, "--max_steps", "1"], [*more, "--max_steps", "2"]):
            program = [sys.executable, "-X", "importtime", ROOT / "train_glide.py"]
            err = subprocess.run(
                [*program, *argv], cwd=place, check=True, capture_output=True, text=True
            ).stderr
            imported = re.findall(r"^import time:.*\| +(\S+)$", err, flags=re.MULTILINE)
            assert "glide_finetune.uncompiled" in imported
            assert not {"torch._dynamo", "sympy"}.intersection(imported)

    def test_data_workers_do_not_hold_the_model(self, place, monkeypatch):
        load_model, workers = training_run.load_model, []

        def look_at_workers(*args, **keywords):
            workers.append(set(multiprocessing.active_children()) - others)
            return load_model(*args, **keywords)

        monkeypatch.setattr(training_run, "load_model", look_at_workers)
        others = set(multiprocessing.active_children())
        argv = [*SMALL_MODEL, "--data_dir", "data", "--checkpoints_dir", "forked"]
        assert main([*argv, "--num_workers", "2", "--max_steps", "1", "--log_frequency", "0"]) == 0
        assert len(workers[0]) == 2

    def test_its_weights_fit_a_freshly_made_model(self, whole):
        options = json.loads((whole / "glide-ft-5x25.json").read_text())["model_options"]
        model, _ = create_model_and_diffusion(**options)
        weights = load(whole / "glide-ft-5x25.pt")
        model.load_state_dict(weights)
        assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
        averaged = load(whole / "glide-ft-5x25-ema.pt")
        model.load_state_dict(averaged)
        assert any(not torch.equal(weights[name], averaged[name]) for name in weights)

    def test_its_checkpoints_tell_what_they_are(self, whole):
        description = json.loads((whole / "glide-ft-1x7.json").read_text())
        assert description["kind"] == "base"
        assert (description["epoch"], description["step"]) == (1, 7)
        assert description["precision"] == "fp32"
        assert description["metrics"]["loss"] == read_metrics(whole)[6]["loss"]
        assert description["trained_from"] == "scratch"
        assert description["data"]["description"].startswith("10 images of data")
        assert re.fullmatch("[0-9a-f]{16}", description["data"]["fingerprint"])
        assert description["settings"] == json.loads((whole / "args.json").read_text())

    def test_its_checkpoints_are_numbered_by_epoch_and_step(self, whole):
        names = [f"glide-ft-{name}.pt" for name in ("1x7", "2x14", "4x21", "5x25")]
        assert sorted(path.name for path in whole.glob("glide-ft-*[0-9].pt")) == names
        progress = load(whole / "training-state-1x7.pt")["progress"]
        assert (progress["epoch"], progress["batch"], progress["images"]) == (1, 4, 14)

    @pytest.mark.parametrize("where", ["load_model", "make_optimizer", "go_on"])
    def test_a_model_that_does_not_fit_is_told_with_what_helps(
        self, place, where, monkeypatch, capsys
    ):
        def fail(*_, **__):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nAnd so on")

        monkeypatch.setattr(training_run, where, fail)
        assert main([*SMALL_MODEL, "--checkpoints_dir", "too_large"]) == 1
        error = capsys.readouterr().err
        assert error.startswith("train_glide.py: error: not enough memory for the model")
        assert "--low_memory; train only a part with --freeze_transformer" in error
        assert error.endswith("(CUDA out of memory. Tried to allocate 2 GiB.)\n")
        assert not (place / "too_large").exists()

    def test_runs_are_numbered(self, place):
        words = [*SMALL_MODEL, "--checkpoints_dir", "numbered", "--max_steps", "1"]
        for number in ("0000", "0001"):
            assert main([*words, "--log_frequency", "0"]) == 0
            assert (place / "numbered" / number / "glide-ft-0x1.pt").exists()


class TestResuming:
    def test_a_run_killed_in_mid_epoch_goes_on_bit_for_bit(self, place, whole, caplog):
        caplog.set_level(logging.INFO)
        run = as_if_killed(whole, place / "killed" / "0000", 7)
        (run / "glide-ft-1x8.pt.tmp").write_text("half")
        with open(run / "metrics.jsonl", "a") as file:
            file.write('{"step": 26, "lo')
        assert main(["--resume_ckpt", "killed/0000"]) == 0
        assert "from step 7" in caplog.text
        assert "other settings" not in caplog.text
        assert_same_run(run, whole)
        assert not list(run.glob("*.tmp"))

    @pytest.mark.parametrize(
        "number",
        [
            signal.SIGTERM,
            pytest.param(signal.SIGINT, marks=pytest.mark.slow),
            pytest.param(signal.SIGUSR1, marks=pytest.mark.slow),
            pytest.param(signal.SIGHUP, marks=pytest.mark.slow),
        ],
    )
    def test_a_run_asked_to_stop_saves_and_goes_on_bit_for_bit(self, place, whole, number):
        folder = f"asked_by_{number.name}"
        words = ["--data_dir", "data", "--checkpoints_dir", folder, "--resume_ckpt", "auto"]
        process = start(place, *SMALL_MODEL, *EXACT, *words)
        run = place / folder / "0000"
        wait_for_steps(run, 2, process)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 128 + number
        assert "stopping after this step" in err
        step = newest_checkpoint(run).step
        assert 2 <= step < LAST_STEP
        assert f"saved at step {step}" in out
        assert f"stopped by {number.name}" in out
        assert f"python train_glide.py --resume_ckpt {folder}/0000" in out
        assert main([*SMALL_MODEL, *EXACT, *words]) == 0
        assert_same_run(run, whole)
        assert [path.name for path in run.parent.iterdir()] == ["0000"]

    @pytest.mark.slow
    def test_a_run_whose_data_worker_was_killed_saves_and_goes_on_bit_for_bit(self, place, whole):
        words = ["--data_dir", "data", "--checkpoints_dir", "orphan", "--num_workers", "1"]
        process = start(place, *SMALL_MODEL, *EXACT, *words)
        run = place / "orphan" / "0000"
        wait_for_steps(run, 2, process)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        for child in children:
            os.kill(int(child), signal.SIGKILL)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 1
        assert err == (
            "train_glide.py: error: a data worker was killed, most likely since memory ran out: "
            "lower --num_workers, or --batch_size\n"
        )
        step = newest_checkpoint(run).step
        assert f"saved at step {step} in " in out
        assert main(["--resume_ckpt", str(run), "--num_workers", "0"]) == 0
        assert_same_run(run, whole)

    @pytest.mark.parametrize("lost_by", ["a full disk", "a reader that has ended"])
    def test_a_run_whose_output_is_lost_saves_when_asked_to_stop(self, place, lost_by):
        folder = lost_by.split()[-1]
        reading, writing = os.pipe()
        output = os.open("/dev/full", os.O_WRONLY) if lost_by == "a full disk" else writing
        words = ["--data_dir", "data", "--checkpoints_dir", folder, "--epochs", "1000"]
        process = start(place, *SMALL_MODEL, *words, stdout=output, stderr=output)
        run = place / folder / "0000"
        wait_for_steps(run, 2, process)
        os.close(reading)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 128 + signal.SIGTERM
        assert newest_checkpoint(run).step >= 2

    @pytest.mark.parametrize(
        "words",
        [
            "--data_dir data --train_upsample --upscale_factor 2 --log_frequency 2",
            "--data_dir tars --use_webdataset --batch_size 2 --log_frequency 0",
            "--data_dir data --precision bf16 --lr_schedule cosine --log_frequency 0",
            "--data_dir data --precision fp16 --loss_spike_factor 9 --log_frequency 0",
            "--data_dir data --low_memory --lr_schedule cosine --log_frequency 2",
            "--data_dir data --train_inpaint --val_fraction 0.2 --eval_interval 1 -freq 2",
            "--data_dir data --train_inpaint --train_upsample --upscale_factor 2 -freq 2",
            pytest.param(
                "--data_dir data --train_inpaint --compile --precision bf16 -freq 0",
                marks=pytest.mark.slow,  # it compiles three times
            ),
        ],
        ids=[
            "upsampler",
            "shards",
            "bf16",
            "fp16",
            "low_memory",
            "inpainting",
            "inpainting_upsampler",
            "compiled",
        ],
    )
    def test_other_kinds_of_run_go_on_bit_for_bit_too(self, place, words, request):
        folder = place / request.node.callspec.id
        words = [*shlex.split(words), "--gradient_accumulation_steps", "2", "--max_steps", "4"]
        words += ["--save_checkpoint_interval", "1", "--checkpoints_dir", str(folder)]
        assert main([*SMALL_MODEL, *words, "--ema_rate", "0.9"]) == 0
        run = as_if_killed(folder / "0000", folder / "0001", 1)
        assert main(["--resume_ckpt", str(run)]) == 0
        assert newest_checkpoint(run).step == 4
        paths = sorted((folder / "0000").glob("*x4*.pt"))
        assert len(paths) == 3
        for path in paths:
            assert_same(load(run / path.name), load(path))
        assert history(run) == history(folder / "0000")

    @pytest.mark.slow
    def test_a_second_ctrl_c_leaves_at_once(self, place):
        words = ["--checkpoints_dir", "twice", "--log_frequency", "0", "--batch_size", "4096"]
        process = start(place, *SMALL_MODEL, *words)
        run = place / "twice" / "0000"
        wait_for_steps(run, 1, process)
        time.sleep(0.5)  # into the second step, which takes some seconds
        process.send_signal(signal.SIGINT)
        while "press Ctrl-C again" not in process.stderr.readline():
            assert process.poll() is None
        time.sleep(2 * ONE_PRESS)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 130
        assert err.endswith("train_glide.py: interrupted\n")
        assert newest_checkpoint(run) is None

    def test_a_finished_run_says_so(self, place, whole, caplog):
        run = as_if_killed(whole, place / "finished" / "0000", LAST_STEP)
        assert main(["--resume_ckpt", str(run)]) == 0
        assert "nothing left to train" in caplog.text
        assert "25 steps" in caplog.text
        assert_same_run(run, whole)

    def test_changed_settings_are_named_and_used(self, place, whole, caplog):
        run = as_if_killed(whole, place / "changed" / "0000", 7)
        words = ["-lr", "2e-3", "--adam_weight_decay", "0.1", "--max_steps", "9"]
        assert main(["--resume_ckpt", str(run), *words, "--log_frequency", "0"]) == 0
        (warning,) = [text for text in caplog.messages if "other settings" in text]
        assert "learning_rate 0.001 -> 0.002" in warning
        assert "max_steps 0 -> 9" in warning
        assert "batch_size" not in warning
        assert [line["lr"] for line in read_metrics(run)[7:]] == [2e-3, 2e-3]
        (group,) = load(run / "training-state-1x9.pt")["optimizer"]["param_groups"]
        assert group["weight_decay"] == 0.1
        assert json.loads((run / "args.json").read_text())["learning_rate"] == 2e-3

    def test_other_data_is_named(self, place, whole, caplog, tmp_path):
        run = as_if_killed(whole, place / "other_data" / "0000", 7)
        data = shutil.copytree(place / "data", tmp_path / "more")
        shutil.copy(data / "1.png", data / "11.png")
        shutil.copy(data / "1.txt", data / "11.txt")
        words = ["--data_dir", str(data), "--max_steps", "8", "--log_frequency", "0"]
        assert main(["--resume_ckpt", str(run), *words]) == 0
        (warning,) = [text for text in caplog.messages if "other settings" in text]
        assert "data: 10 images of data, at 8x8; 1 to validate on -> 11 images" in warning

    def test_two_processes_never_train_in_one_run(self, place, whole, capsys):
        run = as_if_killed(whole, place / "shared" / "0000", 7)
        held = (
            "import pathlib, sys; from glide_finetune.folder_lock import locked\n"
            "with locked(pathlib.Path(sys.argv[1]), ''):\n"
            "    print('held', flush=True)\n"
            "    sys.stdin.read()"
        )
        other = subprocess.Popen(
            [sys.executable, "-c", held, str(run)], cwd=ROOT,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert other.stdout.readline() == b"held\n"
        words = ["--checkpoints_dir", str(run.parent), "--resume_ckpt", "auto"]
        assert main(words) == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert f"{run} is in use by process {other.pid}" in error
        other.kill()
        other.communicate(timeout=60)
        assert main(["--resume_ckpt", str(run), "--max_steps", "8", "--log_frequency", "0"]) == 0

    @pytest.mark.parametrize("meanwhile", ["samples", "validation"])
    def test_who_asks_to_stop_need_not_wait(self, place, monkeypatch, caplog, meanwhile):
        caplog.set_level(logging.INFO)
        words = ["--log_frequency", "2", "--eval_interval", "2", "--val_fraction", "0.3"]
        words += [*SMALL_MODEL, "--max_steps", "2", "--data_dir", "data", "--checkpoints_dir"]
        owner = SampleDrawer if meanwhile == "samples" else Validator
        action = owner.__call__

        def ask_to_stop(self, trainer):
            os.kill(os.getpid(), signal.SIGTERM)
            return action(self, trainer)

        with monkeypatch.context() as patch:
            patch.setattr(owner, "__call__", ask_to_stop)
            assert main([*words, f"left_{meanwhile}"]) == 128 + signal.SIGTERM
        run = place / f"left_{meanwhile}" / "0000"
        assert "saved at step 2" in caplog.text
        assert not (run / "samples").exists()
        assert ("val/loss" in read_metrics(run)[1]) == (meanwhile == "samples")
        assert main(["--resume_ckpt", str(run)]) == 0  # which makes up for what was left
        assert [path.name for path in (run / "samples").iterdir()] == ["00000002.png"]
        assert main([*words, f"whole_{meanwhile}"]) == 0
        assert history(run) == history(place / f"whole_{meanwhile}" / "0000")
        caplog.clear()
        assert main(["--resume_ckpt", str(run)]) == 0
        assert "nothing left to train" in caplog.text

    def test_a_signal_while_the_last_checkpoint_is_written_stops_nothing(
        self, place, monkeypatch, caplog
    ):
        caplog.set_level(logging.INFO)
        save = CheckpointWriter.save

        def save_and_ask_to_stop(self, **checkpoint):
            save(self, **checkpoint)
            os.kill(os.getpid(), signal.SIGTERM)

        monkeypatch.setattr(CheckpointWriter, "save", save_and_ask_to_stop)
        words = ["--max_steps", "1", "--log_frequency", "0", "--checkpoints_dir", "late"]
        assert main([*SMALL_MODEL, *words]) == 0
        assert "finished at step 1" in caplog.text

    def test_a_frozen_unet_that_has_learned_nothing_is_told(self, place, caplog):
        words = ["--freeze_diffusion", "--max_steps", "1", "--log_frequency", "0"]
        assert main([*SMALL_MODEL, *words, "--checkpoints_dir", "frozen"]) == 0
        assert "--freeze_diffusion with --init scratch trains nothing" in caplog.text

    def test_a_refused_resume_leaves_the_run_as_it_was(self, place, whole, capsys):
        run = as_if_killed(whole, place / "refused" / "0000", 7)
        (run / ".lock").unlink()
        before = {path.name: path.read_bytes() for path in run.iterdir()}
        assert main(["--resume_ckpt", str(run), "--freeze_transformer"]) == 1
        assert "other parameters frozen" in capsys.readouterr().err
        (run / ".lock").unlink()
        assert {path.name: path.read_bytes() for path in run.iterdir()} == before

    def test_a_run_goes_on_from_another_folder(self, place, whole, tmp_path, monkeypatch):
        run = as_if_killed(whole, place / "elsewhere" / "0000", 7)
        monkeypatch.chdir(tmp_path)
        assert main(["--resume_ckpt", str(run), "--max_steps", "8", "--log_frequency", "0"]) == 0
        assert newest_checkpoint(run).step == 8
        assert list(tmp_path.iterdir()) == []

    def test_a_run_whose_checkpoints_are_damaged_is_left_alone(self, place, whole, capsys, caplog):
        run = as_if_killed(whole, place / "damaged" / "0000", 14)
        (run / "training-state-2x14.pt").unlink()
        assert main(["--resume_ckpt", str(run), "--max_steps", "8", "--log_frequency", "0"]) == 0
        assert "goes on from step 7, since newer checkpoints are damaged: of glide" in caplog.text
        for path in run.glob("training-state-*"):
            path.unlink()
        (run / ".lock").unlink()
        before = {path.name: path.read_bytes() for path in run.iterdir()}
        assert main(["--resume_ckpt", str(run)]) == 1
        message = capsys.readouterr().err.splitlines()[-1]
        assert "of glide-ft-1x8.pt, training-state-1x8.pt is missing" in message
        assert f"a new run with --resume_ckpt {run / 'glide-ft-2x14.pt'}" in message
        (run / ".lock").unlink()
        assert {path.name: path.read_bytes() for path in run.iterdir()} == before

    def test_a_checkpoint_with_wrong_bytes_is_passed_over_and_its_place_taken(
        self, place, whole, caplog
    ):
        run = as_if_killed(whole, place / "flipped" / "0000", 14)
        path = run / "training-state-2x14.pt"
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 0x55
        path.write_bytes(content)
        words = ["--max_steps", "14", "--log_frequency", "0", "--keep_checkpoints", "1"]
        assert main(["--resume_ckpt", str(run), *words]) == 0
        assert "newer checkpoints are damaged: of glide-ft-2x14.pt" in caplog.text
        assert_same(load(run / "glide-ft-2x14.pt"), load(whole / "glide-ft-2x14.pt"))
        assert_same(load(path), load(whole / path.name))
        assert newest_checkpoint(run).step == 14
        assert not (run / "glide-ft-1x7.json").exists()  # which is older than the one to keep

    def test_what_is_not_taken_of_a_checkpoint_may_be_damaged(self, place, whole, capsys):
        folder = as_if_killed(whole, place / "beside", 7)
        path = folder / "training-state-1x7.pt"
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 0x55
        path.write_bytes(content)
        words = ["--resume_ckpt", str(folder / "glide-ft-1x7.pt"), "--checkpoints_dir", "apart"]
        words += [*SMALL_MODEL, "--max_steps", "8", "--log_frequency", "0"]
        assert main(words) == 1
        assert f"{path} is damaged" in capsys.readouterr().err
        assert main([*words, "--weights_only"]) == 0

    def test_a_run_without_a_checkpoint_begins_again_as_it_began(self, place, whole, caplog):
        caplog.set_level(logging.INFO)
        given = str(whole / "glide-ft-1x7.pt")
        words = ["--resume_ckpt", given, "--checkpoints_dir", "early", "--log_frequency", "0"]
        assert main([*SMALL_MODEL, *words, "--ema_rate", "0.9", "--max_steps", "8"]) == 0
        run = place / "early" / "0000"
        first = load(run / "glide-ft-0x8.pt")
        for path in run.glob("glide-ft-*"):
            path.unlink()
        caplog.clear()
        assert main(["--resume_ckpt", str(run)]) == 0
        assert "from step 7" in caplog.text
        assert_same(load(run / "glide-ft-0x8.pt"), first)
        assert json.loads((run / "args.json").read_text())["resume_ckpt"] == given
        description = json.loads((run / "glide-ft-0x8.json").read_text())
        assert description["trained_from"] == given


class TestStartingFromWeights:
    def from_file(self, folder: str, weights: Path, *argv: str) -> int:
        # no preset: the description beside the file tells the model
        words = ["--side_x", "8", "--side_y", "8", "--device", "cpu", "--num_workers", "0"]
        words += ["--checkpoints_dir", folder, "--log_frequency", "0", "--resume_ckpt"]
        return main([*words, str(weights), *argv])

    def test_a_new_run_takes_the_training_state_beside_the_file(self, place, whole):
        same = [*EXACT, "--max_steps", "9", "--data_dir", "data"]
        assert self.from_file("stated", whole / "glide-ft-1x7.pt", *same) == 0
        lines = read_metrics(place / "stated" / "0000")
        assert [(line["step"], line["epoch"]) for line in lines] == [(8, 0), (9, 0)]
        (state,) = (place / "stated" / "0000").glob("training-state-0x9.pt")
        assert load(state)["optimizer"]["state"][0]["step"] == 9

    def test_a_file_of_a_finished_run_is_trained_for_as_many_epochs_again(self, place, whole):
        words = ["--epochs", "1", "--data_dir", "data", "--gradient_accumulation_steps", "4"]
        assert self.from_file("more", whole / "glide-ft-5x25.pt", *words) == 0
        assert [line["step"] for line in read_metrics(place / "more" / "0000")] == [26, 27, 28]
        assert (place / "more" / "0000" / "glide-ft-1x28.pt").exists()

    def test_a_last_step_that_the_file_is_beyond_is_refused(self, place, whole, capsys):
        assert self.from_file("beyond", whole / "glide-ft-1x7.pt", "--max_steps", "7") == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert "--max_steps is 7" in error
        assert "step 7 already" in error
        assert not (place / "beyond").exists()

    def test_a_training_state_of_other_settings_is_taken_with_a_warning(self, place, whole, caplog):
        words = ["--data_dir", "data", "-bs", "2", "-lr", "1e-3", "--max_steps", "8"]
        assert self.from_file("settings", whole / "glide-ft-1x7.pt", *words) == 0
        (warning,) = [text for text in caplog.messages if "other settings" in text]
        assert "training-state-1x7.pt" in warning
        assert "batch_size 1 -> 2" in warning
        assert "data: 10 images" in warning  # one was held back
        assert "learning_rate" not in warning
        assert "log_frequency" not in warning

    def test_a_training_state_of_another_model_is_refused(self, place, whole, capsys):
        folder = place / "mixed"
        folder.mkdir()
        shutil.copy(whole / "glide-ft-1x7.pt", folder)
        state = load(whole / "training-state-1x7.pt")
        moments = state["optimizer"]["state"][0]
        moments["exp_avg"] = moments["exp_avg"][:1]
        torch.save(state, folder / "training-state-1x7.pt")
        words = shlex.split("--model_preset tiny --model_options xf_width=16 text_ctx=16")
        assert self.from_file("misfit", folder / "glide-ft-1x7.pt", *words) == 1
        assert "training state belongs to another model" in capsys.readouterr().err
        torch.save({"step": 3}, folder / "training-state-1x7.pt")
        assert self.from_file("misfit", folder / "glide-ft-1x7.pt", *words) == 1
        assert f"{folder}/training-state-1x7.pt is no training state" in capsys.readouterr().err

    def test_weights_only_leaves_the_training_state(self, place, whole):
        weights = whole / "glide-ft-1x7.pt"
        assert self.from_file("fresh", weights, "--weights_only", "--max_steps", "1") == 0
        assert [line["step"] for line in read_metrics(place / "fresh" / "0000")] == [1]

    def test_averaged_weights_come_without_a_training_state(self, place, whole):
        assert self.from_file("averaged", whole / "glide-ft-1x7-ema.pt", "--max_steps", "1") == 0
        assert [line["step"] for line in read_metrics(place / "averaged" / "0000")] == [1]

    @pytest.mark.parametrize("part", ["transformer", "diffusion"])
    def test_a_frozen_part_stays_bit_identical(self, place, whole, part):
        weights = whole / "glide-ft-1x7.pt"
        words = [f"--freeze_{part}", "--weights_only", "--max_steps", "2", "-adam_wd", "0.1"]
        assert self.from_file(f"frozen_{part}", weights, *words) == 0
        run = place / f"frozen_{part}" / "0000"
        before, after = load(weights), load(run / "glide-ft-0x2.pt")
        text = re.compile("transformer|final_ln|token_emb|positional_emb|padding_emb")
        frozen = {name for name in before if bool(text.match(name)) == (part == "transformer")}
        assert frozen
        for name in before:
            assert torch.equal(before[name], after[name]) == (name in frozen), name
        state = load(run / "training-state-0x2.pt")["optimizer"]["state"]
        assert len(state) == len(before) - len(frozen)

    def test_a_training_state_of_other_frozen_parts_is_refused(self, place, whole, capsys):
        assert self.from_file("misfit", whole / "glide-ft-1x7.pt", "--freeze_transformer") == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("train_glide.py: error: ")
        assert "--weights_only" in error
        assert not (place / "misfit").exists()

    def test_an_inpainting_run_takes_a_base_models_weights_but_no_training_state(
        self, place, whole, caplog
    ):
        caplog.set_level(logging.INFO)
        given = whole / "glide-ft-1x7.pt"
        assert self.from_file("masked", given, "--train_inpaint", "--max_steps", "1") == 0
        assert "of kind base, becomes one of kind base-inpaint: its weights alone" in caplog.text
        assert "base-inpaint model" in caplog.text
        run = place / "masked" / "0000"
        assert [line["step"] for line in read_metrics(run)] == [1]
        description = json.loads((run / "glide-ft-0x1.json").read_text())
        assert description["kind"] == "base-inpaint"
        assert description["model_options"]["inpaint"] is True
        before, after = load(given), load(run / "glide-ft-0x1.pt")
        first = "input_blocks.0.0.weight"
        assert after[first].shape[1] == 7
        for name in before.keys() - {first}:  # one step of this learning rate is small
            assert torch.allclose(after[name], before[name], atol=1e-4), name
        caplog.clear()
        assert main(["--resume_ckpt", str(run), "--max_steps", "2"]) == 0
        assert "from step 1" in caplog.text
        assert "becomes" not in caplog.text

    def test_a_frozen_unet_cannot_learn_of_masks(self, place, whole, capsys):
        words = ["--train_inpaint", "--freeze_diffusion"]
        assert self.from_file("unlearned", whole / "glide-ft-1x7.pt", *words) == 1
        assert "--freeze_diffusion: " in capsys.readouterr().err
        assert not (place / "unlearned").exists()

    def test_weights_of_another_kind_are_refused_naming_both(self, place, whole, capsys):
        shutil.copy(whole / "glide-ft-1x7.pt", place / "undescribed.pt")
        upsampler = [*SMALL_MODEL, "--train_upsample", "--resume_ckpt", "undescribed.pt"]
        assert main([*upsampler, "--checkpoints_dir", "kinds"]) == 1
        (error,) = capsys.readouterr().err.splitlines()
        assert "undescribed.pt holds a model of kind base, wanted is upsample" in error
        assert not (place / "kinds").exists()

    def test_without_network_the_error_says_what_to_do(self, place, capsys, monkeypatch, tmp_path):
        monkeypatch.setenv("GLIDE_CACHE_DIR", str(tmp_path / "cache"))
        monkeypatch.setattr("glide_text2im.transfer._RETRY_DELAYS", ())
        for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
            monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody answers there
        assert main(["--data_dir", "data", "--checkpoints_dir", "offline"]) == 1
        error = capsys.readouterr().err.splitlines()[-1]
        for part in ("base.pt", f"{tmp_path}/cache", "--resume_ckpt FILE.pt", "--init scratch"):
            assert part in error
        assert not (place / "offline").exists()


class TestFullDisk:
    def test_it_harms_no_checkpoint_and_the_run_goes_on_when_there_is_room(
        self, place, capsys, caplog
    ):
        words = [*SMALL_MODEL, "--data_dir", "data", "--log_frequency", "3", "--max_steps", "20"]
        words += ["--save_checkpoint_interval", "2", "--keep_checkpoints", "0"]
        words += ["--test_batch_size", "9", "--checkpoints_dir"]
        assert main([*words, "roomy"]) == 0
        whole = place / "roomy" / "0000"
        run = as_if_killed(whole, place / "full" / "0000", 2)
        before = {path.name: path.read_bytes() for path in run.glob("*-*x*")}

        usual = resource.getrlimit(resource.RLIMIT_FSIZE)
        room = (run / "args.json").stat().st_size + 200
        assert room < (whole / "metrics.jsonl").stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, usual[1]))
        try:
            assert main(["--resume_ckpt", str(run)]) == 1
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, usual)
        assert f"the checkpoint of step 4 could not be written to {run}" in caplog.text
        assert "metrics.jsonl cannot be written (File too large)" in caplog.text
        assert "the samples cannot be written" in caplog.text
        last_line = capsys.readouterr().err.splitlines()[-1]
        assert last_line.startswith("train_glide.py: error: the checkpoint of step 20 could not")
        assert "free some disk space" in last_line
        assert {path.name: path.read_bytes() for path in run.glob("*-*x*")} == before
        assert not list(run.glob("**/*.tmp"))

        assert main(["--resume_ckpt", str(run)]) == 0
        for name in ("glide-ft-1x20.pt", "training-state-1x20.pt"):
            assert_same(load(run / name), load(whole / name))
        assert history(run) == history(whole)


class TestKindsOfRun:
    def test_the_upsampler_draws_from_a_held_back_image(self, place, caplog):
        caplog.set_level(logging.INFO)
        words = ["--train_upsample", "--upscale_factor", "2", "--max_steps", "2", "-freq", "1"]
        assert main([*SMALL_MODEL, *words, "--checkpoints_dir", "upsampler"]) == 0
        assert "upsample model" in caplog.text
        assert "10 images of ./data, at 16x16" in caplog.text
        run = place / "upsampler" / "0000"
        assert len(list((run / "samples").glob("*.png"))) == 2
        assert json.loads((run / "glide-ft-0x2.json").read_text())["kind"] == "upsample"

    def test_the_samples_of_an_inpainting_run_end_with_a_picture_of_the_data(self, place, tmp_path):
        Image.new("RGB", (8, 8), (200, 30, 60)).save(tmp_path / "red.png")
        (tmp_path / "red.txt").write_text("a red wall")
        words = ["--train_inpaint", "--max_steps", "1", "--val_data_dir", str(tmp_path)]
        assert main([*SMALL_MODEL, *words, "--checkpoints_dir", "repainted"]) == 0
        with Image.open(place / "repainted" / "0000" / "samples" / "00000001.png") as grid:
            drawn, repainted = PADDING, PADDING + CELL_WIDTH + PADDING
            assert grid.width == repainted + CELL_WIDTH + PADDING
            assert grid.getpixel((repainted, PADDING)) == (200, 30, 60)
            assert grid.getpixel((drawn, PADDING)) != (200, 30, 60)
            middle = CELL_WIDTH // 2
            assert grid.getpixel((repainted + middle, PADDING + middle)) != (200, 30, 60)

    def test_shards_without_the_key_are_found_before_a_download(self, place, capsys, monkeypatch):
        monkeypatch.setattr(training_run, "load_model", None)
        words = ["--data_dir", "tars", "--use_webdataset", "--wds_image_key", "webp"]
        assert main([*words, "--checkpoints_dir", "no_key"]) == 1
        assert "11 unreadable images" in capsys.readouterr().err
        assert not (place / "no_key").exists()

    def test_an_error_shows_where_it_comes_from_if_asked(self, capsys, monkeypatch):
        words = ["--data_dir", "tars", "--use_webdataset", "--wds_image_key", "webp"]
        monkeypatch.setenv("GLIDE_TRACEBACK", "1")
        assert main(words) == 1
        error = capsys.readouterr().err
        assert "Traceback (most recent call last)" in error
        assert error.splitlines()[-1].startswith("train_glide.py: error: ")

    def test_shards_train_too_with_frozen_parts_bf16_and_recomputing(self, place, caplog):
        caplog.set_level(logging.INFO)
        words = ["--data_dir", "tars", "--use_webdataset", "--wds_dataset_name", "laion"]
        words += ["--precision", "bf16", "--activation_checkpointing", "--freeze_transformer"]
        words += ["--batch_size", "4", "--epochs", "2", "--checkpoints_dir", "shards"]
        assert main([*SMALL_MODEL, *words]) == 0
        assert "1 shards of tars" in caplog.text
        assert [line["step"] for line in read_metrics(place / "shards" / "0000")] == [1, 2, 3, 4]

    def test_a_ctrl_c_before_training_needs_no_traceback(self, monkeypatch, capsys):
        def interrupt(config):
            raise KeyboardInterrupt

        monkeypatch.setattr(training_run, "run", interrupt)
        assert main(SMALL_MODEL) == 130
        assert capsys.readouterr().err == "train_glide.py: interrupted\n"

    @pytest.mark.parametrize(("device", "part"), [("cuda:99", "CUDA devices"), ("mps", "mps")])
    def test_a_device_that_is_not_there_is_one_line(self, device, part):
        if device == "mps" and torch.backends.mps.is_available():
            assert devices.pick_device(device).type == "mps"
        else:
            with pytest.raises(ValueError, match=part):
                devices.pick_device(device)

    @pytest.mark.parametrize("kind", ["base", "upsample"])
    def test_the_small_preset_has_about_25_million_parameters(self, kind):
        with torch.device("meta"):
            model, _ = create_model_and_diffusion(**training_options(kind, "small", {}))
        assert sum(p.numel() for p in model.parameters()) == pytest.approx(25e6, rel=0.1)
