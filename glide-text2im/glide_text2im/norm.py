"""Group normalisation with all that follows it in a residual block, as one differentiable step.

Torch's own kernel takes about as long on a CPU as a convolution where images lie channels-last in
memory, and on CUDA it copies them out of that layout and back; separate affine, scale-shift and
SiLU steps each keep a copy of the images for the backward pass. Here, on every device, gain,
offset, scale and shift become one multiplication and addition per channel, the arithmetic is
float32 whatever the dtype of the images, and the backward pass needs only the input. At most two
float32 copies of the images live at a time in the forward pass.
"""

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from glide_text2im.defaults import NORM_GROUPS

NORM_EPS = 1e-5


def _per_pixel(x: Tensor) -> Tensor:
    """(batch, groups, channels of a group) in the shape that fits images."""
    return x.reshape(len(x), -1, 1, 1)


def _group_sum(x: Tensor) -> Tensor:
    """(batch, groups, channels of a group), for every channel the sum over its group.

    Adding up for every channel anew costs next to nothing. Of sums that channels share, torch's
    compiler would look up the right one for every pixel, one number at a time. Its option
    `unroll_reductions_threshold` must be 1, or it puts these sums into every pixel as well.
    """
    channels = x.shape[2]
    return x[:, :, None].expand(-1, -1, channels, -1).sum(dim=3)


def _centre(images: Tensor, mean: Tensor, x: Tensor) -> Tensor:
    """images - mean, where `images` are `x` in float32; in place if they are a copy of it."""
    return images - mean if images is x else images.sub_(mean)


class _NormalizeAndActivate(torch.autograd.Function):
    """[SiLU of] gain * (x - mean) / standard deviation + offset.

    x is (batch, channels, height, width), gain and offset are float32 (batch, channels); mean and
    deviation are those of each sample's groups of channels. With a = gain / deviation the step is
    a * (x - mean) + offset. All sums of products are of x - mean: those of x would cancel where
    the mean is far from 0.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, gain: Tensor, offset: Tensor, silu: bool) -> Tensor:
        grouped = (NORM_GROUPS, x.shape[1] // NORM_GROUPS)
        count = x[0].numel() // NORM_GROUPS

        def group_mean(images: Tensor) -> Tensor:
            """(batch, groups, channels of a group), for every channel the mean of its group."""
            return _group_sum(images.sum(dim=(2, 3)).unflatten(1, grouped)) / count

        images = x.float()
        mean = group_mean(images)
        centred = _centre(images, _per_pixel(mean), x)
        rstd = (group_mean(centred.square()) + NORM_EPS).rsqrt()
        a = gain.unflatten(1, grouped) * rstd
        ctx.save_for_backward(x, mean, rstd, a, offset)
        ctx.silu = silu

        out = torch.addcmul(_per_pixel(offset), centred, _per_pixel(a), out=centred)
        if silu:
            out = nn.functional.silu(out, inplace=True)
        return out.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor):
        x, mean, rstd, a, offset = ctx.saved_tensors
        count = x[0].numel() // NORM_GROUPS
        centred, grad = _centre(x.float(), _per_pixel(mean), x), grad.float()
        if ctx.silu:
            before = torch.addcmul(_per_pixel(offset), centred, _per_pixel(a))
            grad = torch.ops.aten.silu_backward.grad_input(grad, before, grad_input=before)

        grad_offset = grad.sum(dim=(2, 3)).view_as(a)
        by_centred = (grad * centred).sum(dim=(2, 3)).view_as(a)
        # The gradient through mean and deviation is k1 * (x - mean) + k0 in every group.
        k1 = -rstd.square() * _group_sum(a * by_centred) / count
        k0 = -_group_sum(a * grad_offset) / count
        grad_x = torch.addcmul(_per_pixel(k0), centred, _per_pixel(k1), out=centred)
        grad_x.addcmul_(grad, _per_pixel(a))
        grad_gain = rstd * by_centred
        return grad_x.to(x.dtype), grad_gain.flatten(1), grad_offset.flatten(1), None


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
