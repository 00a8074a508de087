"""The contrastive loss of CLIP: in a batch every image shall find its caption, and the reverse."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

MOST_LOGIT_SCALE = math.log(100)  # sharper similarities make training unstable (CLIP, section 2.5)


@dataclass(frozen=True)
class ContrastiveLosses:
    """The terms of every pair of a batch, each float32 [B].

    loss: the mean of the cross entropies of finding the caption for the image and the image for
        the caption.
    top1: 1 where the image's own caption is the most similar one, else 0.
    """

    loss: Tensor
    top1: Tensor

    @property
    def terms(self) -> dict[str, Tensor]:
        """All of them, by their names in the log."""
        return {"loss": self.loss, "top1": self.top1}


def contrastive_losses(
    images: Tensor, texts: Tensor, logit_scale: Tensor, same_caption: Tensor
) -> ContrastiveLosses:
    """The symmetric loss of CLIP (Radford et al. 2021, arXiv:2103.00020) over one batch.

    Pairs with the same caption are no negatives of each other, as no model could tell which of
    the two an image belongs to: they are left out of each other's cross entropies.

    Args:
        images, texts: embeddings of length 1, [B, n_embd], the pairs in the same order; all
            arithmetic on them is float32, under autocast too.
        logit_scale: the logarithm of the factor of the similarities, a scalar.
        same_caption: bool [B, B], which pairs have the same caption; True on the diagonal.
    """
    with torch.autocast(images.device.type, enabled=False):
        logits = logit_scale.float().exp() * images.float() @ texts.float().T  # [image, text]
    own = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    logits = logits.masked_fill(same_caption & ~own, -math.inf)
    targets = torch.arange(len(logits), device=logits.device)
    text_of_image = F.cross_entropy(logits, targets, reduction="none")
    image_of_text = F.cross_entropy(logits.T, targets, reduction="none")
    found = logits.argmax(dim=1) == targets
    return ContrastiveLosses((text_of_image + image_of_text) / 2, found.float())
