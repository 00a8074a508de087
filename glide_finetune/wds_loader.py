"""Images and captions from WebDataset tar shards."""

import copy
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch.utils.data import IterableDataset, get_worker_info
from webdataset.cache import FileCache
from webdataset.filters import shuffle as shuffle_buffered
from webdataset.gopen import gopen
from webdataset.tariterators import group_by_keys, tar_file_expander

from glide_finetune.config import DATASET_NAMES
from glide_finetune.data.bad_samples import BadSample, DataAccount, Tally
from glide_finetune.data.captions import Tokenizer, decode_caption
from glide_finetune.data.sample_recipe import SampleRecipe
from glide_finetune.data.shards import Urls, expand_shards, is_remote
from glide_finetune.data.shared_integer import SharedInteger
from glide_finetune.data.wds_filter import (
    LaionFilter,
    parse_metadata,
    reject_other_languages,
    word_pattern,
)
from glide_finetune.seeds import derived_random

ALAMY_CAPTION = "caption"  # the field of Alamy's metadata

Rejection = Callable[[Mapping], str | None]


@dataclass(frozen=True)
class RawSample:
    """A sample that passed the filters, its image still encoded."""

    key: str  # SHARD/KEY, with the shard's file name
    image: bytes | None
    captions: tuple[str, ...]


