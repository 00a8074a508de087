"""What moves the weights: AdamW, its learning rate and the length of its gradients; and what is
frozen."""

import inspect
import math
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from glide_finetune.low_memory import LowMemoryAdamW
from glide_finetune.uncompiled import Uncompiled


def freeze(model: nn.Module, *, transformer: bool, diffusion: bool) -> None:
    """Let a GLIDE model train only the parts that are not frozen.

    Args:
        model: one of the GLIDE networks; `requires_grad` of all its parameters is set.
        transformer: freeze every parameter of the text encoder, its `text_parameters`.
        diffusion: freeze every other parameter, those of the UNet.

    Raises:
        ValueError: nothing is left to train.
    """
    text = set(model.text_parameters())
    for parameter in model.parameters():
        parameter.requires_grad_(not (transformer if parameter in text else diffusion))
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "freeze_transformer and freeze_diffusion leave nothing to train: drop one of them"
        )


def make_optimizer(
    model: nn.Module, learning_rate: float, weight_decay: float, seed: int = 0
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019) over the parameters of `model` that train.

    Where `fp16_util.keep_in_bf16` keeps those in bfloat16, it is `LowMemoryAdamW`, whose rounding
    follows from the seed.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    if trainable[0].dtype == torch.bfloat16:
        return LowMemoryAdamW(trainable, lr=learning_rate, weight_decay=weight_decay, seed=seed)
    kind = trainable[0].device.type
    optimizer = _FusedAdamWOnCPU if kind == "cpu" else _AdamW
    return optimizer(
        trainable,
        lr=learning_rate,
        weight_decay=weight_decay,
        fused=kind in ("cpu", "cuda") or None,
    )


class _AdamW(Uncompiled, torch.optim.AdamW):
    """That of torch. What the decorators around its `step` do, but for an update that is to be
    differentiated, is to switch gradients off."""

    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


class _FusedAdamWOnCPU(_AdamW):
    """AdamW whose kernel gets channels-last tensors in the order in which they lie in memory; else
    it copies every such gradient into another order, for nothing, in the time of half a step."""

    def _init_group(self, group: dict[str, Any], *lists: Any, **keywords: Any) -> Any:
        """As in torch, which gathers in the lists what `step` works on."""
        result = super()._init_group(group, *lists, **keywords)
        for tensors in lists:
            if isinstance(tensors, list):
                tensors[:] = map(_in_memory_order, tensors)
        return result


def _in_memory_order(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or one that shares its memory and is contiguous if it is channels-last."""
    is_channels_last = tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    return tensor.permute(0, 2, 3, 1) if is_channels_last else tensor


def restore_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Take the moments from an earlier `state_dict`; learning rate, weight decay and `fused` stay.

    They are converted to what the optimizer keeps: moments of AdamW are rounded to bfloat16 for
    `LowMemoryAdamW`; the other way round they keep their values.

    Raises:
        ValueError: the state belongs to other parameters.
    """
    try:
        # Before loading, since `fused` and the like decide where the moments go. What another kind
        # of optimizer has beside is left.
        groups = [
            {**group, "params": saved["params"]}
            for saved, group in zip(state["param_groups"], optimizer.param_groups, strict=True)
        ]
        optimizer.load_state_dict({**state, "param_groups": groups})
        _lay_out_moments(optimizer)
    except ValueError:
        raise ValueError(
            "the training state belongs to another model or was made with other parameters "
            "frozen: give the same --freeze_… flags, or start from the .pt file with --weights_only"
        ) from None


def _lay_out_moments(optimizer: torch.optim.Optimizer) -> None:
    """Have the moments lie in memory as their parameters do, which fused kernels take for granted;
    ValueError unless they have their shapes."""
    for parameter, state in optimizer.state.items():
        for name, moment in state.items():
            if torch.is_tensor(moment) and moment.ndim:
                if moment.shape != parameter.shape:
                    raise ValueError
                if moment.stride() != parameter.stride():
                    state[name] = torch.empty_like(parameter, dtype=moment.dtype).copy_(moment)


def _norms(tensors: list[torch.Tensor]) -> Sequence[torch.Tensor]:
    """That of each tensor, a float32 scalar whatever its dtype: bfloat16 has two digits."""
    if tensors[0].device.type != "cpu":
        return torch._foreach_norm(tensors, 2.0, torch.float32)
    # There torch has one core add all squares of a tensor to a few float32 sums, and the text
    # embedding's norm is 0.15 % off. Rows are shared among the cores, and short.
    norm = partial(torch.linalg.vector_norm, dtype=torch.float32)
    rows = (_in_memory_order(t).flatten(1) if t.ndim > 1 else t for t in tensors)
    return [norm(norm(row, dim=-1)) for row in rows]


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], largest_norm: float) -> torch.Tensor:
    """Shorten the gradient to a norm, if it is longer.

    Returns:
        The norm that it had, a float32 scalar on the device; not finite if the gradient is not.
    """
    with_gradient = [p for p in parameters if p.grad is not None]
    norm = torch.linalg.vector_norm(torch.stack(_norms([p.grad for p in with_gradient])))
    # Multiplying by 1 would take as long as half an optimizer step; the second question waits for
    # the device.
    if largest_norm < math.inf and norm > largest_norm:
        nn.utils.clip_grads_with_norm_(with_gradient, largest_norm, norm)
    return norm


def learning_rate_factor(
    step: int, schedule: str, warmup_steps: int, total_steps: int | None
) -> float:
    """What the learning rate is multiplied by in optimizer step `step`, counted from 0.

    Args:
        step: number of optimizer steps made before.
        schedule: constant, or cosine, which falls from 1 at the end of the warm-up to 0 after
            `total_steps`.
        warmup_steps: steps of the linear rise at the start.
        total_steps: length of the run; constant needs none.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
