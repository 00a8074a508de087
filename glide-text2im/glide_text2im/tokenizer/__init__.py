"""Tokenizers of GLIDE (GPT-2 byte pairs) and of its noisy CLIP."""
