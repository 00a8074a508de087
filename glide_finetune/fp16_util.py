"""The one place that decides in which precision a model computes.

Weights, gradients, optimizer and losses are float32, whatever the precision. `bf16` and `fp16` run
the forward and backward passes under autocast; fp16 also needs its loss scaled, so that small
gradients survive (Micikevicius et al. 2018, Mixed Precision Training).

Where memory is short, `keep_in_bf16` has the weights that train, and so their gradients and
moments, kept in bfloat16. The precision stays what it was: every layer converts its weights to the
dtype that it computes in, which without autocast is float32.
"""

import contextlib
from dataclasses import dataclass

import torch
from torch import nn

AUTOCAST_DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Precision:
    """How to compute on one kind of device.

    Args:
        name: fp32, bf16 or fp16.
        device: where the model computes.
    """

    name: str
    device: torch.device

    def autocast(self) -> contextlib.AbstractContextManager:
        """The context for forward passes and losses; the backward pass follows by itself."""
        dtype = AUTOCAST_DTYPES[self.name]
        if dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=dtype)

    def grad_scaler(self) -> torch.amp.GradScaler:
        """A loss scaler, which passes everything through unless the precision is fp16."""
        return torch.amp.GradScaler(self.device.type, enabled=self.name == "fp16")


def keep_in_bf16(model: nn.Module) -> None:
    """Round the parameters that train to bfloat16, in place, before an optimizer gets them.

    Frozen ones stay float32: they have neither gradients nor moments, and rounding would change for
    good what they compute.
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
