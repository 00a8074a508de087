"""Images and captions from a local folder."""

import copy
import logging
import os
from collections.abc import Sequence

import torch
from torch.utils.data import Dataset

from glide_finetune.data.bad_samples import BadSample
from glide_finetune.data.captions import Tokenizer, read_captions
from glide_finetune.data.folder_index import index_folder
from glide_finetune.data.sample_recipe import SampleRecipe
from glide_finetune.data.shared_integer import SharedInteger
from glide_finetune.seeds import derived_random

logger = logging.getLogger(__name__)

MAX_STAND_INS = 1000  # tried in place of one bad sample before giving up


class TextImageDataset(Dataset):
    """The images of a folder and its sub-folders, each with the captions in its .txt file.

    Items are (tokens, mask, image), or with `enable_glide_upsample` (tokens, mask, low_res,
    high_res): tokens int64 and mask bool (text_ctx_len,), image and low_res float32
    (3, side_y, side_x) and high_res (3, side_y * upscale_factor, side_x * upscale_factor), all in
    [-1, 1]. With `return_keys` the sample's key, its path within the folder, comes last.

    Of several lines in a caption file one is drawn each time. With `use_captions` images without a
    caption file are left out (`without_caption` counts them); without it every image has the empty
    caption. `resize_ratio`, `uncond_p` and `random_hflip` are those of `SampleRecipe`.

    All draws of a sample derive from (seed, epoch, its key), so `dataset[i]` is the same item until
    `set_epoch(epoch)` is called: do so before each epoch of a loop of your own over a `DataLoader`
    (`run_glide_finetune_epoch` does it), or every epoch has the same crops and captions. A sample
    that cannot be read is named once in a warning; another takes its place: a random one with
    `shuffle`, otherwise the next. (The order in which samples are visited is the data loader's.)

    Raises ValueError for a missing folder, one without images or captions, and bad settings.
    """

    def __init__(
        self,
        folder: str | os.PathLike = "",
        side_x: int = 64,
        side_y: int = 64,
        resize_ratio: float = 0.75,
        shuffle: bool = False,
        tokenizer: Tokenizer | None = None,
        text_ctx_len: int = 128,
        uncond_p: float = 0.0,
        use_captions: bool = False,
        enable_glide_upsample: bool = False,
        upscale_factor: int = 4,
        *,
        seed: int = 0,
        random_hflip: bool = False,
        return_keys: bool = False,
    ) -> None:
        self.recipe = SampleRecipe(
            side_x=side_x,
            side_y=side_y,
            resize_ratio=resize_ratio,
            uncond_p=uncond_p,
            upscale_factor=upscale_factor if enable_glide_upsample else None,
            random_hflip=random_hflip,
            tokenizer=tokenizer,
            text_ctx_len=text_ctx_len,
        )
        index = index_folder(folder, use_captions)
        self.folder = index.folder
        self.keys = index.images
        self.without_caption = index.without_caption
        self._caption_files = index.captions
        self.shuffle = shuffle
        self.seed = seed
        self.return_keys = return_keys
        self._epoch = SharedInteger()
        self._bad = _flags(len(self.keys))  # those that are named, by any worker

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> tuple:
        return self.draw(range(len(self))[index], self._epoch.value)

    def set_epoch(self, epoch: int) -> None:
        """Draw other crops, captions, dropouts and flips from now on, also in running workers."""
        self._epoch.value = epoch

    def draw(self, index: int, epoch: int, repeat: int = 0) -> tuple:
        """The item of sample `index` in an epoch; `repeat` counts its further uses in that epoch.

        Raises ValueError if neither it nor any of the samples tried in its place can be read.
        """
        rng = derived_random(self.seed, epoch, repeat, self.keys[index])
        candidate, reason = index, None
        for _ in range(min(len(self), MAX_STAND_INS)):
            try:
                return self._make(candidate, rng)
            except BadSample as error:
                reason = f"{self.folder / self.keys[candidate]}: {error}"
                self._report(candidate, reason)
            step = rng.randrange(1, len(self)) if self.shuffle and len(self) > 1 else 1
            candidate = (candidate + step) % len(self)
        raise ValueError(f"no sample can be read, the last one tried was {reason}")

    def _make(self, index: int, rng) -> tuple:
        captions = []
        if self._caption_files:
            captions = read_captions(self.folder / self._caption_files[index])
        item = self.recipe.make(self.folder / self.keys[index], captions, rng)
        return (*item, self.keys[index]) if self.return_keys else item

    def _report(self, index: int, reason: str) -> None:
        if not self._bad[index]:
            self._bad[index] = True
            logger.warning("skipped %s", reason)

    def subset(self, indices: Sequence[int]) -> "TextImageDataset":
        """The same dataset with these samples only."""
        chosen = copy.copy(self)
        chosen.keys = [self.keys[i] for i in indices]
        chosen._caption_files = [self._caption_files[i] for i in indices if self._caption_files]
        chosen._bad = _flags(len(chosen.keys))
        chosen._epoch = SharedInteger(self._epoch.value)
        return chosen

    def for_evaluation(self) -> "TextImageDataset":
        """The same samples with nothing random: centre crop, first caption, no dropout, no flip."""
        fixed = copy.copy(self)
        fixed.recipe = self.recipe.for_evaluation()
        fixed.shuffle = False
        fixed._epoch = SharedInteger()
        return fixed


def _flags(count: int) -> torch.Tensor:
    return torch.zeros(count, dtype=torch.bool).share_memory_()
