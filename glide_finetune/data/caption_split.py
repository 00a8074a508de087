"""A split into training and validation that no caption crosses."""

from glide_finetune.data.bad_samples import BadSample
from glide_finetune.data.folder_dataset import TextImageDataset
from glide_finetune.seeds import derived_seed


def split_by_caption(
    dataset: TextImageDataset, fraction: float, seed: int
) -> tuple[TextImageDataset, TextImageDataset]:
    """(training part, validation part) of a local dataset; all samples of a caption are in one.

    The samples of one of `caption_groups` are held back if the hash of its name and the seed, as a
    number from 0 to 1, is below `fraction`. If that leaves none that can be read, groups are held
    back in the order of their hashes until there is one. Reads every caption.

    Raises:
        ValueError: one of the two parts would be empty.
    """
    draws = [derived_seed(seed, "validation", name) / 2**64 for name in caption_groups(dataset)]
    order = sorted(range(len(draws)), key=draws.__getitem__)
    all_but_one_group = [index for index in order if draws[index] < max(draws)]
    least = draws[dataset.first_readable(all_but_one_group or order)]
    parts: tuple[list[int], list[int]] = ([], [])
    for index, draw in enumerate(draws):
        parts[draw < fraction or draw <= least].append(index)
    if not all(parts):
        raise ValueError(
            f"{len(draws)} samples cannot be split by their captions into some to train on and "
            "some to hold back: too many have the same caption; give --val_data_dir"
        )
    training, validation = map(dataset.subset, parts)
    return training, validation.for_evaluation()


def caption_groups(dataset: TextImageDataset) -> list[str]:
    """The name of each sample's group: samples that share a caption, directly or by way of others,
    are in the same, named by its first caption in the alphabet. Case and white space make no
    difference to a caption. A sample without a readable one is a group of its own."""
    leaders: dict[str, str] = {}

    def leader(caption: str) -> str:
        while leaders.setdefault(caption, caption) != caption:
            caption = leaders[caption]
        return caption

    firsts = []
    for index, key in enumerate(dataset.keys):
        try:
            captions = dataset.index.read_captions(index)
        except BadSample:  # told once it is read to train on
            captions = []
        names = [" ".join(caption.lower().split()) for caption in captions] or [f"\0{key}"]
        firsts.append(names[0])
        first, *others = sorted(map(leader, names))
        leaders |= dict.fromkeys(others, first)
    return list(map(leader, firsts))
