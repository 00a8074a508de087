"""The metrics file and wandb, which can neither stop nor slow a run."""

import json
import math
import re
import resource
import sys
import threading
import time
import types

import pytest
import torch
from PIL import Image

from glide_finetune import wandb_run
from glide_finetune.metrics import MetricsLog, read_metrics
from glide_finetune.train_util import wandb_setup


@pytest.fixture(autouse=True)
def _wandb_is_disabled(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)


def write_steps(run_folder, steps, resume_step=None):
    log = MetricsLog(run_folder, resume_step=resume_step)
    for step in steps:
        log.log({"loss": 1 / step}, step)
    log.close()


# -------------------------------------------------------------- metrics.jsonl
def test_each_line_is_one_object_with_its_step(tmp_path):
    log = MetricsLog(tmp_path)
    log.log({"loss": 0.5, "lr": 1e-4, "images": 4, "note": "größer\u2028"}, 1)
    log.log({"val/loss": torch.tensor(0.25)}, 1)
    # without close: what is logged is in the file at once
    lines = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").rstrip("\n").split("\n")
    assert [json.loads(line) for line in lines] == [
        {"step": 1, "loss": 0.5, "lr": 1e-4, "images": 4, "note": "größer\u2028"},
        {"step": 1, "val/loss": 0.25},
    ]
    assert len(read_metrics(tmp_path)) == 2
    log.close()


def test_values_that_are_not_finite_keep_the_lines_valid_json(tmp_path):
    log = MetricsLog(tmp_path)
    log.log({"a": math.nan, "b": math.inf, "c": torch.tensor(-math.inf), "d": [math.nan]}, 1)
    log.close()

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert line == {"step": 1, "a": "NaN", "b": "Infinity", "c": "-Infinity", "d": ["NaN"]}
    [record] = read_metrics(tmp_path)
    assert math.isnan(record["a"])
    assert (record["b"], record["c"]) == (math.inf, -math.inf)


def test_a_resumed_run_has_the_history_of_one_that_was_never_stopped(tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    whole.mkdir()
    stopped.mkdir()
    write_steps(whole, range(1, 9))
    write_steps(stopped, range(1, 7))  # the newest checkpoint is that of step 4
    write_steps(stopped, range(5, 9), resume_step=4)
    names = ("metrics.jsonl",)
    assert [(stopped / n).read_bytes() for n in names] == [(whole / n).read_bytes() for n in names]


def test_a_torn_last_line_is_dropped(tmp_path):
    write_steps(tmp_path, range(1, 4))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3]
    write_steps(tmp_path, [4], resume_step=3)
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3, 4]
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 4


@pytest.mark.parametrize(
    "line", ['{"step": "3"}', '{"step": Infinity}', '{"loss": 1}', "[1]", "3", "[" * 100_000]
)
def test_lines_that_are_none_of_ours_are_dropped(tmp_path, line):
    write_steps(tmp_path, range(1, 4))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(line + "\n")
    write_steps(tmp_path, [4], resume_step=3)
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3, 4]


def test_a_run_that_begins_again_begins_its_file_again(tmp_path):
    write_steps(tmp_path, range(1, 4))
    write_steps(tmp_path, [1])
    assert [record["step"] for record in read_metrics(tmp_path)] == [1]


def test_there_are_no_metrics_before_the_first(tmp_path):
    assert read_metrics(tmp_path) == []


def test_lines_that_a_full_disk_refuses_follow_once_there_is_room(tmp_path, caplog):
    log = MetricsLog(tmp_path)
    log.log({"loss": 0.5}, 1)
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = (tmp_path / "metrics.jsonl").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 5, usual[1]))
    try:
        log.log({"loss": 0.25}, 2)
        log.log({"loss": 0.125}, 3)
        log.sync()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    (record,) = caplog.records  # once
    assert "metrics.jsonl cannot be written (File too large)" in record.getMessage()
    assert [line["step"] for line in read_metrics(tmp_path)] == [1]
    log.log({"loss": 0.0625}, 4)
    assert [line["loss"] for line in read_metrics(tmp_path)] == [0.5, 0.25, 0.125, 0.0625]
    log.close()


def test_a_silent_log_does_nothing():
    log = MetricsLog(None, project="p")
    log.log({"loss": 1.0}, 1)
    log.log_images("samples", [Image.new("RGB", (2, 2))], ["a"], 1)
    log.close()


# ---------------------------------------------------------------------- wandb
class FakeRun:
    def __init__(self, step=0):
        self.step, self.logged, self.finished, self.offline = step, [], False, False
        self.url = "https://wandb.invalid/run"
        self.settings = types.SimpleNamespace(sync_dir="run/wandb/offline-run-1")

    def log(self, metrics, step=None):
        self.logged.append((step, metrics))
        self.step = step if step is not None else self.step

    def finish(self):
        self.finished = True


