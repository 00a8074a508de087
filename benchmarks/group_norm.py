"""Time of the group norms of a training step, beside the same as torch's operators.

    uv run python benchmarks/group_norm.py                      # base, batch 4
    uv run python benchmarks/group_norm.py --dtype bfloat16

All norms of the model are made by themselves, forward and backward, on a CPU: by the kernel, by the
operators that other devices take, and the naive way, torch's group norm of images in the default
memory layout and then a SiLU.
"""

import argparse
from collections import Counter
from collections.abc import Callable
from unittest.mock import patch

import torch
from naive_glide import group_norm
from side_by_side import Measured, compare, repeated
from torch import Tensor
from training_step import random_batch

from glide_finetune.config import TrainConfig
from glide_finetune.model_options import MODEL_PRESETS
from glide_text2im import norm
from glide_text2im.model_creation import create_model_and_diffusion

WAYS = {"naive": {"way": "naive"}, "operators": {"way": "operators"}, "kernel": {"way": "kernel"}}


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare group norms with torch's operators.")
    parser.add_argument("--preset", choices=MODEL_PRESETS, default="glide", help="size")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--passes", type=int, default=5, help="in each process, after the first")
    parser.add_argument("--rounds", type=int, default=1, help="processes of each way")
    args = parser.parse_args()
    compare(
        measure, WAYS, list(WAYS), args.rounds, preset=args.preset, batch_size=args.batch_size,
        dtype=args.dtype, passes=args.passes,
    )  # fmt: skip


def measure(preset: str, batch_size: int, dtype: str, passes: int, way: str) -> Measured:
    """Of so many passes through all norms."""
    config = TrainConfig(model_preset=preset, batch_size=batch_size)
    memory_format = torch.contiguous_format if way == "naive" else torch.channels_last
    calls = []
    for (shape, silu), times in norms_of(config).items():
        images, grad = torch.randn(2, *shape).to(getattr(torch, dtype)).unbind()
        images, grad = (part.contiguous(memory_format=memory_format) for part in (images, grad))
        layer = norm.GroupNorm(shape[1], silu=silu)
        leaves = [images.requires_grad_(), layer.weight, layer.bias]
        calls += [(layer, leaves, grad)] * times

    def all_norms() -> None:
        for layer, leaves, grad in calls:
            out = naive(layer, leaves[0]) if way == "naive" else layer(leaves[0])
            torch.autograd.grad(out, leaves, grad)

    with patch.object(norm, "_has_kernel", return_value=way == "kernel"):
        return repeated(all_norms, passes, torch.device("cpu"))


def naive(layer: norm.GroupNorm, images: Tensor) -> Tensor:
    """In float32, as autocast has it."""
    return group_norm(layer, images.float()).to(images.dtype)


def norms_of(config: TrainConfig) -> Counter[tuple[torch.Size, bool]]:
    """How many there are of images of each shape, with and without SiLU."""
    found: Counter[tuple[torch.Size, bool]] = Counter()

    def counter(silu: bool) -> Callable[..., None]:
        return lambda _, given, __: found.update([(given[0].shape, silu)])

    with torch.device("meta"):
        model, _ = create_model_and_diffusion(**config.options)
    for module in model.modules():
        if isinstance(module, norm.GroupNorm):
            module.register_forward_hook(counter(module.silu))
    tokens, mask, images = (part.to("meta") for part in random_batch(config))
    model(images, torch.zeros(len(images), device="meta"), tokens=tokens, mask=mask)
    return found


if __name__ == "__main__":
    main()
