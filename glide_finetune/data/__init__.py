"""From files and shards to batches: finding, decoding, cropping, captions and their order."""
