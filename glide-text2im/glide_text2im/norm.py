"""Group normalisation with all that follows it in a residual block, as one differentiable step.

Torch's own kernel for channels-last memory takes about as long on a CPU as a convolution, and
separate affine, scale-shift and SiLU steps each keep a copy of the images for the backward pass.
Here gain, offset, scale and shift become one multiplication and addition per channel, arithmetic is
float32 whatever the dtype of the images, and the backward pass needs only the input.
"""

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

NORM_GROUPS = 32
NORM_EPS = 1e-5


def _per_pixel(x: Tensor) -> Tensor:
    """(batch, groups, channels of a group) in the shape that fits images."""
    return x.reshape(len(x), -1, 1, 1)


class _NormalizeAndActivate(torch.autograd.Function):
    """[SiLU of] gain * (x - mean) / standard deviation + offset.

    x is (batch, channels, height, width), gain and offset are float32 (batch, channels); mean and
    deviation are those of each sample's groups of channels. With a = gain / deviation and
    c = offset - mean * a the step is a * x + c.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, gain: Tensor, offset: Tensor, silu: bool) -> Tensor:
        grouped = (NORM_GROUPS, x.shape[1] // NORM_GROUPS)
        count = x[0].numel() // NORM_GROUPS
        images = x.float()

        def group_mean(images: Tensor) -> Tensor:
            sums = images.sum(dim=(2, 3)).unflatten(1, grouped)
            return sums.sum(dim=2, keepdim=True) / count

        mean = group_mean(images)
        variance = (group_mean(images.square()) - mean.square()).clamp_min(0)
        rstd = (variance + NORM_EPS).rsqrt()
        a = gain.unflatten(1, grouped) * rstd
        c = offset.unflatten(1, grouped) - mean * a
        ctx.save_for_backward(x, mean, rstd, a, c)
        ctx.silu = silu

        out = torch.addcmul(_per_pixel(c), images, _per_pixel(a))
        if silu:
            out = nn.functional.silu(out, inplace=True)
        return out.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor):
        x, mean, rstd, a, c = ctx.saved_tensors
        count = x[0].numel() // NORM_GROUPS
        images, grad = x.float(), grad.float()
        if ctx.silu:
            before = torch.addcmul(_per_pixel(c), images, _per_pixel(a))
            grad = torch.ops.aten.silu_backward(grad, before)

        grad_offset = grad.sum(dim=(2, 3)).view_as(a)
        by_input = (grad * images).sum(dim=(2, 3)).view_as(a)
        centred = by_input - mean * grad_offset
        # The gradient through mean and deviation is k1 * x + k0 in every group.
        k1 = -rstd.square() * (a * centred).sum(dim=2, keepdim=True) / count
        k0 = -(a * grad_offset).sum(dim=2, keepdim=True) / count - k1 * mean
        k1, k0 = k1.expand_as(a), k0.expand_as(a)
        grad_x = torch.addcmul(_per_pixel(k0), images, _per_pixel(k1))
        grad_x.addcmul_(grad, _per_pixel(a))
        grad_gain = rstd * centred
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
