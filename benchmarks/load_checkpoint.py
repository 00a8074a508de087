"""How long a checkpoint takes to load, compared with reading its bytes.

    uv run python benchmarks/load_checkpoint.py /tmp

Writes a checkpoint of the full-size base model (1.5 GB) into the folder, measures reading the file
into memory and `load_model` on it in alternation, prints both medians and their ratio, and deletes
the file. Both find it in the page cache, as it was just written.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from glide_finetune.glide_util import load_model
from glide_finetune.model_options import MODEL_PRESETS

REPETITIONS = 5


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Compare the time to load a checkpoint with that to read its bytes."
    )
    parser.add_argument("folder", type=Path, help="where to put the temporary file")
    parser.add_argument(
        "--preset", choices=MODEL_PRESETS, default="glide", help="size of the model"
    )
    args = parser.parse_args()
    options = MODEL_PRESETS[args.preset]["base"]
    args.folder.mkdir(parents=True, exist_ok=True)

    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        path = Path(folder, "base.pt")
        model, _, _ = load_model(init="scratch", model_options=options)
        with open(path, "wb") as file:
            torch.save(model.state_dict(), file)
            file.flush()
            os.fsync(file.fileno())  # or the disk would still be busy with it while we measure
        del model
        reading, loading = [], []
        for _ in range(REPETITIONS):
            reading.append(seconds(path.read_bytes))
            loading.append(seconds(lambda: load_model(str(path), model_options=options)))
        size = path.stat().st_size

    read, load = statistics.median(reading), statistics.median(loading)
    print(f"{size / 1e9:.2f} GB: read in {read:.2f} s, loaded in {load:.2f} s, {load / read:.2f} x")
    print(f"the first load of the process, with all that torch imports for it: {loading[0]:.2f} s")


def seconds(action: Callable[[], object]) -> float:
    """How long the action takes; what it returns is freed afterwards, outside of the time."""
    start = time.perf_counter()
    result = action()
    end = time.perf_counter()
    del result
    return end - start


if __name__ == "__main__":
    main()
