"""The noise-aware CLIP that can guide GLIDE."""
