"""What to draw and how: the settings of `python -m glide_finetune.generate`, and their checks.

Nothing here imports torch, so that `--help` and mistakes answer at once.
"""

import contextlib
import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from glide_finetune.clip_options import CLIP_FILES, clip_paths
from glide_finetune.config import (
    PRECISIONS,
    ConfigError,
    check_saved,
    flag,
)
from glide_finetune.config_checks import (
    Range,
    check_choices,
    check_device,
    check_ranges,
    check_writable,
    image_size,
)
from glide_finetune.model_options import RELEASED, described_model, released_options
from glide_finetune.runs import read_args
from glide_finetune.sampler_options import SAMPLERS, SamplerOptions, check_sampler
from glide_finetune.text_settings import read_lines, text_of
from glide_text2im.timesteps import space_timesteps

WHAT = "what to draw"
MODELS = "models"
BASE = "how the base model draws"
UPSAMPLER = "how the upsampler draws"
INPAINTING = "painting on a picture"
RUNNING = "running"


@dataclass
class GenerateConfig:
    """Every setting, named as its flag. Those marked `once` make no difference to a picture or
    are told beside the settings in its file."""

    # fmt: off
    prompt: list[str] = flag([], "-prompt", group=WHAT, once=True, nargs="+", metavar="TEXT",
        help="one caption or several")
    prompt_file: str = flag("", group=WHAT, once=True, metavar="FILE",
        help="captions, one a line, instead of --prompt")
    again: str = flag("", group=WHAT, once=True, metavar="PNG",
        help="draw this picture again, with what its file tells; other flags change it")
    num_images: int = flag(1, "-n", group=WHAT, once=True, metavar="N",
        help="pictures of each caption")
    seed: int = flag(0, "-seed", group=WHAT, once=True, metavar="N",
        help="of the first picture of each caption; the next ones have N + 1, N + 2, …")

    base: str = flag(RELEASED, "-base", group=MODELS, metavar="PATH",
        help="weights of the base model (.pt), or a run folder, of which the newest checkpoint is "
             "taken, averaged if the run keeps an average; released: OpenAI's")
    upsampler: str = flag("", "-upsampler", group=MODELS, metavar="PATH",
        help="the same for the upsampler (default: no upsampling)")
    clip: list[str] = flag([], group=MODELS, nargs="+", metavar="PATH",
        help=f"noise-aware CLIP that guides the base model: a run of noisy_clip_finetune or a "
             f"checkpoint in it, a folder with {CLIP_FILES[0]} and {CLIP_FILES[1]}, or these two "
             "files, or released")

    sampler: str = flag("dpm++2m_sde", "-sampler", group=BASE, choices=tuple(SAMPLERS),
        help="how to draw, see docs/samplers.md")
    steps: str = flag("30", "-steps", group=BASE, metavar="N",
        help="timesteps of a picture, or a respacing such as fast27, ddim50 or 10,10,3,2,2")
    guidance_scale: float = flag(4.0, "-gs", group=BASE, metavar="S",
        help="classifier-free guidance, 1 for none")
    guidance_rescale: float = flag(0.0, group=BASE, metavar="R",
        help="how much of the contrast that guidance adds is taken back, 0 to 1")
    threshold: float = flag(0.0, group=BASE, metavar="Q",
        help="dynamic thresholding at this quantile, such as 0.995; 0 for none")
    negative_prompt: str = flag("", group=BASE, metavar="TEXT",
        help="what guidance leads away from, without effect where there is none")
    clip_scale: float = flag(3.0, group=BASE, metavar="S", help="how strongly --clip guides")
    side_x: int = flag(0, "-x", group=BASE, metavar="PIXELS",
        help="width of the base picture (default: as trained)")
    side_y: int = flag(0, "-y", group=BASE, metavar="PIXELS",
        help="height of the base picture (default: as trained)")

    upsample_sampler: str = flag("ddim", group=UPSAMPLER, choices=tuple(SAMPLERS),
        help="as --sampler")
    upsample_steps: str = flag("fast27", group=UPSAMPLER, metavar="N", help="as --steps")
    upsample_temp: float = flag(0.997, group=UPSAMPLER, metavar="T",
        help="temperature of the start noise")
    upscale_factor: int = flag(0, "-upscale", group=UPSAMPLER, metavar="N",
        help="how many times larger its picture is (default: as trained, 4 for OpenAI's)")

    inpaint_image: str = flag("", group=INPAINTING, metavar="FILE",
        help="a picture to paint on, which models of the inpainting kinds can; what is not "
             "painted on stays")
    inpaint_mask: str = flag("", group=INPAINTING, metavar="FILE",
        help="of the same size, white where to paint")

    batch_size: int = flag(16, "-bs", group=RUNNING, once=True, metavar="N",
        help="pictures drawn at once; it makes no difference to them")
    device: str = flag("", "-dev", group=RUNNING, once=True, metavar="NAME",
        help="cpu, cuda, cuda:1 … (default: the best there is)")
    precision: str = flag("fp32", group=RUNNING, choices=PRECISIONS, help="of the arithmetic")
    output_dir: str = flag("./generated", "-out", group=RUNNING, once=True, metavar="DIR",
        help="where the pictures go, numbered on from those that are there")
    # fmt: on

    def __post_init__(self) -> None:
        """Take what is natural in a notebook, too: one text in place of a list, a bare number."""
        for name in ("prompt", "clip"):
            if isinstance(value := getattr(self, name), str):
                setattr(self, name, [value])
        for name in ("steps", "upsample_steps"):
            if isinstance(value := getattr(self, name), int):
                setattr(self, name, str(value))

    def prompts(self) -> list[str]:
        """The captions.

        Raises:
            ConfigError: there are none, or the file cannot be read.
        """
        if self.prompt and self.prompt_file:
            raise ConfigError("--prompt and --prompt_file both give captions: give one of them")
        if self.prompt_file:
            return read_lines("prompt_file", self.prompt_file, "prompt")
        if not self.prompt:
            raise ConfigError("there is no caption: give --prompt or --prompt_file")
        return [text_of("prompt", text) for text in self.prompt]

    def settings(self) -> dict[str, Any]:
        """What a picture depends on beside its prompt and its seed."""
        return {
            name: getattr(self, name)
            for name, field in FIELDS.items()
            if not field.metadata["once"]
        }


