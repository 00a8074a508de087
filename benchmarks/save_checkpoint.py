"""How long a checkpoint holds up training, compared with writing it before training goes on.

    uv run python benchmarks/save_checkpoint.py /tmp

Takes the full-size base model with AdamW's moments (4.6 GB as files), on the device that training
would take, and saves it some times to a folder in the one given: in the background, as the trainer
does, and at once. Prints the time until training could go on, of the first checkpoint, for which
memory has to be found, and the median of the others; and how many steps of a small loop of Python
and torch are made meanwhile, against those made while nothing is written. Deletes what it wrote.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from glide_finetune.checkpoint_writer import CheckpointWriter
from glide_finetune.checkpoints import save_checkpoint
from glide_finetune.devices import pick_device
from glide_finetune.glide_util import load_model
from glide_finetune.model_options import MODEL_PRESETS
from glide_finetune.optimization import make_optimizer


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure how long a checkpoint holds up training.")
    parser.add_argument("folder", type=Path, help="where to put the checkpoints")
    parser.add_argument(
        "--preset", choices=MODEL_PRESETS, default="glide", help="size of the model"
    )
    parser.add_argument("--device", default="", help="of the model (default: the best there is)")
    parser.add_argument("--repetitions", type=int, default=4, help="checkpoints of each way")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    checkpoint = make_checkpoint(args.preset, pick_device(args.device))

    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        writer = CheckpointWriter(Path(folder), keep=1)
        held_up, at_once, shares = [], [], []
        for step in range(1, args.repetitions + 1):
            at_once.append(
                seconds(lambda step=step: save_checkpoint(Path(folder), **checkpoint, step=step))
            )
            idle = steps_a_second(time.monotonic() + 2)
            held_up.append(seconds(lambda step=step: writer.save(**checkpoint, step=100 + step)))
            shares.append(steps_a_second(writer) / idle)
            assert writer.wait() is None
        size = sum(path.stat().st_size for path in Path(folder).iterdir()) / 1e9

    background, direct = statistics.median(held_up[1:]), statistics.median(at_once)
    print(f"{size:.2f} GB")
    print(f"written at once, training waits     {direct:6.2f} s")
    print(f"in the background, first checkpoint {held_up[0]:6.2f} s, {held_up[0] / direct:.2f} x")
    print(f"in the background, later ones       {background:6.2f} s, {background / direct:.2f} x")
    print(f"steps made while one is written: {statistics.median(shares):.0%} of those without")


def make_checkpoint(preset: str, device: torch.device) -> dict:
    """The arguments of `save_checkpoint`, without the step, after one step of training."""
    model, _, options = load_model(
        init="scratch", model_options=MODEL_PRESETS[preset]["base"], device=device
    )
    optimizer = make_optimizer(model, 1e-4, 0.0)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {
        "epoch": 0,
        "model_state": model.state_dict(),
        "ema_state": None,
        "training_state": {"optimizer": optimizer.state_dict()},
        "description": {"kind": "base", "model_options": options},
    }


def seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def steps_a_second(until: float | CheckpointWriter) -> float:
    """Of a loop as training has it, short operations of torch from Python, one thread."""
    x, count, start = torch.randn(64, 64), 0, time.perf_counter()
    while until.is_writing if isinstance(until, CheckpointWriter) else time.monotonic() < until:
        x @ x
        count += 1
    return count / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
