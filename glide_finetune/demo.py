"""The settings of --demo: a small model that learns drawn shapes in minutes on a CPU.

Nothing here imports torch.
"""

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glide_finetune.demo_data import COLOURS, POSITIONS, SHAPES, demo_captions, write_demo_set

if TYPE_CHECKING:
    from glide_finetune.config import TrainConfig

DEMO_FOLDER = "glide_demo"

# What --demo changes of the defaults; flags given beside it still win.
DEMO_SETTINGS: dict[str, Any] = {
    "data_dir": f"{DEMO_FOLDER}/shapes",
    "prompt_file": f"{DEMO_FOLDER}/prompts.txt",
    "checkpoints_dir": f"{DEMO_FOLDER}/runs",
    "init": "scratch",
    "model_preset": "small",
    "model_options": {
        "image_size": 32,
        "channel_mult": "1,2,2",
        "num_channels": 64,
        "num_res_blocks": 1,
        "num_head_channels": 32,
        "attention_resolutions": "8",
        "text_ctx": 16,
        "xf_width": 128,
        "xf_layers": 2,
        "xf_heads": 4,
        "dropout": 0.0,
    },
    "side_x": 32,
    "side_y": 32,
    "batch_size": 16,
    "learning_rate": 1e-3,
    "lr_schedule": "cosine",
    "warmup_steps": 100,
    "max_steps": 2500,
    "epochs": 1000,
    "ema_rate": 0.999,
    "precision": "bf16",
    "resize_ratio": 1.0,
    "uncond_p": 0.1,
    "log_frequency": 500,
    "save_checkpoint_interval": 1000,
    "test_batch_size": 4,
}


def prompts() -> list[str]:
    """The captions of the demo's samples: every colour and shape, none of them twice."""
    captions = {(colour, shape, place): text for text, colour, shape, place in demo_captions()}
    places = itertools.cycle(POSITIONS)
    shapes = itertools.cycle(SHAPES)
    return [captions[colour, next(shapes), next(places)] for colour in [*COLOURS, *COLOURS]]


def prepare(config: "TrainConfig") -> None:
    """Draw the demo's pictures and write its prompts, unless other ones are asked for.

    Raises:
        ValueError: the folder of the demo holds something else.
    """
    if config.data_dir == DEMO_SETTINGS["data_dir"]:
        write_demo_set(config.data_dir)
    if config.prompt_file == DEMO_SETTINGS["prompt_file"]:
        Path(config.prompt_file).write_text("\n".join(prompts()) + "\n", encoding="utf-8")
