"""Fine-tuning the noise-aware CLIP: its loss, its runs, its files, and that it learns."""

import dataclasses
import json
import math
import multiprocessing
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from glide_finetune import clip_weights, data_report, noisy_clip
from glide_finetune.arguments import parse_config as parse_glide_config
from glide_finetune.clip_options import RELEASED_OPTIONS
from glide_finetune.clip_weights import read_clip, used_clip
from glide_finetune.config import ConfigError, TrainConfig
from glide_finetune.contrastive import contrastive_losses
from glide_finetune.data.caption_split import split_by_caption
from glide_finetune.fp16_util import Precision
from glide_finetune.generate_config import GenerateConfig
from glide_finetune.generation import generate
from glide_finetune.loader import TextImageDataset
from glide_finetune.metrics import read_metrics
from glide_finetune.noisy_clip import ClipTokens, RetrievalValidator, clip_losses
from glide_finetune.noisy_clip_config import FIELDS, ClipConfig, parse_config
from glide_finetune.noisy_clip_finetune import finetune, main
from glide_text2im.clip.model_creation import CLIPModel, create_clip_model
from glide_text2im.download import DownloadError
from glide_text2im.model_creation import create_gaussian_diffusion
from glide_text2im.tokenizer.simple_tokenizer import SimpleTokenizer
from real_runs import assert_same, history, load
from test_generate import write_run

COLOURS = {"red": (220, 20, 20), "green": (20, 200, 30), "blue": (30, 30, 220), "grey": (90,) * 3}
SMALL = shlex.split(
    "--data_dir data --model_preset tiny --init scratch --model_options image_size=8 "
    "max_text_len=10 --batch_size 4 --device cpu --num_workers 0 --checkpoints_dir runs"
)


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")


def write_pictures(captions, folder="data"):
    """A picture of the colour that its caption names, for each."""
    Path(folder).mkdir()
    for index, caption in enumerate(captions):
        colour = next((c for name, c in COLOURS.items() if name in caption), (index, 0, 0))
        path = Path(folder, f"{index:02}.png")
        Image.new("RGB", (12, 10), colour).save(path)
        path.with_suffix(".txt").write_text(caption)


def twelve_captions():
    return [f"a {colour} {thing}" for colour in COLOURS for thing in ("wall", "door", "car")]


def tiny_clip():
    torch.manual_seed(0)
    return CLIPModel(parse_config(SMALL).options)


def caption_data(**keywords):
    return TextImageDataset("data", 8, 8, use_captions=True, tokenizer=ClipTokens(), **keywords)


def unit(rows):
    return torch.nn.functional.normalize(torch.tensor(rows, dtype=torch.float32), dim=-1)


# --------------------------------------------------------------------------------------- the loss
def test_the_loss_is_the_mean_of_both_cross_entropies():
    images, texts = unit([[1, 0], [0, 1]]), unit([[1, 0], [3, 4]])
    losses = contrastive_losses(images, texts, torch.tensor(math.log(2)), torch.eye(2).bool())
    # similarities times 2: [[2, 1.2], [0, 1.6]]
    rows = [math.log(1 + math.exp(1.2 - 2)), math.log(1 + math.exp(0 - 1.6))]
    columns = [math.log(1 + math.exp(0 - 2)), math.log(1 + math.exp(1.2 - 1.6))]
    want = [(row + column) / 2 for row, column in zip(rows, columns, strict=True)]
    assert losses.loss.tolist() == pytest.approx(want, rel=1e-6)
    assert losses.top1.tolist() == [1, 1]


def test_the_loss_is_the_same_with_pictures_and_captions_exchanged():
    generator = torch.Generator().manual_seed(0)
    images, texts = (unit(torch.randn(6, 4, generator=generator).tolist()) for _ in range(2))
    same = torch.eye(6).bool()
    same[1, 4] = same[4, 1] = True
    scale = torch.tensor(1.5)
    there, back = (contrastive_losses(*pair, scale, same) for pair in
                   ((images, texts), (texts, images)))  # fmt: skip
    assert torch.allclose(there.loss, back.loss)


