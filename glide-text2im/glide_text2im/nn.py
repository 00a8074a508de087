"""Building blocks that both networks share, and the one place that decides on precision.

The rule: every layer computes in the dtype of its input, and its parameters follow; only CPUs
without instructions for that dtype multiply in float32 (`multiply`). The GLIDE networks choose
the dtype of their running tensor once (`working_dtype`), switch autocast off inside
(`without_autocast`), and keep float32 where digits matter: the time embedding and its maps into the
residual blocks, and the output layers. Norms, their gains and offsets included, and the softmax
with its scores are float32 inside, whatever the dtype of their input, on every device.
"""

import contextlib
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.utils.checkpoint import checkpoint

SHORT_ATTENTION = 512  # positions; beyond them the matrix of scores costs too much memory


def _autocast_enabled(device_type: str) -> bool:
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def working_dtype(weight: Tensor) -> torch.dtype:
    """What the running tensor shall be: autocast's dtype where that is on, else the weights'.

    But bfloat16 is only how weights are kept, and float32 what they compute in without autocast.
    """
    kind = weight.device.type
    if _autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return torch.float32 if weight.dtype == torch.bfloat16 else weight.dtype


def without_autocast(device_type: str) -> contextlib.AbstractContextManager:
    """A region in which layers compute in the dtype of their input."""
    if _autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


LayOut = Callable[[Tensor], Tensor]


class _Casts(threading.local):
    """What `weights_cast_once` keeps: the parameter, so that its id is not used again, how its copy
    is laid out, and the copy. Every thread has its own, since weights may change in one while
    another samples."""

    kept: dict[tuple[int, torch.dtype], tuple[Tensor, LayOut | None, Tensor]] | None = None


_casts = _Casts()


@contextlib.contextmanager
def weights_cast_once() -> Iterator[None]:
    """While open, layers keep the copies of their weights in another dtype from call to call.

    For passes of this thread without gradients; weights must not change inside. Copies of half
    precision take half the memory of float32 weights. They are dropped at the end.
    """
    before, _casts.kept = _casts.kept, {}
    try:
        yield
    finally:
        _casts.kept = before


def cast(parameter: Tensor, dtype: torch.dtype, lay_out: LayOut | None = None) -> Tensor:
    """The parameter in `dtype`, itself if it has that. A copy that is kept is `lay_out(copy)`, made
    anew when another layout, by `==`, is asked for."""
    if parameter.dtype == dtype or torch.is_grad_enabled() or (kept := _casts.kept) is None:
        return parameter.to(dtype)
    key = (id(parameter), dtype)
    if key not in kept or kept[key][1] != lay_out:
        copy = parameter.to(dtype)
        kept[key] = (parameter, lay_out, lay_out(copy) if lay_out else copy)
    return kept[key][2]


def _dtypes_of_onednn() -> set[torch.dtype]:
    """Those that oneDNN, which multiplies for torch on a CPU, takes on this one."""
    if not torch.backends.mkldnn.is_available():
        return set()
    supported = {
        torch.float32: True,
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported(),
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported(),
    }
    return {dtype for dtype, is_supported in supported.items() if is_supported}


def _slow_on_this_cpu() -> set[torch.dtype]:
    """The dtypes that torch multiplies without instructions for them here."""
    slow = {torch.bfloat16, torch.float16} - _dtypes_of_onednn()
    if torch.cpu._is_avx512_supported() and not torch.cpu._is_avx512_bf16_supported():
        slow.add(torch.bfloat16)  # oneDNN calls it supported, and takes four times as long
    return slow


DTYPES_OF_ONEDNN = _dtypes_of_onednn()
SLOW_ON_CPU = _slow_on_this_cpu()


