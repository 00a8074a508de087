"""Data sets as `preparation` reads them: every sample as it is stored, in a fixed order."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from copy import copy
from typing import Any, NamedTuple

from glide_finetune.config import TrainConfig
from glide_finetune.data import fingerprint
from glide_finetune.data.bad_samples import KINDS, BadSample, Tally
from glide_finetune.data.folder_index import index_folder
from glide_finetune.data.image_files import ImageSource
from glide_finetune.data.metadata import parse_metadata
from glide_finetune.data.shard_stream import RawSample, ShardStream
from glide_finetune.wds_loader import glide_wds_loader


class Sample(NamedTuple):
    """One of the source, its image still encoded."""

    name: str
    image: ImageSource
    captions: Sequence[str]
    metadata: dict[str, Any]


class Task(NamedTuple):
    """A sample to prepare, as it travels to a worker."""

    handle: Any  # for `load` of the source
    after: list[int]  # where the source goes on behind it
    tally: Tally  # what came up since the task before


class FolderSource:
    """The samples of a local folder, by path."""

    def __init__(self, folder: str, use_captions: bool) -> None:
        self.index = index_folder(folder, use_captions)
        self.samples: int | None = len(self.index.images)
        self.identity = {
            "source": fingerprint.of_folder(self.index.images),
            "sizes": fingerprint.of_files(self.index.folder, self.index.files()),
        }
        # What has not even a number among the samples.
        counts = self.index.left_out.counts
        self.left_out = Counter({KINDS[kind]: count for kind, count in counts.items()})
        self.left_out["without a caption"] = self.index.without_caption

    def tasks(self, start: Sequence[int], pending: Tally) -> Iterator[Task]:
        """Those behind `start`, which is empty or the `after` of a task.

        `pending` takes note of what comes up between two tasks, until the next one takes it along;
        at the end it holds what has come up behind the last.
        """
        (first,) = start or (0,)
        for image in range(first, self.samples):
            yield Task(image, [image + 1], Tally())

    def load(self, image: int) -> Sample:
        """Raises BadSample."""
        key = self.index.images[image]
        return Sample(key, self.index.folder / key, self.index.read_captions(image), {})

    def name(self, image: int) -> str:
        return str(self.index.folder / self.index.images[image])


class ShardSource:
    """The samples of tar shards, in stored order and unfiltered."""

    def __init__(self, config: TrainConfig) -> None:
        self.samples: int | None = None  # how many is not known
        self.left_out: Counter[str] = Counter()
        self.stream: ShardStream = glide_wds_loader(
            config.data_dir,
            enable_text=config.use_captions,
            image_key=config.wds_image_key,
            caption_key=config.wds_caption_key,
            dataset_name=config.wds_dataset_name,
            nsfw_filter=False,
            ar_lower=0,
            ar_upper=math.inf,
            min_original_width=0,
            min_original_height=0,
        ).for_evaluation()
        if config.wds_dataset_name == "alamy":
            self.stream.reason_to_reject = None  # all languages: training chooses among them
        self.identity = {"source": fingerprint.of_shards(self.stream.shards)}

    def tasks(self, start: Sequence[int], pending: Tally) -> Iterator[Task]:
        """As those of `FolderSource`."""
        first, done = start or (0, 0)
        for place, shard in enumerate(self.stream.shards[first:], start=first):
            one = copy(self.stream)
            one.shards = [shard]
            for number, raw in enumerate(one.raw_samples(0, 0, 1, pending), start=1):
                tally = pending.take()
                if place > first or number > done:
                    yield Task(raw, [place, number], tally)

    def load(self, raw: RawSample) -> Sample:
        try:
            metadata = parse_metadata(raw.metadata)
        except BadSample:  # none, or nobody would have missed it
            metadata = {}
        return Sample(raw.key, raw.image, raw.captions, metadata)

    def name(self, raw: RawSample) -> str:
        return raw.key


Source = FolderSource | ShardSource
