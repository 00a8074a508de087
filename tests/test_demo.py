"""The demo: what it writes, and that the model it trains has learnt its captions."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from glide_finetune import demo
from glide_finetune.arguments import parse_config
from glide_finetune.checkpoints import newest_checkpoint
from glide_finetune.data import images
from glide_finetune.glide_util import load_model, sample
from shape_judge import judge

SCRIPT = Path(__file__).parent.parent / "train_glide.py"


def test_the_prompts_cover_every_colour_and_shape_once_at_most():
    prompts = demo.prompts()
    assert len(set(prompts)) == len(prompts) == 16
    for word in (*demo.COLOURS, *demo.SHAPES):
        assert any(word in prompt.split() for prompt in prompts)


def test_preparing_writes_captioned_pictures_and_prompts_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = parse_config(["--demo"])
    demo.prepare(config)
    pictures = sorted(Path(config.data_dir).glob("*.png"))
    assert len(pictures) == 1000
    assert all(picture.with_suffix(".txt").read_text().startswith("a ") for picture in pictures)
    assert Path(config.prompt_file).read_text().splitlines() == demo.prompts()

    before = pictures[0].stat().st_mtime_ns
    Path(config.prompt_file).write_text("a prompt of the user's")
    demo.prepare(config)
    assert pictures[0].stat().st_mtime_ns == before
    assert Path(config.prompt_file).read_text() == "a prompt of the user's"


def test_preparing_leaves_files_of_the_user_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prompts = tmp_path / "mine.txt"
    prompts.write_text("a red star\n")
    demo.prepare(parse_config(["--demo", "--prompt_file", str(prompts)]))
    assert prompts.read_text() == "a red star\n"

    (tmp_path / demo.DEMO_FOLDER / "shapes" / "note.txt").write_text("keep me")
    (tmp_path / demo.DEMO_FOLDER / "shapes" / "demo_set.json").unlink()
    with pytest.raises(ValueError, match="delete it or name another folder"):
        demo.prepare(parse_config(["--demo"]))


@pytest.mark.slow
def test_the_demo_learns_the_colours_and_shapes_of_its_captions(tmp_path):
    """Six minutes on two cores; 64 samples, four for each caption, as in the grid it ends with."""
    subprocess.run(
        [sys.executable, SCRIPT, "--demo"],
        cwd=tmp_path,
        env=os.environ | {"WANDB_MODE": "disabled"},
        check=True,
    )
    run_folder = tmp_path / demo.DEMO_FOLDER / "runs" / "0000"
    settings = demo.DEMO_SETTINGS
    assert (run_folder / "samples" / f"{settings['max_steps']:08d}.png").is_file()

    model, _, options = load_model(newest_checkpoint(run_folder).ema)
    prompts = demo.prompts()
    torch.manual_seed(1)
    pictures = sample(
        model,
        options,
        demo.IMAGE_SIZE,
        demo.IMAGE_SIZE,
        prompts,
        batch_size=4,
        guidance_scale=settings["test_guidance_scale"],
        prediction_respacing="25",
        sampler=settings["test_sampler"],
    )
    seen = [judge(images.to_pil(picture)) for picture in pictures]
    wanted = [prompt.split() for prompt in prompts for _ in range(4)]
    colours = sum(colour in words for (colour, _), words in zip(seen, wanted, strict=True)) / 64
    shapes = sum(shape in words for (_, shape), words in zip(seen, wanted, strict=True)) / 64
    print(f"of 64 samples {colours:.0%} have the caption's colour, {shapes:.0%} its shape")
    assert colours >= 0.8
    assert shapes >= 0.5
