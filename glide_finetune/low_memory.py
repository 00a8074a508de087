"""AdamW over weights that are kept in bfloat16: 8 bytes each with gradient and moments, not 16.

Neighbouring bfloat16 numbers are 0.4 to 0.8 % apart. An ordinary update changes a weight by less,
and a step changes the second moment by at most 0.1 % of what it was: rounding to the nearest would
drop nearly all of that. Stochastic rounding keeps it on average: a number goes up with a
probability that is its distance from the bfloat16 number below (Gupta et al. 2015, Deep Learning
with Limited Numerical Precision, arXiv:1502.02551).
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from glide_finetune.seeds import derived_seed
from glide_finetune.uncompiled import Uncompiled

# Numbers that are moved together: what fits into a processor's cache, or keeps a card busy.
CPU_CHUNK = 2**18
CHUNK = 2**21

_QUIET_NAN = 0x7FC00000  # the bits of a float32
_UPPER_HALF = -0x10000  # those that a bfloat16 has too

# Views of the same part of a parameter, its gradient and its two moments.
Piece = tuple[Tensor, Tensor, Tensor, Tensor]


def round_stochastically_(values: Tensor, noise: Tensor) -> Tensor:
    """Make `values` numbers that bfloat16 can hold, whose mean over the noise is what they were.

    What bfloat16 can hold stays as it is, infinities and the NaN of any arithmetic too. What is
    beyond its largest finite number, 3.39e38, becomes that or infinity.

    Args:
        values: float32, changed in place and returned.
        noise: int32 of the same shape, uniform in [0, 2**16).
    """
    bits = values.view(torch.int32)
    bits.clamp_(max=_QUIET_NAN)  # the NaN of a CUDA card has all bits set, and would become zero
    bits.add_(noise).bitwise_and_(_UPPER_HALF)
    return values


class LowMemoryAdamW(Uncompiled):
    """AdamW with decoupled weight decay (Loshchilov and Hutter 2019) over bfloat16 parameters.

    A step computes in float32 and rounds weights and moments stochastically, with noise that
    follows from the seed and the count of steps in the state. It deals with chunks of the
    parameters, of `CPU_CHUNK` or `CHUNK` numbers or one row of the longest tensor; beside the state
    it needs 40 bytes for each number of a chunk: 10 MB on a CPU, 84 MB elsewhere.

    Args:
        params: on one device.
        lr, betas, eps, weight_decay: as those of torch.optim.AdamW, whose state has the same form,
            so that each can go on from what the other saved.
        seed: of the noise.

    Raises:
        ValueError: a parameter is not bfloat16.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        seed: int = 0,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)
        self.seed = seed
        dtypes = {p.dtype for group in self.param_groups for p in group["params"]}
        if dtypes != {torch.bfloat16}:
            raise ValueError(f"LowMemoryAdamW moves bfloat16 parameters, but was given {dtypes}")

    @torch.no_grad()
    def step(self) -> None:
        """Move every parameter that has a gradient. The host does not wait for the device."""
        for number, group in enumerate(self.param_groups):
            by_step: dict[int, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_step.setdefault(self._count_step(parameter), []).append(parameter)
            for step, parameters in by_step.items():
                seed = derived_seed(self.seed, "rounding", step, number)
                chunks = list(self._chunks(parameters))
                for chunk, noise in zip(chunks, _noises(chunks, seed), strict=True):
                    _move(chunk, noise, step=step, **group)

    def _count_step(self, parameter: Tensor) -> int:
        """The number of the step that is made now, counted from 1."""
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        state["step"] = int(state["step"]) + 1  # a tensor in what torch.optim.AdamW saved
        return state["step"]

    def _chunks(self, parameters: list[Tensor]) -> Iterator[list[Piece]]:
        """All of the parameters; as many rows in each chunk as its size allows, one at least. Axes
        are taken in the order in which they lie in memory."""
        limit = CPU_CHUNK if parameters[0].device.type == "cpu" else CHUNK
        chunk, size = [], 0
        for parameter in parameters:
            state = self.state[parameter]
            tensors = (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])
            in_memory = sorted(range(parameter.ndim), key=parameter.stride, reverse=True)
            tensors = [torch.atleast_1d(tensor.permute(in_memory)) for tensor in tensors]
            rows = max(1, limit // tensors[0][0].numel())
            for piece in zip(*(tensor.split(rows) for tensor in tensors), strict=True):
                if chunk and size + piece[0].numel() > limit:
                    yield chunk
                    chunk, size = [], 0
                chunk.append(piece)
                size += piece[0].numel()
        yield chunk


def _noises(chunks: list[list[Piece]], seed: int) -> Iterator[Tensor]:
    """For every chunk int32 (3, numbers), uniform in [0, 2**16).

    A processor would take longer to draw that many numbers than for all else of a step. So they
    are drawn once, and every chunk adds a number of its own to them, modulo 2**16: any two of them
    are still independent, so that the errors of rounding are uncorrelated.
    """
    device = chunks[0][0][0].device
    sizes = [sum(weight.numel() for weight, *_ in chunk) for chunk in chunks]
    generator = torch.Generator(device).manual_seed(seed)
    drawn = torch.randint(
        2**16, (3, max(sizes)), dtype=torch.int32, device=device, generator=generator
    )
    for index, size in enumerate(sizes):
        yield (drawn[:, :size] + derived_seed(seed, index) % 2**16).bitwise_and_(2**16 - 1)


def _move(
    chunk: list[Piece],
    noise: Tensor,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    **_: Any,
) -> None:
    """Make step number `step` with a chunk."""
    beta1, beta2 = betas
    weights, gradients, means, squares = zip(*chunk, strict=True)
    new = torch.empty(noise.shape, device=noise.device)
    gradient = torch.empty_like(new[0])
    weight, mean, square = new
    for row, pieces in zip((*new, gradient), (weights, means, squares, gradients), strict=True):
        torch._foreach_copy_(_parts(row, pieces), pieces)

    mean.lerp_(gradient, 1 - beta1)
    square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    correction = (1 - beta2**step) ** 0.5
    root = torch.sqrt(square, out=gradient).add_(eps * correction)
    step_size = lr * correction / (1 - beta1**step)
    if weight_decay:
        weight.mul_(1 - lr * weight_decay)
    weight.addcdiv_(mean, root, value=-step_size)

    round_stochastically_(new, noise)
    for row, pieces in zip(new, (weights, means, squares), strict=True):
        torch._foreach_copy_(pieces, _parts(row, pieces))


def _parts(row: Tensor, pieces: Sequence[Tensor]) -> list[Tensor]:
    """Views of a row that holds the numbers of the pieces one after another, in their shapes."""
    parts = row.split([piece.numel() for piece in pieces])
    return [part.view(piece.shape) for part, piece in zip(parts, pieces, strict=True)]
