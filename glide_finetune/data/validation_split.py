"""The split of a local dataset into a part to train on and one to hold back."""

from glide_finetune.data.folder_dataset import TextImageDataset
from glide_finetune.seeds import derived_seed


def split_validation(
    dataset: TextImageDataset, fraction: float, seed: int
) -> tuple[TextImageDataset, TextImageDataset]:
    """(training part, validation part) of a local dataset.

    A sample is held back if the hash of its key and the seed falls below `fraction`, so adding
    files moves none of the others from one part to the other. At least one is held back and one
    left. The rest is as in `hold_back`. Raises ValueError for a fraction outside of (0, 1).
    """
    if not 0 < fraction < 1:
        raise ValueError(f"the fraction to hold back must be in (0, 1), not {fraction}")
    count = sum(draw < fraction for draw in _draws(dataset, seed))
    return hold_back(dataset, min(max(1, count), len(dataset) - 1), seed)


def hold_back(
    dataset: TextImageDataset, count: int, seed: int
) -> tuple[TextImageDataset, TextImageDataset]:
    """A local dataset less `count` samples, and these, chosen by the hash of their keys and the
    seed, with nothing random (`TextImageDataset.for_evaluation`). More are held back where none of
    them could be read, since no other sample stands in for those.

    Raises ValueError if one of the two would be empty.
    """
    if not 0 < count < len(dataset):
        raise ValueError(
            f"{len(dataset)} samples cannot be split into some to train on and {max(count, 1)} "
            "to hold back"
        )
    draws = _draws(dataset, seed)
    order = sorted(range(len(draws)), key=draws.__getitem__)
    count = max(count, order.index(dataset.first_readable(order[:-1])) + 1)
    held_back = dataset.subset(sorted(order[:count])).for_evaluation()
    return dataset.subset(sorted(order[count:])), held_back


def _draws(dataset: TextImageDataset, seed: int) -> list[float]:
    """A number in [0, 1) for each sample."""
    return [derived_seed(seed, "validation", key) / 2**64 for key in dataset.keys]