def test_pairs_with_the_same_caption_are_no_negatives_of_each_other():
    images, texts = unit([[1, 0], [0.9, 0.1], [0, 1]]), unit([[1, 0], [1, 0], [0, 1]])
    same = torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 1]]).bool()
    scale = torch.tensor(2.0)
    whole = contrastive_losses(images, texts, scale, same).loss
    without = contrastive_losses(images[[0, 2]], texts[[0, 2]], scale, torch.eye(2).bool()).loss
    assert whole[0] == without[0]
    alone = contrastive_losses(images[:2], texts[:2], scale, same[:2, :2])
    assert alone.loss.tolist() == [0, 0]
    assert alone.top1.tolist() == [1, 1]


def test_a_batch_tells_which_captions_are_the_same_and_sees_noised_pictures():
    write_pictures(twelve_captions())
    model, diffusion = tiny_clip(), create_gaussian_diffusion(1000, "squaredcos_cap_v2", "")
    data = caption_data(text_ctx_len=10)
    parts = zip(*(data[index] for index in (0, 3, 0)), strict=True)
    batch = [torch.stack(part) for part in parts]
    timesteps, noise = torch.tensor([0, 999, 500]), torch.randn(3, 3, 8, 8)
    losses, used = clip_losses(model, diffusion, batch, "cpu", timesteps=timesteps, noise=noise)
    assert torch.equal(used, timesteps)
    with torch.no_grad():
        noised = diffusion.q_sample(batch[-1], timesteps, noise)
        images = model.image_embeddings(noised, timesteps)
        texts = model.text_embeddings(["a red wall", "a green wall", "a red wall"])
    same = torch.tensor([[1, 0, 1], [0, 1, 0], [1, 0, 1]]).bool()
    want = contrastive_losses(images, texts, model.logit_scale, same)
    assert torch.allclose(losses.loss, want.loss, atol=1e-5)


def test_timesteps_are_drawn_from_0_to_999():
    seen = set()

    class Watched(CLIPModel):
        def image_embeddings(self, images, t):
            seen.update(t.tolist())
            return torch.ones(len(t), 16) + 0 * images.mean()

    write_pictures(["a cat", "a dog"])
    model = Watched(parse_config(SMALL).options)
    diffusion = create_gaussian_diffusion(1000, "squaredcos_cap_v2", "")
    torch.manual_seed(0)
    tokens = torch.zeros(500, 10, dtype=torch.long)
    tokens[:, 0] = torch.arange(500)
    batch = (tokens, torch.ones(500, 10).bool(), torch.zeros(500, 3, 8, 8))
    with torch.no_grad():
        for _ in range(20):
            clip_losses(model, diffusion, batch, "cpu")
    assert seen == set(range(1000))


# --------------------------------------------------------------------------------------- the data
@pytest.mark.parametrize("caption", ["", "A photo of a cat &amp; a dog", "word " * 8, "word " * 9])
@pytest.mark.parametrize("room", [10, 77])
def test_captions_become_the_tokens_that_clip_itself_makes(caption, room):
    adapter, own = ClipTokens(), SimpleTokenizer()
    row, length = own.padded_tokens_and_len(own.encode(caption), room)
    tokens, mask = adapter.padded_tokens_and_mask(adapter.encode(caption)[:room], room)
    assert (tokens, sum(mask)) == (row, length)
    assert mask == sorted(mask, reverse=True)


def test_no_caption_is_on_both_sides_of_the_split():
    write_pictures(
        [f"thing {i % 7}\nobject {i}" for i in range(20)] + ["Thing  3", "other", "object 5"]
    )
    data = caption_data()
    for seed in range(5):
        parts = split_by_caption(data, 0.3, seed)
        captions = [
            {" ".join(c.lower().split()) for i in range(len(p)) for c in p.index.read_captions(i)}
            for p in parts
        ]
        assert all(captions)
        assert not captions[0] & captions[1]
        assert sorted([*parts[0].keys, *parts[1].keys]) == sorted(data.keys)


