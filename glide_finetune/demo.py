"""The settings of --demo: a small model that learns drawn shapes in minutes on a CPU.

Nothing here imports torch.
"""

import itertools
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glide_finetune.atomic_files import atomic_file
from glide_finetune.demo_data import COLOURS, POSITIONS, SHAPES, demo_captions, write_demo_set

if TYPE_CHECKING:
    from glide_finetune.config import TrainConfig

DEMO_FOLDER = "glide_demo"

IMAGE_SIZE = 32
STEPS = 1300


def fast_precision() -> str:
    """bf16 where the processor has instructions for it; elsewhere it would not be faster."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:  # not on Linux
        return "fp32"
    return "bf16" if re.search(r"\b(avx512_bf16|amx_bf16)\b", flags) else "fp32"


# What --demo changes of the defaults, beside the precision; flags given beside it still win.
DEMO_SETTINGS: dict[str, Any] = {
    "data_dir": f"{DEMO_FOLDER}/shapes",
    "prompt_file": f"{DEMO_FOLDER}/prompts.txt",
    "checkpoints_dir": f"{DEMO_FOLDER}/runs",
    "init": "scratch",
    "model_preset": "small",
    "model_options": {
        "image_size": IMAGE_SIZE,
        # Two channels in each of the 32 groups of a norm: with one, norms would take away the
        # colour of the whole picture, and the model draws on backgrounds of any colour.
        "num_channels": 64,
        "channel_mult": "1,1,2",
        "num_res_blocks": 1,
        "num_head_channels": 32,
        "attention_resolutions": "8",
        "resblock_updown": False,
        "text_ctx": 16,
        "xf_width": 64,
        "xf_layers": 2,
        "xf_heads": 2,
        "dropout": 0.0,
    },
    "side_x": IMAGE_SIZE,
    "side_y": IMAGE_SIZE,
    "batch_size": 16,
    "learning_rate": 1.5e-3,
    "lr_schedule": "cosine",
    "warmup_steps": 100,
    "max_steps": STEPS,
    "epochs": 1000,
    "ema_rate": 0.995,
    "loss_weighting": "soft_min_snr",
    "resize_ratio": 1.0,
    "uncond_p": 0.1,
    "log_frequency": STEPS,
    "save_checkpoint_interval": 500,
    "test_batch_size": 4,
    "test_guidance_scale": 3.0,
    # Fresh noise mends what so short a training leaves wrong.
    "test_sampler": "dpm++2m_sde",
}


def prompts() -> list[str]:
    """The captions of the demo's samples: every colour and shape, none of them twice."""
    captions = {(colour, shape, place): text for text, colour, shape, place in demo_captions()}
    places = itertools.cycle(POSITIONS)
    shapes = itertools.cycle(SHAPES)
    return [captions[colour, next(shapes), next(places)] for colour in [*COLOURS, *COLOURS]]


def prepare(config: "TrainConfig") -> None:
    """Draw the demo's pictures and write its prompts, unless they are there or other ones are asked
    for.

    Raises:
        ValueError: the folder of the demo holds something else.
    """
    if config.data_dir == DEMO_SETTINGS["data_dir"]:
        write_demo_set(config.data_dir, image_size=IMAGE_SIZE)
    if config.prompt_file == DEMO_SETTINGS["prompt_file"]:
        path = Path(config.prompt_file)
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():  # else the user may have changed it
            with atomic_file(path) as file:
                file.write(("\n".join(prompts()) + "\n").encode())
