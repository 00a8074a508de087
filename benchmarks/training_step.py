"""Time and memory of a training step, beside those of the usual way to train GLIDE.

    uv run python benchmarks/training_step.py                          # base, batch 4
    uv run python benchmarks/training_step.py --kind upsample --batch_size 1
    uv run python benchmarks/training_step.py --preset small --ways naive fp32-compiled

Full-size models take seconds to half a minute a step on a CPU. The model has random weights, and
none that are zero, so that all gradients are worth computing; images and captions are random. The
naive way is that of `naive_glide.py`, with nothing but losses, gradients and optimizer; ours is
`Trainer.train_step`, with all that a run does in every step. `first one` is the time of the first
step, which compiles, finds memory and chooses kernels.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from naive_glide import make_naive, naive_optimizer
from side_by_side import Measured, compare, repeated

from glide_finetune.batch_losses import batch_losses
from glide_finetune.config import TrainConfig
from glide_finetune.devices import pick_device
from glide_finetune.fp16_util import keep_in_bf16
from glide_finetune.glide_util import load_model
from glide_finetune.model_options import MODEL_PRESETS
from glide_finetune.optimization import make_optimizer
from glide_finetune.programs import keep_freed_memory
from glide_finetune.trainer import Trainer

WAYS: dict[str, dict[str, Any]] = {
    "naive": {"naive": True},
    "fp32": {},
    "bf16": {"precision": "bf16"},
    "fp32-compiled": {"compile": True},
    "bf16-compiled": {"precision": "bf16", "compile": True},
    "bf16-low-memory": {"precision": "bf16", "low_memory": True},
    "fp32-checkpointing": {"activation_checkpointing": True},
    "bf16-checkpointing": {"precision": "bf16", "activation_checkpointing": True},
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare training steps with the usual way.")
    parser.add_argument("--kind", choices=("base", "upsample"), default="base")
    parser.add_argument("--preset", choices=MODEL_PRESETS, default="glide", help="size")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--device", default="", help="(default: the best there is)")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["naive", "fp32", "bf16"])
    parser.add_argument("--steps", type=int, default=3, help="in each process, after the first")
    parser.add_argument("--rounds", type=int, default=1, help="processes of each way")
    args = parser.parse_args()
    compare(
        measure, WAYS, args.ways, args.rounds, kind=args.kind, preset=args.preset,
        batch_size=args.batch_size, device=pick_device(args.device), steps=args.steps,
    )  # fmt: skip


def measure(steps: int, device: torch.device, **what: Any) -> Measured:
    """Of so many steps; `what` is for `prepare_step`."""
    return repeated(prepare_step(device=device, **what), steps, device)


def prepare_step(
    kind: str,
    preset: str,
    batch_size: int,
    device: torch.device,
    naive: bool = False,
    **settings: Any,
) -> Callable[[], object]:
    """A function that makes one step; `settings` are those of `TrainConfig`."""
    config = TrainConfig(
        train_upsample=kind == "upsample",
        model_preset=preset,
        batch_size=batch_size,
        learning_rate=1e-5,
        **settings,
    )
    model, diffusion, options = load_model(
        init="scratch",
        model_type=kind,
        model_options=config.options,
        activation_checkpointing=config.activation_checkpointing,
        device=device,
    )
    fill_zeros(model)
    model.train()
    batch = random_batch(config)
    if naive:
        make_naive(model)
        optimizer = naive_optimizer(model, config.learning_rate)

        def step() -> None:
            losses, _ = batch_losses(model, diffusion, batch, device)
            losses.loss.mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step
    keep_freed_memory()
    if config.low_memory:
        keep_in_bf16(model)
    optimizer = make_optimizer(model, config.learning_rate, config.adam_weight_decay)
    trainer = Trainer(model, diffusion, optimizer, config, options=options, device=device)
    return lambda: trainer.train_step([batch])


def fill_zeros(model: torch.nn.Module) -> None:
    """Give values to layers that start as zeros, behind which nothing would have a gradient."""
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)


def random_batch(config: TrainConfig) -> list[torch.Tensor]:
    """As a loader gives it."""
    size, length = config.batch_size, config.options["text_ctx"]
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 50000, (size, length), generator=generator)
    mask = torch.arange(length).expand(size, -1) < 20
    sides = (config.image_height, config.image_width)
    images = torch.rand((size, 3, *sides), generator=generator) * 2 - 1
    if not config.train_upsample:
        return [tokens, mask, images]
    return [tokens, mask, torch.nn.functional.avg_pool2d(images, config.scale), images]


if __name__ == "__main__":
    main()
