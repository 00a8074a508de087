"""Numbered run folders and what --resume_ckpt means."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from glide_finetune.folder_lock import locked
from glide_finetune.runs import (
    Start,
    create_run,
    interpret_resume,
    newest_run,
    read_args,
    write_args,
)

ROOT = Path(__file__).parent.parent


def test_runs_are_numbered_from_zero(tmp_path):
    folder = tmp_path / "not" / "there" / "yet"
    assert [create_run(folder).name for _ in range(3)] == ["0000", "0001", "0002"]


def test_the_newest_run_is_one_that_was_begun(tmp_path):
    runs = [create_run(tmp_path) for _ in range(4)]
    assert newest_run(tmp_path) is None
    for run in runs[:3]:
        write_args(run, {})
        assert newest_run(tmp_path) == run
    with locked(runs[3], "wait"):
        assert newest_run(tmp_path) == runs[2]
    assert create_run(tmp_path).name == "0004"


def test_a_folder_of_the_users_is_no_run_though_it_is_called_by_a_number(tmp_path):
    run = create_run(tmp_path)
    write_args(run, {})
    (tmp_path / "2024").mkdir()
    (tmp_path / "2024" / "draft.tmp").write_text("keep me")
    assert newest_run(tmp_path) == run
    assert create_run(tmp_path).name == "2025"


def test_folders_and_files_with_other_names_are_ignored(tmp_path):
    for name in ("samples", "64", "0003x", "-0009"):
        (tmp_path / name).mkdir()
    (tmp_path / "0007").write_text("a file")
    assert newest_run(tmp_path) is None
    assert create_run(tmp_path).name == "0000"


def test_a_file_with_the_next_number_is_stepped_over(tmp_path):
    (tmp_path / "0000").write_text("a file")
    assert create_run(tmp_path).name == "0001"


def test_the_numbers_go_on_after_9999(tmp_path):
    (tmp_path / "9999").mkdir()
    assert create_run(tmp_path).name == "10000"
    assert create_run(tmp_path).name == "10001"


def test_a_gap_is_not_filled(tmp_path):
    (tmp_path / "0005").mkdir()
    assert create_run(tmp_path).name == "0006"


CREATE_MANY = """
import sys
from glide_finetune.runs import create_run
print("ready", flush=True)
sys.stdin.readline()
print(*[create_run(sys.argv[1]).name for _ in range(100)])
"""


def test_processes_that_start_at_once_never_share_a_run(tmp_path):
    command = [sys.executable, "-c", CREATE_MANY, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, **pipes) for _ in range(4)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    names = [name for process in processes for name in process.communicate(timeout=60)[0].split()]
    assert sorted(names) == [f"{number:04d}" for number in range(400)]


def test_a_checkpoints_folder_that_is_a_file_is_named_in_one_line(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(ValueError, match=rf"^[^\n]*{blocked}[^\n]*--checkpoints_dir[^\n]*$"):
        create_run(blocked)


def test_nothing_to_resume_is_a_fresh_start(tmp_path):
    assert interpret_resume("", tmp_path) == Start()
    assert interpret_resume("auto", tmp_path / "missing") == Start()
    assert interpret_resume("auto", tmp_path) == Start()


def test_auto_goes_on_in_the_newest_run(tmp_path):
    create_run(tmp_path)
    newest = create_run(tmp_path)
    write_args(newest, {})
    assert interpret_resume("auto", tmp_path) == Start(run_folder=newest)


def test_a_run_folder_is_gone_on_in_wherever_it_lies(tmp_path):
    run = create_run(tmp_path / "elsewhere")
    write_args(run, {"seed": 1})
    assert interpret_resume(str(run), tmp_path / "checkpoints") == Start(run_folder=run)


def test_a_file_starts_a_new_run(tmp_path):
    weights = tmp_path / "base.pt"
    weights.write_bytes(b"weights")
    assert interpret_resume(str(weights), tmp_path) == Start(weights=weights)


def test_a_path_that_does_not_exist_is_an_error_in_one_line(tmp_path):
    missing = str(tmp_path / "missing.pt")
    with pytest.raises(ValueError, match=rf"^--resume_ckpt {missing}: no such file[^\n]*$"):
        interpret_resume(missing, tmp_path)


def test_the_folder_of_all_runs_is_no_run_and_the_newest_is_named(tmp_path):
    newest = create_run(tmp_path)
    write_args(newest, {})
    with pytest.raises(ValueError, match=rf"no run folder.*{newest}$"):
        interpret_resume(str(tmp_path), tmp_path)


def test_args_come_back_from_the_folder_and_from_the_file(tmp_path):
    args = {"prompt": "ein Vogel über dem See", "betas": [0.9, 0.999], "wds": False, "cap": None}
    path = write_args(tmp_path, {**args, "data_dir": Path("data")})
    assert path.name == "args.json"
    assert read_args(tmp_path) == read_args(path) == {**args, "data_dir": "data"}


@pytest.mark.parametrize("content", ["", "{", "[1]", b"\xff\xfe"])
def test_args_that_are_no_settings_are_an_error_in_one_line(tmp_path, content):
    path = tmp_path / "args.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=rf"^{path} [^\n]*$"):
        read_args(path)


def test_missing_args_are_an_error_in_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"args\.json does not exist$"):
        read_args(tmp_path)


def test_runs_need_no_torch():
    code = "import sys, glide_finetune.runs; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_run_is_locked_once_and_free_again_afterwards(tmp_path):
    held = "import pathlib, sys; from glide_finetune.folder_lock import locked\n"
    held += "with locked(pathlib.Path(sys.argv[1]), 'wait'): print('held')"
    other = [sys.executable, "-c", held, str(tmp_path)]
    with locked(tmp_path, "wait"):
        refused = subprocess.run(other, capture_output=True, text=True, cwd=ROOT)
        assert refused.returncode == 1
        last_line = refused.stderr.splitlines()[-1]
        assert last_line.startswith(
            f"ValueError: {tmp_path} is in use by process {os.getpid()} on "
        )
    assert subprocess.run(other, capture_output=True, cwd=ROOT).stdout == b"held\n"
