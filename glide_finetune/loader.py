"""The name under which notebooks import the data set of a folder."""

from glide_finetune.data.folder_dataset import TextImageDataset

__all__ = ["TextImageDataset"]