def test_captions_that_are_all_the_same_cannot_be_split():
    write_pictures(["a cat"] * 4)
    data = caption_data()
    with pytest.raises(ValueError, match="too many have the same caption"):
        split_by_caption(data, 0.5, 0)


def test_validation_takes_one_pair_of_each_caption_and_at_most_a_hundred():
    def item(number):
        tokens, mask = torch.zeros(10, dtype=torch.long), torch.ones(10).bool()
        tokens[0] = number
        return tokens, mask, torch.zeros(3, 8, 8)

    write_pictures(["a cat"])
    trainer = SimpleNamespace(
        model=tiny_clip(),
        diffusion=create_gaussian_diffusion(1000, "squaredcos_cap_v2", ""),
        precision=Precision("fp32", torch.device("cpu")),
        device="cpu",
        ema=None,
    )
    for captions, pairs in ((5, 5), (240, 100)):
        validate = RetrievalValidator([item(i % captions) for i in range(240)], 0)
        metrics = validate(trainer)
        assert metrics["val/retrieval_pairs"] == pairs
        assert metrics == validate(trainer)
    with pytest.raises(ValueError, match="fewer than two different captions"):
        RetrievalValidator([item(1), item(1)], 0)


# ------------------------------------------------------------------------------------- whole runs
def test_it_learns_which_colour_a_caption_names():
    write_pictures(twelve_captions())
    write_pictures([f"the {colour} wall" for colour in COLOURS], "val")
    argv = "--val_data_dir val --max_steps 60 --epochs 99 --learning_rate 0.01 --warmup_steps 10"
    assert main([*SMALL, *argv.split(), "--batch_size", "12"]) == 0
    (last,) = [line for line in read_metrics(Path("runs/0000")) if "val/loss" in line]
    assert last["val/retrieval_pairs"] == 4
    assert last["val/retrieval_top1"] >= 0.75  # chance is 0.25


EXACT = shlex.split(
    "--max_steps 7 --epochs 9 --learning_rate 1e-3 --ema_rate 0.9 --warmup_steps 3 --random_hflip "
    "--gradient_accumulation_steps 2 --val_fraction 0.2 --eval_interval 2"
)


def test_data_workers_do_not_hold_the_model(monkeypatch):
    write_pictures(twelve_captions())
    make_clip, others = noisy_clip.make_clip, set(multiprocessing.active_children())
    workers = []

    def look_at_workers(*args):
        workers.append(set(multiprocessing.active_children()) - others)
        return make_clip(*args)

    monkeypatch.setattr(noisy_clip, "make_clip", look_at_workers)
    assert main([*SMALL, "--num_workers", "2", "--max_steps", "1"]) == 0
    assert len(workers[0]) == 2


def test_a_run_that_was_stopped_goes_on_to_the_same_weights():
    write_pictures([*twelve_captions(), "a cat", "a dog", "a cow", "a hen"])
    assert main([*SMALL, *EXACT]) == 0
    assert main([*SMALL, *EXACT, "--max_steps", "3"]) == 0
    assert main(["--resume_ckpt", "runs/0001", "--max_steps", "7"]) == 0
    files = [sorted(Path("runs", run).glob("*x7*.pt")) for run in ("0000", "0001")]
    assert len(files[0]) == 3
    for first, second in zip(*files, strict=True):
        assert_same(load(first), load(second))
    lines = [
        [line for line in history(Path("runs", run)) if line["step"] != 3]  # once the last
        for run in ("0000", "0001")
    ]
    assert lines[0] == lines[1]
    assert [line["step"] for line in lines[0]] == [1, 2, 4, 5, 6, 7]