def multiply(
    product: Callable[..., Tensor],
    x: Tensor,
    *parameters: Tensor | None,
    lay_out: LayOut | None = None,
) -> Tensor:
    """product(x, *parameters), all of them in the dtype of x, or of autocast where that is on.

    On a CPU without instructions for that dtype, which would take several times as long, they
    are multiplied in float32 and the product is rounded. `lay_out` is as in `cast`.
    """
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if _autocast_enabled(kind) else x.dtype
    inside = torch.float32 if kind == "cpu" and dtype in SLOW_ON_CPU else dtype
    given = (p if p is None else cast(p, inside, lay_out) for p in parameters)
    with without_autocast(kind):
        return product(x.to(inside), *given).to(dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """An affine map of the last axis in the dtype of x."""
    return multiply(F.linear, x, weight, bias)


def layer_norm(x: Tensor, gain: Tensor, offset: Tensor) -> Tensor:
    """Layer normalisation over the last axis in float32, returned in the dtype of x."""
    normed = F.layer_norm(x.float(), gain.shape, gain.float(), offset.float(), eps=1e-5)
    return normed.to(x.dtype)


def draw_normal(tensor: Tensor, std: float) -> Tensor:
    """Fill the tensor with normal random numbers of mean 0, in place; on the meta device, where
    torch would import its compiler for that and take seconds, nothing happens."""
    return tensor if tensor.is_meta else nn.init.normal_(tensor, std=std)


def normal_parameter(*shape: int, std: float) -> nn.Parameter:
    """A trainable tensor that starts as `draw_normal` fills it."""
    return nn.Parameter(draw_normal(torch.empty(shape), std))


class Linear(nn.Linear):
    """A linear layer that computes in the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class _LaidOutForOneDNN(NamedTuple):
    """How oneDNN wants the weight of a convolution: it lays any other out anew in every pass.

    That depends on the images, too. What is best for others can take 15 times as long.
    """

    padding: tuple[int, ...]
    stride: tuple[int, ...]
    images: tuple[int, ...]
    prepare: Callable[[Tensor], Tensor]  # makes of the weight what images are convolved with

    def __call__(self, copy: Tensor) -> Tensor:
        """The weight in that layout if it is on a CPU; a bias as it is."""
        if copy.ndim < 4 or copy.device.type != "cpu" or copy.dtype not in DTYPES_OF_ONEDNN:
            return copy
        return torch._C._nn.mkldnn_reorder_conv2d_weight(
            self.prepare(copy).to_mkldnn(), self.padding, self.stride, input_size=self.images
        )


FEW_PIXELS = 512  # in a batch, up to which a matrix product gives a weight's gradient sooner


def _patches(x: Tensor) -> Tensor:
    """(pixels of all images, 9 * channels): the 3x3 pixels around each, zeros beyond the edge."""
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
    around = padded.unfold(1, 3, 1).unfold(2, 3, 1)  # batch, height, width, channels, 3, 3
    return around.permute(0, 1, 2, 4, 5, 3).flatten(3).flatten(0, 2)


class _ConvolutionOfFewPixels(torch.autograd.Function):
    """A 3x3 convolution of stride 1 and padding 1 whose weight's gradient is a matrix product.

    oneDNN would spend most of its time on laying that gradient out, which is much larger than the
    images here.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, bias, padding=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        grad_x, _, _ = torch.ops.aten.convolution_backward(
            grad, x, weight, None, (1, 1), (1, 1), (1, 1), False, (0, 0), 1,
            (ctx.needs_input_grad[0], False, False),
        )  # fmt: skip
        by_channel = grad.transpose(0, 1).flatten(1)
        grad_weight = (by_channel @ _patches(x)).unflatten(1, (3, 3, -1)).permute(0, 3, 1, 2)
        return grad_x, grad_weight, by_channel.sum(1)


class Conv2d(nn.Conv2d):
    """A two-dimensional convolution that computes in the dtype of its input.

    Its weight lies channels-last in memory, as the images do: torch would lay any other out anew
    in every pass, and its gradient back.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        padding: int = 0,
    ):
        super().__init__(in_channels, out_channels, kernel_size, stride=stride, padding=padding)
        weight = self.weight.detach().contiguous(memory_format=torch.channels_last)
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        images = tuple(x.shape)
        lay_out = _LaidOutForOneDNN(self.padding, self.stride, images, self._prepared)
        return multiply(self._product, x, self.weight, self.bias, lay_out=lay_out)

    @staticmethod
    def _prepared(weight: Tensor) -> Tensor:
        """What `_product` convolves with, by which it can be given the weight as well."""
        return weight

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        is_usual = (weight.shape[2:], self.stride, self.padding) == ((3, 3), (1, 1), (1, 1))
        if is_usual and weight.requires_grad and self._may_train_on_few_pixels(x):
            return _ConvolutionOfFewPixels.apply(x, weight, bias)
        if not weight.is_mkldnn:
            return self._conv_forward(x, weight, bias)
        return torch.ops.mkldnn._convolution_pointwise(
            x, weight, bias, self.padding, self.stride, self.dilation, self.groups, "none", [], ""
        )

    @staticmethod
    def _may_train_on_few_pixels(x: Tensor) -> bool:
        """Whether this is a pass with gradients of few pixels on a CPU. Whose gradients does not
        matter: to freeze a weight must not change what is computed."""
        few = x.device.type == "cpu" and x[:, 0].numel() <= FEW_PIXELS
        return few and torch.is_grad_enabled()


class PointwiseConv1d(nn.Conv1d):
    """A 1x1 convolution whose weight is (out, in, 1), computed as a matrix product.

    Takes and returns tokens, that is (batch, positions, channels).
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, kernel_size=1)

    def forward(self, tokens: Tensor) -> Tensor:
        return multiply(self._product, tokens, self.weight, self.bias)

    @staticmethod
    def _product(tokens: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.linear(tokens, weight.squeeze(2), bias)


class LayerNorm(nn.LayerNorm):
    """Layer normalisation over the last axis, in and out in the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias)


def attention(query: Tensor, key: Tensor, value: Tensor, *, causal: bool = False) -> Tensor:
    """Softmax attention over (batch, heads, positions, channels of a head), scores scaled by
    1/sqrt(channels). Scores and softmax are float32, whatever the dtype of the arguments.

    `causal`: a position attends to none behind it; query and key then have equally many.
    """
    if query.device.type == "cpu" and query.dtype in SLOW_ON_CPU:
        with without_autocast("cpu"):
            parts = (part.float() for part in (query, key, value))
            return F.scaled_dot_product_attention(*parts, is_causal=causal).to(query.dtype)
    if (
        query.device.type == "cpu"
        and query.dtype == torch.bfloat16
        and key.shape[2] <= SHORT_ATTENTION
    ):
        # There the fused kernel takes up to four times as long, most of it in the backward pass.
        # Scores that a bfloat16 product has rounded would be four times as far off as its own.
        with without_autocast("cpu"):
            scores = (query.float() * query.shape[3] ** -0.5) @ key.float().transpose(2, 3)
            if causal:
                behind = torch.ones(scores.shape[2:], dtype=torch.bool).triu(1)
                scores = scores.masked_fill(behind, -math.inf)
            return scores.softmax(dim=3).to(value.dtype) @ value
    return F.scaled_dot_product_attention(query, key, value, is_causal=causal)


def _draw_kept(like: Tensor, stride: Sequence[int], dropped: int) -> Tensor:
    """For each number of `like` 1 if 16 random bits are at least `dropped`, which is below 2^16,
    else 0: uint8, which lies in memory as `stride` tells, without gaps."""
    words = torch.empty(-(-like.numel() // 4), dtype=torch.int64, device=like.device)
    bits = words.random_(-(2**63), None).view(torch.int16)[: like.numel()]
    kept = bits >= dropped - 2**15
    # torch's compiler converts bytes to numbers in vectors, but not truth values.
    return kept.view(torch.uint8).as_strided(like.shape, stride)


# An operator, so that compiled code calls it, with the same results: torch's compiler would draw
# other numbers, one at a time. It takes `like` itself, so that layers in a row draw in their order,
# and the strides apart from it, since the compiler may lay out `like` anew where it is computed
# again. A process can register it only once, though this module may be imported anew.
if not hasattr(torch.ops.glide_text2im, "draw_kept"):
    torch.library.define(
        "glide_text2im::draw_kept",
        "(Tensor like, SymInt[] stride, int dropped) -> Tensor",
        tags=torch.Tag.nondeterministic_seeded,
    )
    torch.library.impl("glide_text2im::draw_kept", "cpu")(_draw_kept)
    torch.library.register_fake("glide_text2im::draw_kept")(
        lambda like, stride, dropped: like.new_empty_strided(like.shape, stride, dtype=torch.uint8)
    )


class Dropout(nn.Dropout):
    """Dropout that spends 16 random bits a number on a CPU, where torch's spends more time on
    them than a group norm takes. So `p` is rounded to 2^-16 there, for drawing and scaling alike.
    """

    def forward(self, x: Tensor) -> Tensor:
        dropped = round(self.p * 2**16) if self.training else 0
        if dropped in (0, 2**16) or x.device.type != "cpu":
            return super().forward(x)
        stride = torch.empty_like(x, device="meta").stride()  # of a copy: x may have gaps
        kept = torch.ops.glide_text2im.draw_kept(x.detach(), stride, dropped)
        return x * kept.to(x.dtype).mul_(2**16 / (2**16 - dropped))


class RecomputedModule(nn.Module):
    """A module that can forget its activations and compute them again in the backward pass.

    Subclasses implement `compute` instead of `forward`. With `recompute` set, training keeps only
    the inputs of the module; gradients stay the same, dropout included.
    """

    recompute = False

    def compute(self, *args: Tensor | None) -> Tensor:
        raise NotImplementedError

    def forward(self, *args: Tensor | None) -> Tensor:
        if self.recompute and self.training and torch.is_grad_enabled():
            return checkpoint(self.compute, *args, use_reentrant=False)
        return self.compute(*args)


def zeroed(module: nn.Module) -> nn.Module:
    """The module with all of its parameters set to zero."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def timestep_embedding(timesteps: Tensor, channels: int) -> Tensor:
    """Sinusoids of the timesteps, float32 (batch, channels): cosines, then sines.

    `timesteps` (batch,) may be fractional. The frequencies exp(-ln(10000) i / half), with half the
    channels and i from 0 to half - 1, are those of "Attention Is All You Need".
    """
    half = channels // 2
    steps = torch.arange(half, dtype=torch.float32, device=timesteps.device)
    angles = timesteps[:, None].float() * torch.exp(steps * (-math.log(10000) / half))
    return torch.cat([angles.cos(), angles.sin()], dim=1)
