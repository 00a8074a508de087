"""The command line: every flag, where defaults come from, and how mistakes are answered."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from glide_finetune.arguments import build_parser, parse_config
from glide_finetune.config import FIELDS, TrainConfig, complete, recorded
from glide_finetune.config_checks import RANGES, check

ROOT = Path(__file__).parent.parent

# flag, short form, default, something to type, what comes of it
PUBLISHED_FLAGS = [
    ("data_dir", "data", "./data", "pictures", "pictures"),
    ("batch_size", "bs", 1, "4", 4),
    ("learning_rate", "lr", 2e-5, "1e-04", 1e-4),
    ("adam_weight_decay", "adam_wd", 0.0, "0.01", 0.01),
    ("side_x", "x", 64, "128", 128),
    ("side_y", "y", 64, "32", 32),
    ("resize_ratio", "crop", 0.8, "0.5", 0.5),
    ("uncond_p", "p", 0.2, "0.1", 0.1),
    ("train_upsample", "upsample", False, "True", True),
    ("upscale_factor", "upscale", 4, "2", 2),
    ("image_to_upsample", "lowres", "", "low.png", "low.png"),
    ("resume_ckpt", "resume", "", "auto", "auto"),
    ("checkpoints_dir", "ckpt", "./glide_checkpoints/", "runs", "runs"),
    ("use_fp16", "fp16", False, "True", True),
    ("device", "dev", "", "cuda:1", "cuda:1"),
    ("log_frequency", "freq", 100, "7", 7),
    ("freeze_transformer", "fz_xt", False, "True", True),
    ("freeze_diffusion", "fz_unet", False, "True", True),
    ("project_name", "name", "glide-finetune", "stamps", "stamps"),
    ("activation_checkpointing", "grad_ckpt", False, "True", True),
    ("use_captions", "txt", True, "False", False),
    ("epochs", "epochs", 20, "3", 3),
    (
        "test_prompt",
        "prompt",
        "a group of skiers are preparing to ski down a mountain.",
        "a red star",
        "a red star",
    ),
    ("test_batch_size", "tbs", 1, "2", 2),
    ("test_guidance_scale", "tgs", 4.0, "1.5", 1.5),
    ("use_webdataset", "wds", False, "True", True),
    ("wds_image_key", "wds_img", "jpg", "png", "png"),
    ("wds_caption_key", "wds_cap", "txt", "caption", "caption"),
    ("wds_dataset_name", "wds_name", "laion", "alamy", "alamy"),
    ("seed", "seed", 0, "5", 5),
    ("cudnn_benchmark", "cudnn", False, "True", True),
]
NEWER_FLAGS = [
    ("precision", "fp32", "bf16", "bf16"),
    ("low_memory", False, "True", True),
    ("compile", False, "True", True),
    ("gradient_accumulation_steps", 1, "4", 4),
    ("ema_rate", 0.0, "0.9999", 0.9999),
    ("max_grad_norm", 1.0, "0.5", 0.5),
    ("warmup_steps", 0, "10", 10),
    ("lr_schedule", "constant", "cosine", "cosine"),
    ("num_workers", None, "2", 2),
    ("random_hflip", False, "True", True),
    ("wds_min_size", None, "300", 300),
    ("wds_min_aspect", 0.5, "0.4", 0.4),
    ("wds_max_aspect", 2.0, "3", 3.0),
    ("wds_min_similarity", None, "0.3", 0.3),
    ("wds_allow_nsfw", False, "True", True),
    ("wds_skip_words", "", "words.txt", "words.txt"),
    ("wds_epoch_samples", 0, "1000", 1000),
    ("max_steps", 0, "100", 100),
    ("save_checkpoint_interval", 1000, "50", 50),
    ("keep_checkpoints", 5, "0", 0),
    ("val_data_dir", "", "held_back", "held_back"),
    ("val_fraction", 0.0, "0.1", 0.1),
    ("eval_interval", 500, "20", 20),
    ("loss_weighting", "none", "soft_min_snr", "soft_min_snr"),
    ("test_sampler", "", "dpm++2m_sde", "dpm++2m_sde"),
    ("prompt_file", "", "prompts.txt", "prompts.txt"),
    ("vlb_weight", 0.001, "0", 0.0),
    ("loss_spike_factor", 0.0, "4", 4.0),
    ("init", "pretrained", "scratch", "scratch"),
    ("train_inpaint", False, "True", True),
    ("model_preset", "glide", "tiny", "tiny"),
    ("model_options", {}, "dropout=0", {"dropout": 0.0}),
    ("weights_only", False, "True", True),
    ("dry_run", False, "True", True),
    ("config", "", "args.json", "args.json"),
    ("demo", False, "True", True),
]
ALL_FLAGS = {name: default for name, _, default, *_ in PUBLISHED_FLAGS} | {
    name: default for name, default, *_ in NEWER_FLAGS
}
SWITCHES = [name for name, default in ALL_FLAGS.items() if isinstance(default, bool)]


def make_data(folder: Path) -> Path:
    """A folder with one captioned image, as far as a look at the names can tell."""
    folder.mkdir()
    (folder / "cat.jpg").touch()
    (folder / "cat.txt").touch()
    return folder


@pytest.fixture(autouse=True)
def data(tmp_path, monkeypatch) -> Path:
    """The default data folder, in an empty current folder."""
    monkeypatch.chdir(tmp_path)
    return make_data(tmp_path / "data")


def saved_run(folder: Path, **settings) -> Path:
    folder.mkdir(parents=True)
    (folder / "args.json").write_text(json.dumps(recorded(complete(TrainConfig(**settings)))))
    return folder


class TestFlags:
    @pytest.mark.parametrize(("name", "short", "default", "text", "value"), PUBLISHED_FLAGS)
    def test_a_published_flag_works_in_both_forms(self, name, short, default, text, value):
        for spelling in (f"--{name}", f"-{short}"):
            assert vars(build_parser().parse_args([spelling, text])) == {name: value}

    @pytest.mark.parametrize(("name", "default", "text", "value"), NEWER_FLAGS)
    def test_a_newer_flag_works(self, name, default, text, value):
        assert vars(build_parser().parse_args([f"--{name}", text])) == {name: value}

    def test_there_are_no_other_flags(self):
        assert FIELDS.keys() == ALL_FLAGS.keys()

    def test_the_defaults_are_the_published_ones(self):
        config = parse_config([])
        workers = config.num_workers
        assert config.to_dict() == ALL_FLAGS | {"num_workers": workers}
        assert 1 <= workers <= 8

    @pytest.mark.parametrize("name", SWITCHES)
    def test_a_switch_can_stand_alone_or_have_a_value(self, name):
        def parse(*argv):
            return vars(build_parser().parse_args(argv))[name]

        assert parse(f"--{name}") is True
        assert parse(f"--{name}", "--seed", "1") is True
        assert parse(f"--{name}", "True") is True
        assert parse(f"--{name}", "false") is False
        assert parse(f"--{name}=False") is False

    def test_captions_can_be_turned_off(self):
        assert parse_config([]).use_captions is True
        assert parse_config(["--no-use_captions"]).use_captions is False

    def test_the_commands_of_the_readme_and_of_old_scripts_parse(self, tmp_path):
        (tmp_path / "shards").mkdir()
        (tmp_path / "shards" / "0.tar").touch()
        base = parse_config(
            shlex.split(
                "--data_dir data --batch_size 4 --learning_rate 1e-04 --side_x 64 --side_y 64 "
                "--uncond_p 0.2 --checkpoints_dir ./finetune_checkpoints"
            )
        )
        assert (base.model_type, base.batch_size, base.learning_rate) == ("base", 4, 1e-4)
        upsampler = parse_config(
            shlex.split(
                "--data_dir data --train_upsample --upscale_factor 4 --side_x 64 --side_y 64 "
                "--uncond_p 0.0 --checkpoints_dir ./finetune_checkpoints"
            )
        )
        assert (upsampler.model_type, upsampler.image_width) == ("upsample", 256)
        shards = parse_config(
            shlex.split(
                "--data_dir shards --use_webdataset --wds_caption_key txt --wds_image_key jpg "
                "--wds_dataset_name laion"
            )
        )
        assert shards.use_webdataset

    def test_shards_tell_the_end_of_a_cosine_schedule_if_epochs_have_a_length(self, tmp_path):
        (tmp_path / "0.tar").touch()
        words = "--data_dir 0.tar --use_webdataset --lr_schedule cosine --wds_epoch_samples 100"
        assert parse_config(words.split()).wds_epoch_samples == 100

    def test_the_dropped_captions_default_to_none_for_the_upsampler(self):
        assert parse_config([]).uncond_p == 0.2
        assert parse_config(["--train_upsample"]).uncond_p == 0.0
        assert parse_config(["--train_upsample", "False"]).uncond_p == 0.2
        assert parse_config(["--train_upsample", "-p", "0.1"]).uncond_p == 0.1

    def test_use_fp16_means_the_precision_fp16(self):
        assert parse_config(["--use_fp16"]).precision == "fp16"
        assert parse_config(["--precision", "fp16"]).use_fp16 is True
        assert parse_config(["--precision", "bf16"]).use_fp16 is False
        assert parse_config(["--use_fp16", "False", "--precision", "bf16"]).precision == "bf16"
        assert complete(TrainConfig(use_fp16=True)).precision == "fp16"

    def test_model_options_are_collected_in_their_types(self):
        config = parse_config(
            shlex.split(
                "--init scratch --model_options num_channels=64 dropout=0 xf_final_ln=False "
                "--model_options channel_mult=1,2,2,2"
            )
        )
        assert config.model_options == {
            "num_channels": 64,
            "dropout": 0.0,
            "xf_final_ln": False,
            "channel_mult": "1,2,2,2",
        }
        assert config.options["num_channels"] == 64
        assert config.options["xf_width"] == 512

    def test_presets_have_models_of_their_own_for_base_and_upsampler(self):
        tiny = ["--model_preset", "tiny", "--init", "scratch", "-x", "16", "-y", "16"]
        assert parse_config(tiny).options["super_res"] is False
        assert parse_config([*tiny, "--train_upsample"]).options["super_res"] is True

    def test_every_setting_is_used_somewhere(self):
        sources = {
            path: path.read_text(encoding="utf-8")
            for path in [ROOT / "train_glide.py", *(ROOT / "glide_finetune").rglob("*.py")]
            if path.name != "config_checks.py"  # to check is not to use
        }
        config_py = ROOT / "glide_finetune" / "config.py"
        sources[config_py] = sources[config_py].replace("self.", "config.")
        text = "\n".join(sources.values())
        unused = [
            name
            for name in FIELDS
            if not re.search(rf'\bconfig\.{name}\b|\btyped(\.get\(|\[)"{name}"', text)
        ]
        assert not unused


class TestDefaultsFromElsewhere:
    def test_a_config_gives_defaults_and_what_is_typed_wins(self, tmp_path):
        run = saved_run(
            tmp_path / "old", batch_size=4, learning_rate=1e-3, train_upsample=True, seed=9
        )
        config = parse_config(["--config", str(run / "args.json"), "-bs", "2"])
        assert (config.batch_size, config.learning_rate, config.seed) == (2, 1e-3, 9)
        assert config.train_upsample
        off = parse_config(["--config", str(run / "args.json"), "--train_upsample", "False"])
        assert not off.train_upsample

    def test_a_config_does_not_start_what_its_run_was_started_for(self, tmp_path):
        run = saved_run(
            tmp_path / "old", dry_run=True, demo=True, resume_ckpt="auto", config="other.json"
        )
        config = parse_config(["--config", str(run / "args.json")])
        once = (config.dry_run, config.demo, config.resume_ckpt, config.config)
        assert once == (False, False, "", str(run / "args.json"))

    def test_a_config_can_be_written_by_hand(self, tmp_path):
        file = tmp_path / "my.json"
        file.write_text('{"use_fp16": true, "learning_rate": 1, "model_options": {"dropout": 0}}')
        config = parse_config(["--config", str(file)])
        assert (config.precision, config.learning_rate) == ("fp16", 1.0)
        assert config.options["dropout"] == 0

    def test_a_resumed_run_keeps_its_settings_and_what_is_typed_wins(self, tmp_path):
        run = saved_run(tmp_path / "runs" / "0003", batch_size=4, ema_rate=0.99, max_steps=10)
        for words in (["--resume_ckpt", str(run)], ["-resume", "auto", "-ckpt", "runs"]):
            config = parse_config([*words, "--max_steps", "20"])
            assert (config.batch_size, config.ema_rate, config.max_steps) == (4, 0.99, 20)

    def test_auto_without_a_run_and_an_empty_path_start_afresh(self):
        assert parse_config(["--resume_ckpt", "auto"]).batch_size == 1
        assert parse_config(["--resume_ckpt", ""]).resume_ckpt == ""

    def test_a_weights_file_brings_its_model_but_not_its_settings(self, tmp_path):
        run = saved_run(tmp_path / "runs" / "0000", batch_size=4)
        model = {"num_channels": 64, "use_fp16": True, "timestep_respacing": "100"}
        (run / "glide-ft-0x7.json").write_text(json.dumps({"kind": "base", "model_options": model}))
        for name in ("glide-ft-0x7.pt", "glide-ft-0x7-ema.pt"):
            (run / name).touch()
            config = parse_config(["--resume_ckpt", str(run / name)])
            assert config.batch_size == 1
            assert config.options["num_channels"] == 64
            assert config.model_options.keys() == {"num_channels"}

    def test_an_inpainting_model_can_start_from_weights_that_know_nothing_of_masks(self, tmp_path):
        for kind, words in (("base", []), ("upsample", ["--train_upsample"])):
            options = {"num_channels": 64, "inpaint": False, "super_res": kind == "upsample"}
            description = {"kind": kind, "model_options": options}
            (tmp_path / f"{kind}.json").write_text(json.dumps(description))
            (tmp_path / f"{kind}.pt").touch()
            config = parse_config(["--resume_ckpt", f"{kind}.pt", "--train_inpaint", *words])
            assert config.model_type == f"{kind}-inpaint"
            assert config.options["num_channels"] == 64
            assert config.options["inpaint"] is True
            assert config.options["super_res"] is (kind == "upsample")

    def test_a_weights_file_without_description_follows_the_flags(self, tmp_path):
        (tmp_path / "other.pt").touch()
        config = parse_config(["--resume_ckpt", "other.pt", "--model_preset", "tiny"])
        assert config.options["image_size"] == 16

    def test_a_precision_typed_in_any_way_wins_over_a_saved_one(self, tmp_path):
        half = str(saved_run(tmp_path / "half", use_fp16=True))
        brain = str(saved_run(tmp_path / "brain", precision="bf16"))
        assert parse_config(["--config", half]).precision == "fp16"
        assert parse_config(["--config", half, "--precision", "bf16"]).precision == "bf16"
        assert parse_config(["--config", half, "--use_fp16", "False"]).precision == "fp32"
        assert parse_config(["--config", brain, "--use_fp16"]).precision == "fp16"
        assert parse_config(["--config", brain, "--use_fp16", "False"]).precision == "bf16"

    def test_a_typed_prompt_wins_over_a_saved_file_of_prompts(self, tmp_path):
        (tmp_path / "prompts.txt").write_text("a cat\n")
        run = str(saved_run(tmp_path / "old", prompt_file="prompts.txt"))
        assert parse_config(["--config", run]).prompt_file == str(tmp_path / "prompts.txt")
        for prompt in ("a dog", ""):
            assert parse_config(["--config", run, "--test_prompt", prompt]).prompt_file == ""

    def test_a_typed_way_to_validate_wins_over_a_saved_one(self, tmp_path):
        run = str(saved_run(tmp_path / "old", val_fraction=0.1))
        config = parse_config(["--config", run, "--val_data_dir", "data"])
        assert (config.val_fraction, config.val_data_dir) == (0.0, "data")
        run = str(saved_run(tmp_path / "other", val_data_dir="data"))
        config = parse_config(["--config", run, "--val_fraction", "0"])
        assert Path(config.val_data_dir).name == "data"

    def test_the_demo_changes_defaults_only(self, monkeypatch, tmp_path):
        (tmp_path / "empty").mkdir()
        monkeypatch.chdir(tmp_path / "empty")  # its pictures are drawn later
        demo = parse_config(["--demo"])
        assert demo.init == "scratch"
        assert demo.side_x == 32
        changed = parse_config(
            ["--demo", "-bs", "3", "--use_fp16", "--model_options", "num_res_blocks=2"]
        )
        assert (changed.batch_size, changed.precision) == (3, "fp16")
        assert changed.options == demo.options | {"num_res_blocks": 2}

    def test_args_json_of_a_dry_run_is_a_config(self, tmp_path):
        text = json.dumps(parse_config(["-bs", "3", "--use_fp16", "--dry_run"]).to_dict())
        (tmp_path / "printed.json").write_text(text)
        config = parse_config(["--config", "printed.json"])
        assert (config.batch_size, config.precision, config.dry_run) == (3, "fp16", False)


OUT_OF_RANGE = {
    "batch_size": "0", "gradient_accumulation_steps": "0", "epochs": "-1", "test_batch_size": "0",
    "side_x": "0", "side_y": "-64", "upscale_factor": "0", "save_checkpoint_interval": "0",
    "eval_interval": "0", "max_steps": "-1", "warmup_steps": "-1", "keep_checkpoints": "-1",
    "log_frequency": "-1", "num_workers": "-1", "adam_weight_decay": "-0.1",
    "max_grad_norm": "-1.0", "vlb_weight": "-1.0", "test_guidance_scale": "-1.0",
    "loss_spike_factor": "-1.0",
    "learning_rate": "0", "seed": "-1", "uncond_p": "1.1", "resize_ratio": "0", "ema_rate": "1",
    "val_fraction": "0.95", "wds_min_size": "-1", "wds_min_aspect": "-0.5",
    "wds_max_aspect": "-1.0", "wds_min_similarity": "25.0", "wds_epoch_samples": "-1",
}  # fmt: skip

# what is typed, with {} for a folder of odd files: parts of the answer
MISTAKES: dict[str, tuple[str, ...]] = {
    **{f"--{name} {value}": (f"--{name} is", "; give a ") for name, value in OUT_OF_RANGE.items()},
    "--learning_rate nan": ("--learning_rate is nan; give a number above 0",),
    "--learning_rate inf": ("--learning_rate is inf",),
    "--uncond_p nan": ("--uncond_p is nan",),
    "--max_grad_norm inf": ("--max_grad_norm is inf",),
    "--vlb_weight -inf": ("--vlb_weight",),
    "--seed 99999999999999999999": ("--seed",),
    "--batch_size 50000000": ("--batch_size is 50000000; give a number from 1 to 65536",),
    # words of the wrong kind
    "--batch_size four": ("--batch_size", "four"),
    "--batch_size 1.5": ("--batch_size", "1.5"),
    "--train_upsample maybe": ("--train_upsample", "maybe", "neither True nor False"),
    "--batchsize 4": ("no flag --batchsize", "did you mean --batch_size?"),
    "--quite_unknown": ("no flag --quite_unknown", "--help"),
    "stray": ("stray",),
    "--data_dir": ("--data_dir", "expected one argument"),
    "--precision fp64": ("--precision", "fp64", "bf16"),
    "--model_preset huge": ("--model_preset", "huge", "small"),
    "--wds_dataset_name coco": ("--wds_dataset_name", "coco", "generic"),
    "--device gpu": ("--device is 'gpu'", "cuda"),
    # what does not go together
    "--freeze_transformer --freeze_diffusion": ("--freeze_transformer", "--freeze_diffusion"),
    "--low_memory --use_fp16": ("--low_memory", "give --precision bf16 or fp32"),
    "--use_fp16 --precision bf16": ("--use_fp16", "--precision is bf16"),
    "--use_fp16 --precision fp32": ("--use_fp16", "--precision is fp32"),
    "--val_data_dir {}/good --val_fraction 0.1": ("--val_data_dir", "--val_fraction"),
    "--data_dir {}/tars --use_webdataset --val_fraction 0.1": ("--val_fraction", "--val_data_dir"),
    "--data_dir {}/tars --use_webdataset --lr_schedule cosine": ("--lr_schedule", "--max_steps"),
    "--wds_min_aspect 2 --wds_max_aspect 0.5": ("--wds_min_aspect is 2.0", "--wds_max_aspect 0.5"),
    "--wds_epoch_samples 3 -bs 4": ("--wds_epoch_samples is 3", "no batch of 4"),
    "--wds_min_similarity nan": ("--wds_min_similarity is nan",),
    "--image_to_upsample {}/good/cat.jpg": ("--image_to_upsample", "--train_upsample"),
    "--weights_only": ("--weights_only", "--resume_ckpt FILE.pt"),
    "--weights_only --resume_ckpt {}/run": ("--weights_only", "--resume_ckpt FILE.pt"),
    "--no-use_captions --data_dir {}/good --checkpoints_dir {}/good/runs": (
        "--checkpoints_dir",
        "lies in the data",
        "a folder elsewhere",
    ),
    "--test_prompt caf\udce9": ("--test_prompt is 'caf\\udce9', which is not UTF-8",),
    "--model_options diffusion_steps=20 noise_schedule=linear": ("give 21 or more, or noise_sch",),
    "--model_options diffusion_steps=1": ("diffusion_steps is 1; give a number of at least 2",),
    # data
    "--data_dir {}/missing": ("--data_dir", "missing", "does not exist"),
    "--data_dir {}/good/cat.jpg": ("--data_dir", "cat.jpg", "is a file"),
    "--data_dir {}/empty": ("--data_dir", "no images in", "empty"),
    "--data_dir {}/uncaptioned": ("--data_dir", "no captions", "--no-use_captions"),
    "--data_dir {}/empty --no-use_captions": ("no images",),
    "--data_dir {}/tars": ("--data_dir", "no images", "add --use_webdataset"),
    "--data_dir {}/tars/0.tar": ("--data_dir", "is a file", "add --use_webdataset"),
    "--data_dir {}/good --use_webdataset": ("--data_dir", "no shards", ".tar"),
    "--data_dir {}/missing.tar --use_webdataset": ("--data_dir", "missing.tar"),
    "--val_data_dir {}/empty": ("--val_data_dir", "no images"),
    "--demo --val_data_dir {}/empty": ("--val_data_dir", "no images"),
    "--image_to_upsample {}/no.png --train_upsample": ("--image_to_upsample", "no.png"),
    "--image_to_upsample {}/blank.txt --train_upsample": ("--image_to_upsample", "blank.txt"),
    "--image_to_upsample {}/cut.png --train_upsample": ("--image_to_upsample", "cut.png"),
    "--image_to_upsample {}/a.ico --train_upsample": ("a.ico", "not an image that Pillow can read"),
    "--prompt_file {}/no.txt": ("--prompt_file", "no.txt"),
    "--prompt_file {}/blank.txt": ("--prompt_file", "blank.txt", "holds no prompt"),
    "--prompt_file {}/binary.txt": ("--prompt_file", "binary.txt", "UTF-8"),
    "--wds_skip_words {}/no.txt": ("--wds_skip_words", "no.txt", "No such file"),
    "--wds_skip_words {}/blank.txt": ("--wds_skip_words", "blank.txt", "holds no word"),
    "--wds_skip_words {}/binary.txt": ("--wds_skip_words", "binary.txt", "UTF-8"),
    "--data_dir {}/bad.list --use_webdataset": ("--data_dir", "bad.list", "only when typed"),
    "--data_dir ~nobody-here/x": ("~ of a user who is not known",),
    "--data_dir {}/" + "x" * 300: ("--data_dir", "File name too long"),
    "--checkpoints_dir {}/" + "x" * 300: ("cannot read", "File name too long"),
    "--resume_ckpt {}/" + "x" * 300: ("cannot read", "File name too long"),
    "--config {}/" + "x" * 300: ("cannot read", "File name too long"),
    "--data_dir {}/upper": ("no images", "add --use_webdataset"),
    "--data_dir s3://bucket/0.tar --use_webdataset": ("--data_dir", "s3:// is unknown", "pipe:"),
    "--demo --prompt_file {}/no.txt": ("--prompt_file", "no.txt"),
    "--checkpoints_dir {}/blank.txt/runs": ("--checkpoints_dir", "blank.txt is a file"),
    # models
    "--side_x 65": ("--side_x is 65", "multiple of 8", "64 or 72"),
    "--side_y 4": ("--side_y is 4", "multiple of 8", "such as 8"),
    "--train_upsample --side_x 65": ("--side_x is 65", "multiple of 8", "64 or 72"),
    "--train_upsample --side_x 33 --upscale_factor 16": ("--side_x is 33", "multiple of 2"),
    "--model_preset tiny --init scratch --side_x 17": ("--side_x is 17", "16 or 18"),
    "--model_preset tiny": ("--model_preset tiny", "no weights are released", "--init scratch"),
    "--model_preset tiny --resume_ckpt auto": ("no weights are released",),
    "--model_options xf_layers=2": ("xf_layers", "no weights are released", "--init scratch"),
    "--model_options depth=2": ("--model_options", "'depth'", "num_channels"),
    "--model_options num_channels": ("--model_options", "KEY=VALUE"),
    "--model_options num_channels=many": ("num_channels", "'many'", "whole number"),
    "--model_options dropout=lots": ("dropout", "a number"),
    "--model_options xf_padding=maybe": ("xf_padding", "True or False"),
    "--model_options num_channels=100 --init scratch": ("num_channels is 100", "multiple of 32"),
    "--model_options channel_mult=1,x --init scratch": ("--model_options", "channel_mult", "1,x"),
    "--model_options channel_mult=1,2 --init scratch": ("channel_mult '1,2'", "image_size"),
    "--model_options image_size=48 --init scratch": ("--model_options", "image_size", "48"),
    "--model_options attention_resolutions=a --init scratch": ("attention_resolutions is 'a'",),
    "--model_options num_head_channels=50 --init scratch": ("num_head_channels is 50", "384"),
    "--model_options xf_heads=7 --init scratch": ("xf_width is 512", "xf_heads 7"),
    "--model_options dropout=1 --init scratch": ("dropout is 1.0",),
    "--model_options text_ctx=0 --init scratch": ("text_ctx is 0",),
    "--model_options noise_schedule=exp --init scratch": ("noise_schedule", "linear"),
    "--model_options super_res=True": ("super_res", "--train_upsample"),
    "--model_options inpaint=True": ("inpaint", "--train_inpaint"),
    "--model_options cache_text_emb=True": ("cache_text_emb",),
    "--model_options timestep_respacing=10": ("timestep_respacing", "all timesteps"),
    # where to start
    "--resume_ckpt {}/none.pt": ("--resume_ckpt", "none.pt", "no such file"),
    "--resume_ckpt {}/empty": ("--resume_ckpt", "args.json is missing"),
    "--resume_ckpt {}/runs": ("--resume_ckpt", "newest run in it is", "0000"),
    "--resume_ckpt {}/runs/0000/glide-ft-0x1.pt": ("kind upsample", "kind base", "add --train_up"),
    "--resume_ckpt {}/base.pt --train_upsample": (
        "kind base",
        "kind upsample",
        "leave out --train",
    ),
    "--resume_ckpt {}/inpaint.pt": ("kind base-inpaint", "kind base ", "add --train_inpaint"),
    "--resume_ckpt {}/inpaint.pt --train_upsample": (
        "kind base-inpaint",
        "kind upsample ",
        "leave out --train_upsample and add --train_inpaint",
    ),
    "--resume_ckpt {}/base.pt --train_upsample --train_inpaint": (
        "kind base,",
        "kind upsample-inpaint",
        "leave out --train_upsample",
    ),
    "--resume_ckpt {}/run --train_inpaint": (
        "trains a model of kind base,",
        "kind base-inpaint",
        "leave out --train_inpaint",
    ),
    "--config {}/no.json": ("--config", "no.json", "does not exist"),
    "--config {}/blank.txt": ("--config", "blank.txt", "not valid JSON"),
    "--config {}/list.json": ("--config", "list.json", "list"),
    "--config {}/unknown.json": ("--config", "unknown settings: batchsize"),
    "--config {}/text_for_number.json": ("--config", "batch_size is '4'", "type int"),
    "--config {}/null.json": ("--config", "seed is None", "type int"),
    "--config {}/switch.json": ("--config", "epochs is True", "type int"),
    "--config {}/choice.json": ("--precision is 'fp8'", "bf16"),
    "--config {}/option.json": ("--model_options", "'depth'"),
    "--config {}/option_type.json": ("--model_options", "num_channels is '64'"),
    "--config {}/range.json": ("--batch_size is 0",),
}

ANSWER = """
import contextlib, io, json, os, sys
os.chdir(sys.argv[1])
from glide_finetune.arguments import parse_config
answers = []
for argv in json.load(sys.stdin):
    out, err, status = io.StringIO(), io.StringIO(), None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            parse_config(argv)
        except SystemExit as stop:
            status = stop.code
    answers.append((status, out.getvalue(), err.getvalue()))
