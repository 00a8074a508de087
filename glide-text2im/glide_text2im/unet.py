"""The UNet that predicts noise and variance, with text as extra keys and values of its attention.

All images are (batch, channels, height, width) in channels-last memory, so that a reshape to
tokens (batch, height * width, channels) is free; text is (batch, positions, width).
"""

import itertools
from collections.abc import Callable, Collection, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from glide_text2im.nn import (
    Conv2d,
    Dropout,
    Linear,
    PointwiseConv1d,
    RecomputedModule,
    attention,
    timestep_embedding,
    without_autocast,
    working_dtype,
    zeroed,
)
from glide_text2im.norm import GroupNorm


class _Upsample(torch.autograd.Function):
    """Every pixel 2 x 2 times, in the memory layout of the images; its gradient is the sum over
    those, in one pooling, since torch's compiler would add them up pixel by pixel."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2.0, mode="nearest")

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> Tensor:
        return F.avg_pool2d(grad, 2, divisor_override=1)


def upsample(x: Tensor) -> Tensor:
    return _Upsample.apply(x)


class _Interleaved(torch.autograd.Function):
    """(batch, 4 * channels, height + 1, width + 1), the phases of `UpsamplingConv2d`, as images
    (batch, channels, 2 * height, 2 * width)."""

    @staticmethod
    def forward(ctx: FunctionCtx, phases: Tensor) -> Tensor:
        batch, channels, height, width = phases.shape
        shape = (batch, height - 1, 2, width - 1, 2, channels // 4)
        out = phases.new_empty(shape)
        for part, phase in _phases_of(out, phases):
            part.copy_(phase)
        return out.flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> Tensor:
        batch, channels, height, width = grad.shape
        phases = grad.new_zeros(batch, height // 2 + 1, width // 2 + 1, 4 * channels)
        phases = phases.permute(0, 3, 1, 2)
        grad = grad.permute(0, 2, 3, 1).unflatten(2, (-1, 2)).unflatten(1, (-1, 2))
        for part, phase in _phases_of(grad, phases):
            phase.copy_(part)
        return phases


def _phases_of(images: Tensor, phases: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of views of the same pixels and channels, (batch, height, width, channels).

    `images` are (batch, height, 2, width, 2, channels), `phases` those of `_Interleaved`.
    """
    height, width = phases.shape[2] - 1, phases.shape[3] - 1
    by_phase = phases.permute(0, 2, 3, 1).unflatten(3, (2, 2, -1))
    for row, column in itertools.product(range(2), repeat=2):
        its_pixels = by_phase[:, row : row + height, column : column + width, row, column]
        yield images[:, :, row, :, column], its_pixels


# For both phases of an axis, which of the three taps of a kernel fall onto which of two pixels.
_TAPS = torch.tensor([[[1.0, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]])
# A list, since a forecast without memory takes no tensor from elsewhere.
_KERNELS_OF_PHASES = torch.einsum("aui,bvj->abuvij", _TAPS, _TAPS).reshape(16, 9).tolist()


class UpsamplingConv2d(Conv2d):
    """`upsample`, then a 3x3 convolution with padding.

    Each output pixel sees but 2 x 2 different ones of the images before. Their taps, added up, make
    four convolutions by 2 x 2, one for each phase of the output, of fewer than half as many
    products. Only a CPU has been seen to gain by it, and not where to add up taps takes longer.
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, 3, padding=1)

    @staticmethod
    def _prepared(weight: Tensor) -> Tensor:
        outputs, inputs = weight.shape[:2]
        taps = weight.permute(0, 2, 3, 1).reshape(outputs, 9, inputs)
        kernels = taps.new_tensor(_KERNELS_OF_PHASES) @ taps  # (outputs, 4 phases * 4 taps, inputs)
        kernels = kernels.unflatten(1, (4, 4)).transpose(0, 1)
        return kernels.reshape(4 * outputs, 2, 2, inputs).permute(0, 3, 1, 2)

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        if x.device.type != "cpu" or self._may_train_on_few_pixels(x):
            return super()._product(upsample(x), weight, bias)
        kernels = weight if weight.is_mkldnn else self._prepared(weight)
        return _Interleaved.apply(super()._product(x, kernels, bias.repeat(4)))


def downsample(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 2)


class ResidualBlock(RecomputedModule):
    """Two normed 3x3 convolutions, steered by the time embedding, added to the input.

    `resize` (`upsample` or `downsample`) acts between the first norm and its convolution, and on
    the skip path. With `scale_shift` the embedding scales and shifts the second norm's output,
    else it is added before that norm.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        embedding_channels: int,
        *,
        dropout: float,
        scale_shift: bool,
        resize: Callable[[Tensor], Tensor] | None = None,
    ):
        super().__init__()
        self.resize = resize
        self.scale_shift = scale_shift
        convolution = (
            UpsamplingConv2d(in_channels, out_channels)
            if resize is upsample
            else Conv2d(in_channels, out_channels, 3, padding=1)
        )
        # Checkpoints count the SiLU at index 1, which is part of the norm here.
        self.in_layers = nn.ModuleList(
            [
                GroupNorm(in_channels, silu=True),
                nn.Identity(),
                convolution,
            ]
        )
        self.emb_layers = nn.Sequential(
            nn.SiLU(),
            Linear(embedding_channels, 2 * out_channels if scale_shift else out_channels),
        )
        self.out_layers = nn.ModuleList(
            [
                GroupNorm(out_channels, silu=True),
                nn.Identity(),
                Dropout(dropout),
                zeroed(Conv2d(out_channels, out_channels, 3, padding=1)),
            ]
        )
        self.skip_connection = (
            nn.Identity() if in_channels == out_channels else Conv2d(in_channels, out_channels, 1)
        )

    def compute(self, x: Tensor, emb: Tensor, skip: Tensor | None = None) -> Tensor:
        """The block's output, for an `emb` of float32 (batch, embedding_channels); `skip` is
        concatenated to `x` here, so that recomputing needs no copy of the two."""
        if skip is not None:
            x = torch.cat([x, skip], dim=1)
        norm, _, convolve = self.in_layers
        h = norm(x)
        if self.resize is not None:
            x = self.resize(x)
            if self.resize is not upsample:  # which is part of its convolution
                h = self.resize(h)
        h = convolve(h)

        emb = self.emb_layers(emb)
        norm, _, drop, convolve = self.out_layers
        if self.scale_shift:
            h = norm(h, *emb.chunk(2, dim=1))
        else:
            h = norm(h + emb[:, :, None, None].to(h.dtype))
        return self.skip_connection(x) + convolve(drop(h))


