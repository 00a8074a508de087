"""What moves the weights: AdamW, its learning rate over time, and which parameters are frozen."""

import math

import torch
from torch import nn

# Everything that reads the caption. The layers inside the UNet's attention blocks that look at the
# encoded caption (encoder_kv) belong to the UNet.
TEXT_PARTS = (
    "transformer.",
    "final_ln.",
    "token_embedding.",
    "transformer_proj.",
    "positional_embedding",
    "padding_embedding",
)


def freeze(model: nn.Module, *, transformer: bool, diffusion: bool) -> None:
    """Let a GLIDE model train only the parts that are not frozen.

    Args:
        model: one of the GLIDE networks; `requires_grad` of all its parameters is set.
        transformer: freeze every parameter of the text encoder.
        diffusion: freeze every parameter of the UNet.

    Raises:
        ValueError: both, which leaves nothing to train.
    """
    if transformer and diffusion:
        raise ValueError("freezing both the transformer and the diffusion leaves nothing to train")
    for name, parameter in model.named_parameters():
        frozen = transformer if name.startswith(TEXT_PARTS) else diffusion
        parameter.requires_grad_(not frozen)


def make_optimizer(
    model: nn.Module, learning_rate: float, weight_decay: float
) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019) over the parameters of `model` that train."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    fused = trainable[0].device.type in ("cpu", "cuda")
    return torch.optim.AdamW(
        trainable, lr=learning_rate, weight_decay=weight_decay, fused=fused or None
    )


def learning_rate_factor(step: int, schedule: str, warmup_steps: int, total_steps: int) -> float:
    """What the learning rate is multiplied by in optimizer step `step`, counted from 0.

    Args:
        step: number of optimizer steps made before.
        schedule: constant, or cosine, which falls from 1 at the end of the warm-up to 0 after
            `total_steps`.
        warmup_steps: steps of the linear rise at the start.
        total_steps: length of the run; unused by constant.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
