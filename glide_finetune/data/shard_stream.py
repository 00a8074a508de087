"""The samples of WebDataset tar shards: chosen, shuffled, and made into items."""

import copy
import logging
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random

import torch
from torch.utils.data import IterableDataset, get_worker_info
from webdataset.utils import pytorch_worker_info

from glide_finetune.data.bad_samples import KINDS, BadSample, DataAccount, Tally
from glide_finetune.data.captions import decode_caption, is_visible, single_spaced
from glide_finetune.data.metadata import parse_metadata
from glide_finetune.data.sample_recipe import SampleRecipe
from glide_finetune.data.shards import shard_names
from glide_finetune.data.shared_integer import NO_EPOCH, SharedInteger
from glide_finetune.data.tar_samples import DamagedShard, TarSample, shard_samples
from glide_finetune.data.wds_filter import NOT_ENGLISH, word_pattern
from glide_finetune.data.workers import place_among_workers
from glide_finetune.seeds import derived_random

logger = logging.getLogger(__name__)

NO_CAPTION = "no caption"
ALAMY_CAPTION = "caption"  # the field of Alamy's metadata
# Where `glide_finetune.prepare` made a sample, its metadata has the first of these, and its
# captions as a list of texts in the second. They go before a caption of its own, in which line
# breaks are those of scraped text.
PREPARED_FROM = "prepared_from"
SEVERAL_CAPTIONS = "captions"

MOST_SUFFIXES = 6  # that a message names

BUFFER_BYTES = 2**28  # of encoded samples that each worker holds to shuffle

# The user hears of it when the filters have let none of so many first samples pass.
PATIENCE = 10_000

Rejection = Callable[[Mapping], str | None]


@dataclass(frozen=True)
class RawSample:
    """A sample that passed the filters, its image still encoded."""

    key: str  # SHARD/KEY, with the shard's name in `shard_names`
    image: bytes | None
    captions: tuple[str, ...]
    metadata: bytes  # JSON as it is stored, empty if there is none
    repeat: int = 0  # further passes over the shards in the same epoch

    @property
    def size(self) -> int:
        """In bytes, about."""
        return len(self.image or b"") + len(self.metadata) + sum(map(len, self.captions))


