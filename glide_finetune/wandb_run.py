"""One run in Weights & Biases that can neither stop nor slow training.

All calls to wandb happen in a thread that takes them from a queue. If wandb fails, it is off for
the rest of the run, with one warning; if it hangs, calls beyond the queue's size are dropped.
"""

import contextlib
import logging
import os
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

logger = logging.getLogger(__name__)

INIT_SECONDS = 60  # to reach the server
FINISH_SECONDS = 60  # to upload the rest at the end; it stays on disk for `wandb sync` anyway
SILENT_SECONDS = 3  # of those that are not told
QUEUE_LIMIT = 10_000
MOST_OF_A_REASON = 200  # letters


class WandbRun:
    """A run of `project`, its local files in `folder`/wandb.

    run_id: an id that may have been used before, which continues that run. WANDB_MODE is honoured;
    "disabled" does not even import wandb. Without it the run is offline where there is no login, or
    no way to the server.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        project: str,
        config: Mapping[str, Any] | None = None,
        run_id: str | None = None,
    ) -> None:
        self._init_arguments = {
            "dir": str(folder),
            "project": project,
            "config": dict(config or {}),
            "id": run_id,
            "resume": "allow",
        }
        self._calls: queue.Queue[Callable[[Any], None] | None] = queue.Queue(QUEUE_LIMIT)
        self._thread: threading.Thread | None = None
        if os.environ.get("WANDB_MODE") == "disabled":
            return
        # wandb's reports on itself would hold up the exit where its server does not answer.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        try:
            # Here, not in the thread: a data worker forked in mid-import would inherit its locks.
            import wandb
        except Exception as error:
            warn_of_failure(error)
            return
        Path(folder).mkdir(parents=True, exist_ok=True)  # else wandb writes to a temporary folder
        self._thread = threading.Thread(target=self._work, args=(wandb,), name="wandb", daemon=True)
        self._thread.start()

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Send numbers; those of a step that wandb already has are left out."""
        metrics = dict(metrics)
        self._put(lambda run: run.log(metrics, step=step), step)

    def log_images(
        self,
        name: str,
        images: Sequence[Image.Image | str | Path],
        captions: Sequence[str],
        step: int,
    ) -> None:
        """Send pictures, or the files they are in, with one caption each."""
        self._put(lambda run: run.log({name: wandb_images(images, captions)}, step=step), step)

    def finish(self) -> None:
        """Upload what is left, for a limited time; nothing can be logged afterwards."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        try:
            self._calls.put_nowait(None)
            thread.join(SILENT_SECONDS)
            if thread.is_alive():
                logger.info("waiting for wandb, %d seconds at most", FINISH_SECONDS)
            thread.join(FINISH_SECONDS + 5)  # wandb's own limit comes first
        except queue.Full:
            pass
        if thread.is_alive():
            logger.warning("wandb did not finish in time; its local files stay in the run folder")

    def _put(self, call: Callable[[Any], None], step: int) -> None:
        if self._thread is None:
            return
        if not self._thread.is_alive():  # it has warned
            self._thread = None
            return
        try:
            self._calls.put_nowait(lambda run: _log_forward(run, call, step))
        except queue.Full:
            self._thread = None
            logger.warning("wandb does not keep up and is off from step %s on", step)

    def _work(self, wandb: Any) -> None:
        try:
            # Not before the first figures, when the data workers are there: one that is forked
            # while wandb starts a process keeps the pipe open at whose end wandb waits for ever.
            call = self._calls.get()
            run = start(wandb, self._init_arguments)
            while call is not None:
                call(run)
                call = self._calls.get()
            run.finish()
        except Exception as error:
            warn_of_failure(error)
            with contextlib.suppress(Exception):
                wandb.teardown()  # here, since at exit it would wait for the server


def start(wandb: Any, arguments: Mapping[str, Any]) -> Any:
    """A run of the module `wandb`, made by `wandb.init` with these arguments, which records offline
    where there is no login, or no way to the server. Raises what wandb raises."""
    settings = wandb.Settings(
        init_timeout=INIT_SECONDS, finish_timeout=FINISH_SECONDS, silent=True, console="off"
    )
    arguments = dict(arguments, settings=settings)
    wandb.setup(settings=wandb.Settings(silent=True))
    has_login = "WANDB_MODE" in os.environ or wandb.login(prompt=False, verify=False)
    if not has_login:
        arguments["mode"] = "offline"
    why_offline = "" if has_login else "wandb has no login"
    try:
        run = wandb.init(**arguments)
    except wandb.errors.CommError:  # as on a cluster's node
        if "WANDB_MODE" in os.environ:
            raise
        why_offline = "wandb's server cannot be reached"
        wandb.teardown()  # of what holds the run's id
        wandb.setup(settings=wandb.Settings(silent=True))
        run = wandb.init(**arguments, mode="offline")
    if why_offline:
        logger.warning(
            "%s, so this run is recorded offline; to upload it: wandb sync %s",
            why_offline, run.settings.sync_dir,
        )  # fmt: skip
    elif not run.offline:
        logger.info("wandb: %s", run.url)
    return run


def warn_of_failure(error: Exception) -> None:
    """Say in one line that wandb is not used any more."""
    reason = " ".join(str(error).split())[:MOST_OF_A_REASON]
    logger.warning("wandb is off for this run (%s: %s)", type(error).__name__, reason)


def wandb_images(images: Sequence[Image.Image | str | Path], captions: Sequence[str]) -> list:
    """Pictures, or the files they are in, with one caption each, as `wandb.Image` objects."""
    import wandb

    return [
        wandb.Image(str(image) if isinstance(image, Path) else image, caption=caption)
        for image, caption in zip(images, captions, strict=True)
    ]


def _log_forward(run: Any, call: Callable[[Any], None], step: int) -> None:
    """Leave out steps before the one wandb is at: a resumed run sends them a second time."""
    if step >= run.step:
        call(run)
