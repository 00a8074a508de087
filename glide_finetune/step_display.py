"""What a person sees of the steps while a run trains: a bar, or lines where no bar can move."""

import logging
import sys
import time
from types import TracebackType
from typing import Any

from tqdm import tqdm

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 30
MUCH_WAITING = 0.05  # of the time, for data; from there on it is worth telling


class StepDisplay:
    """Shows steps, loss, images a second and the time left; a context manager.

    Where standard error is no terminal, such as in the log of a batch job, one aligned line every
    `SECONDS_BETWEEN_LINES` and one for the last step take the place of the bar. They are logged at
    the level INFO; where that is off, as in notebooks, there is the bar.

    Args:
        step: optimizer steps made before.
        total: those of the whole run; None if that is not known.
    """

    def __init__(self, step: int, total: int | None) -> None:
        self._total = total
        self._lines = not sys.stderr.isatty() and logger.isEnabledFor(logging.INFO)
        self._bar = tqdm(
            initial=step, total=total, unit="step", dynamic_ncols=True, smoothing=0.1,
            disable=self._lines,
        )  # fmt: skip
        self._first_step, self._started = step, time.monotonic()
        self._last_line = -float("inf")

    def __enter__(self) -> "StepDisplay":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.close()

    def show(self, step: int, metrics: dict[str, Any], *, is_last: bool = False) -> None:
        """Show that `step` is made, with these metrics."""
        self._bar.update(step - self._bar.n)  # 0 for a step that a resumed run reports again
        self._bar.set_postfix(
            epoch=metrics["epoch"], loss=f"{metrics['loss']:.4f}",
            images_s=f"{metrics['images_per_second']:.1f}",
        )  # fmt: skip
        now = time.monotonic()
        if self._lines and (is_last or now - self._last_line >= SECONDS_BETWEEN_LINES):
            self._last_line = now
            logger.info("%s", self._line(step, metrics, now))

    def _line(self, step: int, metrics: dict[str, Any], now: float) -> str:
        columns = [
            f"step {step:>7}" + (f"/{self._total}" if self._total else ""),
            f"loss {metrics['loss']:<8.4f}",
            f"grad_norm {metrics['grad_norm']:<8.3g}",
            f"lr {metrics['lr']:<8.2e}",
            f"images/s {metrics['images_per_second']:<6.1f}",
        ]
        waiting = metrics.get("data/wait_share", 0.0)
        if waiting >= MUCH_WAITING and step > self._first_step + 1:  # workers start in the first
            columns.append(f"waiting for data {waiting:.0%}")
        if self._total and step > self._first_step:
            seconds = (now - self._started) / (step - self._first_step) * (self._total - step)
            columns.append(f"left {tqdm.format_interval(seconds)}")
        return "  ".join(columns).rstrip()
