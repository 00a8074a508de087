"""Images and captions from WebDataset tar shards."""

import os
from collections.abc import Sequence

from glide_finetune.config import DATASET_NAMES
from glide_finetune.data.captions import Tokenizer
from glide_finetune.data.sample_recipe import SampleRecipe
from glide_finetune.data.shard_stream import Rejection, ShardStream
from glide_finetune.data.shards import Urls, expand_shards
from glide_finetune.data.wds_filter import LaionFilter, reject_other_languages


def _suffix(key: str) -> str:
    """As members have it in `TarSample`, whose suffixes are in small letters and have no dot."""
    return key.lower().removeprefix(".")


def glide_wds_loader(
    urls: Urls,
    enable_text: bool = True,
    enable_image: bool = True,
    enable_metadata: bool = True,
    image_key: str = "jpg",
    caption_key: str = "txt",
    metadata_key: str = "json",
    cache_path: str | os.PathLike | None = None,
    tokenizer: Tokenizer | None = None,
    base_x: int = 64,
    base_y: int = 64,
    uncond_p: float = 0.2,
    nsfw_filter: bool = True,
    ar_lower: float = 0.5,
    ar_upper: float = 2.0,
    min_original_height: int = 256,
    min_original_width: int = 256,
    enable_upsample: bool = False,
    similarity_threshold_upper: float | None = None,
    similarity_threshold_lower: float | None = None,
    words_to_skip: Sequence[str] = (),
    dataset_name: str = "laion",
    upscale_factor: int = 4,
    *,
    seed: int = 0,
    epoch: int | None = None,
    resize_ratio: float = 0.8,
    random_hflip: bool = False,
    shuffle_buffer: int = 1000,
    return_keys: bool = False,
    text_ctx_len: int = 128,
) -> ShardStream:
    """An iterable of (tokens, mask, image) or, with `enable_upsample`, (tokens, mask, low_res,
    high_res) from tar shards, shapes and ranges as in `TextImageDataset`.

    Args:
        urls: shards as `expand_shards` takes them: files, folders, globs, brace patterns, lists,
            URLs, `pipe:` commands.
        enable_text: False gives every sample the empty caption and asks for none.
        enable_image: False gives (tokens, mask) alone.
        enable_metadata: False reads no metadata and so filters by none.
        image_key, caption_key, metadata_key: suffixes of a sample's members.
        cache_path: folder in which shards at URLs are kept; None reads them anew each time.
        tokenizer: None means GLIDE's own.
        base_x, base_y: width and height of the base image.
        uncond_p: chance of replacing a caption by the empty one.
        nsfw_filter: leave out what LAION rates NSFW or LIKELY, or unsafe by `PUNSAFE_LIMIT`.
        ar_lower, ar_upper: limits of original width / height, included.
        min_original_height, min_original_width: in pixels, included.
        similarity_threshold_lower, similarity_threshold_upper: limits of LAION's similarity,
            included; None for no limit.
        words_to_skip: captions with one of these words or phrases are left out.
        dataset_name: laion filters by its metadata; alamy takes the caption from the metadata and
            only English ones; generic takes image and caption as they are. For each of them, the
            metadata that `glide_finetune.prepare` writes may list several captions, of which one
            is drawn each time.
        upscale_factor: of the upsampler's high-res image.
        seed: what all draws and orders derive from, together with the epoch.
        epoch: every iteration gives the items of this epoch in its order, until `set_epoch(epoch)`
            is called on the result. None makes each iteration an epoch of its own, drawn from
            torch's random state; but not in a distributed run, whose processes have to agree: call
            `set_epoch` there.
        resize_ratio, random_hflip: as in `SampleRecipe`.
        shuffle_buffer: encoded samples held by each worker to shuffle, fewer where they take more
            than `shard_stream.BUFFER_BYTES`; also shuffles the order of the shards. 0 leaves
            everything in stored order.
        return_keys: add "SHARD/KEY" as the last value of each item.
        text_ctx_len: tokens of a caption.

    Shards are divided among the processes of a distributed run, torch.distributed's or those that
    RANK and WORLD_SIZE in the environment tell, and their DataLoader workers. Samples and shards
    that cannot be read are skipped with a warning. A sample without a caption member is filtered; a
    blank or broken caption cannot be read. Raises ValueError for shards that do not exist or are
    fewer than the processes, for bad settings, and while iterating when nothing passes the filters,
    with counts.
    """
    if dataset_name not in DATASET_NAMES:
        known = ", ".join(DATASET_NAMES)
        raise ValueError(f"unknown WebDataset name {dataset_name!r}: choose one of {known}")
    if shuffle_buffer < 0:
        raise ValueError(f"shuffle_buffer must be at least 0, not {shuffle_buffer}")
    reason_to_reject: Rejection | None = None
    if enable_metadata and dataset_name == "laion":
        reason_to_reject = LaionFilter(
            nsfw_filter=nsfw_filter,
            ar_lower=ar_lower,
            ar_upper=ar_upper,
            min_original_width=min_original_width,
            min_original_height=min_original_height,
            similarity_threshold_lower=similarity_threshold_lower,
            similarity_threshold_upper=similarity_threshold_upper,
        ).reason_to_reject
    elif enable_metadata and dataset_name == "alamy":
        reason_to_reject = reject_other_languages
    caption_in_metadata = enable_text and enable_metadata and dataset_name == "alamy"
    recipe = SampleRecipe(
        side_x=base_x,
        side_y=base_y,
        resize_ratio=resize_ratio,
        uncond_p=uncond_p,
        upscale_factor=upscale_factor if enable_upsample else None,
        random_hflip=random_hflip,
        tokenizer=tokenizer,
        text_ctx_len=text_ctx_len,
    )
    return ShardStream(
        expand_shards(urls),
        recipe,
        image_key=_suffix(image_key) if enable_image else None,
        caption_key=_suffix(caption_key) if enable_text and not caption_in_metadata else None,
        metadata_key=_suffix(metadata_key) if enable_metadata else None,
        caption_in_metadata=caption_in_metadata,
        reason_to_reject=reason_to_reject,
        words_to_skip=words_to_skip,
        cache_path=cache_path,
        seed=seed,
        epoch=epoch,
        shuffle_buffer=shuffle_buffer,
        return_keys=return_keys,
    )
