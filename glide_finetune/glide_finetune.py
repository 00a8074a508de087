"""Training steps and epochs as functions, for scripts and notebooks of your own."""

import contextlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from glide_finetune.batch_losses import batch_losses
from glide_finetune.config import TrainConfig
from glide_finetune.data.images import read_image
from glide_finetune.metrics import MetricsLog, read_metrics
from glide_finetune.random_state import seeded
from glide_finetune.samples import SampleDrawer
from glide_finetune.steps import Progress
from glide_finetune.trainer import Trainer
from glide_text2im.gaussian_diffusion import GaussianDiffusion


def base_train_step(
    glide_model: nn.Module,
    glide_diffusion: GaussianDiffusion,
    batch: Sequence[torch.Tensor],
    device: torch.device | str,
    *,
    timesteps: torch.Tensor | None = None,
    noise: torch.Tensor | None = None,
    inpaint_mask: torch.Tensor | None = None,
    vlb_weight: float = 0.0,
    loss_weighting: str = "none",
) -> torch.Tensor:
    """The training loss of one batch; calling `.backward()` on it is left to the caller.

    Args:
        glide_model: a base or base-inpaint model on `device`.
        glide_diffusion: the process it is trained on.
        batch: tokens int64 (B, T), mask bool (B, T), images float32 (B, 3, H, W) in [-1, 1].
        timesteps: int64 (B,); None draws them uniformly from all timesteps.
        noise: like the images; None draws it.
        inpaint_mask: for an inpainting model, float32 (B, 1, H, W), 1 where a pixel is known; None
            draws it as train_glide.py does.
        vlb_weight: of the variational bound, which alone trains the variance. With the default of
            0 the variance stays untrained, and samplers that use it, such as ddpm, draw worse the
            longer you train; 0.001 is what `run_glide_finetune_epoch` and train_glide.py take.
        loss_weighting: none, min_snr or soft_min_snr.

    Returns:
        The mean loss, a float32 scalar.

    Raises:
        ValueError: a timestep is out of range, or the noise has another shape than the images.
    """
    last = glide_diffusion.num_timesteps - 1
    if timesteps is not None and not 0 <= timesteps.min() <= timesteps.max() <= last:
        raise ValueError(f"timesteps are {timesteps.tolist()}: give some from 0 to {last}")
    losses, _ = batch_losses(
        glide_model, glide_diffusion, batch, device, timesteps=timesteps, noise=noise,
        inpaint_mask=inpaint_mask, vlb_weight=vlb_weight, loss_weighting=loss_weighting,
    )  # fmt: skip
    return losses.loss.mean()


def upsample_train_step(
    glide_model: nn.Module,
    glide_diffusion: GaussianDiffusion,
    batch: Sequence[torch.Tensor],
    device: torch.device | str,
    **keywords: Any,
) -> torch.Tensor:
    """As `base_train_step`, for an upsampler or its inpainting variant.

    Args:
        batch: tokens, mask, low_res float32 (B, 3, h, w), images float32 (B, 3, H, W).
        keywords: those of `base_train_step`.
    """
    return base_train_step(glide_model, glide_diffusion, batch, device, **keywords)


