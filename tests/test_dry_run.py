"""--dry_run: the settings, what is told of the data, and the picture of it."""

import json
import os
import re
import shlex
import signal
import socket
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

import bad_data
from glide_finetune import data_report
from glide_finetune import dry_run as dry_run_module
from glide_finetune.arguments import parse_config
from glide_finetune.data import survey as survey_module
from glide_finetune.data.images import to_pil
from glide_finetune.data.survey import survey
from glide_finetune.data_report import histogram
from glide_finetune.loader import TextImageDataset
from glide_finetune.training_data import make_training_data
from stub_tokenizer import StubTokenizer
from train_glide import main

SMALL = shlex.split(
    "--model_preset tiny --init scratch --model_options xf_width=16 text_ctx=16 "
    "--side_x 8 --side_y 8 --num_workers 0 --checkpoints_dir runs"
)
SHEET = Path("runs/dry_run/data.png")


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    """What the run would cost, which tests/test_planner.py is about, is not told here."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dry_run_module, "report_cost", lambda _: None)


def write_sample(name: str, seed: int = 0, size=(40, 30), caption: str | None = "a cat") -> None:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    bad_data.picture(seed, size).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption)


def write_folder(count: int) -> None:
    for i in range(count):
        write_sample(f"data/{i:03}.png", i)


def dry_run(capsys, *argv: str) -> dict[str, str]:
    """What is told of the data, by what it is told of; there are settings before."""
    assert main(["--dry_run", *argv]) == 0
    return report(capsys.readouterr().out)


def report(out: str) -> dict[str, str]:
    settings, end = json.JSONDecoder().raw_decode(out)
    assert settings["dry_run"] is True
    lines = [re.split(r" {2,}", line[2:], maxsplit=1) for line in out[end:].splitlines()]
    return {line[0]: line[-1] for line in lines if len(line) == 2}


def test_good_data_is_told_in_few_lines_without_network_and_weights(capsys, monkeypatch):
    for i in range(20):
        write_sample(f"data/{i}.png", i, (64, 80))

    def no_network(*_):
        raise AssertionError("the network is used")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    words = shlex.split("--dry_run --data_dir data --checkpoints_dir runs --num_workers 0")
    assert main(words) == 0
    out = capsys.readouterr().out
    settings, end = json.JSONDecoder().raw_decode(out)
    assert settings["side_x"] == 64
    lines = out[end:].strip().splitlines()
    assert len(lines) < 10
    assert lines[0] == "data: data, for images of 64x64"
    told = report(out)
    assert told["samples"] == told["usable"] == "20"
    assert told["captions of 1 to 16 tokens"] == "20  " + 40 * "#"
    assert lines[-1] == f"some of it, drawn as for training: {SHEET}"


def test_nothing_but_the_picture_is_written_and_the_next_one_takes_its_place(capsys):
    write_folder(5)
    Path("runs/dry_run").mkdir(parents=True)
    SHEET.write_text("of the last time")
    dry_run(capsys, *SMALL, "--data_dir", "data")
    assert [path for path in Path("runs").rglob("*") if path.is_file()] == [SHEET]
    with Image.open(SHEET) as sheet:
        assert sheet.width > 3 * 192


@pytest.mark.parametrize("longest", [20, 77, 128])
def test_captions_that_are_too_long_have_a_bar_of_their_own(longest):
    lines = histogram(Counter({1: 1, longest: 2, longest + 1: 3, 1000: 4}), longest)
    told = {line.name: line.count for line in lines}
    assert told.pop(f"captions of over {longest} tokens") == 7
    (first, one), (last, two) = told.items()
    assert (one, two) == (1, 2)
    assert first.startswith("captions of 1 to ")
    assert last.endswith(f" to {longest} tokens")


@pytest.mark.parametrize("num_workers", ["0", "2"])
def test_what_is_bad_in_a_folder_is_told_with_reasons_and_names(capsys, num_workers):
    good = len(bad_data.write_good(Path("data"), 60))
    bad_data.write_bad(Path("data"))
    told = dry_run(capsys, *SMALL, "--data_dir", "data", "--num_workers", num_workers)
    assert told["samples"] == str(good + len(bad_data.BAD_FILES))
    assert told["usable"] == str(good)
    assert told["unreadable images"] == str(len(bad_data.BAD_IMAGES))
    assert told["unreadable captions"] == str(len(bad_data.BAD_CAPTIONS))
    assert told["images without a caption"] == "1"
    assert told["named like images only"].startswith(str(len(bad_data.NO_FILES)))


def test_reasons_come_with_their_first_names(capsys):
    write_folder(10)
    for i in range(4):
        Path(f"data/{i:03}.png").write_bytes(b"")
    Path("data/009.txt").write_text("")
    assert main(["--dry_run", *SMALL, "--data_dir", "data"]) == 0
    out = capsys.readouterr().out
    assert re.search(
        r"\n +4  not an image that Pillow can read: 000.png, 001.png, 002.png, \.\.\.\n", out
    )
    assert re.search(r"\n +1  the caption file is blank: 009.png\n", out)


def test_what_is_odd_in_a_folder_is_told(capsys):
    write_folder(10)
    write_sample("data/small/a.png", 20, (30, 15))
    write_sample("data/small/b.png", 21, (31, 10))
    write_sample("data/twice/a.png", 3)
    write_sample("data/twice/b.png", 3)
    write_sample("data/long/a.png", 22, caption="word " * 17)
    write_sample("data/several/a.png", 23, caption="one\ntwo " + "words " * 16 + "\n\nthree")
    write_sample("data/stem/a.png", 24)
    write_sample("data/stem/a.jpg", 25, caption=None)
    Path("data/metadata.jsonl").write_text('{"file_name": "none.png", "text": "a caption"}\n')
    told = dry_run(capsys, *SMALL, "--side_x", "32", "--side_y", "16", "--data_dir", "data")
    assert told["samples"] == told["usable"] == "18"
    assert told["smaller than 32x16"] == "2  the smallest is 31x10: small/a.png, small/b.png"
    assert told["copies of other images"] == "2  twice/a.png = 003.png, twice/b.png = 003.png"
    assert told["captions cut at 16 tokens"] == "2  long/a.png, several/a.png"
    assert told["captions of over 16 tokens"].startswith("2 ")
    assert told["captions of 1 to 2 tokens"].startswith("18 ")
    assert re.fullmatch(r"1  stem/a.\w+ and stem/a.\w+", told["captions shared by images"])
    assert "none.png" in told["rows of metadata left out"]


@pytest.mark.parametrize("num_workers", ["0", "2"])
def test_shards_are_looked_at_too(capsys, num_workers):
    good = bad_data.GOOD_A_SHARD * 4
    bad_data.write_good_shards(Path("data"), 4, Path("trap"))
    bad_data.write_bad_shards(Path("data"))
    told = dry_run(capsys, *SMALL, "--data_dir", "data", "-wds", "--num_workers", num_workers)
    assert told["usable"] == str(good + 2)
    assert told["samples"] == str(good + 2 + len(bad_data.BAD_SAMPLES) + 1)
    assert told["damaged shards"] == str(len(bad_data.BAD_SHARDS))
    assert told["filtered: no caption"] == "1"
    for kind, name in (("caption", "captions"), ("metadata", "metadata")):
        count = sum(bad.kind == kind for bad in bad_data.BAD_SAMPLES.values())
        assert told[f"unreadable {name}"] == str(count)
    assert not Path("trap").exists()


def test_samples_without_metadata_and_odd_names_are_told_in_their_lines(capsys):
    write_folder(4)
    write_sample("data/two\nlines.png", 22, caption="word " * 17)
    told = dry_run(capsys, *SMALL, "--data_dir", "data")
    assert told["captions cut at 16 tokens"] == "1  two\\nlines.png"
    samples = {f"{i}": bad_data.good_sample(i) for i in range(3)}
    samples["0"].pop("json", None)
    bad_data.write_tar(Path("shards/0.tar"), samples)
    told = dry_run(capsys, *SMALL, "--data_dir", "shards", "-wds")
    without = sum("json" not in members for members in samples.values())
    assert told["without metadata to filter by"] == str(without)


def test_data_that_training_would_give_up_is_told_and_ends_with_one_line(capsys):
    write_folder(10)
    for i in range(6):
        Path(f"data/{i:03}.png").write_bytes(b"")
    assert main(["--dry_run", *SMALL, "--data_dir", "data"]) == 1
    out, err = capsys.readouterr()
    assert report(out)["unreadable images"] == "6"
    assert re.fullmatch(r"train_glide.py: error: 6 of the first \d+ samples .*\n", err)
    assert not SHEET.exists()


@pytest.mark.parametrize("flags", [[], ["--use_webdataset"]])
def test_data_of_which_nothing_is_usable_is_told_and_ends_with_one_line(capsys, flags):
    if flags:
        samples = {f"{i}": bad_data.good_sample(i, jpg=b"") for i in range(3)}
        bad_data.write_tar(Path("data/0.tar"), samples)
    else:
        write_folder(3)
        for path in Path("data").glob("*.png"):
            path.write_bytes(b"")
    assert main(["--dry_run", *SMALL, "--data_dir", "data", *flags]) == 1
    out, err = capsys.readouterr()
    assert report(out)["usable"] == "0"
    assert report(out)["unreadable images"] == "3"
    assert re.fullmatch(r"train_glide.py: error: .+\n", err)


def test_a_filter_that_rejects_everything_is_told(capsys):
    bad_data.write_good_shards(Path("data"), 1, Path("trap"))
    assert main(["--dry_run", *SMALL, "--data_dir", "data", "-wds", "--wds_min_size", "500"]) == 1
    out, err = capsys.readouterr()
    assert report(out)["filtered: too small"] == str(bad_data.GOOD_A_SHARD)
    assert "no sample of the shards can be used" in err


def test_validation_data_is_told_by_itself(capsys):
    write_folder(6)
    write_sample("val/a.png", 1)
    assert main(["--dry_run", *SMALL, "--data_dir", "data", "--val_data_dir", "val"]) == 0
    assert "\nvalidation data: val, for images of 8x8\n" in capsys.readouterr().out


def sheet_of(monkeypatch, capsys, *argv: str) -> tuple[Image.Image, list[str], tuple]:
    """The picture, its captions, and the first batch of the training that it is of."""
    captions = []
    draw = data_report.labelled_grid

    def labelled_grid(pictures, labels):
        captions.extend(labels)
        return draw(pictures, labels)

    monkeypatch.setattr(data_report, "labelled_grid", labelled_grid)
    words = [*SMALL, "--data_dir", "data", "--batch_size", "9", *argv]
    dry_run(capsys, *words)
    config = parse_config(words)
    batch = next(iter(make_training_data(config, "cpu").loader))
    with Image.open(SHEET) as sheet:
        return sheet.copy(), captions, batch


def test_a_batch_that_is_larger_than_the_data_is_told(capsys, caplog):
    write_folder(20)
    config = parse_config([*SMALL, "--data_dir", "data", "--batch_size", "40"])
    make_training_data(config, "cpu")
    assert "--batch_size is 40, but there are 20 samples" in caplog.text


def test_limits_that_nothing_reads_are_told(capsys, caplog):
    write_folder(20)
    words = [*SMALL, "--data_dir", "data", "--wds_min_size", "3", "--wds_epoch_samples", "9"]
    make_training_data(parse_config(words), "cpu")
    assert "--wds_min_size does nothing without --use_webdataset" in caplog.text
    assert "--wds_epoch_samples does nothing without --use_webdataset" in caplog.text
    assert "--wds_min_aspect" not in caplog.text


def test_the_picture_shows_what_training_begins_with(capsys, monkeypatch):
    write_folder(20)
    for path in Path("data").glob("*.txt"):
        path.write_text("many words " * 20)  # of which the model gets 16
    flags = ["--uncond_p", "0.5", "--random_hflip", "--resize_ratio", "0.3"]
    sheet, captions, (_, mask, images, _) = sheet_of(monkeypatch, capsys, *flags)
    cell = to_pil(images[0]).resize((192, 192), Image.Resampling.NEAREST)
    assert sheet.crop((4, 4, 196, 196)).tobytes() == cell.tobytes()
    assert len(captions) == 16
    dropped = [caption == "(empty)" for caption in captions[:9]]
    assert dropped == [not row.any() for row in mask]
    assert 0 < sum(dropped) < 9
    assert set(captions) == {"(empty)", " ".join(["many", "words"] * 8)}


def test_the_picture_shows_the_pairs_of_an_upsampler(capsys, monkeypatch):
    write_folder(20)
    sheet, _, (_, _, low_res, high_res, _) = sheet_of(monkeypatch, capsys, "--train_upsample")
    assert high_res.shape[-1] == 4 * low_res.shape[-1] == 32
    left = to_pil(low_res[0]).resize((96, 96), Image.Resampling.NEAREST)
    right = to_pil(high_res[0]).resize((96, 96), Image.Resampling.NEAREST)
    assert sheet.crop((4, 4, 100, 100)).tobytes() == left.tobytes()
    assert sheet.crop((100, 4, 196, 100)).tobytes() == right.tobytes()


@pytest.mark.parametrize("words", ["--train_inpaint", "--train_inpaint --train_upsample"])
def test_the_data_of_an_inpainting_run_is_that_of_any_other(capsys, words):
    write_folder(20)
    told = dry_run(capsys, *SMALL, "--data_dir", "data", *words.split())
    assert told["usable"] == "20"
    assert SHEET.exists()


def dataset(tokenizer=None) -> TextImageDataset:
    return TextImageDataset(
        "data", 8, 8, tokenizer=tokenizer or StubTokenizer(), use_captions=True, return_keys=True
    )


def test_of_a_large_folder_evenly_spread_samples_are_looked_at(monkeypatch):
    write_folder(30)
    Path("data/029.png").write_bytes(b"")  # not among them
    Path("data/027.png").write_bytes(b"")
    monkeypatch.setattr(survey_module, "MOST_SAMPLES", 10)
    found = survey(dataset(), 0)
    assert (found.samples, found.dataset_size, found.usable) == (10, 30, 9)
    (some,) = found.skipped.values()
    assert some.names == ["027.png"]


def test_of_large_shards_the_first_samples_are_looked_at(capsys, monkeypatch):
    bad_data.write_good_shards(Path("data"), 4, Path("trap"))
    monkeypatch.setattr(survey_module, "MOST_SAMPLES", 20)
    told = dry_run(capsys, *SMALL, "--data_dir", "data", "-wds")
    assert told["samples"] == "20  the first ones"


class Interrupting(StubTokenizer):
    """Its user presses Ctrl-C at the fortieth caption."""

    def __init__(self) -> None:
        self.captions = 0

    def encode(self, text):
        self.captions += 1
        if self.captions == 80:  # as each is once made into tokens and once measured
            signal.raise_signal(signal.SIGINT)
        return super().encode(text)


def test_an_interrupted_look_tells_what_was_seen_so_far():
    write_folder(50)
    found = survey(dataset(Interrupting()), 0)
    assert found.interrupted
    assert 0 < found.samples == found.usable < 40
    assert found.dataset_size == 50
    config = parse_config([*SMALL, "--data_dir", "data"])
    (line, *_) = data_report.describe(found, config)
    assert line.remark == "of 50, as you stopped the look"


class Killed(StubTokenizer):
    """Its process is killed at the first caption."""

    def encode(self, text):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_ends_the_look_with_one_line():
    write_folder(4)
    with pytest.raises(ChildProcessError, match="a data worker was killed"):
        survey(dataset(Killed()), 1)


def test_a_folder_with_nothing_usable_ends_with_status_1(capsys):
    Path("data").mkdir()
    assert main(["--dry_run", *SMALL, "--data_dir", "data"]) == 1
    assert "data" in capsys.readouterr().err