def test_who_asks_to_stop_need_not_wait_for_the_validation(monkeypatch):
    write_pictures(twelve_captions())
    words = ["--max_steps", "1", "--val_fraction", "0.3"]
    measure = RetrievalValidator.__call__
    measured = []

    def ask_to_stop(self, trainer):
        os.kill(os.getpid(), signal.SIGTERM)
        measured.append(measure(self, trainer))
        return measured[-1]

    with monkeypatch.context() as patch:
        patch.setattr(RetrievalValidator, "__call__", ask_to_stop)
        assert main([*SMALL, *words]) == 128 + signal.SIGTERM
    assert measured == []
    run = Path("runs/0000")
    assert "val/loss" not in read_metrics(run)[-1]
    assert main(["--resume_ckpt", str(run)]) == 0  # which makes up for what was left
    assert "val/loss" in read_metrics(run)[-1]


@pytest.mark.parametrize("frozen", ["text", "image"])
def test_a_frozen_tower_stays_as_it_is(frozen):
    write_pictures(twelve_captions())
    argv = ["--save_checkpoint_interval", "1", "--learning_rate", "1e-2", "--max_steps", "3"]
    assert main([*SMALL, *argv, f"--freeze_{frozen}", "--adam_weight_decay", "0.1"]) == 0
    first, last = (load(next(Path("runs/0000").glob(f"glide-ft-*x{n}.pt"))) for n in (1, 3))
    changed = {name.split(".")[0] for name in first if not torch.equal(first[name], last[name])}
    other = {"text": "image", "image": "text"}[frozen]
    assert changed == {f"{other}_encoder", "logit_scale"}


def test_half_precision_leaves_the_weights_float32():
    write_pictures(twelve_captions())
    assert main([*SMALL, "--precision", "bf16", "--max_steps", "2", "--val_fraction", "0.2"]) == 0
    weights = load(next(Path("runs/0000").glob("glide-ft-*.pt")))
    assert all(tensor.dtype == torch.float32 for tensor in weights.values())
    full, half = tiny_clip(), read_clip(used_clip(["runs/0000"]))
    assert not torch.equal(full.logit_scale, half.logit_scale)
    assert all(math.isfinite(line["loss"]) for line in read_metrics(Path("runs/0000")))


def test_the_factor_of_the_similarities_never_passes_100():
    write_pictures(twelve_captions())
    argv = "--max_steps 4 --learning_rate 0.5 --model_options logit_scale=99.9"
    assert main([*SMALL, *argv.split(), "--freeze_text", "--val_fraction", "0.1"]) == 0
    weights = load(next(Path("runs/0000").glob("glide-ft-*.pt")))
    assert weights["logit_scale"].exp() <= 100.001


# -------------------------------------------------------------------------------------- its files
@pytest.fixture
def clip_run():
    write_pictures(twelve_captions())
    assert main([*SMALL, "--max_steps", "2", "--ema_rate", "0.9"]) == 0
    return Path("runs/0000")


def test_the_files_load_as_openais_do(clip_run):
    clip = create_clip_model(clip_run / "config.yaml", "cpu")
    clip.image_encoder.load_state_dict(torch.load(clip_run / "clip_image_enc.pt"))
    clip.text_encoder.load_state_dict(torch.load(clip_run / "clip_text_enc.pt"))
    average = load(next(clip_run.glob("glide-ft-*-ema.pt")))
    state = clip.state_dict()
    assert state.keys() == average.keys()
    assert torch.allclose(state.pop("logit_scale"), average.pop("logit_scale"))
    assert_same(dict(state), average)


def test_a_run_a_checkpoint_and_the_two_files_are_the_same_clip(clip_run):
    checkpoint = next(clip_run.glob("glide-ft-*-ema.pt"))
    encoders = [str(clip_run / name) for name in ("clip_image_enc.pt", "clip_text_enc.pt")]
    models = [
        read_clip(used_clip(given)) for given in ([str(clip_run)], [str(checkpoint)], encoders)
    ]
    picture, t = torch.rand(1, 3, 8, 8), torch.tensor([3])
    with torch.no_grad():
        embeddings = [model.image_embeddings(picture, t) for model in models]
    assert torch.equal(embeddings[0], embeddings[1])
    assert torch.equal(embeddings[0], embeddings[2])


