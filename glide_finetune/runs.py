"""Numbered run folders: making the next one, finding the newest, and what a resume starts from.

A run lives in `checkpoints_dir/0000`, `0001`, …; its settings are in `args.json`. Needs no torch.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glide_finetune.atomic_files import read_json, write_json_atomic

ARGS_NAME = "args.json"
_RUN_NAME = re.compile(r"[0-9]{4,}")


@dataclass(frozen=True)
class Start:
    """What `--resume_ckpt` means; at most one of the two is given. An `Origin` has the files that
    are found there.

    run_folder: go on in this folder from its newest checkpoint (from its beginning if it has none).
    weights: make a new run that starts from this file, and from the training state beside it.
    """

    run_folder: Path | None = None
    weights: Path | None = None


def create_run(checkpoints_dir: str | Path) -> Path:
    """Make and return the next numbered folder; processes at the same time get different ones."""
    folder = Path(checkpoints_dir).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        number = max((int(run.name) for run in _runs(folder)), default=-1) + 1
        while True:
            run_folder = folder / f"{number:04d}"
            try:
                run_folder.mkdir()
            except FileExistsError:  # another process was faster, or it is a file
                number += 1
            else:
                return run_folder
    except OSError as error:
        raise ValueError(
            f"no run folder can be made in {folder} ({error.strerror}): "
            "give a folder that can be written as --checkpoints_dir"
        ) from None


def newest_run(checkpoints_dir: str | Path) -> Path | None:
    """The run folder with the highest number; None if there is none.

    It has its settings, without which nothing of value is written into it: it is the start of a run
    for which the disk was full then, or a folder of the user's, such as 2024.
    """
    folder = Path(checkpoints_dir).expanduser()
    begun = (run for run in _runs(folder) if (run / ARGS_NAME).is_file())
    return max(begun, key=lambda run: (int(run.name), run.name), default=None)


def _runs(folder: Path) -> list[Path]:
    paths = folder.iterdir() if folder.is_dir() else ()
    return [path for path in paths if _RUN_NAME.fullmatch(path.name) and path.is_dir()]


def interpret_resume(resume_ckpt: str, checkpoints_dir: str | Path) -> Start:
    """What `--resume_ckpt` means: nothing, "auto", a run folder, or a weights file.

    "auto" is the newest run, or a fresh start if there is none. ValueError, in one line, for a
    path that does not exist or a folder that is not a run.
    """
    if not resume_ckpt:
        return Start()
    if resume_ckpt == "auto":
        return Start(run_folder=newest_run(checkpoints_dir))
    path = Path(resume_ckpt).expanduser()
    if not path.exists():
        raise ValueError(
            f"--resume_ckpt {resume_ckpt}: no such file or folder; "
            'give a run folder, a weights file (.pt) or "auto"'
        )
    if not path.is_dir():
        return Start(weights=path)
    if (path / ARGS_NAME).is_file():
        return Start(run_folder=path)
    inside = newest_run(path)
    advice = f"the newest run in it is {inside}" if inside else "to use only weights, give the file"
    raise ValueError(
        f"--resume_ckpt {resume_ckpt}: no run folder, {ARGS_NAME} is missing; {advice}"
    )


def write_args(run_folder: Path, args: Mapping[str, Any]) -> Path:
    """Store the settings of a run; returns the file."""
    path = run_folder / ARGS_NAME
    write_json_atomic(path, args)
    return path


def read_args(path: str | Path) -> dict[str, Any]:
    """The settings in a run folder, or in a file like its args.json; ValueError without them."""
    path = Path(path).expanduser()
    return read_json(path / ARGS_NAME if path.is_dir() else path)
