"""What a run will cost in memory, time and disk, in words, for --dry_run."""

import math
import shutil
from pathlib import Path

import torch

from glide_finetune.atomic_files import existing_part
from glide_finetune.checkpoint_writer import MOST_OF_MEMORY
from glide_finetune.config import TrainConfig
from glide_finetune.devices import pick_device
from glide_finetune.memory import OutOfMemory, available_memory, total_memory
from glide_finetune.planner import Measurement, Memory, forecast, measure

NAME_WIDTH = 30
FIGURE_WIDTH = 10

PARTS = {
    "weights": "weights",
    "gradients": "gradients",
    "moments": "moments of AdamW",
    "average": "averaged weights",
    "activations": "activations",
    "program": "the program itself",
}
REMARKS = {"activations": "what the peak takes beyond the rest"}


def report_cost(config: TrainConfig) -> None:
    """Forecast what the run will cost, make the first steps to measure it, and print both.

    Raises:
        ValueError, OSError: why training would stop, in one line.
        OutOfMemory: a step does not fit, or will not by the forecast; then none is made.
    """
    device = pick_device(config.device)
    print(
        f"\ncost: {config.model_type} model, batches of {config.batch_size} at "
        f"{config.image_width}x{config.image_height} in {config.precision} on {device}",
        flush=True,
    )
    expected = forecast(config, device)
    there, host = available_memory(device), available_memory(torch.device("cpu"))
    room = None if there is None else there + expected.program  # which is taken already
    if room is not None and expected.peak > room:
        _print_memory(expected, None, _room(device, room))
        _print_checkpoints(config, device, expected, host, None)
        raise OutOfMemory(
            f"a step will need about {gigabytes(expected.peak)} of memory, but "
            f"{gigabytes(room)} are there for it, so none was made. What helps most first: "
            + "; ".join(config.memory_advice)
        )
    print(
        f"  forecast: a peak of {gigabytes(expected.peak)}; now the first steps are made, and "
        "forgotten, to measure it (Ctrl-C leaves)",
        flush=True,
    )
    measured = measure(config, device)
    _print_memory(expected, measured.memory, _room(device, room))
    _print_time(config, measured)
    _print_checkpoints(config, device, expected, host, measured.total, measured.made)


def _print(name: str, *figures: str, remark: str = "") -> None:
    columns = "".join(f"{figure:>{FIGURE_WIDTH}}" for figure in figures)
    print(f"  {name:<{NAME_WIDTH}}{columns}  {remark}".rstrip())


# ------------------------------------------------------------------- memory
def _print_memory(expected: Memory, measured: Memory | None, room: str) -> None:
    """Both kinds of figures side by side, or the forecast alone."""
    kinds = [expected, *([measured] if measured else [])]
    _print("memory of a step", *["forecast", "measured"][: len(kinds)])
    for part, name in PARTS.items():
        if any(getattr(memory, part) for memory in kinds):
            figures = [gigabytes(getattr(memory, part)) for memory in kinds]
            _print(name, *figures, remark=REMARKS.get(part, ""))
    _print("peak", *[gigabytes(memory.peak) for memory in kinds], remark=room)


def _room(device: torch.device, room: int | None) -> str:
    """What there is for the peak."""
    total = total_memory(device)
    if room is None or total is None:
        return ""
    return f"of {gigabytes(total)} in all, {gigabytes(room)} of them available"


def gigabytes(count: int) -> str:
    """So many bytes, as a person reads them."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


# ------------------------------------------------------------------- time
def _print_time(config: TrainConfig, measured: Measurement) -> None:
    if not measured.seconds:
        _print("seconds a step", "unknown", remark="fp16 is still looking for its loss scale")
        return
    seconds = measured.seconds[-1]
    if len(measured.seconds) > 1:
        remark = f"of the second one; the first took {measured.seconds[0]:.3g}"
    else:
        remark = "of the first one, which also warms up; it was too long for a second"
    _print("seconds a step", f"{seconds:.3g}", remark=remark)
    if measured.total is None:
        _print(
            "steps", "unknown", remark="the shards do not tell how many samples they hold: "
            "give --max_steps or --wds_epoch_samples",
        )  # fmt: skip
        return
    left = max(0, measured.total - measured.made)
    made = f", {measured.made:,} of which are made" if measured.made else ""
    limit = f"{config.epochs} epochs" + (f", {config.max_steps:,} at most" * bool(config.max_steps))
    _print("steps", f"{left:,}", remark=f"{limit}{made}")
    remark = "beside samples, validation, checkpoints and waiting for data"
    _print("time for all of them", duration(left * seconds), remark=remark)


def duration(seconds: float) -> str:
    """The two largest units of a time."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if minutes < 60:
        return f"{minutes} min"
    if hours < 24:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{hours // 24} d {hours % 24} h"


# ------------------------------------------------------------------- checkpoints
def _print_checkpoints(
    config: TrainConfig,
    device: torch.device,
    memory: Memory,
    host: int | None,
    total: int | None,
    made: int = 0,
) -> None:
    """Their sizes and what of disk and main memory they need.

    Args:
        host: bytes of main memory that are available before there is a model.
        total, made: as in `kept_checkpoints`.
    """
    # those that train have as many bytes as their gradients, and are written in float32
    weights = memory.weights + (memory.gradients if config.low_memory else 0)
    files = {"weights": weights, "training state": memory.moments}
    if memory.average:
        files["averaged weights"] = weights
    size = sum(files.values())
    copied = size - (memory.gradients if config.low_memory else 0)
    parts = ", ".join(f"{name} {gigabytes(count)}" for name, count in files.items())
    _print("a checkpoint", gigabytes(size), remark=parts)

    folder = Path(config.checkpoints_dir).expanduser()
    free = shutil.disk_usage(existing_part(folder)).free
    count, words = kept_checkpoints(config, total, made)
    needed = count * size
    remark = f"{words}; {gigabytes(free)} are free in {folder}"
    if needed > free:
        remark += ", too little: lower --keep_checkpoints or give another --checkpoints_dir"
    _print("disk", gigabytes(needed), remark=remark)
    _print(
        "copies of a checkpoint",
        gigabytes(copied),
        remark=_on_copies(config, device, memory, copied, host),
    )


def kept_checkpoints(config: TrainConfig, total: int | None, made: int = 0) -> tuple[int, str]:
    """How many checkpoints to come lie on disk at a time at most, and that in words.

    Args:
        total: steps of the run; None if that is not known.
        made: those that are behind it.
    """
    kept = config.keep_checkpoints
    if total is not None:
        interval = config.save_checkpoint_interval
        written = math.ceil(total / interval) - made // interval if made < total else 0
        if not kept or written <= kept:
            return written, f"{written} checkpoint" + "s" * (written != 1)
    elif not kept:
        return 1, f"for one every {config.save_checkpoint_interval} steps, all of which are kept"
    return kept + 1, f"{kept} checkpoints, and one more while it is written"


def _on_copies(
    config: TrainConfig, device: torch.device, memory: Memory, size: int, host: int | None
) -> str:
    """What the copies of a checkpoint, which stay in main memory for the next one, will do."""
    text = "in main memory, from the first checkpoint on"
    if host is None:
        return text
    rest = 0  # of a step that main memory has to hold beside weights, moments and average
    if device.type != "cuda":
        host -= memory.weights + memory.moments + memory.average
        rest = memory.gradients + memory.activations
    if size >= MOST_OF_MEMORY * host:
        return "too much for main memory, so training waits while a checkpoint is written"
    if size + rest > host:
        return f"{text}, where a step may then no longer fit: {config.memory_advice[0]}"
    return text
