"""A look at every sample of a data set before training: what can be used, and what is odd."""

import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import NamedTuple

from torch.utils.data import Dataset, IterableDataset
from tqdm import tqdm

from glide_finetune.data.bad_samples import BadSample, Tally, in_one_line
from glide_finetune.data.captions import default_tokenizer
from glide_finetune.data.folder_dataset import TextImageDataset
from glide_finetune.data.image_files import ImageSource, upright_size
from glide_finetune.data.sample_recipe import SampleRecipe
from glide_finetune.data.shard_stream import ShardStream
from glide_finetune.data.workers import place_among_workers, received_from, worker_loader

MOST_SAMPLES = 100_000  # looked at; of a larger folder evenly spread, of shards the first
MOST_NAMES = 3  # kept as examples of each thing


@dataclass
class Examples:
    """How many samples something is true of, and the names of the first of them."""

    count: int = 0
    names: list[str] = field(default_factory=list)

    def add(self, name: str) -> None:
        self.count += 1
        if len(self.names) < MOST_NAMES:
            self.names.append(name)


@dataclass
class Survey:
    """What a look at a data set has found.

    samples: looked at, those included that are skipped or filtered.
    dataset_size: how many there are; None where that is not known.
    interrupted: whether the user ended it.
    usable: samples to train on.
    skipped: samples and shards that cannot be read, by the kind of fault and its reason; reasons
        that differ in numbers alone are one.
    filtered: how many are not wanted, by reason.
    without_metadata: how many the filters could not look at.
    caption_lengths: how many captions of the usable samples have so many tokens.
    cut: samples with a caption longer than the model takes.
    small: usable samples that have to be enlarged; smallest: (width, height) of the smallest.
    copies: usable samples whose image is byte for byte that of another, as "NAME = OTHER NAME".
    """

    samples: int = 0
    dataset_size: int | None = None
    interrupted: bool = False
    usable: int = 0
    skipped: dict[tuple[str, str], Examples] = field(default_factory=dict)
    filtered: Counter[str] = field(default_factory=Counter)
    without_metadata: int = 0
    caption_lengths: Counter[int] = field(default_factory=Counter)
    cut: Examples = field(default_factory=Examples)
    small: Examples = field(default_factory=Examples)
    smallest: tuple[int, int] | None = None
    copies: Examples = field(default_factory=Examples)


class _Facts(NamedTuple):
    """What is to be known of a usable sample."""

    size: tuple[int, int]  # of the upright image
    digest: bytes  # of the image file
    caption_lengths: list[int]  # in tokens


def survey(dataset: TextImageDataset | ShardStream, num_workers: int) -> Survey:
    """Decode every sample once, as training would, in `num_workers` processes.

    Shows a bar on a terminal. Ctrl-C ends it early. `dataset` has `return_keys`.
    """
    recipe = dataset.recipe
    dataset = dataset.for_evaluation()
    dataset.recipe = _FactsRecipe(dataset.recipe)
    result = Survey()
    if isinstance(dataset, ShardStream):
        facts, places = _ShardFacts(dataset), None
        num_workers = min(num_workers, dataset.shards_here)
    else:
        result.dataset_size = len(dataset)
        facts, places = _FolderFacts(dataset), _spread(len(dataset), MOST_SAMPLES)
    loader = worker_loader(facts, num_workers=num_workers, batch_size=16, sampler=places)
    collector = _Collector(result, recipe)
    with tqdm(
        desc="looking at the data", total=places and len(places), unit="sample", disable=None
    ) as bar:
        try:
            for message in itertools.chain.from_iterable(received_from(loader)):
                collector.add(*message)
                bar.update(result.samples - bar.n)
                if result.samples >= MOST_SAMPLES:
                    break
            else:
                result.dataset_size = result.dataset_size or result.samples
        except KeyboardInterrupt:
            result.interrupted = True
    return result


def _spread(count: int, most: int) -> Sequence[int]:
    """All of `count` places, or `most` of them, evenly spread."""
    return range(count) if count <= most else [i * count // most for i in range(most)]


class _FactsRecipe:
    """Takes the place of a recipe; makes the facts about a sample instead of the sample."""

    def __init__(self, recipe: SampleRecipe) -> None:
        self.recipe = recipe

    def make(
        self, image: ImageSource, captions: Sequence[str], rng: Random, tally: Tally
    ) -> tuple[_Facts]:
        self.recipe.make(image, captions, rng, tally)
        data = image if isinstance(image, bytes) else Path(image).read_bytes()
        encode = (self.recipe.tokenizer or default_tokenizer()).encode
        digest = hashlib.blake2b(data, digest_size=16).digest()
        return (_Facts(upright_size(data), digest, [len(encode(text)) for text in captions]),)


# What workers send: the name of a usable sample and the facts about it, and what else came up.
_Message = tuple[str, _Facts | None, Tally]


class _FolderFacts(Dataset):
    def __init__(self, dataset: TextImageDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> _Message:
        tally, name = Tally(samples=1), self.dataset.keys[index]
        try:
            facts, _ = self.dataset.make(index, Random(), tally)
        except BadSample as error:
            tally.skip(name, error)
            return name, None, tally
        return name, facts, tally


class _ShardFacts(IterableDataset):
    def __init__(self, stream: ShardStream) -> None:
        super().__init__()
        self.stream = stream

    def __iter__(self) -> Iterator[_Message]:
        tally = Tally()
        for raw in self.stream.raw_samples(0, *place_among_workers(), tally):
            try:
                facts, _ = self.stream.make(raw, 0, tally)
            except BadSample as error:
                tally.skip(raw.key, error)
                facts = None
            yield raw.key, facts, tally.take()
        yield "", None, tally


class _Collector:
    """Adds up what the workers send."""

    def __init__(self, result: Survey, recipe: SampleRecipe) -> None:
        factor = recipe.upscale_factor or 1
        self.result = result
        self.text_ctx_len = recipe.text_ctx_len
        self.width, self.height = recipe.side_x * factor, recipe.side_y * factor
        self.names: dict[bytes, str] = {}  # by digest
        self.reasons: dict[str, str] = {}  # the first one by its text without numbers

    def add(self, name: str, facts: _Facts | None, tally: Tally) -> None:
        result, name = self.result, in_one_line(name)
        result.samples += tally.samples + tally.filtered.total()
        result.filtered += tally.filtered
        result.without_metadata += tally.without_metadata
        for skipped in tally.skipped:
            reason = self.reasons.setdefault(re.sub(r"\d+", "", skipped.reason), skipped.reason)
            result.skipped.setdefault((skipped.kind, reason), Examples()).add(skipped.name)
        if facts is None:
            return
        result.usable += 1
        result.caption_lengths.update(facts.caption_lengths)
        if any(length > self.text_ctx_len for length in facts.caption_lengths):
            result.cut.add(name)
        if facts.size[0] < self.width or facts.size[1] < self.height:
            result.small.add(name)
            result.smallest = min(result.smallest or facts.size, facts.size, key=min)
        if facts.digest in self.names:
            result.copies.add(f"{name} = {self.names[facts.digest]}")
        else:
            self.names[facts.digest] = name
