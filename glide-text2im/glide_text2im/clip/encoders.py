"""The two towers of the noisy CLIP: captions and noised images to one shared space."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glide_text2im.clip.layers import Block, LayerNorm, Linear
from glide_text2im.nn import normal_parameter

# Mean and standard deviation of CLIP's training images per RGB channel, for values 0 to 255.
_CHANNEL_MEANS = (122.77093945, 116.74601272, 104.09373519)
_CHANNEL_STDS = (68.50053285, 66.63215831, 70.32316309)


class TextInput(nn.Module):
    """Token and position embeddings: [B, max_text_len] int64 -> [B, max_text_len, width]."""

    def __init__(self, n_vocab: int, max_text_len: int, width: int) -> None:
        super().__init__()
        self.w_voc = normal_parameter(n_vocab, width, std=0.02)
        self.w_pos = normal_parameter(max_text_len, width, std=0.01)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.w_voc) + self.w_pos


class ImageInput(nn.Module):
    """An embedding of the timestep, then the patches: [B, 1 + patches, width]."""

    def __init__(self, image_size: int, patch_size: int, n_timestep: int, width: int) -> None:
        super().__init__()
        if image_size % patch_size:
            raise ValueError(f"image_size {image_size} is no multiple of patch_size {patch_size}")
        n_patch = (image_size // patch_size) ** 2
        self.patch_size = patch_size
        self.w_t = normal_parameter(n_timestep, width, std=0.02)
        patch_std = (3 * patch_size**2) ** -0.5
        self.patch_proj = normal_parameter(width, 3, patch_size, patch_size, std=patch_std)
        self.w_pos = normal_parameter(1 + n_patch, width, std=0.01)
        self.ln = LayerNorm(width)
        for name, values in (("means", _CHANNEL_MEANS), ("stds", _CHANNEL_STDS)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor, timesteps: Tensor) -> Tensor:
        if timesteps.is_floating_point():
            raise ValueError(
                f"the noisy CLIP knows whole timesteps only, got {timesteps.dtype}; "
                f"use a sampler without half steps"
            )
        normed = ((images - self.means) / self.stds).to(self.patch_proj.dtype)
        patches = F.conv2d(normed, self.patch_proj, stride=self.patch_size)
        patches = patches.flatten(2).transpose(1, 2)
        times = F.embedding(timesteps, self.w_t)[:, None]
        return self.ln(torch.cat([times, patches], dim=1) + self.w_pos)


class Output(nn.Module):
    """From the feature at one position to the shared space: [B, width] -> [B, n_embd]."""

    def __init__(self, width: int, n_embd: int) -> None:
        super().__init__()
        self.ln = LayerNorm(width)
        self.f = Linear(width, n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.f(self.ln(x))


def _tower(
    first: nn.Module, n_head: int, n_head_state: int, n_block: int, n_embd: int, *, causal: bool
) -> nn.ModuleDict:
    """The layers of an encoder under their checkpoint names: input, block_0, ..., output."""
    blocks = {f"block_{i}": Block(n_head, n_head_state, causal, n_block) for i in range(n_block)}
    last = Output(n_head * n_head_state, n_embd)
    return nn.ModuleDict({"input": first, **blocks, "output": last})


class TextEncoder(nn.Module):
    """A causal transformer over CLIP's tokens.

    `forward(tokens, lengths)`: tokens [B, max_text_len] int64 and lengths [B] int64, both as
    `SimpleTokenizer.padded_tokens_and_len` makes them -> [B, n_embd], not normalised.
    """

    def __init__(
        self,
        *,
        n_vocab: int,
        max_text_len: int,
        n_head: int,
        n_head_state: int,
        n_block: int,
        n_embd: int,
    ) -> None:
        super().__init__()
        first = TextInput(n_vocab, max_text_len, n_head * n_head_state)
        self.blocks = _tower(first, n_head, n_head_state, n_block, n_embd, causal=True)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        first, *blocks, last = self.blocks.values()
        x = first(tokens)
        for block in blocks:
            x = block(x)
        rows = torch.arange(len(x), device=x.device)
        return last(x[rows, lengths - 1])


class ImageEncoder(nn.Module):
    """A vision transformer that knows how noisy its image is.

    `forward(images, timesteps)`: images [B, 3, image_size, image_size] with values 0 to 255 before
    the noise, timesteps [B] int64 -> [B, n_embd], not normalised. Raises ValueError for fractional
    timesteps.
    """

    def __init__(
        self,
        *,
        image_size: int,
        patch_size: int,
        n_timestep: int,
        n_head: int,
        n_head_state: int,
        n_block: int,
        n_embd: int,
    ) -> None:
        super().__init__()
        first = ImageInput(image_size, patch_size, n_timestep, n_head * n_head_state)
        self.blocks = _tower(first, n_head, n_head_state, n_block, n_embd, causal=False)

    def forward(self, images: Tensor, timesteps: Tensor) -> Tensor:
        first, *blocks, last = self.blocks.values()
        x = first(images, timesteps)
        for block in blocks:
            x = block(x)
        return last(x[:, 0])