FIELDS = {field.name: field for field in dataclasses.fields(GenerateConfig)}

_FROM_ONE = Range(1, 2**31, "a number from 1 to 2^31")
_FROM_ZERO = Range(0, 1e9, "a number from 0 to 10^9")
_SHARE = Range(0, 1, "a number from 0 to 1")
RANGES = {
    "num_images": Range(1, 10**6, "a number from 1 to 1,000,000"),
    "batch_size": _FROM_ONE,
    "upscale_factor": _FROM_ZERO,
    "seed": Range(0, 2**63 - 1, "a number from 0 to 2^63 - 1"),
    "guidance_scale": _FROM_ZERO,
    "guidance_rescale": _SHARE,
    "threshold": _SHARE,
    "clip_scale": _FROM_ZERO,
    "side_x": _FROM_ZERO,
    "side_y": _FROM_ZERO,
    "upsample_temp": _FROM_ZERO,
}
_COUNT = r"[1-9][0-9]*"
_RESPACING = rf"{_COUNT}(,{_COUNT})*|ddim{_COUNT}|fast27"


def check(config: GenerateConfig) -> None:
    """Hold every setting against its range, the others and the files it names.

    Raises:
        ConfigError: with one line about the first that cannot work.
    """
    config.prompts()
    check_choices(config)
    check_ranges(vars(config), RANGES)
    check_device(config.device)
    text_of("negative_prompt", config.negative_prompt)
    if config.seed + config.num_images > 2**63:
        raise ConfigError(
            f"--seed is {config.seed}, which leaves no seeds for {config.num_images} pictures; "
            "give a lower one"
        )
    if bool(config.inpaint_image) != bool(config.inpaint_mask):
        raise ConfigError("--inpaint_image and --inpaint_mask go together: give both")
    for model, kind, steps, sampler in (
        ("base", "base", "steps", config.sampler),
        ("upsampler", "upsample", "upsample_steps", config.upsample_sampler),
    ):
        timesteps = _check_model(model, getattr(config, model), kind)
        _check_steps(steps, getattr(config, steps), sampler, timesteps)
    try:
        check_sampler(
            config.sampler, {"--clip": bool(config.clip), "--threshold": bool(config.threshold)}
        )
    except ValueError as error:
        raise ConfigError(f"--sampler: {error}") from None
    if config.clip and config.clip != [RELEASED]:
        for path in clip_paths(config.clip):
            if not path.exists():
                raise ConfigError(f"--clip: there is no file {path}")
    if config.inpaint_image:
        sizes = [image_size(n, getattr(config, n)) for n in ("inpaint_image", "inpaint_mask")]
        if sizes[0] != sizes[1]:
            image, mask = (f"{width}x{height}" for width, height in sizes)
            raise ConfigError(
                f"--inpaint_mask has {mask} pixels, the image {image}: give a mask of its size"
            )
    check_writable("output_dir", config.output_dir)


