"""The checkpoints of a run: their files, when one is whole, saving, finding and deleting them.

A checkpoint at (epoch, step) of a run is these files in its folder, written in this order:

    glide-ft-{epoch}x{step}.pt          weights, see weights.py
    glide-ft-{epoch}x{step}-ema.pt      averaged weights, if the run keeps them
    training-state-{epoch}x{step}.pt    what resuming needs beside the weights
    glide-ft-{epoch}x{step}.json        what all this is, with the sizes of the files above

Each file appears whole or not at all. The description comes last and goes first, so a checkpoint
is whole exactly if it is there and the files that it names have the sizes that it gives.
"""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glide_finetune.atomic_files import atomic_file, read_json, sync_folder, write_json_atomic
from glide_finetune.weights import (
    DamagedFileError,
    check_bytes,
    host_tensor,
    read_tensor_file,
    write_weights,
)

logger = logging.getLogger(__name__)

MUCH_TO_READ = 1e9  # bytes; from there on it is told

_NAMES = {
    "weights": "glide-ft-{}x{}.pt",
    "ema": "glide-ft-{}x{}-ema.pt",
    "training_state": "training-state-{}x{}.pt",
    "description": "glide-ft-{}x{}.json",
}
_PATTERNS = {
    role: re.compile(re.escape(name).replace(r"\{\}", "([0-9]+)")) for role, name in _NAMES.items()
}


@dataclass(frozen=True)
class CheckpointFiles:
    """The files of one checkpoint; None for those it does not have.

    epoch, step: from the file names, None if the weights file is called otherwise.
    """

    weights: Path
    ema: Path | None = None
    training_state: Path | None = None
    epoch: int | None = None
    step: int | None = None

    def check_bytes(
        self, *, with_ema: bool = True, with_training_state: bool = True, own: bool = False
    ) -> None:
        """`weights.check_bytes` of the files, but for those that are not asked for."""
        asked_for = (True, with_ema, with_training_state)
        files = (self.weights, self.ema, self.training_state)
        paths = [path for path, asked in zip(files, asked_for, strict=True) if path and asked]
        size = sum(path.stat().st_size for path in paths if path.exists())
        if size > MUCH_TO_READ:
            logger.info("looking at the %.1f GB of %s", size / 1e9, self.weights)
        for path in paths:
            check_bytes(path, own=own)


def save_checkpoint(
    run_folder: Path,
    *,
    epoch: int,
    step: int,
    model_state: Mapping[str, Tensor],
    ema_state: Mapping[str, Tensor] | None,
    training_state: Mapping[str, Any],
    description: Mapping[str, Any],
) -> Path:
    """Write one checkpoint, replacing one of the same epoch and step; returns the weights file.

    training_state: tensors, numbers, strings, None in dicts, lists and tuples (TypeError else).
    description: at least `kind` (base, upsample, …) and `model_options`; epoch, step and the files
    are added. OSError, in one line, if it cannot be written; other checkpoints stay as they are.
    """
    training_state = _plain_tree(training_state, "training_state")
    paths = _paths(run_folder, epoch, step)
    try:
        paths["description"].unlink(missing_ok=True)
        sync_folder(run_folder)
        write_weights(paths["weights"], model_state)
        if ema_state is None:
            paths["ema"].unlink(missing_ok=True)
        else:
            write_weights(paths["ema"], ema_state)
        with atomic_file(paths["training_state"]) as file:
            torch.save(training_state, file)
        files = {
            role: {"name": path.name, "bytes": path.stat().st_size}
            for role, path in paths.items()
            if path.exists()
        }
        content = {**description, "epoch": epoch, "step": step, "files": files}
        write_json_atomic(paths["description"], content)
    except (OSError, RuntimeError) as error:  # RuntimeError: torch.save on a full disk
        cause = error if isinstance(error, OSError) else error.__context__ or error
        raise OSError(
            f"the checkpoint of step {step} could not be written to {run_folder} ({cause}): free "
            "some disk space or keep fewer checkpoints; older checkpoints are unharmed"
        ) from error
    return paths["weights"]


def newest_checkpoint(run_folder: Path) -> CheckpointFiles | None:
    """The whole checkpoint with the highest step; None if the run has none."""
    return max(_whole_checkpoints(run_folder), key=_age, default=None)


def newest_to_go_on_from(run_folder: Path) -> tuple[CheckpointFiles | None, dict[Path, str]]:
    """The newest checkpoint that is whole to the last byte, and what is wrong with newer ones, by
    their weights files, oldest first."""
    damaged = damaged_checkpoints(run_folder)
    for files in sorted(_whole_checkpoints(run_folder), key=_age, reverse=True):
        try:
            files.check_bytes(own=True)
        except DamagedFileError as error:
            damaged = {files.weights: str(error)} | damaged
        else:
            return files, damaged
    return None, damaged