heavy = [name for name in ("torch", "numpy", "wandb", "webdataset") if name in sys.modules]
print(json.dumps([answers, heavy]))
"""


def odd_files(folder: Path) -> None:
    make_data(folder / "data")
    make_data(folder / "good")
    for name in ("empty", "uncaptioned", "tars", "upper", "runs/0000", "run"):
        (folder / name).mkdir(parents=True)
    (folder / "uncaptioned" / "cat.png").touch()
    (folder / "tars" / "0.tar").touch()
    (folder / "upper" / "0.TAR").touch()
    Image.effect_noise((64, 64), 80).save(folder / "whole.png")
    (folder / "cut.png").write_bytes((folder / "whole.png").read_bytes()[:1000])
    Image.new("RGB", (64, 64)).save(folder / "a.ico")  # no format that pictures come in
    (folder / "blank.txt").write_text(" \n\n")
    (folder / "binary.txt").write_bytes(b"\xff\xfe\xfa")
    (folder / "bad.list").write_text("pipe:cat 0.tar\n")
    (folder / "run" / "args.json").write_text("{}")
    (folder / "runs" / "0000" / "args.json").write_text("{}")
    for weights, kind in (
        ("runs/0000/glide-ft-0x1", "upsample"),
        ("base", "base"),
        ("inpaint", "base-inpaint"),
    ):
        (folder / f"{weights}.pt").touch()
        description = {"kind": kind, "model_options": {}}
        (folder / f"{weights}.json").write_text(json.dumps(description))
    for name, content in {
        "list": [],
        "unknown": {"batchsize": 4},
        "text_for_number": {"batch_size": "4"},
        "null": {"seed": None},
        "switch": {"epochs": True},
        "choice": {"precision": "fp8"},
        "option": {"model_options": {"depth": 2}},
        "option_type": {"model_options": {"num_channels": "64"}},
        "range": {"batch_size": 0},
    }.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> dict:
    """The answers to all mistakes, given by one process, and which heavy packages it imported."""
    folder = tmp_path_factory.mktemp("odd")
    odd_files(folder)
    commands = [shlex.split(words.replace("{}", str(folder))) for words in MISTAKES]
    done = subprocess.run(
        [sys.executable, "-c", ANSWER, str(folder)],
        input=json.dumps(commands), capture_output=True, text=True, check=True, cwd=ROOT,
        env={"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    found, heavy = json.loads(done.stdout)
    return dict(zip(MISTAKES, found, strict=True)) | {"heavy": heavy}


class TestArgsJson:
    def test_paths_are_absolute_and_come_back_from_any_folder(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        settings = recorded(
            complete(TrainConfig(data_dir="data", checkpoints_dir="~/runs", val_data_dir=""))
        )
        assert settings["data_dir"] == str(tmp_path / "data")
        assert settings["checkpoints_dir"] == str(tmp_path / "home" / "runs")
        assert settings["val_data_dir"] == settings["prompt_file"] == ""
        words = recorded(complete(TrainConfig(wds_skip_words="words.txt")))["wds_skip_words"]
        assert words == str(tmp_path / "words.txt")

    @pytest.mark.parametrize(
        "shards",
        ["https://host/{0..9}.tar", "pipe:cat 0.tar", "s3://bucket/0.tar", "{/a,/b}/0.tar"],
    )
    def test_shards_that_are_no_paths_stay_as_they_are(self, shards):
        assert recorded(complete(TrainConfig(data_dir=shards)))["data_dir"] == shards

    def test_patterns_of_shards_stay_patterns(self, tmp_path):
        settings = recorded(complete(TrainConfig(data_dir="tars/{0..9}-*.tar")))
        assert settings["data_dir"] == f"{tmp_path}/tars/{{0..9}}-*.tar"

    def test_what_was_left_to_the_program_is_left_to_it_again(self, tmp_path):
        run = str(saved_run(tmp_path / "base"))
        settings = json.loads((tmp_path / "base" / "args.json").read_text())
        assert (settings["uncond_p"], settings["num_workers"]) == (None, None)
        assert parse_config(["--config", run]).uncond_p == 0.2
        assert parse_config(["--config", run, "--train_upsample"]).uncond_p == 0.0

    def test_what_was_typed_stays_and_so_do_the_workers_over_shards(self):
        typed = recorded(complete(TrainConfig(uncond_p=0.1, num_workers=77)))
        assert (typed["uncond_p"], typed["num_workers"]) == (0.1, 77)
        assert recorded(complete(TrainConfig(use_webdataset=True)))["num_workers"] >= 1


class TestMistakes:
    @pytest.mark.parametrize("words", MISTAKES)
    def test_a_mistake_is_answered_with_one_clear_line(self, words, answers):
        status, out, error = answers[words]
        assert (status, out) == (2, "")
        assert error.startswith("train_glide.py: error: ")
        assert error.endswith("\n")
        assert error.count("\n") == 1
        for part in MISTAKES[words]:
            assert part in error

    @pytest.mark.parametrize(("word", "meant"), [("--lr", "-lr"), ("--batchsize", "--batch_size")])
    def test_a_flag_that_is_nearly_right_is_told(self, word, meant, capsys):
        with pytest.raises(SystemExit):
            parse_config([word, "1"])
        assert f"there is no flag {word}; did you mean {meant}?" in capsys.readouterr().err

    def test_a_command_in_somebody_elses_settings_is_not_run_unless_typed(self, tmp_path, capsys):
        settings = tmp_path / "args.json"
        settings.write_text('{"data_dir": "pipe:cat 0.tar", "use_webdataset": true}')
        with pytest.raises(SystemExit):
            parse_config(["--config", str(settings)])
        assert "commands are run only when typed" in capsys.readouterr().err
        typed = ["--config", str(settings), "--data_dir", "pipe:cat 1.tar"]
        assert parse_config(typed).data_dir == "pipe:cat 1.tar"

    def test_a_run_that_was_moved_needs_no_folder_of_other_runs(self, tmp_path, capsys):
        run = saved_run(tmp_path / "moved", checkpoints_dir=str(tmp_path / "file" / "runs"))
        (tmp_path / "file").write_text("")
        assert parse_config(["--resume_ckpt", str(run)]).resume_ckpt == str(run)

    def test_the_newest_run_is_looked_for_once_and_where_it_lies_now(self, tmp_path):
        saved_run(tmp_path / "glide_checkpoints" / "0000", checkpoints_dir=str(tmp_path / "before"))
        saved_run(tmp_path / "before" / "0001")
        config = parse_config(["--resume_ckpt", "auto"])
        saved_run(tmp_path / "glide_checkpoints" / "0001")
        assert config.resume_ckpt == "glide_checkpoints/0000"
        assert config.checkpoints_dir == str(tmp_path / "glide_checkpoints")

    def test_a_launcher_of_several_processes_is_refused(self, monkeypatch, capsys):
        for processes in ("", "1"):
            monkeypatch.setenv("WORLD_SIZE", processes)
            assert parse_config([]).batch_size == 1
        monkeypatch.setenv("WORLD_SIZE", "4")
        with pytest.raises(SystemExit):
            parse_config([])
        assert "WORLD_SIZE is 4, as torchrun sets it" in capsys.readouterr().err

    def test_torch_is_not_imported_to_find_them(self, answers):
        assert answers["heavy"] == []

    def test_every_range_is_tried(self):
        assert OUT_OF_RANGE.keys() == RANGES.keys()

    def test_a_bad_default_of_no_flag_is_found_too(self):
        with pytest.raises(ValueError, match="--precision is 'fp8'"):
            check(complete(TrainConfig(precision="fp8")))


def test_help_is_grouped_shows_defaults_and_imports_nothing_heavy(tmp_path):
    code = (
        "import sys\nfrom train_glide import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "print([m for m in ('torch', 'numpy', 'wandb', 'webdataset') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT,
        env={"COLUMNS": "100"},
    )  # fmt: skip
    *lines, heavy = done.stdout.splitlines()
    assert heavy == "[]"
    titles = [line for line in lines if re.fullmatch(r"[a-z].*:", line)]
    assert titles[1:] == [
        "how to start:",
        "data:",
        "model and checkpoints:",
        "training:",
        "precision, memory and speed:",
        "samples, validation and logging:",
    ]
    text = "".join("".join(lines).split())
    for name, default in ALL_FLAGS.items():
        assert f"--{name}" in text
        if default not in ("", None, {}) and not isinstance(default, bool) and name != "uncond_p":
            assert f"(default:{default})".replace(" ", "") in text
    assert "(default:0.2;0.0with--train_upsample)" in text


def test_what_is_advised_where_memory_is_short_goes_together():
    (advice,) = [a for a in parse_config(["--use_fp16"]).memory_advice if "--low_memory" in a]
    flags = advice.partition(" with ")[2].replace(" and ", " ")
    config = parse_config(flags.split())
    assert (config.low_memory, config.precision) == (True, "bf16")
    assert not any("--low_memory" in advice for advice in config.memory_advice)
