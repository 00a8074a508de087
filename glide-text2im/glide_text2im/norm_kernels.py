"""The group norm of `norm.py` for CPUs, compiled by numba when it is first used.

As torch's operators the norm is some twenty passes over float32 copies of all images. Here it is
three passes forward and two backward over the images of one sample, which fit a core's cache.

The kernels take numpy arrays of one sample: images (pixels, channels) without gaps, float32 or the
bits of bfloat16 as uint16, and what belongs to a channel as float32 (channels,). A call deals with
the channels from `first` to before `last`, which are whole groups of `size` channels.
"""

import functools
import math
from collections.abc import Callable

import numpy as np
import torch
from numba import njit, types
from numba.extending import overload
from numpy.polynomial import Chebyshev, Polynomial
from torch import Tensor

from glide_text2im.defaults import NORM_EPS, NORM_GROUPS
from glide_text2im.openmp import run_on_torch_threads

BLOCK = 32  # pixels whose sums are float32; sums of blocks are float64

# exp(x) is 2^k exp(rest), where k is a whole number and rest = x - k ln 2 at most ln 2 / 2 from 0.
# There a polynomial is exp with an error of 1e-7.
LN2, LOG2_E = np.float32(math.log(2)), np.float32(1 / math.log(2))
POLYNOMIAL = tuple(
    Chebyshev.interpolate(np.exp, 5, domain=[-LN2 / 2, LN2 / 2])
    .convert(kind=Polynomial)
    .coef.astype(np.float32)
)
LIMIT = np.float32(87)  # beyond it exp leaves float32
# float32 numbers of this size have no fraction: added to x / ln 2 it gives ROUNDING + k. The lowest
# bits of that are k + 127, which in the bits from 23 on of a float32 number stand for 2^k.
ROUNDING = np.float32(1.5 * 2**23 + 127)
ONE = np.float32(1)


# ------------------------------------------------------------------- numbers
def _widen(stored):
    """The float32 number that is stored."""


@overload(_widen, inline="always")
def _overload_widen(stored):
    if stored == types.uint16:
        return lambda stored: np.uint32(np.uint32(stored) << np.uint32(16)).view(np.float32)
    return lambda stored: stored


def _narrow(number, like):
    """What stands for the float32 number among what is stored as `like` is, rounded to nearest."""


@overload(_narrow, inline="always")
def _overload_narrow(number, like):
    if like == types.uint16:

        def rounded(number, like):
            bits = np.float32(number).view(np.uint32)
            is_odd = (bits >> np.uint32(16)) & np.uint32(1)
            upper = np.uint32(bits + is_odd + np.uint32(0x7FFF)) >> np.uint32(16)
            return np.uint16(0x7FC0) if number != number else np.uint16(upper)

        return rounded
    return lambda number, like: number


@njit(inline="always")
def _sigmoid(x):
    """1 / (1 + exp(-x)) in vectors; numpy's exp would be called number by number."""
    x = LIMIT if x > LIMIT else x
    x = -LIMIT if x < -LIMIT else x
    rounded = np.float32(ROUNDING - x * LOG2_E)
    rest = (ROUNDING - rounded) * LN2 - x
    power = POLYNOMIAL[5]
    power = power * rest + POLYNOMIAL[4]
    power = power * rest + POLYNOMIAL[3]
    power = power * rest + POLYNOMIAL[2]
    power = power * rest + POLYNOMIAL[1]
    power = power * rest + POLYNOMIAL[0]
    scale = np.uint32(rounded.view(np.uint32) << np.uint32(23)).view(np.float32)
    return ONE / (ONE + power * scale)


@njit(inline="always")
def _silu(x):
    return x * _sigmoid(x)


@njit(inline="always")
def _through_silu(grad, x):
    """The gradient of x where `grad` is that of silu(x)."""
    sigmoid = _sigmoid(x)
    return grad * sigmoid * (ONE + x * (ONE - sigmoid))


