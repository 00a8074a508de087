"""The noise-aware CLIP: similarity of captions and noised images, and guidance by its gradient."""

import math
from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

from glide_text2im.clip.encoders import ImageEncoder, TextEncoder
from glide_text2im.tokenizer.simple_tokenizer import SimpleTokenizer

_DEFAULT_CONFIG = Path(__file__).with_name("config.yaml")


class CLIPModel(nn.Module):
    """A text encoder and a noise-aware image encoder with one shared embedding space.

    The released checkpoints load into `text_encoder` and `image_encoder`. `logit_scale` is a
    trainable scalar that holds the logarithm of the factor of the similarities; `config` is the
    dict of options with the keys of `config.yaml`.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = config
        self.tokenizer = SimpleTokenizer()
        self.text_encoder = TextEncoder(
            n_vocab=config["n_vocab"],
            max_text_len=config["max_text_len"],
            n_head=config["n_head_text"],
            n_head_state=config["n_head_state_text"],
            n_block=config["n_xf_blocks_text"],
            n_embd=config["n_embd"],
        )
        self.image_encoder = ImageEncoder(
            image_size=config["image_size"],
            patch_size=config["patch_size"],
            n_timestep=config["n_timesteps"],
            n_head=config["n_head_image"],
            n_head_state=config["n_head_state_image"],
            n_block=config["n_xf_blocks_image"],
            n_embd=config["n_embd"],
        )
        self.logit_scale = nn.Parameter(torch.tensor(math.log(config["logit_scale"])))

    def encode_prompts(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Tokens [B, max_text_len] and their lengths [B], int64, on the model's device.

        A prompt that is too long is cut.
        """
        tokens, lengths = [], []
        for prompt in prompts:
            row, length = self.tokenizer.padded_tokens_and_len(
                self.tokenizer.encode(prompt), self.config["max_text_len"]
            )
            tokens.append(row)
            lengths.append(length)
        device = self.logit_scale.device
        return torch.tensor(tokens, device=device), torch.tensor(lengths, device=device)

    def text_embeddings(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings of the prompts, [B, n_embd] of length 1, float32."""
        return F.normalize(self.text_encoder(*self.encode_prompts(prompts)).float(), dim=-1)

    def image_embeddings(self, images: Tensor, t: Tensor) -> Tensor:
        """Embeddings of noised images, [B, n_embd] of length 1, float32.

        images: [B, 3, image_size, image_size], [-1, 1] before the noise. t: [B] whole timesteps.
        """
        return F.normalize(self.image_encoder((images + 1) * 127.5, t).float(), dim=-1)

    def cond_fn(self, prompts: Sequence[str], grad_scale: float) -> Callable[..., Tensor]:
        """A guidance function for the samplers, for as many images as there are prompts.

        `cond_fn(...)(x, t)` is grad_scale times the gradient, with respect to the noised images
        x [B, 3, image_size, image_size], of the scaled similarities' sum at the original timesteps
        t [B]. It can be called while gradients are off, leaves those of the parameters alone, and
        ignores the samplers' model arguments.
        """
        with torch.inference_mode(False), torch.no_grad():
            text = self.text_embeddings(prompts)

        def similarity_gradient(x: Tensor, t: Tensor, **_model_kwargs: Any) -> Tensor:
            if len(x) != len(prompts):
                raise ValueError(f"cond_fn is for {len(prompts)} prompts, got {len(x)} images")
            with torch.inference_mode(False), torch.enable_grad():
                # Clones, since tensors made in inference mode cannot take part in a graph.
                x = x.detach().clone().requires_grad_()
                similarities = text * self.image_embeddings(x, t.clone())
                (gradient,) = torch.autograd.grad(self.logit_scale.exp() * similarities.sum(), x)
            return grad_scale * gradient

        return similarity_gradient


def create_clip_model(
    config_path: str | PathLike | None = None,
    device: torch.device | str | None = None,
) -> CLIPModel:
    """A CLIPModel with random weights, on `device` or else torch's default device.

    config_path is a YAML file with the keys of `config.yaml` beside this module, which describes
    the released model and is used without a path. Raises ValueError for other keys.
    """
    config = _read_config(config_path or _DEFAULT_CONFIG)
    with torch.device(device or torch.get_default_device()):
        return CLIPModel(config)


def _read_config(path: str | PathLike) -> dict[str, Any]:
    config = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    expected = yaml.safe_load(_DEFAULT_CONFIG.read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise ValueError(f"{path} is no CLIP configuration: expected a mapping of options")
    if wrong := sorted(config.keys() ^ expected.keys()):
        raise ValueError(f"{path} is no CLIP configuration: missing or unknown {', '.join(wrong)}")
    return config
