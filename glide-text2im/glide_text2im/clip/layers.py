"""The layers of both CLIP towers, with the parameter names of the released checkpoints."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glide_text2im.nn import attention, layer_norm, linear, normal_parameter


class Linear(nn.Module):
    """A linear layer that computes in the dtype of its input; `gain` scales the initial weights."""

    def __init__(self, n_in: int, n_out: int, bias: bool = True, gain: float = 1.0) -> None:
        super().__init__()
        self.w = normal_parameter(n_out, n_in, std=gain * n_in**-0.5)
        self.b = nn.Parameter(torch.zeros(n_out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.w, self.b)


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis, in and out in the dtype of its input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(width))
        self.b = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.g, self.b)


class Attention(nn.Module):
    """Pre-norm multi-head self-attention, without the residual connection."""

    def __init__(self, n_head: int, n_head_state: int, causal: bool, output_gain: float) -> None:
        super().__init__()
        width = n_head * n_head_state
        self.n_head = n_head
        self.causal = causal
        self.ln = LayerNorm(width)
        self.f_q = Linear(width, width)
        # A bias of the keys adds the same to all scores of a query: the softmax would not see it.
        self.f_k = Linear(width, width, bias=False)
        self.f_v = Linear(width, width)
        self.f_c = Linear(width, width, gain=output_gain)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.ln(x)
        # [B, T, width] -> [B, n_head, T, n_head_state]
        q, k, v = (
            f(normed).unflatten(-1, (self.n_head, -1)).transpose(1, 2)
            for f in (self.f_q, self.f_k, self.f_v)
        )
        mixed = attention(q, k, v, causal=self.causal)
        return self.f_c(mixed.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Pre-norm perceptron with one hidden layer of four times the width, without the residual."""

    def __init__(self, width: int, output_gain: float) -> None:
        super().__init__()
        self.ln = LayerNorm(width)
        self.f_1 = Linear(width, 4 * width)
        self.f_2 = Linear(4 * width, width, gain=output_gain)

    def forward(self, x: Tensor) -> Tensor:
        return self.f_2(F.gelu(self.f_1(self.ln(x))))


class Block(nn.Module):
    """One transformer block, [B, T, width] to the same; `n_block` is the depth of its tower."""

    def __init__(self, n_head: int, n_head_state: int, causal: bool, n_block: int) -> None:
        super().__init__()
        # Every block adds two terms to the residual stream: initially it keeps its size with depth.
        output_gain = (2 * n_block) ** -0.5
        self.f_attn = Attention(n_head, n_head_state, causal, output_gain)
        self.f_mlp = MLP(n_head * n_head_state, output_gain)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.f_attn(x)
        return x + self.f_mlp(x)
