"""Images and captions from a local folder."""

import contextlib
import copy
import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch.utils.data import Dataset

from glide_finetune.data.bad_samples import BadSample, DataAccount, Tally
from glide_finetune.data.captions import Tokenizer
from glide_finetune.data.folder_index import index_folder
from glide_finetune.data.sample_recipe import SampleRecipe
from glide_finetune.data.shared_integer import NO_EPOCH, SharedInteger
from glide_finetune.seeds import derived_random

MAX_STAND_INS = 1000  # tried in place of one bad sample before giving up


class TextImageDataset(Dataset):
    """The images of a folder and its sub-folders with their captions (`index_folder`).

    Items are (tokens, mask, image), or with `enable_glide_upsample` (tokens, mask, low_res,
    high_res): tokens int64 and mask bool (text_ctx_len,), image and low_res float32
    (3, side_y, side_x) and high_res (3, side_y * upscale_factor, side_x * upscale_factor), all in
    [-1, 1]. With `return_keys` the sample's key, its path within the folder, comes last.

    Of several captions one is drawn each time. With `use_captions` images without a caption are
    left out (`without_caption` counts them); without it every image has the empty caption.
    `resize_ratio`, `uncond_p` and `random_hflip` are those of `SampleRecipe`.

    Crops, captions, dropout and flips are drawn anew each time, as torch's random state has it, in
    the workers of a `DataLoader` their own. After `set_epoch(epoch)` they derive from (seed, epoch,
    the sample's key) instead, so that `dataset[i]` is the same item for any number of workers,
    until the next `set_epoch`; `run_glide_finetune_epoch` and train_glide.py do that. A sample that
    cannot be read is named once in a warning; another takes its place: a random one with
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
        self.index = index_folder(folder, use_captions)
        self.shuffle = shuffle
        self.seed = seed
        self.return_keys = return_keys
        self._epoch = SharedInteger(NO_EPOCH)
        self.account = DataAccount()  # of what is taken by index

    @property
    def folder(self) -> Path:
        return self.index.folder

    @property
    def keys(self) -> Sequence[str]:
        """The paths of the images within the folder, sorted."""
        return self.index.images

    @property
    def without_caption(self) -> int:
        """How many images were left out because they have no caption."""
        return self.index.without_caption

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> tuple:
        tally, epoch = Tally(), self._epoch.value
        if epoch == NO_EPOCH:
            epoch = int(torch.randint(2**62, ()))
        item = self.draw(range(len(self))[index], epoch, tally=tally)
        self.account.add(tally)
        return item

    def set_epoch(self, epoch: int) -> None:
        """Draw the crops, captions, dropouts and flips of this epoch from now on, also in running
        workers."""
        self._epoch.value = epoch

    def draw(self, index: int, epoch: int, repeat: int = 0, tally: Tally | None = None) -> tuple:
        """The item of sample `index` in an epoch; `repeat` counts its further uses in that epoch.

        `tally` takes note of it, and of what is wrong with it if it cannot be read; not of its
        stand-ins, whose own turn comes. Raises ValueError if none of them can be read either.
        """
        rng = derived_random(self.seed, epoch, repeat, self.keys[index])
        tally = Tally() if tally is None else tally
        tally.samples += 1
        for candidate in self._candidates(index, rng):
            try:
                return self.make(candidate, rng, tally if candidate == index else Tally())
            except BadSample as error:
                name, reason = str(self.folder / self.keys[candidate]), str(error)
                if candidate == index:
                    tally.skip(name, error)
        raise ValueError(f"no sample can be read, the last one tried was {name}: {reason}")

    def _candidates(self, index: int, rng: random.Random) -> Iterator[int]:
        """A sample and its stand-ins; random ones leave a sub-folder full of bad ones behind."""
        yield index
        most = min(len(self) - 1, MAX_STAND_INS)
        steps = rng.sample(range(1, len(self)), most) if self.shuffle else range(1, most + 1)
        for step in steps:
            yield (index + step) % len(self)

    def make(self, index: int, rng: random.Random, tally: Tally) -> tuple:
        """The item of this very sample. Raises BadSample."""
        captions = self.index.read_captions(index)
        image = os.path.join(self.folder, self.keys[index])
        item = self.recipe.make(image, captions, rng, tally)
        return (*item, self.keys[index]) if self.return_keys else item

    def first_readable(self, indices: Sequence[int]) -> int:
        """The first of these samples that can be read; the very first if none of many can."""
        for index in indices[:MAX_STAND_INS]:
            with contextlib.suppress(BadSample):
                self.make(index, random.Random(0), Tally())
                return index
        return indices[0]

    def subset(self, indices: Sequence[int]) -> "TextImageDataset":
        """The same dataset with these samples only."""
        chosen = copy.copy(self)
        chosen.index = self.index.subset(indices)
        chosen.account = self.account.again()
        chosen._epoch = SharedInteger(self._epoch.value)
        return chosen

    def for_evaluation(self) -> "TextImageDataset":
        """The same samples with nothing random: centre crop, first caption, no dropout, no flip."""
        fixed = copy.copy(self)
        fixed.recipe = self.recipe.for_evaluation()
        fixed.account = self.account.again(gives_up=False)
        fixed._epoch = SharedInteger(0)
        return fixed