# ------------------------------------------------------------------- sums
@njit(inline="always")
def _add_up_groups(sums, size):
    """Put the sum of each group in the place of those of its channels."""
    for start in range(0, len(sums), size):
        sums[start : start + size] = sums[start : start + size].sum()


@njit(inline="always")
def _sums(x, first, last):
    """Those of x over all pixels, float64, for each of the channels."""
    sums = np.zeros(last - first, np.float64)
    part = np.empty(last - first, np.float32)
    for start in range(0, len(x), BLOCK):
        part[:] = 0
        for pixel in range(start, min(start + BLOCK, len(x))):
            row = x[pixel, first:last]
            for channel in range(len(part)):
                part[channel] += _widen(row[channel])
        sums += part
    return sums


@njit(inline="always")
def _squares(x, first, mean):
    """The sums of (x - mean)^2, like `_sums`."""
    sums = np.zeros(len(mean), np.float64)
    part = np.empty(len(mean), np.float32)
    for start in range(0, len(x), BLOCK):
        part[:] = 0
        for pixel in range(start, min(start + BLOCK, len(x))):
            row = x[pixel, first : first + len(mean)]
            for channel in range(len(mean)):
                centred = _widen(row[channel]) - mean[channel]
                part[channel] += centred * centred
        sums += part
    return sums


# ------------------------------------------------------------------- kernels
def _forward(x, gain, offset, silu, size, first, last, out, mean, rstd):
    """Write [SiLU of] gain * (x - mean) * rstd + offset to `out`, and `mean` and `rstd`, which are
    1 / the standard deviation, of the group of every channel."""
    count = len(x) * size
    mean, rstd = mean[first:last], rstd[first:last]
    sums = _sums(x, first, last)
    _add_up_groups(sums, size)
    mean[:] = sums / count
    squares = _squares(x, first, mean)
    _add_up_groups(squares, size)
    rstd[:] = 1 / np.sqrt(squares / count + NORM_EPS)
    factor, offset = gain[first:last] * rstd, offset[first:last]
    for pixel in range(len(x)):
        row, out_row = x[pixel, first:last], out[pixel, first:last]
        for channel in range(len(mean)):
            centred = _widen(row[channel]) - mean[channel]
            normed = centred * factor[channel] + offset[channel]
            if silu:
                normed = _silu(normed)
            out_row[channel] = _narrow(normed, row[channel])


def _backward(
    grad, x, mean, rstd, gain, offset, silu, size, first, last, grad_x, grad_gain, grad_offset
):
    """Write the gradients of x, gain and offset, where `grad` is that of the result."""
    mean, rstd, offset = mean[first:last], rstd[first:last], offset[first:last]
    factor = gain[first:last] * rstd
    by_one, by_centred = np.zeros(len(mean), np.float64), np.zeros(len(mean), np.float64)
    one_part, centred_part = np.empty(len(mean), np.float32), np.empty(len(mean), np.float32)
    for start in range(0, len(x), BLOCK):
        one_part[:] = 0
        centred_part[:] = 0
        for pixel in range(start, min(start + BLOCK, len(x))):
            row, grad_row = x[pixel, first:last], grad[pixel, first:last]
            for channel in range(len(mean)):
                centred = _widen(row[channel]) - mean[channel]
                before = _widen(grad_row[channel])
                if silu:
                    before = _through_silu(before, centred * factor[channel] + offset[channel])
                one_part[channel] += before
                centred_part[channel] += before * centred
        by_one += one_part
        by_centred += centred_part
    grad_offset[first:last] = by_one
    grad_gain[first:last] = by_centred * rstd

    # The gradient through mean and deviation is slope * (x - mean) + constant in every group.
    count = len(x) * size
    by_one *= factor
    by_centred *= factor
    _add_up_groups(by_one, size)
    _add_up_groups(by_centred, size)
    constant = (-by_one / count).astype(np.float32)
    slope = (-by_centred * rstd * rstd / count).astype(np.float32)
    for pixel in range(len(x)):
        row, grad_row = x[pixel, first:last], grad[pixel, first:last]
        out_row = grad_x[pixel, first:last]
        for channel in range(len(mean)):
            centred = _widen(row[channel]) - mean[channel]
            before = _widen(grad_row[channel])
            if silu:
                before = _through_silu(before, centred * factor[channel] + offset[channel])
            through_x = before * factor[channel] + centred * slope[channel] + constant[channel]
            out_row[channel] = _narrow(through_x, row[channel])


