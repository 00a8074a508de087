"""Generating pictures: the command, its mistakes, what it writes, and that it can be repeated."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from glide_finetune import generation
from glide_finetune.checkpoints import save_checkpoint
from glide_finetune.data import images
from glide_finetune.generate import main, parse_config
from glide_finetune.generate_config import FIELDS, RANGES, GenerateConfig
from glide_finetune.generation import Painter, generate, write_numbered
from glide_finetune.runs import write_args
from glide_finetune.sampler_options import SAMPLERS
from glide_finetune.samplers import LOOPS
from glide_text2im.clip.model_creation import create_clip_model
from glide_text2im.download import DownloadError
from tiny_training import OPTIONS, SIDE, tiny_model

ROOT = Path(__file__).parents[1]


def write_run(
    folder: Path, kind="base", seed=0, ema_seed=None, vlb_weight=0.001, **changes
) -> Path:
    """A run folder with one checkpoint of a tiny model with these changes of its options."""
    folder.mkdir()
    model, _, options = tiny_model(kind, seed=seed, options=changes)
    ema = None if ema_seed is None else tiny_model(kind, seed=ema_seed)[0].state_dict()
    save_checkpoint(
        folder, epoch=0, step=3, model_state=model.state_dict(), ema_state=ema, training_state={},
        description={"kind": kind, "model_options": options, "vlb_weight": vlb_weight},
    )  # fmt: skip
    write_args(folder, {"side_x": SIDE, "side_y": SIDE, "model_options": changes})
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Run folders of all four kinds, named by it."""
    folder = tmp_path_factory.mktemp("runs")
    for kind in ("base", "upsample", "base-inpaint", "upsample-inpaint"):
        write_run(folder / kind, kind)
    return folder


def config_of(runs, out, **settings):
    defaults = {"prompt": ["a cat"], "base": str(runs / "base"), "steps": "5", "sampler": "ddpm"}
    return GenerateConfig(
        **{**defaults, "upsample_steps": "4", "device": "cpu", "output_dir": str(out), **settings}
    )


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image)


def text_of(path):
    with Image.open(path) as image:
        return image.text


# ---------------------------------------------------------------------------------- what is written


def test_every_picture_gets_a_file_and_all_of_them_a_grid(runs, tmp_path):
    out = tmp_path / "new" / "out"
    paths = generate(config_of(runs, out, prompt=["a cat", "ein Bär"], num_images=2))
    assert [path.name for path in paths] == [f"0000{n}.png" for n in range(4)]
    assert sorted(path.name for path in out.iterdir()) == [
        *(path.name for path in paths), "grid-00000.png",
    ]  # fmt: skip
    assert [text_of(path)["prompt"] for path in paths] == ["a cat"] * 2 + ["ein Bär"] * 2
    assert [text_of(path)["seed"] for path in paths] == ["0", "1", "0", "1"]
    assert {pixels(path).shape for path in paths} == {(SIDE, SIDE, 3)}
    assert len({pixels(path).tobytes() for path in paths}) == 4
    assert pixels(out / "grid-00000.png").shape[1] > 2 * 192


def test_nothing_is_overwritten(runs, tmp_path):
    (tmp_path / "00007.png").write_text("mine")
    (tmp_path / "grid-00002.png").write_text("mine")
    (path,) = generate(config_of(runs, tmp_path))
    assert path.name == "00008.png"
    assert (tmp_path / "grid-00003.png").exists()
    assert (tmp_path / "00007.png").read_text() == "mine"
    picture = Image.new("RGB", (4, 4))
    assert write_numbered(tmp_path, "", picture, {}).name == "00009.png"


