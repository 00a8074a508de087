"""The four GLIDE models: the UNet together with its text encoder."""

from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glide_text2im.nn import (
    LayerNorm,
    Linear,
    draw_normal,
    normal_parameter,
    without_autocast,
)
from glide_text2im.unet import UNet
from glide_text2im.xf import Transformer

if TYPE_CHECKING:
    from glide_text2im.tokenizer.bpe import Encoder

VOCABULARY_SIZE = 50257  # GPT-2's byte pairs and its end token
EMBEDDING_STD = 0.01  # of position and padding embeddings before training
TOKEN_EMBEDDING_STD = 0.02


class TokenEmbedding(nn.Embedding):
    """A vector for every token."""

    def reset_parameters(self) -> None:
        draw_normal(self.weight, TOKEN_EMBEDDING_STD)


class Text2ImUNet(UNet):
    """The base model: noise and variance from a noisy image, its timestep and a caption.

    With `xf_width` 0 it has no text parameters and takes no caption. `xf_padding` adds a learned
    embedding for every masked position. With `cache_text_emb`, calls without gradients keep the
    text's result until `del_cache`. The other keywords are those of `UNet`.
    """

    image_channels = 3  # of the first convolution's input
    inpaints = False  # whether it takes known pixels and their mask

    def __init__(
        self,
        *,
        model_channels: int,
        text_ctx: int,
        xf_width: int,
        xf_layers: int,
        xf_heads: int,
        xf_final_ln: bool = True,
        xf_padding: bool = True,
        cache_text_emb: bool = False,
        **unet_options,
    ):
        super().__init__(
            in_channels=self.image_channels,
            model_channels=model_channels,
            text_width=xf_width or None,
            **unet_options,
        )
        self.xf_width = xf_width
        self.xf_padding = xf_padding
        self.cache_text_emb = cache_text_emb
        self.del_cache()
        if not xf_width:
            return
        self.positional_embedding = normal_parameter(text_ctx, xf_width, std=EMBEDDING_STD)
        if xf_padding:
            self.padding_embedding = normal_parameter(text_ctx, xf_width, std=EMBEDDING_STD)
        self.transformer = Transformer(xf_width, xf_layers, xf_heads)
        self.final_ln = LayerNorm(xf_width) if xf_final_ln else nn.Identity()
        self.token_embedding = TokenEmbedding(VOCABULARY_SIZE, xf_width)
        self.transformer_proj = Linear(xf_width, 4 * model_channels)

    @cached_property
    def tokenizer(self) -> "Encoder":
        """The tokenizer of the captions, read from its files on first use."""
        from glide_text2im.tokenizer.bpe import get_encoder

        return get_encoder()

    def text_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of the text encoder; all others belong to the diffusion UNet."""
        own = {
            "positional_embedding",
            "padding_embedding",
            "transformer",
            "final_ln",
            "token_embedding",
            "transformer_proj",
        }
        return (p for name, p in self.named_parameters() if name.split(".")[0] in own)

    def _convert(self, dtype: torch.dtype) -> None:
        super()._convert(dtype)
        self.del_cache()
        if self.xf_width:
            for module in self.transformer.modules():
                if isinstance(module, Linear):
                    module.to(dtype)
            self.transformer_proj.to(dtype)
            self.token_embedding.to(dtype)

    def del_cache(self) -> None:
        """Forget the text that `cache_text_emb` keeps."""
        self._cached_tokens: Tensor | None = None
        self._cached_text: dict[str, Tensor] = {}
        self._cached_dtype: torch.dtype | None = None

    def get_text_emb(self, tokens: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        """What the UNet reads of the captions.

        `tokens` are integers (batch, text_ctx), `mask` is bool of the same shape and False at
        padding, whose tokens do not matter. Returns `xf_proj` (batch, 4 * model_channels) and
        `xf_out` (batch, xf_width, text_ctx). Raises AssertionError if tokens are None, if mask is
        None with `xf_padding`, and for other tokens than those of a cached result; ValueError for
        another number of them than text_ctx.
        """
        # Callers of the released models expect AssertionError; raised so, it outlives python -O.
        if tokens is None:
            raise AssertionError("this model needs tokens")
        if mask is None and self.xf_padding:
            raise AssertionError("this model needs a mask beside the tokens")
        tokens, text_ctx = tokens.long(), len(self.positional_embedding)
        if tokens.shape[1] != text_ctx:
            raise ValueError(
                f"captions come with {tokens.shape[1]} tokens each, but this model reads "
                f"{text_ctx}: make them with its text_ctx"
            )
        # A result that gradients shall flow through is good for one backward pass only.
        use_cache = self.cache_text_emb and not torch.is_grad_enabled()
        dtype = self.dtype
        if use_cache and dtype == self._cached_dtype:
            # the same tensor in all steps of a loop, which then need not wait for the device
            if tokens is not self._cached_tokens and not torch.equal(tokens, self._cached_tokens):
                raise AssertionError(
                    "the cached text belongs to other tokens: call del_cache() first"
                )
            return self._cached_text

        with without_autocast(tokens.device.type):
            # float32 like the rest of this sum, also where the weights are not
            x = self.token_embedding(tokens) + self.positional_embedding.float()
            if self.xf_padding:
                x = torch.where(mask[..., None], x, self.padding_embedding)
            x = self.final_ln(self.transformer(x.to(dtype)))
            text = {"xf_proj": self.transformer_proj(x[:, -1]), "xf_out": x.transpose(1, 2)}
        if use_cache:
            self._cached_tokens, self._cached_text, self._cached_dtype = tokens, text, dtype
        return text

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        tokens: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Noise and variance (batch, 6, height, width), three channels each, in the dtype of x.

        `x` is the noisy image (batch, 3, height, width), `timesteps` (batch,) are in [0, 1000) and
        may be fractional; tokens and mask are those of `get_text_emb`.
        """
        if not self.xf_width:
            return self.predict(x, timesteps)
        text = self.get_text_emb(tokens, mask)
        return self.predict(x, timesteps, text["xf_proj"], text["xf_out"].transpose(1, 2))


