"""What --dry_run tells of the cost of a run: its forecast, what is measured, and what is told."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch

import real_runs
from glide_finetune import cost_report, glide_util, memory, planner
from glide_finetune.arguments import parse_config
from glide_finetune.cost_report import duration, kept_checkpoints, report_cost
from glide_finetune.memory import OutOfMemory
from glide_finetune.origin import Origin
from glide_finetune.planner import LiveMemory, Measurement, Memory, forecast, measure
from glide_finetune.trainer import Trainer
from glide_finetune.training_run import glide_job
from train_glide import main

CPU = torch.device("cpu")
TINY = [*real_runs.SMALL_MODEL, "--checkpoints_dir", "runs", "--data_dir", "data"]


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    real_runs.make_data(tmp_path)
    Path("runs").mkdir()


def settings(words: str = ""):
    return parse_config([*TINY, *shlex.split(words)])


def report(out: str) -> dict[str, str]:
    """What the cost section tells, by what it tells it of."""
    lines = [re.split(r" {2,}", line[2:]) for line in out[out.index("\ncost: ") :].splitlines()]
    return {name: "  ".join(rest) for name, *rest in lines}


LARGE = "--side_x 16 --side_y 16 --batch_size 16"
VARIANTS = [
    LARGE,
    f"{LARGE} --activation_checkpointing",
    "--side_x 16 --side_y 16 --batch_size 6 --precision bf16",
    "--train_upsample --side_x 4 --side_y 4 --batch_size 16 -grad_ckpt --ema_rate 0.9",
    f"{LARGE} --train_inpaint --vlb_weight 0",
    f"{LARGE} --gradient_accumulation_steps 2 --ema_rate 0.9",
    f"{LARGE} --freeze_transformer --ema_rate 0.9",
    f"{LARGE} --freeze_diffusion",
    f"{LARGE} --low_memory --ema_rate 0.9 --freeze_transformer",
]


@pytest.mark.parametrize("words", VARIANTS)
def test_the_forecast_is_what_the_tensors_of_a_second_step_take(words, monkeypatch):
    """All bytes are counted here; what a process takes for them is up to its allocator."""
    monkeypatch.setattr(LiveMemory, "peak_with_holes", property(lambda live: live.peak))
    config = settings(words)
    expected = forecast(config, CPU)
    job = glide_job(config, Origin(), CPU)
    trainer, batch = job.trainer, next(iter(job.data.loader))
    batches = [batch] * config.gradient_accumulation_steps
    trainer.model.train()
    trainer.train_step(batches)
    with LiveMemory() as live:
        trainer.train_step(batches)

    parameters = list(trainer.model.parameters())
    trained = sum(p.nbytes for p in parameters if p.requires_grad)
    assert expected.weights == sum(p.nbytes for p in parameters)
    assert expected.gradients == trained
    states = trainer.optimizer.state.values()
    moments = [value for state in states for value in state.values() if torch.is_tensor(value)]
    assert expected.moments == sum(moment.nbytes for moment in moments)
    count = sum(p.numel() for p in parameters if p.requires_grad)
    assert trained == (2 if config.low_memory else 4) * count
    assert expected.average == (4 * count if config.ema_rate else 0)
    assert expected.gradients + expected.activations == pytest.approx(live.peak, rel=0.01)
    assert live.peak > 1.1 * trained  # so there is something to forecast


def test_the_forecast_draws_no_random_numbers_and_leaves_none_behind():
    before = torch.get_rng_state()
    memory = forecast(settings("--activation_checkpointing"), CPU)
    assert torch.equal(torch.get_rng_state(), before)
    assert type(torch.zeros(1)) is torch.Tensor
    assert memory.peak == sum(vars(memory).values())


def test_what_is_freed_is_no_longer_counted_and_views_are_not_counted_twice():
    kept = torch.zeros(100)
    with LiveMemory() as live:
        first = torch.zeros(1000)
        view = first.view(10, 100)[2:].transpose(0, 1)
        kept.add_(1)
        second = view + 1
        del first, view
        after = live.now
        del second
    assert (after, live.now, live.peak) == (4 * 800, 0, 4 * 1800)


def test_the_peak_on_a_cpu_has_the_holes_that_freed_tensors_leave():
    with LiveMemory() as live:
        first, second, third = (torch.zeros(1000) for _ in range(3))
        del second
        fourth = torch.zeros(1000)  # too long for the hole
    assert live.now == live.peak == first.nbytes + third.nbytes + fourth.nbytes
    assert 4 * 4000 < live.peak_with_holes < 4 * 4000 + 1000


def test_measuring_finds_the_parts_of_the_forecast_and_the_length_of_the_run():
    config = settings("--batch_size 2 --ema_rate 0.9 --epochs 3 --lr_schedule cosine")
    measured = measure(config, CPU)
    expected = forecast(config, CPU)
    for part in ("weights", "gradients", "moments", "average"):
        assert getattr(measured.memory, part) == getattr(expected, part)
    assert measured.memory.activations >= 0
    assert len(measured.seconds) == 2
    assert (measured.made, measured.total) == (0, 3 * 5)


@pytest.mark.parametrize(
    ("words", "total"),
    [
        ("--batch_size 2 --epochs 4 --max_steps 7", 7),
        ("--batch_size 2 --epochs 4 --gradient_accumulation_steps 4", 4 * 2),
        ("--batch_size 2 -wds --data_dir tars", None),
        ("--batch_size 2 -wds --data_dir tars --max_steps 9", 9),
        ("--batch_size 2 -wds --data_dir tars --wds_epoch_samples 40 --epochs 2", 2 * 20),
    ],
)
def test_the_steps_of_a_run_follow_from_epochs_steps_and_data(words, total, monkeypatch):
    monkeypatch.setattr(planner, "WHOLE_STEPS", 1)
    assert measure(settings(words), CPU).total == total


@pytest.mark.parametrize(("passes", "seconds"), [(1, 5.0), (2, 7.0), (3, 9.0), (16, 13.0)])
def test_a_step_takes_each_of_its_passes_and_its_optimizer_once(passes, seconds, monkeypatch):
    now = 0.0

    def train_step(trainer, batches):
        nonlocal now
        now += 3.0 + 2.0 * len(batches)

    monkeypatch.setattr(Trainer, "train_step", train_step)
    monkeypatch.setattr(planner.time, "perf_counter", lambda: now)
    config = settings(f"--batch_size 2 --gradient_accumulation_steps {passes}")  # 5 an epoch
    assert measure(config, CPU).seconds[-1] == seconds


def test_no_part_is_negative_where_nothing_tells_of_the_process(monkeypatch):
    monkeypatch.setattr(memory, "_of_process", lambda name: None)
    assert min(vars(measure(settings(), CPU).memory).values()) >= 0


def test_after_a_long_first_step_no_second_one_is_made(monkeypatch, capsys):
    monkeypatch.setattr(planner, "LONG_STEP", 0.0)
    report_cost(settings())
    assert "of the first one" in report(capsys.readouterr().out)["seconds a step"]


def test_a_first_step_that_compiled_is_not_taken_for_the_others(monkeypatch, capsys):
    monkeypatch.setattr(planner, "LONG_STEP", 0.0)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # takes minutes
    report_cost(settings("--compile"))
    assert "of the second one" in report(capsys.readouterr().out)["seconds a step"]


def without_steps(monkeypatch, measured: Measurement, config) -> None:
    """Report the cost as if these steps had been made."""
    monkeypatch.setattr(cost_report, "measure", lambda *_: measured)
    report_cost(config)


def test_the_time_of_the_run_is_that_of_the_steps_still_to_make(monkeypatch, capsys):
    memory = Memory(1, 2, 3, 0, 10**9)
    config = settings("--epochs 5 --max_steps 8000")
    without_steps(monkeypatch, Measurement(memory, [60.0, 3.0], 500, 8000), config)
    told = report(capsys.readouterr().out)
    assert told["seconds a step"] == "3  of the second one; the first took 60"
    assert told["steps"] == "7,500  5 epochs, 8,000 at most, 500 of which are made"
    assert told["time for all of them"].startswith("6 h 15 min")
    assert told["disk"].split("  ")[1].startswith("5 checkpoints, and one more")


def test_a_run_that_has_made_more_than_is_asked_costs_nothing_more(monkeypatch, capsys):
    memory = Memory(1, 2, 3, 0, 10**9)
    without_steps(monkeypatch, Measurement(memory, [1.0], 500, 300), settings("--epochs 1"))
    told = report(capsys.readouterr().out)
    assert told["disk"].startswith("0.0 MB  0 checkpoints")


def test_the_length_of_shards_that_tell_none_is_not_guessed(monkeypatch, capsys):
    without_steps(monkeypatch, Measurement(None, [1.0, 1.0], 0, None), settings())
    told = report(capsys.readouterr().out)
    assert told["steps"].startswith("unknown  the shards do not tell")
    assert "time for all of them" not in told
    assert told["memory of a step"] == "forecast"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(7, "7 s"), (130, "2 min"), (3600 * 5 + 60, "5 h 1 min"), (3600 * 50, "2 d 2 h")],
)
def test_times_are_told_in_their_two_largest_units(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("words", "steps", "made", "count"),
    [
        ("--keep_checkpoints 3", 10_000, 0, 4),
        ("--keep_checkpoints 3", 2500, 0, 3),  # of steps 1000, 2000 and the last
        ("--keep_checkpoints 3", None, 0, 4),
        ("--keep_checkpoints 0", 2500, 0, 3),
        ("--keep_checkpoints 0", None, 0, 1),
        ("--keep_checkpoints 3", 1100, 900, 2),  # of step 1000 and the last
        ("--keep_checkpoints 3", 1000, 1000, 0),
    ],
)
def test_the_disk_holds_the_checkpoints_that_are_kept_and_the_one_being_written(
    words, steps, made, count
):
    assert kept_checkpoints(settings(words), steps, made)[0] == count


@pytest.mark.parametrize("low_memory", ["", "--low_memory"])
def test_a_checkpoint_on_disk_is_as_large_as_told(capsys, low_memory):
    words = f"--ema_rate 0.9 --freeze_transformer --max_steps 1 --log_frequency 0 {low_memory}"
    assert main([*TINY, *words.split()]) == 0
    files = {path.name: path.stat().st_size for path in Path("runs/0000").glob("*.pt")}
    report_cost(settings(words))
    told = report(capsys.readouterr().out)["a checkpoint"]
    for name, size in files.items():
        kind = "training state" if name.startswith("training") else "weights"
        kind = "averaged weights" if name.endswith("-ema.pt") else kind
        (megabytes,) = re.findall(rf"(?:  |, ){kind} ([\d.]+) MB", told)
        assert float(megabytes) == pytest.approx(size / 1e6, rel=0.1)


def test_too_little_disk_is_told(monkeypatch, capsys):
    monkeypatch.setattr(cost_report.shutil, "disk_usage", lambda _: Free())
    without_steps(monkeypatch, Measurement(None, [1.0], 0, 9), settings())
    assert "too little: lower --keep_checkpoints" in report(capsys.readouterr().out)["disk"]


class Free:
    free = 1000


def with_available(monkeypatch, count: int) -> None:
    monkeypatch.setattr(cost_report, "available_memory", lambda _: count)


def test_what_will_not_fit_is_not_tried_but_told_with_what_helps(monkeypatch, capsys):
    def no_step(*_):
        raise AssertionError("a step is made")

    monkeypatch.setattr(cost_report, "measure", no_step)
    with_available(monkeypatch, 1000)
    assert main(["--dry_run", *TINY, "--batch_size", "4"]) == 1
    out, err = capsys.readouterr()
    told = report(out)
    assert told["memory of a step"] == "forecast"
    assert {"weights", "gradients", "activations", "peak", "disk"} <= told.keys()
    assert err.startswith("train_glide.py: error: a step will need about ")
    assert err.count("\n") == 1
    for flag in ("--batch_size (now 4)", "--activation_checkpointing", "--precision bf16"):
        assert flag in err


def test_running_out_of_memory_in_the_step_is_told_in_one_line(monkeypatch):
    def train_step(*_):
        raise RuntimeError("DefaultCPUAllocator: not enough memory")

    monkeypatch.setattr(Trainer, "train_step", train_step)
    with pytest.raises(OutOfMemory, match="add --activation_checkpointing"):
        report_cost(settings())


@pytest.mark.parametrize(
    ("activations", "room", "told"),
    [
        (0, 630, "training waits while a checkpoint is written"),
        (300, 750, "a step may then no longer fit: add --activation_checkpointing"),
        (300, 1500, "in main memory, from the first checkpoint on"),
    ],
)
def test_it_is_told_what_the_copies_of_a_checkpoint_do(
    activations, room, told, monkeypatch, capsys
):
    memory = Memory(100, 100, 200, 0, activations)
    monkeypatch.setattr(cost_report, "forecast", lambda *_: memory)
    with_available(monkeypatch, room)
    without_steps(monkeypatch, Measurement(None, [1.0], 0, 9), settings())
    assert report(capsys.readouterr().out)["copies of a checkpoint"].endswith(told)


def test_a_dry_run_of_a_run_leaves_it_as_it_is_and_counts_what_is_left(capsys):
    words = [*TINY, "--batch_size", "2", "--epochs", "2", "--log_frequency", "0"]
    assert main([*words, "--max_steps", "3"]) == 0
    before = {path: path.read_bytes() for path in Path("runs/0000").rglob("*") if path.is_file()}
    flags = ["--resume_ckpt", "runs/0000", "--max_steps", "0"]
    assert main(["--dry_run", *words, *flags]) == 0
    told = report(capsys.readouterr().out)
    assert told["steps"] == "7  2 epochs, 3 of which are made"
    after = {path: path.read_bytes() for path in Path("runs").rglob("*") if path.is_file()}
    assert after.keys() - before.keys() == {Path("runs/dry_run/data.png")}
    assert {path: after[path] for path in before} == before


def test_released_weights_are_not_fetched_to_plan(monkeypatch, caplog):
    caplog.set_level("INFO")

    def fetched(*_, **__):
        raise AssertionError("weights are fetched")

    monkeypatch.setattr(glide_util, "load_checkpoint", fetched)
    config = settings()
    config.init = "pretrained"
    report_cost(config)
    assert "random weights instead of OpenAI's" in caplog.text


def test_a_dry_run_tells_settings_data_and_cost_and_writes_nothing_else(tmp_path):
    out = real_runs.train(tmp_path, "--dry_run", *TINY, "--batch_size", "2", "--epochs", "3")
    told, end = json.JSONDecoder().raw_decode(out)
    assert told["batch_size"] == 2
    assert out.index("\ndata: ") > end
    told = report(out)
    assert told["memory of a step"] == "forecast  measured"
    expected, measured, *_ = re.findall(r"[\d.]+ [GM]B", told["peak"])
    assert float(expected.split()[0]) == pytest.approx(float(measured.split()[0]), rel=0.15)
    assert told["steps"].startswith("15  3 epochs")
    assert {"weights", "seconds a step", "time for all of them", "a checkpoint", "disk"} <= set(
        told
    )
    written = [path for path in Path("runs").rglob("*") if path.is_file()]
    assert written == [Path("runs/dry_run/data.png")]


@pytest.mark.slow
@pytest.mark.parametrize(
    "words", ["-bs 8", "-bs 8 --precision bf16", "-bs 16 -grad_ckpt", "-bs 1 --ema_rate 0.999"]
)
def test_the_forecast_is_within_15_per_cent_of_the_peak_of_a_process(tmp_path, words):
    model = "--model_preset small --init scratch --num_workers 0 --device cpu --data_dir data"
    out = real_runs.train(tmp_path, "--dry_run", *shlex.split(f"{model} {words}"))
    expected, measured, *_ = re.findall(r"([\d.]+) GB", report(out)["peak"])
    assert float(expected) == pytest.approx(float(measured), rel=0.15)
