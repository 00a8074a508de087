"""Drawing pictures in two stages, and writing them with all that is needed to draw them again.

From a notebook:

    from glide_finetune.generate_config import GenerateConfig
    from glide_finetune.generation import generate

    paths = generate(GenerateConfig(prompt="a red fox", base="glide_checkpoints/0000"))
"""

import contextlib
import io
import itertools
import json
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image, PngImagePlugin
from torch import nn

from glide_finetune import weights
from glide_finetune.atomic_files import write_new
from glide_finetune.checkpoints import newest_checkpoint
from glide_finetune.clip_weights import read_clip, used_clip
from glide_finetune.config import absolute
from glide_finetune.data import images
from glide_finetune.devices import pick_device
from glide_finetune.fp16_util import Precision
from glide_finetune.generate_config import GenerateConfig, check, check_stage
from glide_finetune.glide_util import load_model
from glide_finetune.model_options import RELEASED, described_model
from glide_finetune.runs import read_args
from glide_finetune.samples import labelled_grid
from glide_finetune.sampling import STALE_VARIANCE, sample
from glide_finetune.seeds import derived_seed
from glide_text2im.clip.model_creation import CLIPModel

logger = logging.getLogger(__name__)

RELEASED_UPSCALE_FACTOR = 4
MOST_SHOWN_OF_CUT = 80  # characters of the end of a caption that is too long
MOST_IN_GRID = 256  # pictures; a grid of thousands could not be looked at, nor always be held


def generate(config: GenerateConfig) -> list[Path]:
    """Draw and write the pictures that `config` asks for, and a grid of them.

    Models are loaded anew by every call; a `Painter` keeps them.

    Args:
        config: has a field for every flag of the command, with its default.

    Returns:
        The PNG files of the pictures, `num_images` of the first caption, then those of the next.
        In each, the texts `prompt`, `seed` and `settings` (JSON) tell how to draw it again. The
        grid, `grid-….png` beside them, shows at most the first `MOST_IN_GRID`.

    Raises:
        ValueError, OSError, DownloadError: with one line for the user.
    """
    check(config)
    folder = Path(config.output_dir).expanduser()
    painter = Painter(config)
    jobs = [
        (prompt, config.seed + number)
        for prompt in config.prompts()
        for number in range(config.num_images)
    ]
    painter.tell_what_is_cut([*config.prompts(), config.negative_prompt])
    folder.mkdir(parents=True, exist_ok=True)
    pictures, paths = [], []
    for first in range(0, len(jobs), config.batch_size):
        prompts, seeds = map(list, zip(*jobs[first : first + config.batch_size], strict=True))
        drawn = painter.draw(prompts, seeds)
        for picture, prompt, seed in zip(drawn, prompts, seeds, strict=True):
            text = {"prompt": prompt, "seed": str(seed), "settings": json.dumps(painter.settings)}
            paths.append(write_numbered(folder, "", images.to_pil(picture), text))
        if first < MOST_IN_GRID:
            pictures.append(drawn)
    shown = torch.cat(pictures)[:MOST_IN_GRID]
    labels = [f"{path.stem} {prompt}" for path, (prompt, _) in zip(paths, jobs, strict=True)]
    grid = labelled_grid(shown, labels[: len(shown)])
    grid_path = write_numbered(folder, "grid-", grid, {})
    which = "all of them" if len(shown) == len(paths) else f"the first {len(shown)}"
    logger.info("drawn: %d, in %s, %s in %s", len(paths), folder, which, grid_path.name)
    return paths


@dataclass(frozen=True)
class Stage:
    """A model to draw with: where its weights came from, the network and its options."""

    source: str
    model: nn.Module
    options: dict[str, Any]