class ShardStream(IterableDataset):
    """The samples of tar shards; `glide_wds_loader` makes it and tells of its settings.

    Iterating gives the items of one epoch that could be read, in DataLoader workers each worker's
    share. What the filters reject and what cannot be read is counted by reason.
    """

    def __init__(
        self,
        shards: Sequence[str],
        recipe: SampleRecipe,
        *,
        image_key: str | None,
        caption_key: str | None,
        metadata_key: str | None,
        caption_in_metadata: bool = False,
        reason_to_reject: Rejection | None = None,
        words_to_skip: Sequence[str] = (),
        cache_path: str | os.PathLike | None = None,
        seed: int = 0,
        epoch: int = 0,
        shuffle_buffer: int = 1000,
        return_keys: bool = False,
    ) -> None:
        super().__init__()
        self.shards = list(shards)
        self.recipe = recipe
        self.image_key, self.caption_key, self.metadata_key = image_key, caption_key, metadata_key
        self.caption_in_metadata = caption_in_metadata
        self.reason_to_reject = reason_to_reject
        self.skip_words = word_pattern(words_to_skip)
        self.cache_path = cache_path
        self.seed = seed
        self.shuffle_buffer = shuffle_buffer
        self.return_keys = return_keys
        self._epoch = SharedInteger(epoch)
        self._account = DataAccount()  # of what is iterated over directly
        self._held_back: frozenset[str] = frozenset()

    @property
    def epoch(self) -> int:
        return self._epoch.value

    def set_epoch(self, epoch: int) -> None:
        """The next iteration gives this epoch: another order, other crops; also in workers."""
        self._epoch.value = epoch

    def for_evaluation(self) -> "ShardStream":
        """The same samples in stored order with nothing random."""
        fixed = copy.copy(self)
        fixed.recipe = self.recipe.for_evaluation()
        fixed.shuffle_buffer = 0
        fixed._account = DataAccount()
        fixed._epoch = SharedInteger()
        return fixed

    def without(self, keys: Collection[str]) -> "ShardStream":
        """The same samples but for those with these keys ("SHARD/KEY")."""
        smaller = copy.copy(self)
        smaller._account = DataAccount()
        smaller._held_back = self._held_back | frozenset(keys)
        smaller._epoch = SharedInteger(self.epoch)
        return smaller

    def __iter__(self) -> Iterator[tuple]:
        epoch, tally, given = self.epoch, Tally(), 0
        worker = get_worker_info()
        place = (worker.id, worker.num_workers) if worker else (0, 1)
        for raw in self.raw_samples(epoch, *place, tally):
            try:
                item = self.make(raw, epoch, tally)
            except BadSample as error:
                tally.skip(raw.key, error)
                continue
            finally:
                self._account.add(tally.take())
            given += 1
            yield item
        self._account.add(tally)
        if not given and worker is None:
            raise ValueError(nothing_left(self._account))
        self._account.end_epoch()

    def raw_samples(
        self, epoch: int, worker: int, workers: int, tally: Tally
    ) -> Iterator[RawSample]:
        """One worker's share of an epoch, in its order, filtered but not decoded.

        `tally` takes note of what is left out.
        """
        shards = list(self.shards)
        if self.shuffle_buffer:
            derived_random(self.seed, epoch, "shards").shuffle(shards)
        samples = (
            raw
            for shard in shards[worker::workers]
            for sample in self._read_shard(shard, tally)
            if (raw := self._select(shard, sample, tally))
        )
        if not self.shuffle_buffer:
            return samples
        rng = derived_random(self.seed, epoch, "buffer", worker)
        return shuffle_buffered(self.shuffle_buffer, initial=self.shuffle_buffer, rng=rng)(samples)

    def make(self, raw: RawSample, epoch: int, tally: Tally) -> tuple:
        """The item of a sample; its draws derive from (seed, epoch, key). Raises BadSample."""
        tally.samples += 1
        rng = derived_random(self.seed, epoch, raw.key)
        item = self.recipe.make(raw.image, raw.captions, rng, tally)
        return (*item, raw.key) if self.return_keys else item

    def _read_shard(self, shard: str, tally: Tally) -> Iterator[dict[str, bytes]]:
        """The members of each sample of a shard by suffix, as raw bytes; nothing is unpickled."""
        errors = []

        def broken(error: Exception) -> bool:
            if not errors:  # one fault may show up several times
                tally.skip(shard, BadSample(_shard_fault(error), "shard"))
            errors.append(error)
            return True  # webdataset then goes on with what can still be read

        try:
            with self._open(shard) as stream:
                members = tar_file_expander([{"url": shard, "stream": stream}], handler=broken)
                yield from group_by_keys(members, handler=broken)
        except Exception as error:  # whatever the network or a pipe's command comes up with
            broken(error)

    def _open(self, shard: str):
        if not is_remote(shard):
            return open(shard, "rb")
        if self.cache_path is not None:
            return open(FileCache(os.fspath(self.cache_path)).get_file(shard), "rb")
        return gopen(shard)

    def _select(self, shard: str, sample: dict[str, bytes], tally: Tally) -> RawSample | None:
        key = f"{os.path.basename(shard)}/{sample['__key__']}"
        if key in self._held_back:
            return None
        try:
            raw, reason = self._filter(key, sample)
        except BadSample as error:
            tally.samples += 1
            tally.skip(key, error)
            return None
        if reason:
            tally.filtered[reason] += 1
            return None
        return raw

    def _filter(self, key: str, sample: dict[str, bytes]) -> tuple[RawSample | None, str | None]:
        """The sample, or the reason why it is not wanted. Raises BadSample."""
        if self.image_key and self.image_key not in sample:
            return None, f"no .{self.image_key}"
        metadata = parse_metadata(sample.get(self.metadata_key) or b"{}")
        captions = ()
        if self.caption_in_metadata or self.caption_key:
            caption = self._caption(sample, metadata)
            if not caption:
                return None, "no caption"
            if self.skip_words and self.skip_words.search(caption):
                return None, "word to skip"
            captions = (caption,)
        if self.reason_to_reject and (reason := self.reason_to_reject(metadata)):
            return None, reason
        return RawSample(key, sample.get(self.image_key), captions), None

    def _caption(self, sample: dict[str, bytes], metadata: Mapping) -> str:
        if self.caption_in_metadata:
            text = metadata.get(ALAMY_CAPTION) or ""
            text = text if isinstance(text, str) else ""
        else:
            text = decode_caption(sample.get(self.caption_key, b""))
        # A caption of scraped data may well hold line breaks; here it is one caption all the same.
        return " ".join(text.split())