def _check_model(name: str, given: str, kind: str) -> int:
    """Whether there is something, and of what kind it is, as far as a description tells; returns
    its number of timesteps, as far as that is told."""
    released = released_options(kind)["diffusion_steps"]
    if given in ("", RELEASED):
        return released
    path = Path(given).expanduser()
    if not path.exists():
        raise ConfigError(f"--{name}: {path} does not exist: give a .pt file or a run folder")
    if path.is_file():
        found, options = described_model(path)
        check_stage(name, path, found or kind, kind)
        return options.get("diffusion_steps", released)
    with contextlib.suppress(ValueError):  # no folder of a run, which is told later
        options = read_args(path).get("model_options")
        return options.get("diffusion_steps", released) if isinstance(options, dict) else released
    return released


def _check_steps(name: str, respacing: str, sampler: str, timesteps: int) -> None:
    """ConfigError, naming the flag, unless a picture can be drawn at these of all timesteps."""
    least = SAMPLERS[sampler].least_timesteps
    of_sampler = f", which {sampler} needs," if least > SamplerOptions.least_timesteps else ""
    if re.fullmatch(_RESPACING, respacing):
        try:
            kept = space_timesteps(timesteps, respacing)
        except ValueError as error:
            raise ConfigError(f"--{name}: {error}") from None
        if len(kept) >= least:
            return
    raise ConfigError(
        f"--{name} is {respacing!r}; give a number from {least}{of_sampler} to {timesteps}, or a "
        "respacing such as fast27, ddim50 or 10,10,3,2,2"
    )


def check_stage(name: str, path: Path, found: str, wanted: str) -> None:
    """ConfigError if the model in `path` belongs to the other stage.

    Args:
        name: the flag that gave it.
        found: its kind, such as base-inpaint.
        wanted: base or upsample.
    """
    if not found.startswith(wanted):
        other = {"upsample": "upsampler", "clip": "clip"}.get(found.split("-")[0], "base")
        raise ConfigError(
            f"--{name}: {path} holds a model of kind {found}: give it as --{other}, and one of "
            f"kind {wanted} here"
        )


def settings_of(picture: str) -> dict[str, Any]:
    """The settings that a picture was drawn with, its prompt and seed among them.

    Raises:
        ConfigError: it cannot be read, or was not drawn here.
    """
    path = Path(picture).expanduser()
    image_size("again", picture)
    try:
        with Image.open(path) as image:
            told = {"prompt": [image.text["prompt"]], "seed": int(image.text["seed"])}
            settings = dict(json.loads(image.text["settings"]))
    except (AttributeError, LookupError, TypeError, ValueError):
        raise ConfigError(
            f"--again: {path} does not tell how it was drawn: give a picture that "
            "glide_finetune.generate has written"
        ) from None
    check_saved("again", path, settings, FIELDS)
    return settings | told
