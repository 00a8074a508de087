"""Time and memory of a guided pass of sampling, beside those of the usual way.

    uv run python benchmarks/guided_pass.py                      # base, one picture
    uv run python benchmarks/guided_pass.py --batch_size 4

A pass with classifier-free guidance computes every picture twice, with and without its caption, in
one batch. The model is that of `training_step.py`, the naive way that of `naive_glide.py`; neither
encodes the captions anew in every pass.
"""

import argparse

import torch
from naive_glide import make_naive
from side_by_side import Measured, compare, repeated
from training_step import fill_zeros, random_batch

from glide_finetune.config import TrainConfig
from glide_finetune.devices import pick_device
from glide_finetune.evaluation import evaluation_mode
from glide_finetune.fp16_util import Precision
from glide_finetune.glide_util import load_model
from glide_finetune.guidance import guided
from glide_finetune.model_options import MODEL_PRESETS
from glide_finetune.programs import keep_freed_memory
from glide_finetune.sampling import text_cached

WAYS = {
    "naive": {"naive": True},
    "fp32": {},
    "bf16": {"precision": "bf16"},
    "fp16": {"precision": "fp16"},
}
GUIDANCE_SCALE = 4.0


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare passes of sampling with the usual way.")
    parser.add_argument("--preset", choices=MODEL_PRESETS, default="glide", help="size")
    parser.add_argument("--batch_size", type=int, default=1, help="pictures")
    parser.add_argument("--device", default="", help="(default: the best there is)")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["naive", "fp32", "bf16"])
    parser.add_argument("--passes", type=int, default=5, help="in each process, after the first")
    parser.add_argument("--rounds", type=int, default=1, help="processes of each way")
    args = parser.parse_args()
    compare(
        measure, WAYS, args.ways, args.rounds, preset=args.preset, batch_size=args.batch_size,
        device=pick_device(args.device), passes=args.passes,
    )  # fmt: skip


def measure(
    preset: str,
    batch_size: int,
    device: torch.device,
    passes: int,
    naive: bool = False,
    precision: str = "fp32",
) -> Measured:
    """Of so many passes."""
    config = TrainConfig(model_preset=preset, batch_size=batch_size)
    model, _, _ = load_model(init="scratch", model_options=config.options, device=device)
    fill_zeros(model)
    if naive:
        make_naive(model)
    else:
        keep_freed_memory()
    tokens, mask, images = (part.to(device) for part in random_batch(config))
    conditions = {
        "tokens": torch.cat([tokens, torch.zeros_like(tokens)]),
        "mask": torch.cat([mask, torch.zeros_like(mask)]),
    }
    timesteps = torch.full((batch_size,), 500, device=device)
    network = guided(model, GUIDANCE_SCALE)
    with evaluation_mode(model), text_cached(model), Precision(precision, device).autocast():
        return repeated(lambda: network(images, timesteps, **conditions), passes, device)


if __name__ == "__main__":
    main()
