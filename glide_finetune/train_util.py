"""Names that notebooks import: saving weights, tensors and pictures, wandb."""

import os
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from glide_finetune import wandb_run, weights
from glide_finetune.atomic_files import write_json_atomic
from glide_finetune.data import images
from glide_finetune.model_options import description_path, type_of_model

__all__ = ["pil_image_to_norm_tensor", "pred_to_pil", "save_model", "wandb_setup"]


def save_model(glide_model: nn.Module, checkpoints_dir: str, train_idx: int, epoch: int) -> Path:
    """Write the weights to `checkpoints_dir/glide-ft-{epoch}x{train_idx}.pt`; returns that path.

    The options of a model that `load_model` has made go into a JSON beside them, so that it makes
    one of the same size of them.

    Args:
        glide_model: its state_dict is saved in float32.
        checkpoints_dir: made if it is not there.
        train_idx: the optimizer step, for the name.
        epoch: for the name.
    """
    path = Path(checkpoints_dir) / f"glide-ft-{epoch}x{train_idx}.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    weights.write_weights(path, glide_model.state_dict())
    if options := getattr(glide_model, "glide_options", None):
        kind = type_of_model(upsample=options["super_res"], inpaint=options["inpaint"])
        write_json_atomic(description_path(path), {"kind": kind, "model_options": options})
    return path


def pred_to_pil(pred: torch.Tensor) -> Image.Image:
    """A batch of pictures (n, 3, height, width) in [-1, 1] as one image, side by side."""
    return images.to_pil(torch.cat(list(pred), dim=-1))


def pil_image_to_norm_tensor(image: Image.Image) -> torch.Tensor:
    """An image as float32 (3, height, width) in [-1, 1], transparency on white."""
    return images.to_tensor(image)


def wandb_setup(
    batch_size: int,
    side_x: int,
    side_y: int,
    learning_rate: float,
    use_fp16: bool,
    device: Any,
    data_dir: str,
    base_dir: str,
    project_name: str = "glide-finetune",
) -> Any:
    """Begin a wandb run with these settings as its config; its local files go to `base_dir`.

    It is wandb's own, so that `wandb.log` goes to it as well. One that is open is finished first.
    Without a login, or a way to the server, it records offline; if wandb fails, a warning says so,
    and the run keeps nothing.
    """
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # as `WandbRun` has it
    import wandb  # here, as it takes a while

    if wandb.run is not None:  # of an earlier call, which would be returned again
        wandb.run.finish()
    Path(base_dir).mkdir(parents=True, exist_ok=True)  # else wandb writes to a temporary folder
    arguments = {
        "dir": str(base_dir),
        "project": project_name,
        "config": {
            "batch_size": batch_size,
            "side_x": side_x,
            "side_y": side_y,
            "learning_rate": learning_rate,
            "use_fp16": use_fp16,
            "device": str(device),
            "data_dir": str(data_dir),
        },
    }
    try:
        return wandb_run.start(wandb, arguments)
    except Exception as error:
        wandb_run.warn_of_failure(error)
        return wandb.init(mode="disabled")
