"""A very small model, batches for it, and a trainer, for tests of training."""

from pathlib import Path

import pytest
import torch

from glide_finetune.config import TrainConfig
from glide_finetune.fp16_util import keep_in_bf16
from glide_finetune.glide_util import load_model
from glide_finetune.metrics import MetricsLog
from glide_finetune.optimization import make_optimizer
from glide_finetune.trainer import Trainer

OPTIONS = {
    "image_size": 16,
    "channel_mult": "1,2",
    "num_channels": 32,
    "num_res_blocks": 1,
    "num_head_channels": 16,
    "attention_resolutions": "8",
    "text_ctx": 8,
    "xf_width": 32,
    "xf_layers": 1,
    "xf_heads": 2,
}
SIDE = 8  # pixels of the images, small for speed

on_every_device = pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.cuda,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
            ],
        ),
    ],
)


def tiny_model(model_type="base", seed=0, **keywords):
    """What `load_model` returns, from scratch; the layers that start at zero filled at random, so
    that gradients reach everything."""
    torch.manual_seed(seed)
    options = {**OPTIONS, **keywords.pop("options", {})}
    model, diffusion, options = load_model(
        model_type=model_type, init="scratch", model_options=options, **keywords
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.copy_(0.02 * torch.randn(parameter.shape))  # in any memory layout
    return model, diffusion, options


def tiny_batch(size=4, seed=0, upsample=False, keys=False):
    """Batches as the loaders give them; the colour of an image follows from its first token."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 1000, (size, OPTIONS["text_ctx"]), generator=generator)
    mask = torch.rand(tokens.shape, generator=generator) < 0.7
    colours = torch.tensor([[0.9, -0.9, -0.5], [-0.8, 0.7, 0.9]])[tokens[:, 0] % 2]
    images = colours[:, :, None, None] + 0.1 * torch.randn(
        (size, 3, SIDE, SIDE), generator=generator
    )
    images = images.clamp(-1, 1)
    batch = [tokens, mask, images]
    if upsample:
        batch.insert(2, torch.nn.functional.avg_pool2d(images, 4))
    if keys:
        batch.append([f"{seed}-{index}.png" for index in range(size)])
    return tuple(batch)


def tiny_trainer(folder: Path, model_type="base", *, load=None, log=None, device="cpu", **settings):
    """A trainer over a tiny model; `load` are keywords of `tiny_model`, `settings` the config's."""
    callbacks = {name: settings.pop(name, None) for name in ("draw_samples", "validate")}
    model, diffusion, options = tiny_model(model_type, device=device, **(load or {}))
    upsample = model_type.startswith("upsample")
    config = TrainConfig(
        **{
            "learning_rate": 1e-3,
            "train_upsample": upsample,
            "train_inpaint": model_type.endswith("-inpaint"),
            "side_x": SIDE // 4 if upsample else SIDE,
            "side_y": SIDE // 4 if upsample else SIDE,
            **settings,
        }
    )
    if config.low_memory:
        keep_in_bf16(model)
    return Trainer(
        model,
        diffusion,
        make_optimizer(model, config.learning_rate, config.adam_weight_decay, config.seed),
        config,
        options=options,
        device=device,
        run_folder=folder,
        log=log or MetricsLog(None),
        **callbacks,
    )


def weights_of(model):
    """A copy of the weights."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_weights(got, want):
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert torch.equal(got[name], tensor), name
