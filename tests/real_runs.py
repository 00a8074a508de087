"""train_glide.py in processes of its own, on data that is made here."""

import io
import json
import os
import shlex
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import torch
from PIL import Image

from glide_finetune.metrics import read_metrics

ROOT = Path(__file__).parent.parent
SMALL_MODEL = shlex.split(
    "--model_preset tiny --init scratch --model_options xf_width=16 text_ctx=16 "
    "--side_x 8 --side_y 8 --device cpu --num_workers 0"
)
# Metrics that differ from machine to machine.
NOT_OF_THE_RUN = ("images_per_second", "data/wait_share", "memory_gb")


def make_data(folder: Path) -> Path:
    """Fill a folder with a data folder and the same data as a shard; returns it."""
    (folder / "data").mkdir()
    (folder / "tars").mkdir()
    with tarfile.open(folder / "tars" / "0.tar", "w") as tar:
        for index in range(11):
            picture = Image.effect_noise((20 + index, 24), 80).convert("RGB")
            picture.putpixel((0, 0), (index, 0, 0))
            caption = f"patch {index}\nthe patch of number {index}\n"
            metadata = {"similarity": 0.3, "NSFW": "UNLIKELY", "width": 20 + index, "height": 24}
            picture.save(folder / "data" / f"{index}.png")
            (folder / "data" / f"{index}.txt").write_text(caption)
            image = io.BytesIO()
            picture.save(image, "jpeg")
            for suffix, content in (
                ("jpg", image.getvalue()),
                ("txt", caption.encode()),
                ("json", json.dumps(metadata).encode()),
            ):
                member = tarfile.TarInfo(f"{index:03d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return folder


def start(place: Path, *argv: str, **keywords) -> subprocess.Popen:
    """train_glide.py in a process of its own; `keywords` go to `Popen`."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train_glide.py"), *argv],
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | keywords, text=True, cwd=place,
        env=os.environ | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"},
    )  # fmt: skip


def train(place: Path, *argv: str) -> str:
    """Train in a process of its own; returns what it printed."""
    process = start(place, *argv)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out


def wait_for_steps(run: Path, count: int, process: subprocess.Popen) -> None:
    """Until the metrics of `count` steps are written."""
    metrics = run / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < count:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def load(path: Path):
    return torch.load(path, weights_only=True)


def assert_same(first, second) -> None:
    """Bit for bit, through dicts and lists."""
    assert type(first) is type(second)
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second)
    elif isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_same(first[key], second[key])
    elif isinstance(first, list | tuple):
        assert len(first) == len(second)
        for a, b in zip(first, second, strict=True):
            assert_same(a, b)
    else:
        assert first == second


def history(run: Path) -> list[dict]:
    """The metrics of a run that follow from its settings alone."""
    return [
        {name: value for name, value in line.items() if name not in NOT_OF_THE_RUN}
        for line in read_metrics(run)
    ]