def _resized(low_res: Tensor, x: Tensor) -> Tensor:
    """The low-resolution image at the size of x."""
    return F.interpolate(low_res, x.shape[2:], mode="bilinear", align_corners=False)


def _known_pixels(x: Tensor, image: Tensor | None, mask: Tensor | None) -> Tensor:
    """The image where it is known, and the mask as a fourth channel; zeros for what is absent."""
    if image is None:
        image = torch.zeros_like(x)
    if mask is None:
        mask = torch.zeros_like(x[:, :1])
    return torch.cat([image * mask, mask], dim=1)


class SuperResText2ImUNet(Text2ImUNet):
    """The upsampler: also sees a smaller image `low_res` (batch, 3, any height, any width)."""

    image_channels = 6

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        low_res: Tensor,
        tokens: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        x = torch.cat([x, _resized(low_res, x)], dim=1)
        return super().forward(x, timesteps, tokens, mask)


class InpaintText2ImUNet(Text2ImUNet):
    """The inpainting base model: also sees the known part of an image of the size of x.

    `inpaint_mask` (batch, 1, height, width) is 1 where a pixel of `inpaint_image` is known; without
    them nothing is.
    """

    image_channels = 7
    inpaints = True

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        inpaint_image: Tensor | None = None,
        inpaint_mask: Tensor | None = None,
        tokens: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        x = torch.cat([x, _known_pixels(x, inpaint_image, inpaint_mask)], dim=1)
        return super().forward(x, timesteps, tokens, mask)


class SuperResInpaintText2ImUnet(Text2ImUNet):
    """The inpainting upsampler: sees what its two relatives see."""

    image_channels = 10
    inpaints = True

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        inpaint_image: Tensor | None = None,
        inpaint_mask: Tensor | None = None,
        low_res: Tensor | None = None,
        tokens: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        if low_res is None:
            raise AssertionError("this model needs a low_res image")
        known = _known_pixels(x, inpaint_image, inpaint_mask)
        x = torch.cat([x, known, _resized(low_res, x)], dim=1)
        return super().forward(x, timesteps, tokens, mask)
