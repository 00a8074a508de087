"""GLIDE text-to-image: networks, diffusion process, samplers, tokenizers and noisy CLIP."""