def _shard_fault(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    # webdataset puts the stream and the shard into the message or behind it
    return str(error.args[0] if error.args else error).split(" @ ")[0]


def nothing_left(account: DataAccount) -> str:
    """What to tell when an epoch has no sample."""
    left_out = account.describe()
    if not left_out:
        return "the shards hold no samples"
    return f"no sample of the shards can be used: {left_out}; loosen the filters"


def glide_wds_loader(
    urls: Urls,
    enable_text: bool = True,
    enable_image: bool = True,
    enable_metadata: bool = True,
    image_key: str = "jpg",
    caption_key: str = "txt",
    metadata_key: str = "json",
    cache_path: str | os.PathLike | None = None,
    tokenizer: Tokenizer | None = None,
    base_x: int = 64,
    base_y: int = 64,
    uncond_p: float = 0.2,
    nsfw_filter: bool = True,
    ar_lower: float = 0.5,
    ar_upper: float = 2.0,
    min_original_height: int = 256,
    min_original_width: int = 256,
    enable_upsample: bool = False,
    similarity_threshold_upper: float | None = None,
    similarity_threshold_lower: float | None = None,
    words_to_skip: Sequence[str] = (),
    dataset_name: str = "laion",
    upscale_factor: int = 4,
    *,
    seed: int = 0,
    epoch: int = 0,
    resize_ratio: float = 0.8,
    random_hflip: bool = False,
    shuffle_buffer: int = 1000,
    return_keys: bool = False,
    text_ctx_len: int = 128,
) -> ShardStream:
    """An iterable of (tokens, mask, image) or, with `enable_upsample`, (tokens, mask, low_res,
    high_res) from tar shards, shapes and ranges as in `TextImageDataset`.

    Args:
        urls: shards as `expand_shards` takes them: files, folders, globs, brace patterns, URLs.
        enable_text: False gives every sample the empty caption and asks for none.
        enable_image: False gives (tokens, mask) alone.
        enable_metadata: False reads no metadata and so filters by none.
        image_key, caption_key, metadata_key: suffixes of a sample's members.
        cache_path: folder in which remote shards are kept; None reads them anew each time.
        tokenizer: None means GLIDE's own.
        base_x, base_y: width and height of the base image.
        uncond_p: chance of replacing a caption by the empty one.
        nsfw_filter: leave out what LAION rates NSFW or LIKELY.
        ar_lower, ar_upper: limits of original width / height, included.
        min_original_height, min_original_width: in pixels, included.
        similarity_threshold_lower, similarity_threshold_upper: limits of LAION's similarity,
            included; None for no limit.
        words_to_skip: captions with one of these words or phrases are left out.
        dataset_name: laion filters by its metadata; alamy takes the caption from the metadata and
            only English ones; generic takes image and caption as they are.
        upscale_factor: of the upsampler's high-res image.
        seed, epoch: what all draws and orders derive from. Every iteration gives the same items
            in the same order until `set_epoch(epoch)` is called on the result; in a loop of your
            own do so before each epoch.
        resize_ratio, random_hflip: as in `SampleRecipe`.
        shuffle_buffer: encoded samples held by each worker to shuffle; also shuffles the order of
            the shards. 0 leaves everything in stored order.
        return_keys: add "SHARD/KEY" as the last value of each item.
        text_ctx_len: tokens of a caption.

    Shards are divided among DataLoader workers. Samples and shards that cannot be read are skipped
    with a warning. Raises ValueError for shards that do not exist and bad settings, and while
    iterating when nothing passes the filters, with counts.
    """
    if dataset_name not in DATASET_NAMES:
        known = ", ".join(DATASET_NAMES)
        raise ValueError(f"unknown WebDataset name {dataset_name!r}: choose one of {known}")
    if shuffle_buffer < 0:
        raise ValueError(f"shuffle_buffer must be at least 0, not {shuffle_buffer}")
    with_metadata = enable_metadata and dataset_name != "generic"
    reason_to_reject: Rejection | None = None
    if with_metadata and dataset_name == "laion":
        reason_to_reject = LaionFilter(
            nsfw_filter=nsfw_filter,
            ar_lower=ar_lower,
            ar_upper=ar_upper,
            min_original_width=min_original_width,
            min_original_height=min_original_height,
            similarity_threshold_lower=similarity_threshold_lower,
            similarity_threshold_upper=similarity_threshold_upper,
        ).reason_to_reject
    elif with_metadata:
        reason_to_reject = reject_other_languages
    caption_in_metadata = enable_text and with_metadata and dataset_name == "alamy"
    recipe = SampleRecipe(
        side_x=base_x,
        side_y=base_y,
        resize_ratio=resize_ratio,
        uncond_p=uncond_p,
        upscale_factor=upscale_factor if enable_upsample else None,
        random_hflip=random_hflip,
        tokenizer=tokenizer,
        text_ctx_len=text_ctx_len,
    )
    return ShardStream(
        expand_shards(urls),
        recipe,
        image_key=image_key.lower() if enable_image else None,
        caption_key=caption_key.lower() if enable_text and not caption_in_metadata else None,
        metadata_key=metadata_key.lower() if with_metadata else None,
        caption_in_metadata=caption_in_metadata,
        reason_to_reject=reason_to_reject,
        words_to_skip=words_to_skip,
        cache_path=cache_path,
        seed=seed,
        epoch=epoch,
        shuffle_buffer=shuffle_buffer,
        return_keys=return_keys,
    )
