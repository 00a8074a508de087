"""Training the noise-aware CLIP of GLIDE (section 4.1): model, loss, figures and files.

The image encoder sees pictures noised by the diffusion process at a random timestep and is told
the timestep, so that its gradient can guide sampling from the first step on.
"""

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glide_finetune.clip_weights import make_clip, write_encoders
from glide_finetune.contrastive import MOST_LOGIT_SCALE, ContrastiveLosses, contrastive_losses
from glide_finetune.data.caption_split import split_by_caption
from glide_finetune.data_report import report_data
from glide_finetune.evaluation import evaluation_mode
from glide_finetune.noisy_clip_config import ClipConfig
from glide_finetune.optimization import make_optimizer
from glide_finetune.origin import Origin
from glide_finetune.trainer import Trainer
from glide_finetune.training_data import make_training_data
from glide_finetune.training_run import Job
from glide_finetune.validation import fixed_items
from glide_text2im.clip.model_creation import CLIPModel
from glide_text2im.gaussian_diffusion import GaussianDiffusion
from glide_text2im.model_creation import create_gaussian_diffusion
from glide_text2im.tokenizer.simple_tokenizer import SimpleTokenizer

logger = logging.getLogger(__name__)

MOST_PAIRS = 100  # among which a picture's caption is to be found in validation
LOW_NOISE_TIMESTEP = 50  # of 1000: the picture is nearly clean


class ClipTokens:
    """CLIP's tokenizer in the form the loaders use; start and end token count as the caption's."""

    def __init__(self) -> None:
        self._tokenizer = SimpleTokenizer()

    def encode(self, text: str) -> list[int]:
        """Start token, the tokens of `text`, end token."""
        return [self._tokenizer.start_token, *self._tokenizer.encode(text), self._end]

    def padded_tokens_and_mask(
        self, tokens: list[int], text_ctx: int
    ) -> tuple[list[int], list[bool]]:
        """`tokens` padded with zeros, and True for each that is no padding. Of those that fill the
        context, cut or not, the last one becomes the end token."""
        row = [*tokens[: text_ctx - 1], self._end]
        if len(tokens) < text_ctx:
            row = tokens
        padding = text_ctx - len(row)
        return [*row, *[0] * padding], [True] * len(row) + [False] * padding

    def decode(self, tokens: list[int]) -> str:
        """The text between start and end token, with a space after every word."""
        return self._tokenizer.decode(tokens[1:-1])

    @property
    def _end(self) -> int:
        return self._tokenizer.end_token


def clip_losses(
    model: CLIPModel,
    diffusion: GaussianDiffusion,
    batch: Sequence[Any],
    device: torch.device | str,
    *,
    timesteps: Tensor | None = None,
    noise: Tensor | None = None,
) -> tuple[ContrastiveLosses, Tensor]:
    """The contrastive losses of a batch of noised pictures, and their timesteps.

    The captions of the other pairs in this batch are what each caption competes with.

    Args:
        batch: tokens int64 (B, T) and mask bool (B, T) of `ClipTokens`, images float32
            (B, 3, image_size, image_size) in [-1, 1]; keys after them are ignored.
        timesteps: int64 (B,); None draws them uniformly from all timesteps.
        noise: like the images; None draws it.
    """
    tokens, mask, images = (p.to(device, non_blocking=True) for p in batch if torch.is_tensor(p))
    if timesteps is None:
        timesteps = torch.randint(0, diffusion.num_timesteps, (len(images),), device=device)
    timesteps = timesteps.to(device)
    noised = diffusion.q_sample(images, timesteps, None if noise is None else noise.to(device))
    texts = torch.nn.functional.normalize(
        model.text_encoder(tokens, mask.sum(dim=1)).float(), dim=-1
    )
    same_caption = (tokens[:, None] == tokens[None]).all(dim=-1)
    losses = contrastive_losses(
        model.image_embeddings(noised, timesteps), texts, model.logit_scale, same_caption
    )
    return losses, timesteps