class Painter:
    """The models of a `GenerateConfig`, loaded once, to draw with as often as wanted.

    Where there are two stages, only the one at work is on the device, the other on the CPU.

    Args:
        config: prompts and numbers of pictures in it are not used.

    Attributes:
        settings: what the pictures depend on beside prompt and seed; JSON values, with the paths
            of the files that were really used.

    Raises:
        ValueError, OSError, DownloadError: with one line, about models that cannot be used.
    """

    def __init__(self, config: GenerateConfig) -> None:
        self.config = config
        self.device = pick_device(config.device)
        self._precision = Precision(config.precision, self.device)
        if advice := self._precision.advice:
            logger.info("%s", advice)
        self.base = load_stage("base", config.base, "base", config.inpaint_image)
        self.upsampler: Stage | None = None
        if config.upsampler:
            self.upsampler = load_stage(
                "upsampler", config.upsampler, "upsample", config.inpaint_image
            )
        for stage, sampler in (
            (self.base, config.sampler),
            (self.upsampler, config.upsample_sampler),
        ):
            if stage and sampler == "ddpm" and stage.model.variance_is_stale:
                logger.info("%s: %s", stage.source, STALE_VARIANCE)  # here once, not in every pass
        self.size = self._base_size()
        self.upscale_factor = (
            config.upscale_factor
            or (self.upsampler and _trained(self.upsampler).get("upscale_factor"))
            or RELEASED_UPSCALE_FACTOR
        )
        clip_files = used_clip(config.clip) if config.clip else []
        self.clip = load_clip(clip_files, self.base, self.size, self.device) if clip_files else None
        self.settings = replace(
            config,
            base=self.base.source,
            upsampler=self.upsampler.source if self.upsampler else "",
            clip=clip_files,
            inpaint_image=absolute(config.inpaint_image),
            inpaint_mask=absolute(config.inpaint_mask),
            side_x=self.size[0],
            side_y=self.size[1],
            upscale_factor=self.upscale_factor,
        ).settings()

    def draw(self, prompts: list[str], seeds: list[int]) -> torch.Tensor:
        """A picture of each prompt from the seed beside it, all of them at once, by both stages.

        Returns:
            float32 (n, 3, height, width) in [-1, 1], on the CPU.
        """
        pictures = self.draw_base(prompts, seeds)
        return self.upsample(pictures, prompts, seeds) if self.upsampler else pictures

    def draw_base(self, prompts: list[str], seeds: list[int]) -> torch.Tensor:
        """The base stage of `draw` alone; same result, of the size `self.size`."""
        config = self.config
        width, height = self.size
        with self._at_work(self.base), self._precision.autocast():
            return sample(
                self.base.model,
                self.base.options,
                width,
                height,
                prompts,
                guidance_scale=config.guidance_scale,
                device=self.device,
                prediction_respacing=config.steps,
                sampler=config.sampler,
                negative_prompt=config.negative_prompt,
                guidance_rescale=config.guidance_rescale,
                threshold=config.threshold,
                seeds=seeds,
                pictures_a_pass=len(prompts),
                inpaint_image=config.inpaint_image,
                inpaint_mask=config.inpaint_mask,
                learned_variance=not self.base.model.variance_is_stale,
                cond_fn=self.clip.cond_fn(prompts, config.clip_scale) if self.clip else None,
                progress=True,
            ).cpu()

    def upsample(
        self, pictures: torch.Tensor, prompts: list[str], seeds: list[int]
    ) -> torch.Tensor:
        """The second stage of `draw` alone, which makes base pictures `upscale_factor` times as
        large.

        Args:
            pictures: (n, 3, height, width) in [-1, 1], one for each prompt.

        Raises:
            ValueError: there is no upsampler.
        """
        if self.upsampler is None:
            raise ValueError("there is no model that makes pictures larger: give --upsampler")
        config = self.config
        height, width = pictures.shape[2:]
        with self._at_work(self.upsampler), self._precision.autocast():
            return sample(
                self.upsampler.model,
                self.upsampler.options,
                width * self.upscale_factor,
                height * self.upscale_factor,
                prompts,
                device=self.device,
                prediction_respacing=config.upsample_steps,
                upsample_enabled=True,
                image_to_upsample=pictures,
                upsample_temp=config.upsample_temp,
                sampler=config.upsample_sampler,
                seeds=[derived_seed(seed, "upsampler") for seed in seeds],
                pictures_a_pass=len(prompts),
                inpaint_image=config.inpaint_image,
                inpaint_mask=config.inpaint_mask,
                learned_variance=not self.upsampler.model.variance_is_stale,
                progress=True,
            ).cpu()

    def tell_what_is_cut(self, prompts: list[str]) -> None:
        """Log a line about each prompt of which the model does not read the end."""
        if not self.base.options["xf_width"]:
            return
        most, tokenizer = self.base.options["text_ctx"], self.base.model.tokenizer
        for prompt in prompts:
            tokens = tokenizer.encode(prompt)
            if len(tokens) > most:
                cut = tokenizer.decode(tokens[most:])
                if len(cut) > MOST_SHOWN_OF_CUT:
                    cut = cut[: MOST_SHOWN_OF_CUT - 1] + "…"
                logger.warning(
                    "a caption has %d tokens, the model reads %d: what is cut is %r",
                    len(tokens), most, cut,
                )  # fmt: skip

    @contextlib.contextmanager
    def _at_work(self, stage: Stage) -> Iterator[None]:
        """While open, the model of this stage is on the device."""
        stage.model.to(self.device)
        try:
            yield
        finally:
            if self.upsampler:
                stage.model.to("cpu")

    def _base_size(self) -> tuple[int, int]:
        """(width, height) of base pictures: as asked, as trained, or as the model's options say."""
        trained = _trained(self.base)
        width, height = (
            getattr(self.config, name) or trained.get(name) or self.base.options["image_size"]
            for name in ("side_x", "side_y")
        )
        return width, height