def test_generate_draws_with_it(clip_run):
    write_run(Path("base"))
    settings = {"prompt": ["a red wall"], "base": "base", "steps": "4", "device": "cpu"}
    (plain,) = generate(GenerateConfig(**settings, output_dir="plain"))
    (guided,) = generate(
        GenerateConfig(**settings, output_dir="guided", clip=[str(clip_run)], clip_scale=30.0)
    )
    with Image.open(plain) as one, Image.open(guided) as other:
        assert one.tobytes() != other.tobytes()
        told = json.loads(other.text["settings"])["clip"]
    assert told == [str(next(clip_run.glob("*-ema.pt")).absolute())]


def test_its_files_tell_only_settings_that_concern_a_clip(clip_run):
    settings = json.loads((clip_run / "args.json").read_text())
    assert settings.keys() == FIELDS.keys()
    (path,) = clip_run.glob("glide-ft-*.json")
    description = json.loads(path.read_text())
    assert description["settings"] == settings
    assert description.keys() == {
        "kind", "model_options", "precision", "metrics", "trained_from", "data", "settings",
        "epoch", "step", "files",
    }  # fmt: skip


def test_a_run_that_told_more_settings_goes_on(clip_run):
    path = clip_run / "args.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vlb_weight": 0.001, "side_x": 8}))
    assert main(["--resume_ckpt", str(clip_run), "--max_steps", "3"]) == 0


def test_a_new_run_starts_from_the_files_of_another(clip_run):
    files = [str(clip_run / name) for name in ("clip_image_enc.pt", "clip_text_enc.pt")]
    shared = ["--data_dir", "data", "--batch_size", "4", "--device", "cpu", "--num_workers", "0"]
    argv = ["--max_steps", "1", "--learning_rate", "1e-30", "--checkpoints_dir", "more"]
    assert main([*shared, *argv, "--clip", *files]) == 0
    again = Path("more/0000")
    for name in ("clip_image_enc.pt", "clip_text_enc.pt"):
        assert_same(load(again / name), load(clip_run / name))
    (description,) = again.glob("glide-ft-*.json")
    assert json.loads(description.read_text())["kind"] == "clip"
    weights = next(clip_run.glob("glide-ft-*x2.pt"))
    assert main([*shared, *argv, "--weights_only", "--resume_ckpt", str(weights)]) == 0


def test_openais_weights_are_what_it_starts_from(monkeypatch):
    write_pictures(twelve_captions())
    model, asked = tiny_clip(), []

    def load_checkpoint(name, device):
        asked.append(name)
        encoder = model.image_encoder if "image" in name else model.text_encoder
        return encoder.state_dict()

    monkeypatch.setattr(clip_weights, "load_checkpoint", load_checkpoint)
    config = parse_config(SMALL)
    config.init = "pretrained"
    made = clip_weights.make_clip(config, None, torch.device("cpu"))
    assert asked == ["clip/image-enc", "clip/text-enc"]
    assert_same(dict(made.image_encoder.state_dict()), dict(model.image_encoder.state_dict()))


def test_weights_that_are_not_to_be_had_are_told_with_what_else_there_is(monkeypatch, capsys):
    def offline(*_):
        raise DownloadError("cannot download clip_image_enc.pt")

    write_pictures(twelve_captions())
    monkeypatch.setattr(clip_weights, "load_checkpoint", offline)
    monkeypatch.setattr(clip_weights, "CLIPModel", lambda options: tiny_clip())  # for speed
    shared = ["--data_dir", "data", "--batch_size", "4", "--device", "cpu", "--num_workers", "0"]
    assert main(shared) == 1
    assert capsys.readouterr().err == (
        "python -m glide_finetune.noisy_clip_finetune: error: cannot download clip_image_enc.pt; "
        "or start from other weights with --clip PATH, or from nothing with --init scratch\n"
    )


