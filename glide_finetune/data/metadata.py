"""The metadata of a sample, as shards and the lines of metadata.jsonl hold it."""

import json

from glide_finetune.data.bad_samples import BadSample


def parse_metadata(data: bytes) -> dict:
    """The JSON object of a sample. Raises BadSample for anything else."""
    try:
        metadata = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadSample("the metadata is not JSON", "metadata") from error
    if not isinstance(metadata, dict):
        raise BadSample("the metadata is no JSON object", "metadata")
    return metadata