def _trained(stage: Stage) -> dict[str, int]:
    """The sizes among the settings of the run that the model comes from, if it comes from one."""
    settings = {}
    if stage.source != RELEASED:
        with contextlib.suppress(ValueError):  # no file of a run
            settings = read_args(Path(stage.source).parent)
    sizes = {name: settings.get(name) for name in ("side_x", "side_y", "upscale_factor")}
    return {name: size for name, size in sizes.items() if type(size) is int and size > 0}


def load_stage(name: str, source: str, stage: str, inpainting: str | bool = False) -> Stage:
    """The model of one stage, on the CPU.

    Args:
        name: the flag that gave it, for messages.
        source: a .pt file, a run folder, or released.
        stage: base or upsample.
        inpainting: whether it has to be made for that.

    Raises:
        ValueError: there is no such file or checkpoint, or it is of another kind.
        DownloadError: OpenAI's weights are not to be had.
    """
    wanted = f"{stage}-inpaint" if inpainting else stage
    if source == RELEASED:
        model, _, options = load_model(model_type=wanted)
        return Stage(RELEASED, model, options)
    path = _weights_in(name, Path(source).expanduser())
    weights.check_bytes(path)
    kind = described_model(path)[0] or weights.kind_of_weights(weights.read_weights(path)) or wanted
    check_stage(name, path, kind, stage)
    if inpainting and kind != wanted:
        raise ValueError(
            f"--{name}: {path} holds a model of kind {kind}, which cannot paint on a picture: give "
            f"one of kind {wanted}"
        )
    model, _, options = load_model(str(path), model_type=kind)
    return Stage(str(path.absolute()), model, options)


def _weights_in(name: str, path: Path) -> Path:
    """A weights file itself, or those of the newest whole checkpoint of a run folder."""
    if not path.is_dir():
        return path
    newest = newest_checkpoint(path)
    if newest is None:
        raise ValueError(
            f"--{name}: {path} holds no whole checkpoint: give the folder of a run, or a .pt file"
        )
    return newest.ema or newest.weights


def load_clip(
    files: list[str], base: Stage, size: tuple[int, int], device: torch.device
) -> CLIPModel:
    """The noise-aware CLIP in the files of `used_clip`, for pictures of `size` that `base` draws.

    Raises:
        ValueError: the weights do not fit, or it knows pictures of another size or other noise.
        DownloadError: OpenAI's weights are not to be had.
    """
    clip = read_clip(files).to(device)
    side = clip.config["image_size"]
    if size != (side, side):
        raise ValueError(
            f"--clip looks at pictures of {side}x{side} pixels, the base model draws "
            f"{size[0]}x{size[1]}: leave --clip out, or change --side_x and --side_y"
        )
    known = clip.config["n_timesteps"], clip.config["beta_schedule"]
    drawn = base.options["diffusion_steps"], base.options["noise_schedule"]
    if known != drawn:
        raise ValueError(
            f"--clip knows noise of {known[0]} timesteps by {known[1]}, the base model removes "
            f"that of {drawn[0]} by {drawn[1]}: leave --clip out, or give one trained with it"
        )
    return clip.eval()


def write_numbered(folder: Path, prefix: str, picture: Image.Image, text: dict[str, str]) -> Path:
    """Write a picture under the next free number, with `text` in its PNG; returns the file.

    It appears whole or not at all. What is there is never replaced, not even by several processes
    at once.
    """
    info = PngImagePlugin.PngInfo()
    for key, value in text.items():
        info.add_itxt(key, value)
    encoded = io.BytesIO()
    picture.save(encoded, "PNG", pnginfo=info)
    pattern = re.compile(re.escape(prefix) + r"([0-9]{5,})\.png")
    numbers = [int(m[1]) for path in folder.iterdir() if (m := pattern.fullmatch(path.name))]
    first = max(numbers, default=-1) + 1
    paths = (folder / f"{prefix}{number:05d}.png" for number in itertools.count(first))
    return write_new(paths, encoded.getvalue())