# ------------------------------------------------------------------------------------ its settings
def test_a_dry_run_tells_of_the_data_and_shows_it_with_the_captions_that_clip_gets(
    capsys, monkeypatch
):
    write_pictures([*twelve_captions(), "A Cat &amp; a dog", "word " * 9])
    labels = []
    draw = data_report.labelled_grid
    monkeypatch.setattr(
        data_report, "labelled_grid", lambda pics, texts: draw(pics, labels.extend(texts) or texts)
    )
    assert main([*SMALL, "--val_fraction", "0.1", "--dry_run"]) == 0
    out = capsys.readouterr().out
    settings, end = json.JSONDecoder().raw_decode(out)
    assert settings["batch_size"] == 4
    report = " ".join(out[end:].split())
    assert "data: data, for images of 8x8 samples 14 usable 14" in report
    assert "captions cut at 10 tokens 1 13.png" in report  # of 11 with start and end
    texts = [*twelve_captions(), "a cat & a dog", " ".join(["word"] * 8)]
    assert set(map(str.strip, labels)) < set(texts)  # less what is held back
    assert len(labels) == 12
    assert [path.name for path in Path("runs").iterdir()] == ["dry_run"]


def test_another_runs_settings_are_defaults(clip_run):
    old = parse_config(["--config", str(clip_run / "args.json")])
    assert (old.max_steps, old.ema_rate, old.model_options["image_size"]) == (2, 0.9, 8)
    new = parse_config(["--config", str(clip_run), "--ema_rate", "0", "--init", "scratch"])
    assert new == dataclasses.replace(old, config=str(clip_run), ema_rate=0.0)


def test_a_typed_start_takes_the_place_of_another_runs(clip_run):
    files = [str(clip_run / name) for name in ("clip_image_enc.pt", "clip_text_enc.pt")]
    words = ["--config", str(clip_run), "--clip", *files]
    config = parse_config(words)
    assert (config.init, config.clip) == ("pretrained", [str(Path(f).absolute()) for f in files])
    Path("args.json").write_text(json.dumps(config.to_dict() | {"config": ""}))
    config = parse_config(["--config", "args.json", "--init", "scratch"])
    assert (config.init, config.clip) == ("scratch", [])


# --------------------------------------------------------------------------------------- mistakes
@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--freeze_text", "--freeze_image"], "leave nothing to train"),
        (["--batch_size", "1"], "--batch_size is 1"),
        (["--init", "pretrained"], "no weights are released for a CLIP with another"),
        (["--clip", "data"], "--init scratch takes none"),
        (["--init", "pretrained", "--clip", "data"], "/data/clip_image_enc.pt"),
        (["--model_options", "depth=3"], "there is no option 'depth'"),
        (["--model_options", "n_embd=x"], "n_embd is 'x'; give a number"),
        (["--model_options", "patch_size=3"], "image_size 8 is no multiple of patch_size 3"),
        (["--model_options", "logit_scale=200"], "give 100 at most"),
        (["--data_dir", "nowhere"], "--data_dir"),
        (["--resume_ckpt", "base"], "trains no CLIP: go on with it by python train_glide.py"),
        (["--resume_ckpt", "base/glide-ft-0x3.pt"], "is a model of kind base, no CLIP"),
        (["--config", "base"], "--config: base is of a run that trains no CLIP"),
        (["--config", "nowhere"], "--config: nowhere"),
        (["--vlb_weight", "1"], "there is no flag --vlb_weight"),
    ],
)
def test_a_mistake_is_told_in_one_line(argv, message, capsys, monkeypatch):
    monkeypatch.delenv("UV", raising=False)  # else the command begins with uv run
    write_pictures(["a cat", "a dog"])
    write_run(Path("base"))
    with pytest.raises(SystemExit) as exit_:
        parse_config([*SMALL, *argv])
    error = capsys.readouterr().err
    assert exit_.value.code == 2
    assert message in error
    assert error.count("\n") == 1


