"""How a model is used while it is not trained: for samples and for validation."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from glide_text2im.nn import weights_cast_once


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """While open, `model` is in evaluation mode without gradients; then every module as it was.

    Its weights must not change meanwhile.
    """
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad(), weights_cast_once():
            yield
    finally:
        for module, mode in training.items():
            module.training = mode
