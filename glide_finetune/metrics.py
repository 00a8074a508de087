"""The figures of a run, through one object: metrics.jsonl and wandb."""

import contextlib
import json
import logging
import os
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from glide_finetune.atomic_files import atomic_file, valid_json
from glide_finetune.wandb_run import WandbRun, wandb_images, warn_of_failure

logger = logging.getLogger(__name__)

METRICS_NAME = "metrics.jsonl"
WANDB_ID_NAME = "wandb_id.txt"


class MetricsLog:
    """Figures by step, appended to metrics.jsonl in the run folder and handed to wandb.

    metrics.jsonl has one object a line: "step", then the metrics in the order given. NaN and
    infinities are the strings "NaN", "Infinity", "-Infinity"; `read_metrics` turns them back.

    run_folder: None makes an object that does nothing.
    resume_step: the step of the checkpoint that the run goes on from. Lines of later steps are
        dropped, since they come again; so everything of a step must be logged before its
        checkpoint is saved. None: the run begins, and so does the file.
    project, config: of the wandb run, whose id is kept in the run folder, so that a
        resumed run continues it. project None: no wandb.
    wandb_run: a run to log to instead, of `wandb_setup` or `wandb.init`; `close` leaves it open.
        If it raises, it gets nothing more, with one warning.
    """

    def __init__(
        self,
        run_folder: Path | None,
        *,
        resume_step: int | None = None,
        project: str | None = None,
        config: Mapping[str, Any] | None = None,
        wandb_run: Any = None,
    ) -> None:
        self._file = None
        self._unwritten = b""  # lines that a full disk has not taken yet
        self._disk_takes_lines = True
        self._wandb, self._owns_wandb = None, False
        if run_folder is None:
            return
        self._wandb = wandb_run
        path = run_folder / METRICS_NAME
        _rewind(path, resume_step)
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (closed by close)
        if project is not None:
            self._owns_wandb = True
            self._wandb = WandbRun(
                run_folder,
                project=project,
                config=valid_json(config or {}),
                run_id=_wandb_id(run_folder),
            )

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Record metrics (numbers, numpy or torch scalars, strings) of an optimizer step."""
        if self._file is None:
            return
        metrics = {
            name: value.item() if hasattr(value, "item") else value
            for name, value in metrics.items()
        }
        line = json.dumps(valid_json({"step": step, **metrics}), ensure_ascii=False)
        self._unwritten += (line + "\n").encode("utf-8", errors="backslashreplace")
        self._write_lines()
        self._send(lambda run: run.log(metrics, step))

    def sync(self) -> None:
        """Make the lines so far outlast a power cut, as the checkpoints after them do."""
        if self._file:
            self._write_lines()
            with contextlib.suppress(OSError):  # `_write_lines` has told of a full disk
                os.fsync(self._file.fileno())

    def log_images(
        self,
        name: str,
        images: Sequence[Image.Image | str | Path],
        captions: Sequence[str],
        step: int,
    ) -> None:
        """Show pictures, or the files they are in, with one caption each, in wandb."""
        if isinstance(self._wandb, WandbRun):
            self._wandb.log_images(name, images, captions, step)
        else:
            self._send(lambda run: run.log({name: wandb_images(images, captions)}, step))

    def close(self) -> None:
        """Close the file and finish the wandb run; waits for uploads, for a limited time."""
        if self._file:
            self._write_lines()
            self._file.close()
        if self._wandb and self._owns_wandb:
            self._wandb.finish()
        self._file = self._wandb = None

    def _write_lines(self) -> None:
        """Write what is not written yet, as much of it as the disk takes."""
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
            self._disk_takes_lines = True
        except OSError as error:
            if self._disk_takes_lines:
                logger.error(
                    "%s cannot be written (%s): free some disk space; training goes on, and the "
                    "lines follow once there is room", self._file.name, error.strerror,
                )  # fmt: skip
            self._disk_takes_lines = False

    def _send(self, call: Callable[[Any], None]) -> None:
        """Call wandb, which must not end training; `WandbRun` sees to that itself."""
        if self._wandb is None:
            return
        try:
            call(self._wandb)
        except Exception as error:
            self._wandb = None
            warn_of_failure(error)


def read_metrics(run_folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, NaN and infinities as numbers; unreadable lines are left out."""
    numbers = {text: float(text) for text in ("NaN", "Infinity", "-Infinity")}
    return [
        {
            name: numbers.get(value, value) if isinstance(value, str) else value
            for name, value in record.items()
        }
        for _, record in _lines(run_folder / METRICS_NAME)
    ]


def _lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """The readable lines with their content; a process killed in mid-write leaves a torn one."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and type(record.get("step")) is int:
            found.append((line, record))
    return found


def _rewind(path: Path, step: int | None) -> None:
    """Keep the lines up to `step`, none if it is None."""
    if not path.exists():
        return
    kept = [line for line, record in _lines(path) if step is not None and record["step"] <= step]
    with atomic_file(path) as file:
        file.write("".join(line + "\n" for line in kept).encode("utf-8"))


def _wandb_id(run_folder: Path) -> str:
    """The id of this run's wandb run, made once."""
    path = run_folder / WANDB_ID_NAME
    if path.exists():
        run_id = path.read_text(encoding="utf-8", errors="replace").strip()
        if re.fullmatch(r"[\w-]+", run_id, re.ASCII):  # else the file is damaged
            return run_id
    run_id = secrets.token_hex(4)
    with atomic_file(path) as file:
        file.write(run_id.encode("utf-8"))
    return run_id
