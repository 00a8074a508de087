"""The random masks that inpainting is trained with."""

from random import Random

import pytest
import torch

from glide_finetune.inpaint_masks import SHARES, mask_without, random_mask, random_masks

SIZES = [(8, 8), (64, 64), (48, 96)]


def is_box(region):
    """Whether the True pixels of (height, width) are those of one upright rectangle."""
    rows, columns = region.any(1).nonzero(), region.any(0).nonzero()
    return bool(
        region[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].all()
        if len(rows)
        else False
    )


def masks_without(region, size, count=200):
    """bool (count, height, width), True where a pixel is known."""
    return torch.cat([mask_without(region, Random(seed), *size) for seed in range(count)]) == 1


@pytest.mark.parametrize("size", SIZES)
def test_masks_are_ones_where_a_pixel_is_known_and_zeros_elsewhere(size):
    masks = random_masks(50, *size)
    assert masks.shape == (50, 1, *size)
    assert masks.dtype == torch.float32
    assert masks.unique().tolist() == [0.0, 1.0]


def test_the_regions_are_erased_in_the_documented_shares():
    masks = [random_mask(Random(seed), 16, 24)[0] for seed in range(4000)]
    everything = sum(not mask.any() for mask in masks) / len(masks)
    surroundings = sum(is_box(mask == 1) for mask in masks) / len(masks)
    assert sum(SHARES.values()) == pytest.approx(1)
    assert everything == pytest.approx(SHARES["everything"], abs=0.02)
    assert surroundings == pytest.approx(SHARES["surroundings"], abs=0.02)
    # a third of the boxes stand alone, and only few strokes look like a box
    alone = sum(is_box(mask == 0) and bool(mask.any()) for mask in masks) / len(masks)
    assert alone == pytest.approx(SHARES["boxes"] / 3, abs=0.06)
    assert torch.stack(masks).mean().item() == pytest.approx(0.52, abs=0.03)


@pytest.mark.parametrize("size", SIZES)
def test_everything_erased_leaves_nothing(size):
    assert not masks_without("everything", size).any()


@pytest.mark.parametrize("size", SIZES)
def test_surroundings_erased_leave_a_box_that_lies_anywhere(size):
    known = masks_without("surroundings", size)
    assert all(map(is_box, known))
    shares = known.flatten(1).float().mean(1)
    assert shares.max() < 0.8
    assert known.any(0).all()


@pytest.mark.parametrize("region", ["boxes", "strokes"])
@pytest.mark.parametrize("size", SIZES)
def test_boxes_and_strokes_always_erase_a_part_and_never_all(region, size):
    known = masks_without(region, size)
    shares = known.flatten(1).float().mean(1)
    assert shares.min() > 0.1
    assert shares.max() < 1
    assert (~known).any(0).all()  # they lie anywhere


def test_strokes_are_no_boxes():
    known = masks_without("strokes", (64, 64))
    assert sum(map(is_box, ~known)) < 0.05 * len(known)


def test_masks_follow_from_torchs_random_state_whatever_their_number():
    torch.manual_seed(3)
    masks = random_masks(6, 16, 16)
    assert len({mask.numpy().tobytes() for mask in masks}) > 3
    torch.manual_seed(3)
    assert torch.equal(random_masks(2, 16, 16), masks[:2])
    assert not torch.equal(random_masks(6, 16, 16), masks)  # the state has moved on
