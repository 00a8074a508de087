"""GLIDE as it is usually trained: the yardstick that the benchmarks hold the project against.

`make_naive` turns one of our models into one that computes the same with the same weights, the
usual way: float32 images and weights in torch's default memory layout; group norm, scale, shift and
SiLU each a step of its own; queries, keys and values by one-dimensional convolutions; attention as
two einsums around a float32 softmax. `naive_optimizer` is AdamW in its plain loop.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glide_text2im.nn import Conv2d
from glide_text2im.norm import GroupNorm
from glide_text2im.unet import AttentionBlock, ResidualBlock, UNet, UpsamplingConv2d
from glide_text2im.xf import SelfAttention


def make_naive(model: UNet) -> UNet:
    """The model itself, its layers computing the naive way from now on; weights stay."""
    for module in model.modules():
        if isinstance(module, GroupNorm):
            module.forward = partial(group_norm, module)
        elif isinstance(module, Conv2d):
            module.forward = partial(convolution, module)
        elif isinstance(module, ResidualBlock):
            module.compute = partial(residual_block, module)
        elif isinstance(module, AttentionBlock):
            module.compute = partial(attention_block, module)
        elif isinstance(module, SelfAttention):
            module.forward = partial(self_attention, module)
    model.to(memory_format=torch.contiguous_format)
    first = model.input_blocks[0]
    first.register_forward_pre_hook(lambda _, args: (args[0].contiguous(), *args[1:]))
    return model


def naive_optimizer(model: nn.Module, learning_rate: float) -> torch.optim.AdamW:
    """AdamW that goes through the parameters one by one."""
    return torch.optim.AdamW(model.parameters(), lr=learning_rate, foreach=False, fused=False)


def group_norm(norm: GroupNorm, x: Tensor) -> Tensor:
    out = F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)
    return F.silu(out) if norm.silu else out


def convolution(layer: Conv2d, x: Tensor) -> Tensor:
    if isinstance(layer, UpsamplingConv2d):
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
    return nn.Conv2d.forward(layer, x)


def residual_block(block: ResidualBlock, x: Tensor, emb: Tensor, skip: Tensor | None) -> Tensor:
    if skip is not None:
        x = torch.cat([x, skip], dim=1)
    norm, _, convolve = block.in_layers
    h = norm(x)
    if block.resize is not None:
        x = block.resize(x)
        if not isinstance(convolve, UpsamplingConv2d):
            h = block.resize(h)
    h = convolve(h)
    emb = block.emb_layers(emb)[:, :, None, None]
    norm, _, dropout, convolve = block.out_layers
    if block.scale_shift:
        scale, shift = emb.chunk(2, dim=1)
        h = F.group_norm(h, norm.num_groups, norm.weight, norm.bias, norm.eps)
        h = F.silu(h * (1 + scale) + shift)
    else:
        h = norm(h + emb)
    h = F.dropout(h, dropout.p, block.training)
    return block.skip_connection(x) + convolve(h)


def attention_block(block: AttentionBlock, x: Tensor, text: Tensor | None) -> Tensor:
    positions = block.norm(x).flatten(2)  # (batch, channels, positions)
    query, key, value = _heads(F.conv1d(positions, block.qkv.weight, block.qkv.bias), block.heads)
    if text is not None:
        encoder = block.encoder_kv
        text = F.conv1d(text.transpose(1, 2), encoder.weight, encoder.bias)
        text_key, text_value = _heads(text, block.heads, parts=2)
        key, value = torch.cat([text_key, key], dim=2), torch.cat([text_value, value], dim=2)
    scale = query.shape[1] ** -0.25
    scores = torch.einsum("bct,bcs->bts", query * scale, key * scale)
    attended = torch.einsum("bts,bcs->bct", scores.float().softmax(dim=2), value)
    attended = attended.unflatten(0, (-1, block.heads)).flatten(1, 2)
    out = F.conv1d(attended, block.proj_out.weight, block.proj_out.bias)
    return x + out.view_as(x)


def _heads(channels: Tensor, heads: int, parts: int = 3) -> tuple[Tensor, ...]:
    """Each of the parts as (batch times heads, channels of a head, positions)."""
    return channels.unflatten(1, (heads, -1)).flatten(0, 1).chunk(parts, dim=1)


def self_attention(layer: SelfAttention, x: Tensor) -> Tensor:
    qkv = layer.c_qkv(x).unflatten(2, (layer.heads, -1))
    query, key, value = qkv.chunk(3, dim=3)
    scale = query.shape[3] ** -0.25
    scores = torch.einsum("bthc,bshc->bhts", query * scale, key * scale)
    attended = torch.einsum("bhts,bshc->bthc", scores.float().softmax(dim=3), value)
    return layer.c_proj(attended.flatten(2))