# ------------------------------------------------------------------- calls
def normalize(x: Tensor, gain: Tensor, offset: Tensor, silu: bool) -> tuple[Tensor, Tensor, Tensor]:
    """[SiLU of] the group norm of x, and mean and 1 / deviation of the group of every channel.

    x is (batch, channels, height, width), float32 or bfloat16; gain, offset, mean and 1 / deviation
    are float32 (batch, channels). The result has the dtype of x and lies channels-last in memory.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    out, mean, rstd = torch.empty_like(x), gain.new_empty(gain.shape), gain.new_empty(gain.shape)
    _run(_forward, (x, gain, offset), silu, (out, mean, rstd))
    return out, mean, rstd


def normalize_backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    gain: Tensor,
    offset: Tensor,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, gain and offset, where `grad` is that of the result of `normalize`."""
    grad, x = (images.contiguous(memory_format=torch.channels_last) for images in (grad, x))
    results = torch.empty_like(x), gain.new_empty(gain.shape), gain.new_empty(gain.shape)
    _run(_backward, (grad, x, mean, rstd, gain, offset), silu, results)
    return results


def _run(
    kernel: Callable, given: tuple[Tensor, ...], silu: bool, results: tuple[Tensor, ...]
) -> None:
    """Call the kernel for each sample, or for parts of its channels if there are more threads."""
    batch, channels = given[0].shape[:2]
    parts = 1
    while batch * parts < torch.get_num_threads() and parts < NORM_GROUPS:
        parts *= 2
    size, width = channels // NORM_GROUPS, channels // parts
    compiled = _compiled(kernel, given[0].dtype)
    given, results = (zip(*map(_by_sample, tensors), strict=True) for tensors in (given, results))
    calls = [
        (*its_given, silu, size, first, first + width, *its_results)
        for its_given, its_results in zip(given, results, strict=True)
        for first in range(0, channels, width)
    ]
    run_on_torch_threads(lambda index: compiled(*calls[index]), len(calls))


def _by_sample(tensor: Tensor) -> np.ndarray:
    """The tensor's memory as an array whose first axis counts samples."""
    if tensor.dim() == 4:
        tensor = tensor.permute(0, 2, 3, 1).flatten(1, 2)
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.view(torch.uint16)
    return tensor.contiguous().numpy()


_CHANNELS = types.float32[::1]
_PART = (types.boolean, types.int64, types.int64, types.int64)  # silu, size, first, last


@functools.cache
def _compiled(kernel: Callable, dtype: torch.dtype) -> Callable:
    """The kernel in machine code for such images, kept on disk if there is a place for it."""
    images = (types.uint16 if dtype == torch.bfloat16 else types.float32)[:, ::1]
    signature = {
        _forward: (images, *[_CHANNELS] * 2, *_PART, images, *[_CHANNELS] * 2),
        _backward: (*[images] * 2, *[_CHANNELS] * 4, *_PART, images, *[_CHANNELS] * 2),
    }[kernel]
    # "contract" has a product and a sum rounded once, by one instruction.
    decorate = functools.partial(njit, nogil=True, error_model="numpy", fastmath={"contract"})
    try:
        compiled = decorate(cache=True)(kernel)
        compiled.compile(signature)
    except Exception:  # of many kinds: no folder to write to, a full disk, a damaged file
        compiled = decorate()(kernel)
        compiled.compile(signature)
    return compiled