class RetrievalValidator:
    """How often the caption of a held-out picture at low noise is the most similar one among those
    of all held-out pictures, each with the same noise for ever.

    Of several pictures with the same caption one is used, so that chance is 1 / pairs; at most
    `MOST_PAIRS`.

    Args:
        dataset: as of `Validator`, with CLIP's tokens.
        seed: of the noise.

    Raises:
        ValueError: there are not two captions in it.
    """

    def __init__(self, dataset: Iterable, seed: int) -> None:
        items = [[part for part in item if torch.is_tensor(part)] for item in fixed_items(dataset)]
        different = list({tuple(item[0].tolist()): item for item in items}.values())
        if len(different) < 2:
            raise ValueError(
                "the validation data has fewer than two different captions: give more of it"
            )
        count = min(len(different), MOST_PAIRS)
        pairs = [different[place * len(different) // count] for place in range(count)]
        self._batch = [torch.stack(parts) for parts in zip(*pairs, strict=True)]
        generator = torch.Generator().manual_seed(seed)
        self._noise = torch.randn(self._batch[-1].shape, generator=generator)

    def __call__(self, trainer: Trainer) -> dict[str, float]:
        """val/retrieval_top1, val/retrieval_pairs and val/loss, of the averaged weights where the
        trainer keeps them as val_ema/…, and the factor of the similarities, logit_scale."""
        metrics = {"logit_scale": trainer.model.logit_scale.exp().item()}
        metrics |= self._metrics(trainer, "val")
        if trainer.ema:
            with trainer.ema.applied():
                metrics |= self._metrics(trainer, "val_ema")
        return metrics

    def _metrics(self, trainer: Trainer, name: str) -> dict[str, float]:
        pairs = len(self._noise)
        # timesteps count from 0, so that this is the same noise whatever n_timesteps is
        timestep = LOW_NOISE_TIMESTEP * trainer.diffusion.num_timesteps // 1000
        with evaluation_mode(trainer.model), trainer.precision.autocast():
            losses, _ = clip_losses(
                trainer.model, trainer.diffusion, self._batch, trainer.device,
                timesteps=torch.full((pairs,), timestep), noise=self._noise,
            )  # fmt: skip
        return {
            f"{name}/loss": losses.loss.mean().item(),
            f"{name}/retrieval_top1": losses.top1.mean().item(),
            f"{name}/retrieval_pairs": pairs,
        }


def report_clip_data(config: ClipConfig) -> None:
    """`report_data` of what a CLIP is trained on."""
    report_data(config, tokenizer=ClipTokens(), split=split_by_caption)


def clip_job(config: ClipConfig, origin: Origin, device: torch.device) -> Job:
    """The training of a noise-aware CLIP, for `training_run.run`."""
    options = config.options
    data = make_training_data(config, device, tokenizer=ClipTokens(), split=split_by_caption)
    data.loader.start_workers()
    model = make_clip(config, origin.checkpoint.weights if origin.checkpoint else None, device)
    optimizer = make_optimizer(model, config.learning_rate, config.adam_weight_decay)

    def limit_scale(*_: Any) -> None:
        with torch.no_grad():
            model.logit_scale.clamp_(max=MOST_LOGIT_SCALE)

    optimizer.register_step_post_hook(limit_scale)
    validate = None
    if data.validation is not None:
        validate = RetrievalValidator(data.validation, config.seed)
    trainer = Trainer(
        model,
        create_gaussian_diffusion(options["n_timesteps"], options["beta_schedule"], ""),
        optimizer,
        config,
        options=options,
        device=device,
        validate=validate,
        losses=clip_losses,
    )
    return Job(trainer, data, origin, at_end=_write_encoders)


def _write_encoders(run_folder: Path) -> None:
    if written := write_encoders(run_folder):
        names = ", ".join(path.name for path in written)
        logger.info("in the form of OpenAI's files: %s", names)
