"""Group normalisation with all that follows it in a residual block, as one differentiable step.

Torch's own kernel takes about as long on a CPU as a convolution where images lie channels-last in
memory, and on CUDA it copies them out of that layout and back; separate affine, scale-shift and
SiLU steps each keep a copy of the images for the backward pass. Here, on every device, gain,
offset, scale and shift become one multiplication and addition per channel, the arithmetic is
float32 whatever the dtype of the images, and the backward pass needs only the input.

It is written twice: as torch's operators, for every device and for torch's compiler, and in
`norm_kernels.py` for CPUs, where those take more than twice as long (benchmarks/group_norm.py).
Both do the same arithmetic.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from glide_text2im.defaults import NORM_EPS, NORM_GROUPS
from glide_text2im.openmp import HAS_THREADS


def _per_pixel(x: Tensor) -> Tensor:
    """(batch, channels) in the shape that fits images."""
    return x[:, :, None, None]


def _group_sum(x: Tensor) -> Tensor:
    """(batch, channels), for every channel the sum over its group.

    Adding up for every channel anew costs next to nothing. Of sums that channels share, torch's
    compiler would look up the right one for every pixel, one number at a time. Its option
    `unroll_reductions_threshold` must be 1, or it puts these sums into every pixel as well.
    """
    grouped = x.unflatten(1, (NORM_GROUPS, -1))
    channels = grouped.shape[2]
    return grouped[:, :, None].expand(-1, -1, channels, -1).sum(dim=3).flatten(1)


def _centre(images: Tensor, mean: Tensor, x: Tensor) -> Tensor:
    """images - mean, where `images` are `x` in float32; in place if they are a copy of it."""
    return images - mean if images is x else images.sub_(mean)


def _normalize(x: Tensor, gain: Tensor, offset: Tensor, silu: bool) -> tuple[Tensor, ...]:
    """The result, and for every channel mean and 1 / deviation of its group.

    At most two float32 copies of the images live at a time.
    """
    count = x.shape[1:].numel() // NORM_GROUPS
    images = x.float()
    mean = _group_sum(images.sum(dim=(2, 3))) / count
    centred = _centre(images, _per_pixel(mean), x)
    rstd = (_group_sum(centred.square().sum(dim=(2, 3))) / count + NORM_EPS).rsqrt()
    out = torch.addcmul(_per_pixel(offset), centred, _per_pixel(gain * rstd), out=centred)
    if silu:
        out = nn.functional.silu(out, inplace=True)
    return out.to(x.dtype), mean, rstd


def _normalize_backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    gain: Tensor,
    offset: Tensor,
    silu: bool,
) -> tuple[Tensor, ...]:
    """The gradients of x, gain and offset, where `grad` is that of the result."""
    count = x.shape[1:].numel() // NORM_GROUPS
    a = gain * rstd
    centred, grad = _centre(x.float(), _per_pixel(mean), x), grad.float()
    if silu:
        before = torch.addcmul(_per_pixel(offset), centred, _per_pixel(a))
        grad = torch.ops.aten.silu_backward.grad_input(grad, before, grad_input=before)

    grad_offset = grad.sum(dim=(2, 3))
    by_centred = (grad * centred).sum(dim=(2, 3))
    # The gradient through mean and deviation is k1 * (x - mean) + k0 in every group.
    k1 = -rstd.square() * _group_sum(a * by_centred) / count
    k0 = -_group_sum(a * grad_offset) / count
    grad_x = torch.addcmul(_per_pixel(k0), centred, _per_pixel(k1), out=centred)
    grad_x.addcmul_(grad, _per_pixel(a))
    return grad_x.to(x.dtype), rstd * by_centred, grad_offset


def _alike(x: Tensor, gain: Tensor) -> tuple[Tensor, ...]:
    """Results without values."""
    like_x = torch.empty_like(x, memory_format=torch.channels_last)
    return like_x, gain.new_empty(gain.shape), gain.new_empty(gain.shape)


def _register_kernel(name: str, given: str, fake: Callable[..., tuple[Tensor, ...]]) -> None:
    """Make a function of `norm_kernels` an operator, which fake tensors take by `fake`."""

    def call(*args: Tensor | bool) -> tuple[Tensor, ...]:
        from glide_text2im import norm_kernels  # it takes a second, and seconds the first time

        return getattr(norm_kernels, name)(*args)

    operator = f"glide_text2im::{name}"
    torch.library.define(operator, f"({given}) -> (Tensor, Tensor, Tensor)")
    torch.library.impl(operator, "cpu")(call)
    torch.library.register_fake(operator)(fake)


if not hasattr(torch.ops.glide_text2im, "normalize"):  # once in a process
    _register_kernel(
        "normalize",
        "Tensor x, Tensor gain, Tensor offset, bool silu",
        lambda x, gain, offset, silu: _alike(x, gain),
    )
    _register_kernel(
        "normalize_backward",
        "Tensor grad, Tensor x, Tensor mean, Tensor rstd, Tensor gain, Tensor offset, bool silu",
        lambda grad, x, mean, rstd, gain, offset, silu: _alike(x, gain),
    )


def _has_kernel(x: Tensor) -> bool:
    """Whether `norm_kernels` deals with such images. Torch's compiler would have to write and lay
    out for it what it otherwise computes within the operators."""
    return (
        HAS_THREADS
        and not torch.compiler.is_compiling()
        and x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.bfloat16)
        and x.is_contiguous(memory_format=torch.channels_last)
    )


class _NormalizeAndActivate(torch.autograd.Function):
    """[SiLU of] gain * (x - mean) / standard deviation + offset.

    x is (batch, channels, height, width), gain and offset are float32 (batch, channels); mean and
    deviation are those of each sample's groups of channels. With a = gain / deviation the step is
    a * (x - mean) + offset. All sums of products are of x - mean: those of x would cancel where
    the mean is far from 0.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, gain: Tensor, offset: Tensor, silu: bool) -> Tensor:
        normalize = torch.ops.glide_text2im.normalize if _has_kernel(x) else _normalize
        out, mean, rstd = normalize(x, gain, offset, silu)
        ctx.save_for_backward(x, mean, rstd, gain, offset)
        ctx.silu = silu
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor):
        x, *saved = ctx.saved_tensors
        operators = torch.ops.glide_text2im
        backward = operators.normalize_backward if _has_kernel(x) else _normalize_backward
        return *backward(grad, x, *saved, ctx.silu), None


class GroupNorm(nn.GroupNorm):
    """Group normalisation of images in 32 groups, with `silu` followed by a SiLU.

    `scale` and `shift`, float32 (batch, channels), turn the normed images y into
    y * (1 + scale) + shift before the SiLU. The result has the dtype of its input.
    """

    def __init__(self, channels: int, *, silu: bool = False):
        super().__init__(NORM_GROUPS, channels, eps=NORM_EPS)
        self.silu = silu

    def forward(
        self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None
    ) -> Tensor:
        gain, offset = (p.float().expand(len(x), -1) for p in (self.weight, self.bias))
        if scale is not None:
            gain, offset = gain * (1 + scale), torch.addcmul(shift, offset, 1 + scale)
        return _NormalizeAndActivate.apply(x, gain, offset, self.silu)
