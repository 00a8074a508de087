"""From the command to the first training step, compared with reading the checkpoint and a step.

    uv run python benchmarks/start_up.py /tmp

Writes a checkpoint of the base model (full size: 1.5 GB) and a few pictures into the folder and
starts `train_glide.py` on them, as a user would. When the second line of its metrics is there, it
is killed, since what follows is writing checkpoints. The step is the second one; the file is read
in between. Everything is deleted at the end.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image

from glide_finetune.glide_util import load_model
from glide_finetune.model_options import MODEL_PRESETS

PROGRAM = Path(__file__).parents[1] / "train_glide.py"
PICTURES = 16


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Compare the time to the first step with reading the file and a step."
    )
    parser.add_argument("folder", type=Path, help="where to put the temporary files")
    parser.add_argument(
        "--preset", choices=MODEL_PRESETS, default="glide", help="size of the model"
    )
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        checkpoint = folder / "base.pt"
        model, _, _ = load_model(init="scratch", model_options=MODEL_PRESETS[args.preset]["base"])
        torch.save(model.state_dict(), checkpoint)
        del model
        for number in range(PICTURES):
            picture = folder / "data" / f"{number}.png"
            picture.parent.mkdir(exist_ok=True)
            Image.effect_noise((256, 256), 64).convert("RGB").save(picture)
            picture.with_suffix(".txt").write_text("noise")

        starts, reads, steps = [], [], []
        for number in range(args.rounds):
            started, step = train(folder, number, checkpoint, args)
            starts.append(started)
            steps.append(step)
            begin = time.perf_counter()
            checkpoint.read_bytes()
            reads.append(time.perf_counter() - begin)
            print(f"first step after {started:.1f} s; read {reads[-1]:.1f} s, step {step:.1f} s")
    start, read, step = map(statistics.median, (starts, reads, steps))
    print(
        f"medians: {start:.1f} s against {read:.1f} + {step:.1f} s: {start / (read + step):.2f} x"
    )


def train(
    folder: Path, number: int, checkpoint: Path, args: argparse.Namespace
) -> tuple[float, float]:
    """The seconds until the first step was made, and those of the second step."""
    runs = folder / f"runs-{number}"
    command = [
        sys.executable, PROGRAM, "--data_dir", folder / "data", "--checkpoints_dir", runs,
        "--resume_ckpt", checkpoint, "--model_preset", args.preset, "--precision", args.precision,
        "--batch_size", str(args.batch_size), "--log_frequency", "0",
    ]  # fmt: skip
    begin = time.perf_counter()
    process = subprocess.Popen(
        command,
        env={**os.environ, "WANDB_MODE": "disabled"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = runs / "0000" / "metrics.jsonl"
    seconds: list[float] = []
    while len(seconds) < 2:
        lines = metrics.read_text().count("\n") if metrics.exists() else 0
        seconds += [time.perf_counter() - begin] * (lines - len(seconds))
        if process.poll() is not None:
            sys.exit(f"the training ended before its second step:\n{process.stderr.read()}")
        time.sleep(0.02)
    process.kill()
    process.communicate()
    return seconds[0], seconds[1] - seconds[0]


if __name__ == "__main__":
    main()
