"""What all programs do alike: how they tell errors, and with which status they end."""

import contextlib
import errno
import io
import multiprocessing
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from glide_finetune import generate, noisy_clip_finetune, prepare, programs
from glide_finetune.bad_steps import TrainingDiverged
from glide_finetune.config import ConfigError, TrainConfig
from glide_finetune.memory import OutOfMemory
from glide_finetune.noisy_clip_config import ClipConfig
from glide_finetune.programs import run_program
from glide_finetune.stopping import ONE_PRESS, stopping_on_signals
from glide_text2im.download import DownloadError


def ending_with(error):
    """An action that fails."""

    def action():
        raise error

    return action


@pytest.mark.parametrize(
    ("main", "argv", "message"),
    [
        (generate.main, ["--promt", "a fox"], "no flag --promt; did you mean --prompt?"),
        (
            generate.main,
            ["--output_dir", "my", "fox"],
            "'fox' belongs to no flag; put quotes around",
        ),
        (prepare.main, ["--output_dir", "out", "--worker=2"], "did you mean --num_workers?"),
        (noisy_clip_finetune.main, ["--freeze_txt"], "did you mean --freeze_text?"),
    ],
)
def test_a_mistyped_flag_is_told_with_the_one_that_was_meant(main, argv, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(argv)
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_program_can_print_into_any_stream():
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert run_program("a.py", lambda: print("done") or 0) == 0
    assert out.getvalue() == "done\n"


LOGGING = """
import logging, sys
from tqdm import tqdm
from glide_finetune.programs import run_program
def action():
    logger = logging.getLogger('glide_finetune')
    with tqdm(total=2, disable=True):
        logger.warning('%d is no number', 'this')  # a mistake of ours
        logger.info('saved')
    return 143
sys.exit(run_program('a.py', action))
"""


@pytest.mark.parametrize("lost", ["closed", "unread", "full"])
def test_lines_that_nobody_reads_come_on_standard_error_and_end_nothing(lost):
    reading, writing = os.pipe()
    os.close(reading)
    redirect = {"closed": ">&-", "unread": f">&{writing}", "full": "> /dev/full"}[lost]
    both = redirect + " 2>&1" if lost != "closed" else ">&- 2>&-"
    for where, told in ((redirect, "saved"), (both, "")):
        command = f"exec {shlex.join([sys.executable, '-c', LOGGING])} {where}"
        done = subprocess.run(
            ["bash", "-c", command], check=False, capture_output=True, text=True,
            pass_fds=[writing],
        )  # fmt: skip
        assert done.returncode == 143
        assert done.stderr.splitlines()[-1:] == [told][: bool(told)]
    os.close(writing)


def test_what_is_opened_takes_the_place_of_no_closed_stream(tmp_path):
    """Or it would get what is written there by number."""
    script = """
import os, sys
from glide_finetune.programs import run_program
def action():
    with open(sys.argv[1], "w") as file:
        print("line", file=sys.stderr)
        print("caf\\udce9", file=sys.stderr)
        os.write(2, b"more")
        file.write(str(file.fileno()))
    return 0
sys.exit(run_program("a.py", action))
"""
    path = tmp_path / "file"
    command = f"exec {shlex.join([sys.executable, '-c', script, str(path)])} <&- >&- 2>&-"
    subprocess.run(["bash", "-c", command], check=True)
    assert int(path.read_text()) > 2


def test_lines_come_on_standard_output():
    done = subprocess.run(
        [sys.executable, "-c", LOGGING], check=False, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (143, "saved\n")


def test_an_action_that_ends_gives_the_status(capsys):
    assert run_program("a.py", lambda: 143) == 143
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        (ConfigError, 2),
        (ValueError, 1),
        (OSError, 1),
        (DownloadError, 1),
        (TrainingDiverged, 1),
        (OutOfMemory, 1),
    ],
)
def test_an_error_for_the_user_is_one_line(capsys, monkeypatch, kind, status):
    monkeypatch.delenv("GLIDE_TRACEBACK", raising=False)
    assert run_program("a.py", ending_with(kind("it is so"))) == status
    assert capsys.readouterr().err == "a.py: error: it is so\n"


def test_a_full_disk_is_told_with_what_to_do(capsys):
    assert run_program("a.py", ending_with(OSError(errno.ENOSPC, "No space left on device"))) == 1
    error = capsys.readouterr().err
    assert error.startswith("a.py: error: [Errno 28] No space left on device: free some, ")
    assert error.count("\n") == 1


