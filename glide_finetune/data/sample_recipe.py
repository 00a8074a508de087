"""How an image and its captions become one training sample, the same for every loader."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from PIL import ImageOps

from glide_finetune.data.bad_samples import Tally
from glide_finetune.data.captions import Tokenizer, caption_tensors, default_tokenizer
from glide_finetune.data.image_files import ImageSource
from glide_finetune.data.images import read_crop, shrink, to_tensor


@dataclass(frozen=True, kw_only=True)
class SampleRecipe:
    """The settings of samples, and the making of them.

    side_x, side_y: width and height of the base image in pixels.
    resize_ratio: smallest random crop, as area fraction of the largest crop of the target's shape.
    uncond_p: chance of replacing the caption by the empty one.
    upscale_factor: makes upsampler pairs with a high-res side this many times as long; None makes
        base samples.
    random_hflip: mirror half of the images.
    augment: False takes the largest centred crop and the first caption, whatever else is set.
    tokenizer: None means GLIDE's own.
    """

    side_x: int
    side_y: int
    resize_ratio: float
    uncond_p: float
    upscale_factor: int | None = None
    random_hflip: bool = False
    augment: bool = True
    tokenizer: Tokenizer | None = None
    text_ctx_len: int = 128

    def __post_init__(self) -> None:
        if self.side_x < 1 or self.side_y < 1:
            raise ValueError(f"image sides must be at least 1, not {self.side_x}x{self.side_y}")
        if not 0 < self.resize_ratio <= 1:
            raise ValueError(f"resize_ratio must be in (0, 1], not {self.resize_ratio}")
        if not 0 <= self.uncond_p <= 1:
            raise ValueError(f"uncond_p must be in [0, 1], not {self.uncond_p}")
        if self.upscale_factor is not None and self.upscale_factor < 1:
            raise ValueError(f"upscale_factor must be at least 1, not {self.upscale_factor}")
        if self.text_ctx_len < 1:
            raise ValueError(f"text_ctx_len must be at least 1, not {self.text_ctx_len}")

    def for_evaluation(self) -> "SampleRecipe":
        """The same samples without any randomness and with their captions kept."""
        return replace(self, augment=False)

    def make(
        self,
        image: ImageSource | None,
        captions: Sequence[str],
        rng: random.Random,
        tally: Tally,
    ) -> tuple[torch.Tensor, ...]:
        """(tokens, mask, image) or (tokens, mask, low_res, high_res); (tokens, mask) without image.

        tokens int64 and mask bool, both (text_ctx_len,); images float32 (3, height, width) in
        [-1, 1]. No captions means the empty caption. `tally` learns of cut captions. Raises
        BadSample.
        """
        # All three are drawn whatever the settings, so that changing one leaves the others' draws.
        dropout, which, flip = rng.random(), rng.random(), rng.random()
        caption = captions[int(which * len(captions)) if self.augment else 0] if captions else ""
        if self.augment and dropout < self.uncond_p:
            caption = ""
        tokenizer = self.tokenizer or default_tokenizer()
        tokens, mask, is_cut = caption_tensors(tokenizer, caption, self.text_ctx_len)
        tally.captions_cut += is_cut
        if image is None:
            return tokens, mask

        factor = self.upscale_factor or 1
        size = (self.side_x * factor, self.side_y * factor)
        crop = read_crop(image, size, self.resize_ratio, rng if self.augment else None)
        if self.augment and self.random_hflip and flip < 0.5:
            crop = ImageOps.mirror(crop)
        if self.upscale_factor is None:
            return tokens, mask, to_tensor(crop)
        return tokens, mask, to_tensor(shrink(crop, factor)), to_tensor(crop)