def damaged_checkpoints(run_folder: Path) -> dict[Path, str]:
    """The weights files of checkpoints that were whole once and are newer than the newest that is,
    oldest first, each with what its checkpoint lacks.

    One that was never finished is none of them: a process killed in mid-write leaves such a one.
    """
    newest = newest_checkpoint(run_folder)
    found, undescribed = {}, {}
    for path in run_folder.iterdir():
        for role in ("weights", "description"):
            if match := _PATTERNS[role].fullmatch(path.name):
                epoch, step = int(match[1]), int(match[2])
                paths = _paths(run_folder, epoch, step)
                if newest and (step, epoch) <= _age(newest):
                    continue
                if paths["description"].exists():
                    found[step, epoch] = paths["weights"], _damage(paths["description"])
                else:
                    undescribed[step, epoch] = (
                        paths["weights"],
                        f"{paths['description'].name} is missing",
                    )
    if undescribed:
        del undescribed[max(undescribed)]
    return dict(checkpoint for _, checkpoint in sorted((found | undescribed).items()))


def delete_unfinished(run_folder: Path, epoch: int, step: int) -> None:
    """Delete what `save_checkpoint` has left of one that it could not write."""
    paths = _paths(run_folder, epoch, step)
    if not paths["description"].exists():
        for path in paths.values():
            path.unlink(missing_ok=True)


def files_beside(weights: Path) -> CheckpointFiles:
    """The checkpoint that a weights file belongs to, whole or not.

    The averaged weights have no training state: the optimizer's moments belong to the others.
    """
    for role in ("weights", "ema"):
        if match := _PATTERNS[role].fullmatch(weights.name):
            break
    else:
        return CheckpointFiles(weights)
    epoch, step = int(match[1]), int(match[2])
    paths = _paths(weights.parent, epoch, step)
    beside = {}
    if role == "weights":
        beside = {role: paths[role] for role in ("ema", "training_state") if paths[role].exists()}
    return CheckpointFiles(weights, epoch=epoch, step=step, **beside)


def read_training_state(path: Path) -> dict[str, Any]:
    """The training state in `path`, its tensors in memory, on the CPU; WeightsError if damaged."""
    return read_tensor_file(path, mmap=False)


def set_aside(weights: Path) -> None:
    """Have the checkpoint of a weights file no longer count as whole, if it looks so, since some of
    its bytes are wrong."""
    files = files_beside(weights)
    description = _paths(weights.parent, files.epoch, files.step)["description"]
    if _if_whole(description):
        description.replace(description.with_name(description.name + ".damaged"))


def prune(run_folder: Path, keep: int) -> None:
    """Delete what is older than the `keep` newest whole checkpoints; 0 keeps everything."""
    whole = sorted(_whole_checkpoints(run_folder), key=_age)
    if keep == 0 or not whole:
        return
    oldest_kept = _age(whole[-keep:][0])
    for role in ("description", "weights", "ema", "training_state"):
        # Descriptions first: a checkpoint that is half deleted must not look whole.
        for path in run_folder.iterdir():
            match = _PATTERNS[role].fullmatch(path.name)
            if match and (int(match[2]), int(match[1])) < oldest_kept:
                path.unlink(missing_ok=True)


def _paths(run_folder: Path, epoch: int, step: int) -> dict[str, Path]:
    return {role: run_folder / name.format(epoch, step) for role, name in _NAMES.items()}


def _age(files: CheckpointFiles) -> tuple[int, int]:
    return files.step, files.epoch


def _whole_checkpoints(run_folder: Path) -> list[CheckpointFiles]:
    found = []
    for path in run_folder.iterdir():
        if _PATTERNS["description"].fullmatch(path.name) and (files := _if_whole(path)):
            found.append(files)
    return found


def _if_whole(description_path: Path) -> CheckpointFiles | None:
    """The checkpoint of this description; None if a file is missing or has another size."""
    try:
        description = read_json(description_path)
        files = description["files"]
        paths = {role: description_path.with_name(file["name"]) for role, file in files.items()}
        sizes_fit = all(paths[role].stat().st_size == files[role]["bytes"] for role in files)
        step, epoch = int(description["step"]), int(description["epoch"])
        if sizes_fit:
            return CheckpointFiles(**paths, epoch=epoch, step=step)
    except (ValueError, TypeError, LookupError, AttributeError, OSError):
        pass  # cut off, edited by hand, or half deleted
    return None


def _damage(description_path: Path) -> str:
    """What is wrong with a checkpoint that is not whole."""
    try:
        files = read_json(description_path)["files"].values()
        for path, size in ((description_path.with_name(f["name"]), f["bytes"]) for f in files):
            if not path.exists():
                return f"{path.name} is missing"
            if path.stat().st_size != size:
                return f"{path.name} has {path.stat().st_size} bytes instead of {size}"
    except (ValueError, TypeError, LookupError, AttributeError, OSError):
        pass
    return f"{description_path.name} is damaged"


def _plain_tree(value: Any, where: str) -> Any:
    """`value` as torch.load reads it back with weights_only, its tensors on the CPU. They are
    copied only where they must: the moments of a whole model may be more than memory has room for.
    """
    if isinstance(value, Tensor):
        return host_tensor(value)
    if isinstance(value, Mapping):
        return {key: _plain_tree(item, f"{where}[{key!r}]") for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_plain_tree(item, f"{where}[{i}]") for i, item in enumerate(value))
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise TypeError(f"{where} is a {type(value).__name__}, which a training state cannot hold")
