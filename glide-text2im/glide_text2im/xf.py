"""The text transformer: pre-norm blocks in which every position attends to every position."""

import torch.nn.functional as F
from torch import Tensor, nn

from glide_text2im.nn import LayerNorm, Linear, RecomputedModule, attention


class SelfAttention(nn.Module):
    """Multi-head self-attention without any mask, (batch, positions, width) to the same."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.c_qkv = Linear(width, 3 * width)
        self.c_proj = Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        # The channels of every head are laid out as its query, key and value.
        qkv = self.c_qkv(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
        attended = attention(*qkv.chunk(3, dim=3))
        return self.c_proj(attended.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two linear layers around an exact GELU, four times as wide inside."""

    def __init__(self, width: int):
        super().__init__()
        self.c_fc = Linear(width, 4 * width)
        self.c_proj = Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x)))


class TransformerBlock(RecomputedModule):
    """Attention, then a perceptron, each on the normed running tensor and added to it."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attn = SelfAttention(width, heads)
        self.ln_1 = LayerNorm(width)
        self.mlp = MLP(width)
        self.ln_2 = LayerNorm(width)

    def compute(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """A stack of blocks over (batch, positions, width)."""

    def __init__(self, width: int, layers: int, heads: int):
        super().__init__()
        self.resblocks = nn.ModuleList(TransformerBlock(width, heads) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.resblocks:
            x = block(x)
        return x
