"""The known part of a picture that is to be painted on: reading it, and putting it back.

In files white is to be repainted; in the model's mask 1 is known.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from glide_finetune.data import images
from glide_finetune.data.bad_samples import BadSample
from glide_finetune.data.image_files import upright_size


@dataclass(frozen=True)
class KnownPixels:
    """What is known of the pictures to draw.

    image: float32 (n, 3, H, W) in [-1, 1], where `mask` is 0 without meaning.
    mask: float32 (n, 1, H, W), 1 where a pixel is known, else 0.
    """

    image: Tensor
    mask: Tensor

    def expanded(self, count: int) -> "KnownPixels":
        """For `count` pictures.

        Raises:
            ValueError: there are neither 1 nor `count` images or masks.
        """
        for name, tensor in (("inpaint_image", self.image), ("inpaint_mask", self.mask)):
            if len(tensor) not in (1, count):
                raise ValueError(f"{name} holds {len(tensor)} for {count}: give 1 or {count}")
        image, mask = (part.expand(count, -1, -1, -1) for part in (self.image, self.mask))
        return KnownPixels(image, mask)

    def part(self, pictures: slice) -> "KnownPixels":
        """Of some of the pictures."""
        return KnownPixels(self.image[pictures], self.mask[pictures])

    def put_back(self, pictures: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) with the known pixels as they are."""
        known = self.to(pictures.device)
        return torch.where(known.mask == 1, known.image.to(pictures.dtype), pictures)

    def to(self, device: torch.device | str) -> "KnownPixels":
        """The same on a device."""
        return KnownPixels(self.image.to(device), self.mask.to(device))


def read_known_pixels(
    image: str | Path | Tensor, mask: str | Path | Tensor, size: tuple[int, int]
) -> KnownPixels:
    """The known part of an image at `size` (width, height).

    Files are cropped at their centre to the shape of `size` and resized, both in the same way. A
    pixel is known where the mask is black all over it; what is grey counts as the nearer of black
    and white, what is transparent as white.

    Args:
        image: a file, or float32 (1 or n, 3, H, W) in [-1, 1].
        mask: a file, white where to repaint, of the size of the image's; or float32
            (1 or n, 1, H, W), 1 where known.

    Raises:
        ValueError: a file cannot be read, the two have different sizes, a mask has nothing to
            repaint, or tensors have other shapes.
    """
    image, mask = (s if torch.is_tensor(s) else Path(s).expanduser() for s in (image, mask))
    if isinstance(image, Path) and isinstance(mask, Path):
        _check_same_size(image, mask)
    if isinstance(image, Path):
        image = images.read_image(image, size)
    if isinstance(mask, Path):
        white = images.read_mask(mask, size)
        if not white.any():
            raise ValueError(
                f"the mask {mask} has nothing white in what is drawn: make white where to paint"
            )
        mask = 1 - white
    height, width = size[::-1]
    for name, tensor, channels in (("inpaint_image", image, 3), ("inpaint_mask", mask, 1)):
        if tensor.ndim != 4 or tensor.shape[1:] != (channels, height, width):
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; (n, {channels}, {height}, {width}) is "
                "needed"
            )
    return KnownPixels(image, mask)


def _check_same_size(image: Path, mask: Path) -> None:
    wanted, found = (f"{w}x{h}" for w, h in map(_size, (image, mask)))
    if found != wanted:
        raise ValueError(
            f"the mask {mask} has {found} pixels, the image {image} {wanted}: give a mask of the "
            "image's size"
        )


def _size(path: Path) -> tuple[int, int]:
    try:
        return upright_size(path)
    except BadSample as error:
        raise ValueError(f"cannot read {path}: {error}") from None