def test_the_text_of_a_picture_is_enough_to_draw_it_again(runs, tmp_path):
    out = tmp_path / "out"
    paths = generate(
        config_of(
            runs,
            out,
            prompt=["a cat", "a dog"],
            num_images=2,
            seed=7,
            sampler="dpm++2m_sde",
            steps="fast27",
            guidance_scale=2.5,
            guidance_rescale=0.5,
            threshold=0.9,
            negative_prompt="a fish",
            upsampler=str(runs / "upsample"),
            upscale_factor=2,
        )
    )
    assert main(["--again", str(paths[3]), "--output_dir", str(tmp_path / "again")]) == 0
    again = tmp_path / "again" / "00000.png"
    assert pixels(again).shape == (2 * SIDE, 2 * SIDE, 3)
    assert np.abs(pixels(again).astype(int) - pixels(paths[3])).max() <= 1
    assert text_of(again) == text_of(paths[3])
    # by hand, too
    settings = json.loads(text_of(paths[3])["settings"])
    flags = [w for name, value in settings.items() if value for w in (f"--{name}", str(value))]
    typed = [
        "--prompt", text_of(paths[3])["prompt"], "--seed", text_of(paths[3])["seed"],
        "--output_dir", str(tmp_path / "hand"), *flags,
    ]  # fmt: skip
    assert main(typed) == 0
    assert (pixels(tmp_path / "hand" / "00000.png") == pixels(again)).all()
    # and with a change
    assert main(["--again", str(again), "--seed", "1", "--output_dir", str(tmp_path)]) == 0
    assert (pixels(tmp_path / "00000.png") != pixels(again)).any()


@pytest.mark.parametrize("sampler", ["ddpm", "plms", "dpm++2m_sde"])
def test_the_size_of_a_batch_does_not_change_the_pictures(runs, tmp_path, sampler):
    keywords = {"num_images": 3, "sampler": sampler, "upsampler": str(runs / "upsample")}
    sets = [
        generate(config_of(runs, tmp_path / str(size), batch_size=size, **keywords))
        for size in (1, 2, 3)
    ]
    for one, two, three in zip(*sets, strict=True):
        for other in (two, three):
            assert np.abs(pixels(one).astype(int) - pixels(other)).max() <= 1


def test_a_grid_shows_the_first_pictures_with_the_numbers_of_their_files(
    runs, tmp_path, monkeypatch, caplog
):
    grids = []
    monkeypatch.setattr(generation, "MOST_IN_GRID", 3)
    monkeypatch.setattr(
        generation,
        "labelled_grid",
        lambda pictures, labels: grids.append((pictures, labels)) or Image.new("RGB", (4, 4)),
    )
    with caplog.at_level("INFO"):
        paths = generate(config_of(runs, tmp_path, num_images=5, batch_size=2))
    ((pictures, labels),) = grids
    assert labels == ["00000 a cat", "00001 a cat", "00002 a cat"]
    for picture, path in zip(pictures, paths[:3], strict=True):
        assert (np.asarray(images.to_pil(picture)) == pixels(path)).all()
    assert caplog.messages[-1].endswith("the first 3 in grid-00000.png")


