"""Fine-tuning of GLIDE on your own pictures and captions."""