def test_an_error_shows_where_it_comes_from_if_asked(capsys, monkeypatch):
    monkeypatch.setenv("GLIDE_TRACEBACK", "1")
    assert run_program("a.py", ending_with(OutOfMemory("it is so"))) == 1
    first, *_, last = capsys.readouterr().err.splitlines()
    assert first == "Traceback (most recent call last):"
    assert last == "a.py: error: it is so"


@pytest.mark.parametrize("error", [RuntimeError("a bug"), torch.OutOfMemoryError("bare")])
def test_other_errors_pass(error):
    with pytest.raises(type(error), match=str(error)):
        run_program("a.py", ending_with(error))


def test_an_import_that_fails_is_told_as_it_is(monkeypatch):
    monkeypatch.setitem(sys.modules, "glide_finetune.bad_steps", None)  # as torch cannot be again
    with pytest.raises(ImportError, match=r"libtorch\.so"):
        run_program("a.py", ending_with(ImportError("libtorch.so: cannot open")))


def test_a_ctrl_c_needs_no_traceback(capsys):
    assert run_program("a.py", ending_with(KeyboardInterrupt())) == 130
    assert run_program("b.py", ending_with(KeyboardInterrupt()), after_interrupt="go on") == 130
    assert capsys.readouterr().err == "a.py: interrupted\nb.py: interrupted; go on\n"


def test_a_ctrl_c_that_comes_twice_is_one(capsys, monkeypatch):
    def tell(line):
        signal.raise_signal(signal.SIGINT)  # the same one, passed on by a launcher
        print(line)

    monkeypatch.setattr(programs, "tell", tell)
    before = signal.getsignal(signal.SIGINT)
    assert run_program("a.py", ending_with(KeyboardInterrupt())) == 130
    assert capsys.readouterr().out == "a.py: interrupted\n"
    assert signal.getsignal(signal.SIGINT) is before


def test_after_ctrl_c_no_worker_is_waited_for():
    worker = multiprocessing.get_context("fork").Process(target=signal.pause)
    worker.start()
    assert run_program("a.py", ending_with(KeyboardInterrupt())) == 130
    worker.join()
    assert worker.exitcode == -signal.SIGKILL


def test_mistakes_are_told_without_torch():
    code = (
        "import sys; from glide_finetune.programs import run_program\n"
        "def fail(): raise ValueError('wrong')\n"
        "status = run_program('a.py', fail)\n"
        "sys.exit(status if 'torch' not in sys.modules else 9)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True)
    assert (done.returncode, done.stderr) == (1, b"a.py: error: wrong\n")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="this is of glibc")
def test_memory_that_is_freed_is_kept():
    code = (
        "import mmap, resource, torch; from glide_finetune.programs import run_program\n"
        "def pages_of(tensors):\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    for _ in range(tensors): torch.ones(2**24)\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "def show():\n"
        "    pages_of(10)\n"  # until there is room between what else is there
        "    print(pages_of(30) / (2**26 / mmap.PAGESIZE))\n"
        "run_program('a.py', show)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert float(done.stdout) < 3, "of 30 tensors"


def test_outside_of_the_main_thread_nobody_listens_to_signals():
    def listen():
        config = SimpleNamespace(config=TrainConfig(), stop_requested=False)
        with stopping_on_signals(config) as received:
            return received

    with ThreadPoolExecutor() as pool:
        assert pool.submit(listen).result() == []


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (TrainConfig(), "train_glide.py"),
        (ClipConfig(), "python -m glide_finetune.noisy_clip_finetune"),
    ],
)
def test_a_second_ctrl_c_leaves_in_the_name_of_the_program(capfd, monkeypatch, config, name):
    statuses = []
    monkeypatch.setattr(os, "_exit", statuses.append)
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with stopping_on_signals(SimpleNamespace(config=config, stop_requested=False)) as received:
        signal.raise_signal(signal.SIGINT)
        now += ONE_PRESS / 2
        signal.raise_signal(signal.SIGINT)  # the same one, passed on by a launcher
        assert statuses == []
        now += ONE_PRESS
        signal.raise_signal(signal.SIGINT)
    assert statuses == [130]
    assert received == [signal.SIGINT] * 3
    assert f"\n{name}: interrupted\n" in capfd.readouterr().err