def test_a_picture_that_cannot_be_written_leaves_no_file(tmp_path):
    picture = mock.Mock()
    picture.save.side_effect = OSError("no space left")
    with pytest.raises(OSError, match="no space left"):
        write_numbered(tmp_path, "", picture, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("has_links", [True, False])
def test_a_picture_takes_the_next_free_name_and_replaces_nothing(tmp_path, monkeypatch, has_links):
    """Whatever another process writes in the meantime."""
    link = os.link

    def late(source, target):
        if Path(target).name == "00000.png":
            Path(target).write_bytes(b"another's")
        if not has_links:
            raise PermissionError(errno.EPERM, "Operation not permitted")
        link(source, target)

    monkeypatch.setattr(os, "link", late)
    path = write_numbered(tmp_path, "", Image.new("RGB", (4, 4), "red"), {"seed": "1"})
    assert path.name == "00001.png"
    assert text_of(path) == {"seed": "1"}
    assert (tmp_path / "00000.png").read_bytes() == b"another's"
    assert len(list(tmp_path.iterdir())) == 2


def test_a_notebook_may_give_one_caption_and_numbers_as_they_are(runs, tmp_path):
    config = config_of(runs, tmp_path, prompt="a cat", steps=3, upsample_steps=2, clip="released")
    assert config.prompts() == ["a cat"]
    assert (config.steps, config.upsample_steps, config.clip) == ("3", "2", ["released"])


# ------------------------------------------------------------------------------------------- models


def test_a_run_folder_stands_for_the_average_of_its_newest_checkpoint(tmp_path):
    averaged = write_run(tmp_path / "averaged", seed=1, ema_seed=2)
    plain = write_run(tmp_path / "plain", seed=2)
    want, *got = (
        pixels(generate(config_of(tmp_path, tmp_path / "out", base=str(base)))[0])
        for base in (
            plain / "glide-ft-0x3.pt",
            plain,
            averaged,
            averaged / "glide-ft-0x3-ema.pt",
            averaged / "glide-ft-0x3.pt",
        )
    )
    assert [bool((picture == want).all()) for picture in got] == [True, True, True, False]
    assert json.loads(text_of(tmp_path / "out" / "00002.png")["settings"])["base"] == str(
        averaged / "glide-ft-0x3-ema.pt"
    )


def test_without_a_checkpoint_openais_weights_are_fetched(tmp_path, monkeypatch, runs):
    asked = []

    def released(path="", *, model_type="base", **_):
        asked.append((path, model_type))
        return tiny_model(model_type)

    monkeypatch.setattr(generation, "load_model", released)
    generate(
        config_of(runs, tmp_path, base="released", upsampler="released", side_x=SIDE, side_y=SIDE)
    )
    assert asked == [("", "base"), ("", "upsample")]
    assert json.loads(text_of(tmp_path / "00000.png")["settings"])["base"] == "released"


def test_a_stale_variance_is_told_and_replaced(tmp_path, caplog):
    stale = write_run(tmp_path / "stale", vlb_weight=0.0)
    with caplog.at_level("INFO"):
        generate(config_of(tmp_path, tmp_path / "out", base=str(stale), num_images=2, batch_size=1))
    (line,) = [r.message for r in caplog.records if "posterior" in r.message]
    assert line.startswith(str(stale))
    assert line.endswith("ddpm takes the posterior's variance, since the model's own is untrained")


def test_the_idle_stage_waits_on_the_cpu(runs, tmp_path, monkeypatch):
    """On "meta", which stands in for an accelerator, and only as far as the first model call."""
    painter = Painter(config_of(runs, tmp_path, upsampler=str(runs / "upsample")))
    places = []

    def stand_in(model, options, width, height, prompts, **_):
        places.append(tuple(next(s.model.parameters()).device.type for s in stages))
        return torch.zeros(len(prompts), 3, height, width)

    stages = (painter.base, painter.upsampler)
    monkeypatch.setattr(generation, "sample", stand_in)
    monkeypatch.setattr(torch.nn.Module, "to", moved_by_name)
    painter.device = torch.device("meta")
    painter.draw(["a cat"], [0])
    assert places == [("meta", "cpu"), ("cpu", "meta")]


def moved_by_name(module, device):
    """`Module.to` that also leads back from "meta", where values are lost."""
    return module._apply(lambda tensor: torch.empty_like(tensor, device=device))


def write_clip(folder, **settings):
    """A CLIP of random weights, in the form of OpenAI's files; returns those of the encoders."""
    folder.mkdir()
    config = {
        "logit_scale": 100.0, "image_size": SIDE, "patch_size": 4, "n_timesteps": 1000,
        "n_vocab": 65536, "max_text_len": 77, "n_embd": 16,
        "n_head_state_text": 8, "n_head_text": 2, "n_xf_blocks_text": 1,
        "n_head_state_image": 8, "n_head_image": 2, "n_xf_blocks_image": 1,
        "beta_schedule": "squaredcos_cap_v2",
    }  # fmt: skip
    (folder / "config.yaml").write_text(json.dumps(config | settings))
    torch.manual_seed(0)
    clip = create_clip_model(folder / "config.yaml", "cpu")
    files = [folder / "clip_image_enc.pt", folder / "clip_text_enc.pt"]
    torch.save(clip.image_encoder.state_dict(), files[0])
    torch.save(clip.text_encoder.state_dict(), files[1])
    return clip, files


def test_a_clip_that_knows_other_noise_is_refused(runs, tmp_path):
    write_clip(tmp_path / "clip", n_timesteps=100)
    with pytest.raises(ValueError, match=r"knows noise of 100 timesteps by .* 1000 by squared"):
        generate(config_of(runs, tmp_path / "out", clip=[str(tmp_path / "clip")]))


def test_a_clip_guides_the_pictures_towards_their_captions(runs, tmp_path):
    folder = tmp_path / "clip"
    clip, files = write_clip(folder)

    def similarity(**settings):
        (path,) = generate(config_of(runs, tmp_path / "out", steps="15", **settings))
        picture = torch.from_numpy(pixels(path).copy()).permute(2, 0, 1)[None] / 127.5 - 1
        with torch.no_grad():
            image = clip.image_embeddings(picture, torch.tensor([0]))
            return float((clip.text_embeddings(["a cat"]) * image).sum())

    guided = similarity(clip=[str(folder)], clip_scale=1.0)
    assert guided > similarity() + 0.05
    assert similarity(clip=[str(path) for path in files], clip_scale=1.0) == guided
    with pytest.raises(ValueError, match="pictures of 8x8 pixels, the base model draws 16x8"):
        generate(config_of(runs, tmp_path, clip=[str(folder)], side_x=16))
    with pytest.raises(ValueError, match="plms does not work with --clip: choose one of ddpm,"):
        generate(config_of(runs, tmp_path, clip=[str(folder)], sampler="plms"))


# --------------------------------------------------------------------------------------- inpainting


@pytest.mark.parametrize("upsampled", [False, True])
@pytest.mark.parametrize("sampler", ["ddpm", "plms", "dpm++2m"])
def test_known_pixels_are_the_same_in_the_written_picture(runs, tmp_path, sampler, upsampled):
    side = 4 * SIDE if upsampled else SIDE
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
    mask = np.zeros((side, side), dtype=np.uint8)
    mask[side // 4 : side // 2] = 255
    Image.fromarray(image).save(tmp_path / "image.png")
    Image.fromarray(mask).save(tmp_path / "mask.png")
    (path,) = generate(
        config_of(
            runs,
            tmp_path / "out",
            sampler=sampler,
            base=str(runs / "base-inpaint"),
            upsampler=str(runs / "upsample-inpaint") if upsampled else "",
            inpaint_image=str(tmp_path / "image.png"),
            inpaint_mask=str(tmp_path / "mask.png"),
        )
    )
    drawn = pixels(path)
    assert (drawn[mask == 0] == image[mask == 0]).all()
    assert (drawn[mask == 255] != image[mask == 255]).any(axis=-1).mean() > 0.9


# ----------------------------------------------------------------------------------------- mistakes


def told(capsys):
    """The one line on standard error."""
    error = capsys.readouterr().err.splitlines()
    lines = [line for line in error if line.startswith("python -m glide_finetune.generate: error")]
    assert len(lines) == 1
    return lines[0]


MISTAKES = {
    "no caption": ([], "there is no caption: give --prompt or --prompt_file"),
    "two sources": (["--prompt", "a", "--prompt_file", "f"], "give one of them"),
    "no file": (["--prompt_file", "{}/none.txt"], "cannot read {}/none.txt"),
    "blank file": (["--prompt_file", "{}/blank.txt"], "blank.txt holds no prompt"),
    "sampler": (["--sampler", "heun"], "invalid choice: 'heun'"),
    **{
        f"{flag} {steps}": ([flag, steps], f"{flag} is '{steps}'; give a number from 2 to 1000, or")
        for flag in ("--steps", "--upsample_steps")
        for steps in ("many", "0", "1", "-5", "ddim0", "10,x", "10,0", "fast99", "")
    },
    "steps": (["--steps", "2000"], "--steps: timestep respacing asks for 2000 of the 1000"),
    "few for plms": (["--sampler", "plms", "--steps", "2"], "number from 3, which plms needs"),
    "few for prk": (
        ["--upsample_sampler", "prk", "--upsample_steps", "2"], "number from 3, which prk needs"
    ),
    "sections": (["--upsample_steps", "9,501"], "--upsample_steps: timestep respacing asks for 50"),
    "stride": (["--steps", "ddim300"], "--steps: no whole stride over 1000 timesteps gives ddim"),
    "few": (["--base", "{}/few", "--steps", "50"], "--steps: timestep respacing asks for 50 of th"),
    "few of a file": (
        ["--base", "{}/few/glide-ft-0x3.pt", "--steps", "1"], "give a number from 2 to 20, or"
    ),
    "missing": (["--base", "{}/none.pt"], "--base: {}/none.pt does not exist"),
    "stage": (["--base", "{}/runs/upsample/glide-ft-0x3.pt"], "kind upsample: give it as --ups"),
    "other": (["--upsampler", "{}/runs/base/glide-ft-0x3.pt"], "kind base: give it as --base"),
    "one half": (["--inpaint_image", "{}/wide.png"], "go together: give both"),
    "mask size": (
        ["--inpaint_image", "{}/wide.png", "--inpaint_mask", "{}/tall.png"],
        "--inpaint_mask has 10x20 pixels, the image 20x10",
    ),
    "no image": (
        ["--inpaint_image", "{}/blank.txt", "--inpaint_mask", "{}/tall.png"],
        "--inpaint_image: cannot read {}/blank.txt",
    ),
    "clip": (["--clip", "{}"], "there is no file {}/clip_image_enc.pt"),
    "clips": (["--clip", "a", "b", "c"], "--clip has 3 paths"),
    "device": (["--device", "gpu"], "--device is 'gpu'"),
    "prompt": (["--prompt", "caf\udce9"], "--prompt is 'caf\\udce9', which is not UTF-8"),
    "negative": (["--negative_prompt", "\udce9"], "--negative_prompt is '\\udce9', which is not"),
    "last seed": (["--seed", str(2**63 - 1), "-n", "2"], "leaves no seeds for 2 pictures"),
    "again": (["--again", "{}/wide.png"], "wide.png does not tell how it was drawn"),
    "output": (["--output_dir", "{}/blank.txt"], "--output_dir: {}/blank.txt is a file"),
    **{
        f"range of {name}": ([f"--{name}", "-1"], f"--{name} is -1")
        for name in RANGES
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def odd(tmp_path_factory, runs) -> Path:
    folder = tmp_path_factory.mktemp("odd")
    (folder / "blank.txt").write_text("\n \n")
    Image.new("RGB", (20, 10)).save(folder / "wide.png")
    Image.new("RGB", (10, 20)).save(folder / "tall.png")
    (folder / "runs").symlink_to(runs)
    write_run(folder / "few", diffusion_steps=20)
    return folder


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_in_one_line(odd, capsys, name):
    flags, message = MISTAKES[name]
    flags = [flag.replace("{}", str(odd)) for flag in flags]
    if name not in ("no caption", "two sources", "no file", "blank file", "again"):
        flags = ["--prompt", "a cat", *flags]
    with pytest.raises(SystemExit) as stop:
        parse_config(flags)
    assert stop.value.code == 2
    assert message.replace("{}", str(odd)) in told(capsys)


@pytest.mark.parametrize(
    ("flags", "status", "message"),
    [
        (["--base", "{}/runs/upsample"], 2, "holds a model of kind upsample: give it as --upsam"),
        (["--base", "{}"], 1, "holds no whole checkpoint"),
        (["--base", "{}/blank.txt"], 1, "not a PyTorch weights file"),
        (
            ["--base", "{}/runs/base", "--inpaint_image", "{}/wide.png", "--inpaint_mask",
             "{}/wide.png"],
            1,
            "kind base, which cannot paint on a picture: give one of kind base-inpaint",
        ),
    ],
)  # fmt: skip
def test_what_only_the_files_tell_is_one_line_too(odd, tmp_path, capsys, flags, status, message):
    flags = [flag.replace("{}", str(odd)) for flag in flags]
    flags = ["--prompt", "a", "--output_dir", str(tmp_path), "--device", "cpu", *flags]
    assert main(flags) == status
    assert message in told(capsys)


def test_an_upsampler_enlarges_as_it_was_trained_to(runs, tmp_path):
    folder = write_run(tmp_path / "by_two", "upsample")
    write_args(folder, {"upscale_factor": 2, "model_options": {}})
    for settings, factor in (
        ({"upsampler": str(folder)}, 2),
        ({"upsampler": str(folder), "upscale_factor": 3}, 3),
        ({"upsampler": str(runs / "upsample")}, 4),
    ):
        (path,) = generate(config_of(runs, tmp_path / "out", **settings))
        assert pixels(path).shape == (factor * SIDE, factor * SIDE, 3)
        assert json.loads(text_of(path)["settings"])["upscale_factor"] == factor


def test_a_full_disk_names_the_file(tmp_path, monkeypatch):
    full = mock.Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*00000\.png'"):
        write_numbered(tmp_path, "", Image.new("RGB", (4, 4)), {})
    assert list(tmp_path.iterdir()) == []


def test_plain_weights_of_the_other_stage_are_told_apart(tmp_path, capsys):
    model, _, _ = tiny_model("upsample")
    torch.save(model.state_dict(), tmp_path / "plain.pt")
    assert main(["--prompt", "a", "--base", str(tmp_path / "plain.pt"), "--device", "cpu"]) == 2
    assert "holds a model of kind upsample: give it as --upsampler" in told(capsys)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("[1]", "does not tell how it was drawn"),
        ('{"size": 3}', "holds unknown settings: size"),
        ('{"upsampler": 3}', "upsampler is 3, which should be of type str"),
        ('{"side_x": "8"}', "side_x is '8', which should be of type int"),
        ('{"clip": [3]}', "clip is [3], not a list of texts"),
    ],
)
def test_a_picture_whose_settings_were_changed_is_told_in_one_line(
    tmp_path, capsys, settings, message
):
    text = {"prompt": "a cat", "seed": "1", "settings": settings}
    path = write_numbered(tmp_path, "", Image.new("RGB", (4, 4)), text)
    with pytest.raises(SystemExit):
        parse_config(["--again", str(path)])
    assert message in told(capsys)


def test_a_run_whose_settings_were_changed_is_no_reason_for_a_traceback(runs, tmp_path, capsys):
    (tmp_path / "args.json").write_text('{"model_options": null}')
    flags = ["--prompt", "a", "--base", str(tmp_path), "--device", "cpu"]
    assert main([*flags, "--output_dir", str(tmp_path / "out")]) == 1
    assert "holds no whole checkpoint" in told(capsys)


def test_what_is_cut_from_a_long_prompt_is_told(runs, tmp_path, caplog):
    prompt = "one two three four five six seven eight nine ten"
    Painter(config_of(runs, tmp_path)).tell_what_is_cut(["a cat", prompt, prompt + " word" * 1000])
    line, long_line = [r.message for r in caplog.records if "tokens" in r.message]
    most = OPTIONS["text_ctx"]
    assert f"10 tokens, the model reads {most}: what is cut is ' nine ten'" in line
    start = f"1010 tokens, the model reads {most}: what is cut is ' nine ten word word"
    assert start in long_line
    assert long_line.endswith("…'")
    assert len(long_line.partition("cut is ")[2]) == 80 + len("''")


def test_too_little_memory_is_told_in_one_line(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(generation, "sample", mock.Mock(side_effect=torch.OutOfMemoryError("cuda")))
    flags = ["--prompt", "a", "--base", str(runs / "base"), "--output_dir", str(tmp_path)]
    assert main([*flags, "--device", "cpu"]) == 1
    assert "memory does not suffice: give a --batch_size below 16" in told(capsys)


def test_weights_that_are_not_to_be_had_are_told_in_one_line(tmp_path, capsys, monkeypatch):
    error = DownloadError("cannot download base.pt")
    monkeypatch.setattr(generation, "load_model", mock.Mock(side_effect=error))
    assert main(["--prompt", "a", "--output_dir", str(tmp_path), "--device", "cpu"]) == 1
    assert told(capsys).endswith(
        "error: cannot download base.pt; or give other weights to --base, --upsampler or --clip"
    )


def test_help_and_mistakes_need_no_torch():
    code = (
        "import sys; from glide_finetune.generate import parse_config\n"
        "for argv in (['--help'], ['--prompt', 'a', '--base', 'none.pt']):\n"
        "    try:\n        parse_config(argv)\n    except SystemExit:\n        pass\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'numpy', 'wandb')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT).returncode == 0


def test_the_samplers_and_settings_are_known_by_their_names():
    assert tuple(SAMPLERS) == tuple(LOOPS)
    once = {name for name, field in FIELDS.items() if field.metadata["once"]}
    assert once == {
        "prompt", "prompt_file", "again", "num_images", "seed", "batch_size", "device",
        "output_dir",
    }  # fmt: skip
