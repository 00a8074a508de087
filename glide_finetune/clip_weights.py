"""The noise-aware CLIP in files: a checkpoint of a run, or two encoders as OpenAI releases them."""

import json
from pathlib import Path

import torch

from glide_finetune import weights
from glide_finetune.atomic_files import atomic_file, read_json
from glide_finetune.checkpoints import newest_checkpoint
from glide_finetune.clip_options import CLIP_CONFIG, CLIP_FILES, CLIP_KIND, clip_paths
from glide_finetune.model_options import RELEASED, described_model, description_path
from glide_finetune.noisy_clip_config import ClipConfig
from glide_text2im.clip.model_creation import CLIPModel, create_clip_model
from glide_text2im.download import load_checkpoint


def used_clip(given: list[str]) -> list[str]:
    """The files that `--clip` names, absolute: of a run its newest checkpoint, averaged if the run
    keeps an average. ValueError if the run has none yet."""
    if given == [RELEASED]:
        return given
    paths = clip_paths(given)
    if len(paths) == 1 and paths[0].is_dir():
        newest = newest_checkpoint(paths[0])
        if newest is None:
            raise ValueError(f"--clip: {paths[0]} holds no whole checkpoint: give another run")
        paths = [newest.ema or newest.weights]
    return [str(path.absolute()) for path in paths]


def read_clip(files: list[str]) -> CLIPModel:
    """The model in the files of `used_clip`, on the CPU.

    Raises:
        ValueError: they do not fit, or do not tell what they are.
        DownloadError: OpenAI's weights are not to be had.
    """
    if files != [RELEASED]:
        for file in files:
            weights.check_bytes(Path(file))
    if len(files) == 2 or files == [RELEASED]:
        beside = Path(files[0]).with_name(CLIP_CONFIG)
        own = beside if files != [RELEASED] and beside.exists() else None
        model = create_clip_model(own, "cpu")
        load_encoders(model, files)
        return model
    path = Path(files[0])
    kind, options = described_model(path)
    if kind != CLIP_KIND:
        raise ValueError(
            f"--clip: {path} is no checkpoint of a CLIP with its .json beside it; give one, or the "
            "files of the image and the text encoder"
        )
    model = CLIPModel(options)
    load_whole(model, path)
    return model


def make_clip(config: ClipConfig, checkpoint: Path | None, device: torch.device) -> CLIPModel:
    """The model to train, with its first weights and its frozen parts.

    Args:
        checkpoint: weights of the whole model; None follows `clip` and `init` of `config`.

    Raises:
        ValueError: the weights do not fit.
        DownloadError: OpenAI's weights are not to be had.
    """
    model = CLIPModel(config.options)
    if checkpoint:
        load_whole(model, checkpoint)
    elif config.init == "pretrained":
        load_encoders(model, config.clip or [RELEASED])
    for encoder, frozen in (
        (model.text_encoder, config.freeze_text),
        (model.image_encoder, config.freeze_image),
    ):
        encoder.requires_grad_(not frozen)
    return model.to(device)


def load_whole(model: CLIPModel, path: Path) -> None:
    """Fill `model` from a checkpoint of a run. ValueError if it does not fit."""
    state = weights.read_weights(path)
    weights.check_fit(model, state, str(path))
    model.load_state_dict(state)


def load_encoders(model: CLIPModel, given: list[str]) -> None:
    """Fill the two encoders of `model` from what `--clip` names, or OpenAI's weights.

    Raises:
        ValueError: the weights do not fit.
        DownloadError: OpenAI's weights are not to be had.
    """
    if given == [RELEASED]:
        states = [load_checkpoint(f"clip/{part}-enc", "cpu") for part in ("image", "text")]
        labels = ["the released CLIP"] * 2
    else:
        paths = clip_paths(given)
        states, labels = [weights.read_weights(path) for path in paths], list(map(str, paths))
    encoders = (model.image_encoder, model.text_encoder)
    for encoder, state, label in zip(encoders, states, labels, strict=True):
        weights.check_fit(encoder, state, label)
        encoder.load_state_dict(state)


def write_encoders(run_folder: Path) -> list[Path]:
    """Write the newest checkpoint of a run, averaged if the run keeps an average, in the form of
    OpenAI's files: `CLIP_FILES` for the two encoders, and `CLIP_CONFIG` for `create_clip_model`
    with the sizes and the learned logit_scale. Returns the files; none without a checkpoint.
    """
    newest = newest_checkpoint(run_folder)
    if newest is None:
        return []
    state = weights.read_weights(newest.ema or newest.weights)
    options = read_json(description_path(newest.weights))["model_options"]
    *encoder_paths, config_path = (run_folder / name for name in (*CLIP_FILES, CLIP_CONFIG))
    for path, encoder in zip(encoder_paths, ("image_encoder.", "text_encoder."), strict=True):
        part = {
            name.removeprefix(encoder): tensor
            for name, tensor in state.items()
            if name.startswith(encoder)
        }
        weights.write_weights(path, part)
    config = {**options, "logit_scale": state["logit_scale"].exp().item()}
    with atomic_file(config_path) as file:  # JSON is YAML too
        file.write(json.dumps(config, indent=2).encode())
    return [*encoder_paths, config_path]