@pytest.fixture
def fake_wandb(monkeypatch):
    """A stand-in for the package wandb that records how it is called."""
    fake = types.ModuleType("wandb")
    fake.run, fake.inits, fake.logged_in = FakeRun(), [], True
    fake.Settings = lambda **settings: settings
    fake.setup = lambda settings: None
    fake.teardown = lambda: None
    fake.login = lambda prompt, verify: fake.logged_in
    fake.Image = lambda image, caption: (image, caption)
    fake.errors = types.SimpleNamespace(CommError=type("CommError", (Exception,), {}))

    def init(**arguments):
        fake.inits.append(arguments)
        return fake.run

    fake.init = init
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_MODE")
    return fake


def wandb_log(run_folder, **arguments):
    return MetricsLog(
        run_folder, project="birds", config={"seed": 3, "dir": run_folder}, **arguments
    )


def test_wandb_gets_metrics_images_and_config(tmp_path, fake_wandb):
    log = wandb_log(tmp_path)
    log.log({"loss": 0.5}, 1)
    log.log_images("samples", [tmp_path / "grid.png"], ["a red bird"], 1)
    log.close()
    [arguments] = fake_wandb.inits
    assert arguments["project"] == "birds"
    assert arguments["config"] == {"seed": 3, "dir": str(tmp_path)}
    assert arguments["dir"] == str(tmp_path)
    assert "mode" not in arguments
    assert fake_wandb.run.logged == [
        (1, {"loss": 0.5}),
        (1, {"samples": [(str(tmp_path / "grid.png"), "a red bird")]}),
    ]
    assert fake_wandb.run.finished


def test_wandb_starts_its_process_only_when_the_data_workers_are_forked(tmp_path, fake_wandb):
    """Which they are once there is a first step to log."""
    log = wandb_log(tmp_path)
    time.sleep(0.3)
    assert fake_wandb.inits == []
    log.log({"loss": 0.5}, 1)
    log.close()
    assert len(fake_wandb.inits) == 1


def test_a_resumed_run_goes_on_in_the_same_wandb_run_and_never_backwards(tmp_path, fake_wandb):
    wandb_log(tmp_path).close()
    fake_wandb.run = FakeRun(step=7)  # wandb had received steps up to 7
    log = wandb_log(tmp_path, resume_step=5)
    for step in (6, 7, 8):
        log.log({"loss": 0.5}, step)
    log.close()
    first, second = fake_wandb.inits
    assert first["id"] == second["id"] == (tmp_path / "wandb_id.txt").read_text()
    assert second["resume"] == "allow"
    assert [step for step, _ in fake_wandb.run.logged] == [7, 8]


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"a b\n"])
def test_a_damaged_id_makes_another_wandb_run(tmp_path, fake_wandb, content):
    (tmp_path / "wandb_id.txt").write_bytes(content)
    wandb_log(tmp_path).close()
    (arguments,) = fake_wandb.inits
    assert re.fullmatch("[0-9a-f]{8}", arguments["id"])
    assert (tmp_path / "wandb_id.txt").read_text() == arguments["id"]


def test_another_run_is_another_wandb_run(tmp_path, fake_wandb):
    for name in ("0000", "0001"):
        (tmp_path / name).mkdir()
        wandb_log(tmp_path / name).close()
    assert fake_wandb.inits[0]["id"] != fake_wandb.inits[1]["id"]


def test_without_a_login_the_run_is_offline_and_says_how_to_sync(tmp_path, fake_wandb, caplog):
    fake_wandb.logged_in = False
    wandb_log(tmp_path).close()
    assert fake_wandb.inits[0]["mode"] == "offline"
    assert "wandb sync run/wandb/offline-run-1" in caplog.text


@pytest.mark.parametrize("mode", ["", "online"])
def test_without_a_way_to_the_server_the_run_is_offline(
    tmp_path, fake_wandb, monkeypatch, caplog, mode
):
    """Unless the user wants it online."""
    if mode:
        monkeypatch.setenv("WANDB_MODE", mode)
    init = fake_wandb.init

    def unless_offline(**arguments):
        if arguments.get("mode") != "offline":
            raise fake_wandb.errors.CommError("Failed to get resume status")
        return init(**arguments)

    fake_wandb.init = unless_offline
    log = wandb_log(tmp_path)
    log.log({"loss": 0.5}, 1)
    log.close()
    if mode:
        assert "wandb is off for this run (CommError: Failed to get resume status)" in caplog.text
    else:
        assert fake_wandb.run.logged == [(1, {"loss": 0.5})]
        assert "cannot be reached, so this run is recorded offline" in caplog.text