class AttentionBlock(RecomputedModule):
    """Every position of the image attends to all of them and to the text."""

    def __init__(self, channels: int, heads: int, text_width: int | None):
        super().__init__()
        self.heads = heads
        self.norm = GroupNorm(channels)
        self.qkv = PointwiseConv1d(channels, 3 * channels)
        if text_width is not None:
            self.encoder_kv = PointwiseConv1d(text_width, 2 * channels)
        self.proj_out = zeroed(PointwiseConv1d(channels, channels))

    def compute(self, x: Tensor, text: Tensor | None = None) -> Tensor:
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        # The channels of every head are laid out as its query, key and value.
        query, *image = self._heads(self.qkv(tokens), 3)
        if text is None:
            key, value = image
        else:
            pairs = zip(self._heads(self.encoder_kv(text), 2), image, strict=True)
            key, value = (torch.cat(pair, dim=2) for pair in pairs)
        attended = attention(query, key, value)
        tokens = self.proj_out(attended.transpose(1, 2).flatten(2))
        return x + tokens.transpose(1, 2).unflatten(2, x.shape[2:])

    def _heads(self, tokens: Tensor, parts: int) -> Sequence[Tensor]:
        """Views (batch, heads, positions, channels of a head) of each of the parts."""
        return tokens.unflatten(2, (self.heads, -1)).transpose(1, 2).chunk(parts, dim=3)


