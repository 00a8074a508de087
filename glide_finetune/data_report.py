"""What a run's data looks like, in words and in a picture, for --dry_run."""

import contextlib
import itertools
import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch.nn.functional import interpolate

from glide_finetune.atomic_files import atomic_file
from glide_finetune.config import TrainConfig
from glide_finetune.data.bad_samples import KINDS, TRIAL_SAMPLES, in_one_line
from glide_finetune.data.captions import Tokenizer, default_tokenizer
from glide_finetune.data.folder_dataset import TextImageDataset
from glide_finetune.data.folder_index import FolderIndex
from glide_finetune.data.survey import MOST_NAMES, Examples, Survey, survey
from glide_finetune.data.validation_split import split_validation
from glide_finetune.samples import labelled_grid
from glide_finetune.training_data import Split, make_dataset, make_training_data

SHEET_SAMPLES = 16
SHEET_NAME = "dry_run/data.png"  # in the folder of the runs, but no run, since those are numbers
BINS = 8  # of the caption lengths up to the longest that the model takes
BAR_WIDTH = 40
NAME_WIDTH = 30


def report_data(
    config: TrainConfig, *, tokenizer: Tokenizer | None = None, split: Split = split_validation
) -> None:
    """Look at all data, print what there is and what is wrong with it, draw some of it.

    Args:
        tokenizer, split: as of `make_training_data`.

    Raises:
        ValueError, OSError: why training would stop, in one line.
    """
    with _warnings_off("glide_finetune.data"):  # which tell one by one what is told in sum here
        found = _print_data("data", config.data_dir, config, tokenizer)
        if config.val_data_dir:
            _print_data("validation data", config.val_data_dir, config, tokenizer)
        loader = make_training_data(config, "cpu", tokenizer=tokenizer, split=split).loader
        samples = first_samples(loader, SHEET_SAMPLES if found.interrupted else TRIAL_SAMPLES)
        path = Path(config.checkpoints_dir).expanduser() / SHEET_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            draw_sheet(samples, tokenizer or default_tokenizer()).save(file, "png")
    print(f"\nsome of it, drawn as for training: {path}")


def _print_data(title: str, place: str, config: TrainConfig, tokenizer: Tokenizer | None) -> Survey:
    dataset = make_dataset(place, config, return_keys=True, tokenizer=tokenizer)
    print(
        f"\n{title}: {place}, for images of {config.image_width}x{config.image_height}", flush=True
    )
    found = survey(dataset, config.num_workers)
    lines = describe(found, config)
    if isinstance(dataset, TextImageDataset):
        lines += describe_index(dataset.index)
    lines += histogram(found.caption_lengths, config.text_ctx)
    for name, count, remark in lines:
        print(f"  {name:<{NAME_WIDTH}}{count:>10,}  {remark}".rstrip())
    return found