def run_glide_finetune_epoch(
    glide_model: nn.Module,
    glide_diffusion: GaussianDiffusion,
    glide_options: dict[str, Any],
    dataloader: Iterable,
    optimizer: torch.optim.Optimizer,
    sample_bs: int,
    sample_gs: float = 4.0,
    sample_respacing: str = "100",
    prompt: str = "",
    side_x: int = 64,
    side_y: int = 64,
    outputs_dir: str = "./outputs",
    checkpoints_dir: str = "./finetune_checkpoints",
    device: torch.device | str = "cpu",
    log_frequency: int = 100,
    wandb_run: Any = None,
    gradient_accumualation_steps: int = 1,
    epoch: int = 0,
    train_upsample: bool = False,
    upsample_factor: int = 4,
    image_to_upsample: str = "",
    *,
    gradient_accumulation_steps: int | None = None,
    vlb_weight: float = 0.001,
    max_grad_norm: float = 1.0,
    save_checkpoint_interval: int = 5000,
    keep_checkpoints: int = 0,
) -> None:
    """Train for one epoch, with sample grids on the way and a checkpoint at its end, or where it is
    interrupted.

    Steps are counted over all epochs: an epoch goes on where metrics.jsonl ends. Draws follow from
    torch's random state at the start, which moves on by one number; other draws of the caller stay
    the same.

    Args:
        glide_model, glide_diffusion, glide_options: as `load_model` returns them.
        dataloader: gives batches as the train steps above take them. If it or its dataset,
            also within `Subset` and the like, has `set_epoch`, that is called, so that every epoch
            has crops and captions of its own.
        optimizer: over the parameters that train; its learning rates are left as they are.
        sample_bs: pictures of each sample grid; sample_gs their guidance, sample_respacing their
            timesteps, prompt their caption.
        side_x, side_y: of the base image in pixels, also for the upsampler.
        outputs_dir: where the grids go.
        checkpoints_dir: where metrics.jsonl and the checkpoint go.
        log_frequency: steps between grids, 0 for none.
        wandb_run: takes the metrics and grids, if given: of `wandb_setup` or `wandb.init`.
        gradient_accumualation_steps: batches of an optimizer step; the right spelling works too.
        epoch: counted from 0, for logs and `set_epoch`, which gets the number of steps so far
            where every call leaves it at 0; the checkpoint's name counts those that are complete,
            this one included.
        train_upsample: the batches are (tokens, mask, low_res, images).
        upsample_factor: how many times larger than side_x and side_y the upsampler's images are.
        image_to_upsample: file for the upsampler's grids; without it there are none. A base model
            takes no notice of it.
        vlb_weight, max_grad_norm: as the flags of train_glide.py.
        save_checkpoint_interval: steps between further checkpoints, 0 for none.
        keep_checkpoints: delete all but so many of the newest checkpoints, which take three times
            the bytes of the weights each; 0 keeps all.

    Raises:
        ValueError: the dataloader is empty, arguments contradict each other or the model, or its
            weights are float16.
        TrainingDiverged: the loss has not been finite for many steps.
    """
    if train_upsample != glide_options["super_res"]:
        raise ValueError(
            f"train_upsample is {train_upsample}, but the model is "
            f"{'an upsampler' if glide_options['super_res'] else 'a base model'}"
        )
    accumulation = gradient_accumualation_steps
    if gradient_accumulation_steps is not None:
        if accumulation not in (1, gradient_accumulation_steps):
            raise ValueError("gradient_accumulation_steps is given twice, in both spellings")
        accumulation = gradient_accumulation_steps
    if accumulation < 1:
        raise ValueError(f"gradient_accumulation_steps is {accumulation}: give 1 or more")
    use_fp16 = glide_options["use_fp16"]
    config = TrainConfig(
        epochs=epoch + 1,
        batch_size=getattr(dataloader, "batch_size", None) or 1,
        gradient_accumulation_steps=accumulation,
        vlb_weight=vlb_weight,
        max_grad_norm=max_grad_norm,
        use_fp16=use_fp16,
        precision="fp16" if use_fp16 else "fp32",
        train_upsample=train_upsample,
        train_inpaint=glide_options["inpaint"],
        upscale_factor=upsample_factor,
        side_x=side_x,
        side_y=side_y,
        test_prompt=prompt,
        test_batch_size=sample_bs,
        test_guidance_scale=sample_gs,
        log_frequency=log_frequency,
        save_checkpoint_interval=save_checkpoint_interval,
        keep_checkpoints=keep_checkpoints,
        seed=int(torch.randint(2**31, ())),
    )
    run_folder = Path(checkpoints_dir)
    run_folder.mkdir(parents=True, exist_ok=True)
    step = max((line["step"] for line in read_metrics(run_folder)), default=0)
    low_res = None
    if train_upsample and image_to_upsample:
        low_res = read_image(image_to_upsample, (side_x, side_y))
    draw_samples = None
    if log_frequency and not (train_upsample and low_res is None):
        draw_samples = SampleDrawer(
            config, glide_options, Path(outputs_dir), low_res, sample_respacing
        )
    log = MetricsLog(run_folder, resume_step=step, wandb_run=wandb_run)
    with contextlib.closing(log), seeded(config.seed, torch.device(device)):
        trainer = Trainer(
            glide_model.to(device),
            glide_diffusion,
            optimizer,
            config,
            options=glide_options,
            device=device,
            run_folder=run_folder,
            log=log,
            draw_samples=draw_samples,
        )
        trainer.progress = Progress(epoch=epoch, step=step, first_step=step)
        try:
            with trainer.display(dataloader) as display:
                trainer.run_epoch(dataloader, display, data_epoch=epoch or step)
            trainer.finish()
        except KeyboardInterrupt:
            trainer.save_what_is_made()
            raise
        finally:
            trainer.wait_for_checkpoint()