class Upsample(nn.Module):
    """Twice the size, then a 3x3 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = UpsamplingConv2d(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Downsample(nn.Module):
    """Half the size by a 3x3 convolution of stride 2."""

    def __init__(self, channels: int):
        super().__init__()
        self.op = Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Stage(nn.Sequential):
    """Layers in a row, each given what it needs beside the running tensor."""

    def forward(self, x: Tensor, emb: Tensor, text: Tensor | None, skip: Tensor | None = None):
        for layer in self:
            if isinstance(layer, ResidualBlock):
                x = layer(x, emb, skip)
                skip = None  # for the first residual block only
            elif isinstance(layer, AttentionBlock):
                x = layer(x, text)
            else:
                x = layer(x)
        return x


class UNet(nn.Module):
    """The network without its text encoder.

    `channel_mult` holds the channels of every level as multiples of `model_channels`, and
    `attention_rates` the downsampling rates with attention. Images of any size whose sides are
    multiples of `downsampling_factor` fit. `text_width` None leaves out the text's keys and values.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int,
        model_channels: int,
        num_res_blocks: int,
        channel_mult: Sequence[int],
        attention_rates: Collection[int],
        num_heads: int = 1,
        num_head_channels: int = -1,
        num_heads_upsample: int = -1,
        dropout: float = 0.0,
        use_scale_shift_norm: bool = True,
        resblock_updown: bool = True,
        text_width: int | None = None,
    ):
        super().__init__()
        self.model_channels = model_channels
        self.downsampling_factor = 2 ** (len(channel_mult) - 1)
        embedding_channels = 4 * model_channels
        if num_heads_upsample == -1:
            num_heads_upsample = num_heads

        def residual_block(inputs: int, outputs: int, resize=None) -> ResidualBlock:
            return ResidualBlock(
                inputs,
                outputs,
                embedding_channels,
                dropout=dropout,
                scale_shift=use_scale_shift_norm,
                resize=resize,
            )

        def attention_block(channels: int, heads: int) -> AttentionBlock:
            if num_head_channels == -1:
                option = "num_heads" if heads == num_heads else "num_heads_upsample"
                divisor = heads
            else:
                option, divisor = "num_head_channels", num_head_channels
                heads = channels // num_head_channels
            if channels % divisor:
                raise ValueError(
                    f"{option} is {divisor}, which does not divide the {channels} channels of an "
                    "attention block"
                )
            return AttentionBlock(channels, heads, text_width)

        self.time_embed = nn.Sequential(
            Linear(model_channels, embedding_channels),
            nn.SiLU(),
            Linear(embedding_channels, embedding_channels),
        )

        channels = channel_mult[0] * model_channels
        self.input_blocks = nn.ModuleList([Stage(Conv2d(in_channels, channels, 3, padding=1))])
        skip_channels = [channels]
        for level, multiplier in enumerate(channel_mult):
            width = multiplier * model_channels
            for _ in range(num_res_blocks):
                stage = Stage(residual_block(channels, width))
                channels = width
                if 2**level in attention_rates:
                    stage.append(attention_block(channels, num_heads))
                self.input_blocks.append(stage)
                skip_channels.append(channels)
            if level != len(channel_mult) - 1:
                down = (
                    residual_block(channels, channels, downsample)
                    if resblock_updown
                    else Downsample(channels)
                )
                self.input_blocks.append(Stage(down))
                skip_channels.append(channels)

        self.middle_block = Stage(
            residual_block(channels, channels),
            attention_block(channels, num_heads),
            residual_block(channels, channels),
        )

        self.output_blocks = nn.ModuleList()
        for level, multiplier in reversed(list(enumerate(channel_mult))):
            width = multiplier * model_channels
            for index in range(num_res_blocks + 1):
                stage = Stage(residual_block(channels + skip_channels.pop(), width))
                channels = width
                if 2**level in attention_rates:
                    stage.append(attention_block(channels, num_heads_upsample))
                if level and index == num_res_blocks:
                    stage.append(
                        residual_block(channels, channels, upsample)
                        if resblock_updown
                        else Upsample(channels)
                    )
                self.output_blocks.append(stage)

        self.out = nn.Sequential(
            GroupNorm(channels, silu=True),
            nn.Identity(),
            zeroed(Conv2d(channels, out_channels, 3, padding=1)),
        )

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the running tensor, as `working_dtype` decides it."""
        return working_dtype(self.input_blocks[0][0].weight)

    @property
    def activation_checkpointing(self) -> bool:
        """Whether training keeps only the inputs of the residual, attention and transformer
        blocks, and computes the rest again in the backward pass."""
        return any(block.recompute for block in self._recomputed_blocks())

    @activation_checkpointing.setter
    def activation_checkpointing(self, enabled: bool) -> None:
        for block in self._recomputed_blocks():
            block.recompute = enabled

    use_checkpoint = activation_checkpointing  # the name that users of such models know

    def _recomputed_blocks(self) -> list[RecomputedModule]:
        return [block for block in self.modules() if isinstance(block, RecomputedModule)]

    def convert_to_fp16(self) -> None:
        """Turn convolutions and text layers to float16 weights for inference, in place.

        Norms, the time embedding and its maps, the output layers and the position and padding
        embeddings stay float32.
        """
        self._convert(torch.float16)

    def convert_to_fp32(self) -> None:
        """Undo `convert_to_fp16`; the digits lost stay lost."""
        self._convert(torch.float32)

    def _convert(self, dtype: torch.dtype) -> None:
        for blocks in (self.input_blocks, self.middle_block, self.output_blocks):
            for module in blocks.modules():
                if isinstance(module, Conv2d | PointwiseConv1d):
                    module.to(dtype)

    def predict(
        self,
        x: Tensor,
        timesteps: Tensor,
        text_projection: Tensor | None = None,
        text: Tensor | None = None,
    ) -> Tensor:
        """Noise and variance channels (batch, out_channels, height, width) in the dtype of x,
        contiguous.

        `text_projection` (batch, 4 * model_channels) is added to the time embedding, `text`
        (batch, positions, width) is what the attention blocks read. Raises ValueError for an image
        whose sides are no multiples of `downsampling_factor`.
        """
        height, width = x.shape[2:]
        if height % self.downsampling_factor or width % self.downsampling_factor:
            raise ValueError(
                f"the image is {width}x{height} pixels (width x height), "
                f"but its sides must be multiples of {self.downsampling_factor}"
            )
        dtype = self.dtype
        with without_autocast(x.device.type):
            emb = self.time_embed(timestep_embedding(timesteps, self.model_channels))
            if text_projection is not None:
                emb = emb + text_projection
            h = x.to(dtype, memory_format=torch.channels_last)
            skips = []
            for stage in self.input_blocks:
                h = stage(h, emb, text)
                skips.append(h)
            h = self.middle_block(h, emb, text)
            for stage in self.output_blocks:
                h = stage(h, emb, text, skips.pop())
            return self.out(h.to(x.dtype)).contiguous()  # callers may `view` it