def test_a_mode_that_the_user_chose_is_left_to_wandb(tmp_path, fake_wandb, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    fake_wandb.logged_in = False
    wandb_log(tmp_path).close()
    assert "mode" not in fake_wandb.inits[0]


def fail(*_, **__):
    raise RuntimeError("no network\nsecond line")


@pytest.mark.parametrize("where", ["Settings", "login", "init", "Image"])
def test_an_error_in_wandb_gives_one_warning_and_the_run_goes_on(
    tmp_path, fake_wandb, caplog, where
):
    setattr(fake_wandb, where, fail)
    log = wandb_log(tmp_path)
    for step in range(1, 6):
        log.log({"loss": 0.5}, step)
        log.log_images("samples", ["grid.png"], ["a"], step)
    log.close()
    assert [r.getMessage() for r in caplog.records] == [
        "wandb is off for this run (RuntimeError: no network second line)"
    ]
    assert len(read_metrics(tmp_path)) == 5


@pytest.mark.parametrize("where", ["log", "finish"])
def test_an_error_in_a_wandb_run_gives_one_warning(tmp_path, fake_wandb, caplog, where):
    setattr(fake_wandb.run, where, fail)
    write = wandb_log(tmp_path)
    write.log({"loss": 0.5}, 1)
    write.log({"loss": 0.5}, 2)
    write.close()
    assert len(caplog.records) == 1
    assert len(read_metrics(tmp_path)) == 2


def test_an_error_in_a_run_that_was_given_gives_one_warning_too(tmp_path, caplog):
    given = FakeRun()
    given.log = fail
    log = MetricsLog(tmp_path, wandb_run=given)
    for step in (1, 2):
        log.log({"loss": 0.5}, step)
        log.log_images("samples", ["grid.png"], ["a"], step)
    log.close()
    assert [r.getMessage() for r in caplog.records] == [
        "wandb is off for this run (RuntimeError: no network second line)"
    ]
    assert len(read_metrics(tmp_path)) == 2
    assert not given.finished


def test_a_wandb_that_cannot_be_imported_gives_one_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setitem(sys.modules, "wandb", None)
    write = wandb_log(tmp_path)
    write.log({"loss": 0.5}, 1)
    write.close()
    assert len(caplog.records) == 1
    assert len(read_metrics(tmp_path)) == 1


@pytest.mark.parametrize("where", ["init", "log", "finish"])
def test_a_wandb_that_hangs_does_not_hold_up_the_run(
    tmp_path, fake_wandb, monkeypatch, caplog, where
):
    monkeypatch.setattr(wandb_run, "FINISH_SECONDS", -4.9)  # wait 0.1 s in all
    monkeypatch.setattr(wandb_run, "QUEUE_LIMIT", 100)
    released = threading.Event()
    owner = fake_wandb if where == "init" else fake_wandb.run
    setattr(owner, where, lambda *_, **__: released.wait())
    started = time.perf_counter()
    write = wandb_log(tmp_path)
    for step in range(1, 301):
        write.log({"loss": 0.5}, step)
        time.sleep(0.0001)
    write.close()
    assert time.perf_counter() - started < 30
    assert len(read_metrics(tmp_path)) == 300
    assert len(caplog.records) == 1
    released.set()  # the thread ends


def test_disabled_means_that_wandb_is_not_even_imported(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it fails
    write = wandb_log(tmp_path)
    write.log({"loss": 0.5}, 1)
    write.close()
    assert len(read_metrics(tmp_path)) == 1


def test_the_setup_of_notebooks_returns_something_that_logs(tmp_path, fake_wandb):
    folder = tmp_path / "outputs"
    run = wandb_setup(4, 64, 32, 1e-4, False, torch.device("cpu"), "./data", str(folder))
    run.log({"loss": 0.5})
    run.log({"loss": 0.25}, step=2)
    run.finish()
    [arguments] = fake_wandb.inits
    assert arguments["project"] == "glide-finetune"
    assert arguments["config"] == {
        "batch_size": 4,
        "side_x": 64,
        "side_y": 32,
        "learning_rate": 1e-4,
        "use_fp16": False,
        "device": "cpu",
        "data_dir": "./data",
    }
    assert fake_wandb.run.logged == [(None, {"loss": 0.5}), (2, {"loss": 0.25})]


def test_the_real_wandb_records_offline_inside_the_run_folder(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("WANDB_MODE", "offline")
    write = wandb_log(tmp_path)
    write.log({"loss": 0.5, "bad": math.nan}, 1)
    write.log_images("samples", [Image.new("RGB", (4, 4))], ["a red bird"], 1)
    write.log({"loss": 0.25}, 2)
    write.close()
    assert not [r for r in caplog.records if r.name.startswith("glide_finetune")]
    [folder] = (tmp_path / "wandb").glob("offline-run-*")
    run_id = (tmp_path / "wandb_id.txt").read_text()
    assert (folder / f"run-{run_id}.wandb").stat().st_size > 0
    assert len(list(folder.rglob("*.png"))) == 1