@contextlib.contextmanager
def _warnings_off(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


# ------------------------------------------------------------------- in words
class Line(NamedTuple):
    """What is counted, how often it is there, and what else is to be said of it."""

    name: str
    count: int
    remark: str = ""


def describe(found: Survey, config: TrainConfig) -> list[Line]:
    """A survey in lines, those left out that have nothing to tell."""
    size = f"{config.image_width}x{config.image_height}"
    longest = config.text_ctx
    lines = [Line("samples", found.samples, _extent(found)), Line("usable", found.usable)]
    for kind, name in KINDS.items():
        of_kind = {reason: some for (k, reason), some in found.skipped.items() if k == kind}
        if of_kind:
            lines.append(Line(name, sum(some.count for some in of_kind.values())))
        lines += [
            Line("", some.count, f"{reason}: {_listed(some.names, some.count)}")
            for reason, some in sorted(of_kind.items(), key=lambda pair: -pair[1].count)
        ]
    lines += [Line(f"filtered: {reason}", n) for reason, n in found.filtered.most_common()]
    if found.without_metadata:
        lines.append(Line("without metadata to filter by", found.without_metadata))
    if found.smallest:
        line = _line_of(f"smaller than {size}", found.small)
        width, height = found.smallest
        lines.append(line._replace(remark=f"the smallest is {width}x{height}: {line.remark}"))
    for name, some in (
        ("copies of other images", found.copies),
        (f"captions cut at {longest} tokens", found.cut),
    ):
        if some.count:
            lines.append(_line_of(name, some))
    return lines


def describe_index(index: FolderIndex) -> list[Line]:
    """What came up when the files of a folder were listed, in lines."""
    lines = []
    if index.without_caption:
        lines.append(Line("images without a caption", index.without_caption))
    for kind, name in (
        ("image", "named like images only"),
        ("metadata", "rows of metadata left out"),
        ("folder", "folders left out"),
    ):
        if count := index.left_out.counts[kind]:
            named = [f"{s.name}: {s.reason}" for s in index.left_out.named if s.kind == kind]
            lines.append(Line(name, count, _listed(named, count)))
    clashes, groups = index.same_stem(MOST_NAMES)
    if clashes:
        named = [in_one_line(" and ".join(group)) for group in groups]
        lines.append(Line("captions shared by images", clashes, _listed(named, clashes)))
    return lines


def _extent(found: Survey) -> str:
    if found.dataset_size == found.samples:
        return ""
    text = f"of {found.dataset_size:,}" if found.dataset_size else "the first ones"
    return text + (", as you stopped the look" if found.interrupted else "")


def _line_of(name: str, examples: Examples) -> Line:
    return Line(name, examples.count, _listed(examples.names, examples.count))


def _listed(names: Sequence[str], count: int) -> str:
    """The first of so many names."""
    return ", ".join(names[:MOST_NAMES]) + (", ..." if count > MOST_NAMES else "")


def histogram(lengths: Counter[int], longest: int) -> list[Line]:
    """How many captions have how many tokens, as bars, where there are any; longer ones are cut."""
    width = math.ceil(longest / BINS)
    counts: Counter[int] = Counter()  # by the first length of each bar
    for length, count in lengths.items():
        place = max(0, length - 1) // width
        counts[longest + 1 if length > longest else place * width + 1] += count
    lines = []
    for first, count in sorted(counts.items()):
        last = min(first + width - 1, longest)
        tokens = f"{first} to {last}" if first <= longest else f"over {longest}"
        bar = "#" * math.ceil(BAR_WIDTH * count / max(counts.values()))
        lines.append(Line(f"captions of {tokens} tokens", count, bar))
    return lines


# ------------------------------------------------------------------- in a picture
def first_samples(loader: Iterable, most: int) -> list[tuple[torch.Tensor, ...]]:
    """The first `SHEET_SAMPLES` of the first epoch of training, without their keys.

    Takes `most` samples from the loader, or an epoch if it has fewer, and so raises the ValueError
    with which training would give up data of which too much cannot be read.
    """
    first: list[tuple[torch.Tensor, ...]] = []
    count = 0
    for *parts, keys in loader:
        first += itertools.islice(zip(*parts, strict=True), SHEET_SAMPLES - len(first))
        count += len(keys)
        if count >= most:
            break
    return first


def draw_sheet(samples: Sequence[tuple[torch.Tensor, ...]], tokenizer: Tokenizer) -> Image.Image:
    """Samples as a grid, with the captions that the model gets."""
    captions = [
        tokenizer.decode(tokens[mask].tolist()) or "(empty)" for tokens, mask, *_ in samples
    ]
    return labelled_grid(
        torch.stack([_side_by_side(*images) for _, _, *images in samples]), captions
    )


def _side_by_side(image: torch.Tensor, high_res: torch.Tensor | None = None) -> torch.Tensor:
    """An upsampler's pair as one picture; the image of a base model as it is."""
    if high_res is None:
        return image
    return torch.cat([interpolate(image[None], high_res.shape[1:])[0], high_res], dim=2)