class ShardStream(IterableDataset):
    """The samples of tar shards; `glide_wds_loader` makes it and tells of its settings.

    Iterating gives the items of one epoch that could be read, in DataLoader workers each worker's
    share, in a distributed run each node's. What the filters reject and what cannot be read is
    counted by reason.
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
        epoch: int | None = None,
        shuffle_buffer: int = 1000,
        return_keys: bool = False,
    ) -> None:
        super().__init__()
        self.shards = list(shards)
        self._names = shard_names(self.shards)
        self.node, self.nodes, *_ = pytorch_worker_info()  # processes that train together
        if len(self.shards) < self.nodes:
            raise ValueError(
                f"{len(self.shards)} shards cannot be divided among {self.nodes} processes that "
                "train together: use fewer, or make more and smaller shards"
            )
        self.recipe = recipe
        self.image_key, self.caption_key, self.metadata_key = image_key, caption_key, metadata_key
        self.caption_in_metadata = caption_in_metadata
        self.reason_to_reject = reason_to_reject
        self.skip_words = word_pattern(words_to_skip)
        self.cache_path = cache_path
        self.seed = seed
        self.shuffle_buffer = shuffle_buffer
        self.return_keys = return_keys
        self._epoch = SharedInteger(NO_EPOCH if epoch is None else epoch)
        self._passes = 0
        self.account = DataAccount()  # of what is iterated over directly
        self._held_back: frozenset[str] = frozenset()

    @property
    def epoch(self) -> int:
        """That of `set_epoch`, 0 before it is called."""
        return max(0, self._epoch.value)

    @property
    def shards_here(self) -> int:
        """How many of the shards each pass reads in this process of a distributed run."""
        return len(self.shards[self.node :: self.nodes])

    def set_epoch(self, epoch: int) -> None:
        """The iterations from now on give this epoch, its order and its crops, also in workers."""
        self._epoch.value = epoch

    def for_evaluation(self) -> "ShardStream":
        """The same samples in stored order with nothing random."""
        fixed = copy.copy(self)
        fixed.recipe = self.recipe.for_evaluation()
        fixed.shuffle_buffer = 0
        fixed.account = self.account.again(gives_up=False)
        fixed._epoch = SharedInteger(0)
        return fixed

    def without(self, keys: Collection[str]) -> "ShardStream":
        """The same samples but for those with these keys ("SHARD/KEY")."""
        smaller = copy.copy(self)
        smaller.account = self.account.again()
        smaller._held_back = self._held_back | frozenset(keys)
        smaller._epoch = SharedInteger(self._epoch.value)
        return smaller

    def __iter__(self) -> Iterator[tuple]:
        epoch, tally, given, rejected = self._epoch_of_pass(), Tally(), 0, 0
        place = place_among_workers()

        def tell() -> None:
            nonlocal rejected
            rejected += 1
            self.account.add(tally.take())
            if rejected == PATIENCE and not given:
                logger.warning("no sample could be used yet: %s", self.account.describe())

        for raw in self.raw_samples(epoch, *place, tally, on_rejection=tell):
            try:
                item = self.make(raw, epoch, tally)
            except BadSample as error:
                tally.skip(raw.key, error)
                tell()
                continue
            self.account.add(tally.take())
            given += 1
            yield item
        self.account.add(tally)
        if not given and get_worker_info() is None:
            raise ValueError(nothing_left(self.account, self.caption_in_metadata))
        self.account.end_epoch()

    def _epoch_of_pass(self) -> int:
        """That of `set_epoch`, or else one for this pass alone, from torch's random state; the same
        in all workers, which divide one order of the shards among them."""
        self._passes += 1
        if self._epoch.value != NO_EPOCH:
            return self._epoch.value
        if self.nodes > 1:  # whose random states may differ
            return 0
        if (worker := get_worker_info()) is None:
            return int(torch.randint(2**62, ()))
        return worker.seed - worker.id + self._passes

    def raw_samples(
        self,
        epoch: int,
        worker: int,
        workers: int,
        tally: Tally,
        repeat: int = 0,
        on_rejection: Callable[[], None] = lambda: None,
    ) -> Iterator[RawSample]:
        """One worker's share of a pass over the shards, in its order, filtered but not decoded.

        Args:
            repeat: counts further passes over the same share in an epoch, which have an order and
                draws of their own.
            tally: takes note of what is left out.
            on_rejection: called for each sample that is left out.
        """
        shards = list(self.shards)
        if self.shuffle_buffer:
            derived_random(self.seed, epoch, "shards").shuffle(shards)
        share = shards[self.node :: self.nodes][worker::workers]
        if not self.shuffle_buffer:
            return self._wanted(share, repeat, tally, on_rejection)
        rng = derived_random(self.seed, epoch, "buffer", repeat, self.node, worker)
        if repeat:
            rng.shuffle(share)
        return _shuffled(self._wanted(share, repeat, tally, on_rejection), self.shuffle_buffer, rng)

    def make(self, raw: RawSample, epoch: int, tally: Tally) -> tuple:
        """The item of a sample; its draws derive from (seed, epoch, repeat, key).

        Raises BadSample.
        """
        tally.samples += 1
        rng = derived_random(self.seed, epoch, raw.repeat, raw.key)
        item = self.recipe.make(raw.image, raw.captions, rng, tally)
        return (*item, raw.key) if self.return_keys else item

    def _wanted(
        self,
        shards: Sequence[str],
        repeat: int,
        tally: Tally,
        on_rejection: Callable[[], None],
    ) -> Iterator[RawSample]:
        for shard in shards:
            for sample in self._read_shard(shard, tally):
                if raw := self._select(shard, sample, repeat, tally):
                    yield raw
                else:
                    on_rejection()

    def _read_shard(self, shard: str, tally: Tally) -> Iterator[TarSample]:
        is_empty = True
        wanted = {self.image_key, self.caption_key, self.metadata_key}
        try:
            for sample in shard_samples(shard, wanted, self.cache_path):
                is_empty = False
                yield sample
            if is_empty:
                raise DamagedShard("it holds no samples")
        except DamagedShard as error:
            tally.skip(shard, BadSample(str(error), "shard"))

    def _select(self, shard: str, sample: TarSample, repeat: int, tally: Tally) -> RawSample | None:
        key = f"{self._names[shard]}/{sample.key}"
        if key in self._held_back:
            return None
        try:
            captions, reason = self._filter(sample)
        except BadSample as error:
            tally.samples += 1
            tally.skip(key, error)
            return None
        if reason:
            tally.filtered[reason] += 1
            return None
        if self.reason_to_reject and self.metadata_key not in sample.members:
            tally.without_metadata += 1
        image = sample.members.get(self.image_key)
        metadata = sample.members.get(self.metadata_key, b"")
        return RawSample(key, image, captions, metadata, repeat)

    def _filter(self, sample: TarSample) -> tuple[tuple[str, ...], str | None]:
        """The captions of a sample, and the reason if it is not wanted. Raises BadSample."""
        if sample.key.startswith("/") or ".." in sample.key.split("/"):
            raise BadSample("a name that leads out of the shard", "name")
        if self.image_key and self.image_key not in sample.members:
            suffixes = [f".{suffix}" for suffix in sample.members]
            others = ", ".join(suffixes[:MOST_SUFFIXES]) + ", …" * (len(suffixes) > MOST_SUFFIXES)
            hint = " (a name ends at its first dot)" if len(suffixes) > MOST_SUFFIXES else ""
            raise BadSample(f"there is no .{self.image_key} among its members {others}{hint}")
        metadata = self._metadata(sample)
        captions: tuple[str, ...] = ()
        if self.caption_in_metadata or self.caption_key:
            captions = self._captions(sample, metadata)
            if not captions:
                return (), NO_CAPTION
            if self.skip_words:
                captions = tuple(text for text in captions if not self.skip_words.search(text))
            if not captions:
                return (), "word to skip"
        return captions, self.reason_to_reject and self.reason_to_reject(metadata)

    def _metadata(self, sample: TarSample) -> dict:
        try:
            return parse_metadata(sample.members.get(self.metadata_key, b"{}"))
        except BadSample:
            if self.reason_to_reject:
                raise
            return {}  # nobody would have missed it

    def _captions(self, sample: TarSample, metadata: Mapping) -> tuple[str, ...]:
        """Empty if there is none. Raises BadSample for what is there, but is no caption."""
        several = metadata.get(SEVERAL_CAPTIONS) if PREPARED_FROM in metadata else None
        if isinstance(several, list) and several:
            texts = several
        elif self.caption_in_metadata:
            text = metadata.get(ALAMY_CAPTION)
            texts = [] if text is None else [text]
        else:
            texts = [sample.members[self.caption_key]] if self.caption_key in sample.members else []
        # A caption of scraped data may well hold line breaks; here it is one caption all the same.
        captions = tuple(single_spaced(text) for text in map(_caption, texts) if is_visible(text))
        if texts and not captions:
            raise BadSample("the caption is blank", "caption")
        return captions


def _shuffled(samples: Iterable[RawSample], most: int, rng: Random) -> Iterator[RawSample]:
    """Each time a random one of those in a buffer of `most` samples and `BUFFER_BYTES`."""
    buffer: list[RawSample] = []
    size = 0

    def draw() -> RawSample:
        nonlocal size
        place = rng.randint(0, len(buffer) - 1)
        buffer[place], buffer[-1] = buffer[-1], buffer[place]
        size -= buffer[-1].size
        return buffer.pop()

    for sample in samples:
        buffer.append(sample)
        size += sample.size
        while len(buffer) >= most or size > BUFFER_BYTES:
            yield draw()
    while buffer:
        yield draw()


def _caption(text: object) -> str:
    """A caption from a member's bytes or from JSON. Raises BadSample."""
    if isinstance(text, str):
        text = text.encode(errors="surrogatepass")  # JSON may hold halves of characters
    if not isinstance(text, bytes):
        raise BadSample("the caption in the metadata is no text", "caption")
    return decode_caption(text)


def nothing_left(account: DataAccount, caption_in_metadata: bool) -> str:
    """What to tell when an epoch has no sample."""
    reasons = account.reasons
    if not reasons:
        return "the shards hold no samples"
    left_out, advice = account.describe(), []
    if account.example:
        left_out += f", such as {account.example}"
        advice.append("mend the data")
    if KINDS["image"] in reasons:
        advice.append("give the suffix of its images as --wds_image_key")
    if NO_CAPTION in reasons:
        advice.append(
            "give --wds_dataset_name generic, as the metadata have no caption"
            if caption_in_metadata
            else "give the suffix of its captions as --wds_caption_key"
        )
    if NOT_ENGLISH in reasons:
        advice.append("give --wds_dataset_name generic, which asks for no language")
    if reasons - {*KINDS.values(), NO_CAPTION, NOT_ENGLISH}:
        advice.append("loosen the filters")
    return f"no sample of the shards can be used: {left_out}; {', or '.join(advice)}"
