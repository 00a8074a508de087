"""How training computes in half precision: autocast, loss scaling, and weights kept in bf16.

In which dtype each layer computes then, `glide_text2im/nn.py` decides. Weights, gradients,
optimizer and losses are float32 unless `keep_in_bf16` is asked for. `bf16` and `fp16` run the
forward and backward passes under autocast; fp16 also needs its loss scaled, so that small
gradients survive (Micikevicius et al. 2018, Mixed Precision Training). On CUDA, fp32 is what torch
makes of it: matrix products in float32, convolutions in TF32, which has 10 bits of fraction, unless
`torch.backends.cudnn.allow_tf32` is off.

Where memory is short, `keep_in_bf16` has the weights that train, and so their gradients and
moments, kept in bfloat16. The precision stays what it was: every layer converts its weights to the
dtype that it computes in, which without autocast is float32.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from glide_text2im import nn as glide_nn

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

    @property
    def advice(self) -> str:
        """A line for the user about a precision that the device is not made for; "" for others."""
        if self.device.type != "cpu" or AUTOCAST_DTYPES[self.name] not in glide_nn.SLOW_ON_CPU:
            return ""
        return (
            f"--precision {self.name}: this processor has no instructions for it and multiplies "
            "in float32; fp32 is a little faster here and more exact"
        )

    def autocast(self) -> contextlib.AbstractContextManager:
        """The context for forward passes and losses; the backward pass follows by itself."""
        dtype = AUTOCAST_DTYPES[self.name]
        if dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=dtype)

    def compiled(self, model: nn.Module, backend: str = "inductor") -> Callable[..., torch.Tensor]:
        """The model compiled for batches of one shape, with the context for forward passes in it.

        torch compiles the backward pass under the autocast that is on around a compiled function,
        whatever is switched off inside. It is on inside alone, so that layers which the model
        keeps in float32 have gradients in float32, as without compiling.
        """

        def forward(*args: torch.Tensor, **conditions: torch.Tensor) -> torch.Tensor:
            with self.autocast():
                return model(*args, **conditions)

        options = {}
        if backend == "inductor" and self.device.type == "cpu":
            # Else sums of few numbers, such as those over the channels of a group, are put into
            # every use of them, and the pixels that use them are no longer dealt with in vectors.
            option = "unroll_reductions_threshold"
            if option in torch._inductor.list_options():  # of this version of torch
                options[option] = 1
        compiled = torch.compile(forward, dynamic=False, backend=backend, options=options or None)

        def network(*args: torch.Tensor, **conditions: torch.Tensor) -> torch.Tensor:
            with glide_nn.without_autocast(self.device.type):
                return compiled(*args, **conditions)

        network.inpaints = model.inpaints  # which the loss looks at
        return network

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