def test_weights_of_glide_are_told_as_such(capsys):
    """And not by their options, which no CLIP has."""
    write_pictures(["a cat", "a dog"])
    write_run(Path("base"))
    with pytest.raises(SystemExit):
        parse_config(["--data_dir", "data", "--resume_ckpt", "base/glide-ft-0x3.pt"])
    assert "is a model of kind base, no CLIP" in capsys.readouterr().err


@pytest.mark.parametrize(
    "settings", [{"compile": True}, {"log_frequency": 1}, {"low_memory": True}, {"demo": True}]
)
def test_settings_that_only_glide_has_are_refused_from_a_notebook(settings):
    write_pictures(["a cat", "a dog"])
    config = ClipConfig(data_dir="data", init="scratch", **settings)
    with pytest.raises(ConfigError, match=f"{next(iter(settings))} is not for a CLIP"):
        finetune(config)


def test_a_dry_run_from_a_notebook_trains_nothing():
    write_pictures(["a cat", "a dog"])
    with pytest.raises(ConfigError, match="dry_run is for the command line"):
        finetune(ClipConfig(data_dir="data", init="scratch", dry_run=True))
    assert not Path("clip_checkpoints").exists()


def test_weights_that_do_not_fit_are_told_in_one_line(clip_run, capsys):
    weights = str(next(clip_run.glob("glide-ft-*x2.pt")))
    assert main([*SMALL, "--resume_ckpt", weights, "--model_options", "n_embd=24"]) == 1
    error = capsys.readouterr().err
    assert "does not fit the model" in error
    assert error.count("\n") == 1


def test_the_released_options_are_those_of_the_package():
    assert create_clip_model(device="meta").config == RELEASED_OPTIONS


def test_mistakes_are_found_before_torch_is_imported():
    code = (
        "import sys; from glide_finetune.noisy_clip_finetune import parse_config;"
        "parse_config(sys.argv[1:]);"
        "sys.exit(any(name in sys.modules for name in ('torch', 'numpy', 'wandb', 'yaml')))"
    )
    write_pictures(["a cat"])
    subprocess.run([sys.executable, "-c", code, *SMALL], check=True)


def test_the_two_programs_do_not_take_each_others_runs(clip_run, capsys):
    with pytest.raises(SystemExit):
        parse_glide_config(["--resume_ckpt", str(clip_run)])
    weights = next(clip_run.glob("glide-ft-*x2.pt"))
    with pytest.raises(SystemExit):
        parse_glide_config(["--resume_ckpt", str(weights), "--data_dir", "data"])
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2
    assert "model of kind clip" in errors[1]
    with pytest.raises(ValueError, match="holds a model of kind clip: give it as --clip"):
        generate(GenerateConfig(prompt=["a"], base=str(weights), device="cpu"))
    write_run(Path("base"))
    with pytest.raises(ValueError, match="is no checkpoint of a CLIP"):
        read_clip(used_clip(["base"]))


def test_every_flag_of_training_is_one_of_clip_only_if_somebody_said_so():
    """A field of `TrainConfig` becomes a flag here, unless it is named as no setting of a CLIP."""
    from_training = FIELDS.keys() & {field.name for field in dataclasses.fields(TrainConfig)}
    assert from_training == {
        "adam_weight_decay", "batch_size", "checkpoints_dir", "config", "cudnn_benchmark",
        "data_dir", "device", "dry_run", "ema_rate", "epochs", "eval_interval",
        "gradient_accumulation_steps", "init", "keep_checkpoints", "learning_rate",
        "loss_spike_factor", "lr_schedule", "max_grad_norm", "max_steps", "model_options",
        "model_preset", "num_workers", "precision", "project_name", "random_hflip", "resize_ratio",
        "resume_ckpt", "save_checkpoint_interval", "seed", "use_webdataset", "val_data_dir",
        "val_fraction", "warmup_steps", "wds_allow_nsfw", "wds_caption_key", "wds_dataset_name",
        "wds_epoch_samples", "wds_image_key", "wds_max_aspect", "wds_min_aspect",
        "wds_min_similarity", "wds_min_size", "wds_skip_words", "weights_only",
    }  # fmt: skip
