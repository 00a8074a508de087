"""Preparing: any data set in, small shards out that train the same, whatever happens on the way."""

import io
import json
import os
import shlex
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from glide_finetune.arguments import parse_config
from glide_finetune.folder_lock import LOCK_NAME
from glide_finetune.prepare import main
from glide_finetune.wds_loader import glide_wds_loader
from stub_tokenizer import StubTokenizer, caption_of

# torch advises against more workers than cores; here it is about the order.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

SIZE = (300, 200)


def picture(seed: int = 0, size: tuple[int, int] = SIZE) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


def encoded(image: Image.Image, image_format: str = "JPEG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


def write_folder(folder: Path, count: int = 5) -> Path:
    """Pictures in a folder and a sub-folder with two captions each."""
    for i in range(count):
        path = folder / ("sub" if i % 2 else "") / f"{i:03}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(picture(i)))
        path.with_suffix(".txt").write_text(f"caption {i}\n\nother caption {i}\n")
    return folder


def write_shard(path: Path, samples: dict[str, dict[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, members in samples.items():
            for suffix, data in members.items():
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def prepare(source: Path, out: Path, *flags: str, workers: int = 0, status: int = 0) -> None:
    arguments = ["--data_dir", source, "--output_dir", out, "--num_workers", workers]
    sizes = ["--side_x", 16, "--side_y", 8]
    assert main([str(word) for word in (*arguments, *sizes, *flags)]) == status


def samples(out: Path) -> list[dict]:
    """The samples of all shards in order, each with its members decoded."""
    found = {}
    for shard in sorted(out.glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                key, suffix = member.name.split(".")
                found.setdefault(f"{shard.stem}/{key}", {})[suffix] = tar.extractfile(member).read()
    for sample in found.values():
        sample["json"] = json.loads(sample["json"])
        sample["jpg"] = Image.open(io.BytesIO(sample["jpg"]))
    return list(found.values())


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != LOCK_NAME
    }


def error_line(capsys) -> str:
    """What the command says on its way out."""
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_the_samples_of_a_folder_come_with_captions_and_sizes(tmp_path):
    source, out = write_folder(tmp_path / "in"), tmp_path / "out"
    before = content(source)
    prepare(source, out)
    assert content(source) == before
    got = samples(out)
    assert [sample["json"]["prepared_from"] for sample in got] == [
        "000.jpg", "002.jpg", "004.jpg", "sub/001.jpg", "sub/003.jpg",
    ]  # fmt: skip
    for sample in got:
        number = int(Path(sample["json"]["prepared_from"]).stem)
        assert sample["txt"].decode() == f"caption {number}\nother caption {number}"
        assert sample["json"]["captions"] == [f"caption {number}", f"other caption {number}"]
        assert (sample["json"]["original_width"], sample["json"]["original_height"]) == SIZE
        assert (sample["json"]["width"], sample["json"]["height"]) == sample["jpg"].size
        error = np.asarray(sample["jpg"], dtype=float) - picture(number, sample["jpg"].size)
        assert np.abs(error).mean() < 4


def test_pictures_come_out_upright_whole_and_just_large_enough(tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    (source / "turned.jpg").write_bytes(encoded(picture(), exif=exif))
    (source / "clear.png").write_bytes(encoded(Image.new("RGBA", SIZE), "PNG"))
    (source / "small.png").write_bytes(encoded(picture(size=(20, 15)), "PNG"))
    for flags, least in ((), 16), (("--train_upsample", "--upscale_factor", "2"), 32):
        out = tmp_path / f"out{least}"
        prepare(source, out, "--no-use_captions", *flags)
        clear, small, turned = samples(out)
        assert clear["jpg"].getcolors() == [(np.prod(clear["jpg"].size), (255, 255, 255))]
        assert small["jpg"].size == (20, 15)
        width, height = turned["jpg"].size
        assert width / height == pytest.approx(200 / 300, rel=0.02)
        assert 1.4 * least <= width * 0.8**0.5 < 1.7 * least
        assert (turned["json"]["original_width"], turned["json"]["original_height"]) == (200, 300)
        assert "txt" not in turned


def test_training_reads_the_shards_and_draws_from_all_captions(tmp_path):
    out = tmp_path / "out"
    prepare(write_folder(tmp_path / "in"), out, "--shard_size", "2")
    stream = glide_wds_loader(
        out, dataset_name="generic", base_x=16, base_y=8, uncond_p=0, tokenizer=StubTokenizer()
    )
    drawn = set()
    for epoch in range(20):
        stream.set_epoch(epoch)
        items = list(stream)
        assert len(items) == 5
        drawn |= {caption_of(tokens, mask) for tokens, mask, _ in items}
    assert drawn == {f"{text} {i}" for text in ("caption", "other caption") for i in range(5)}


def test_unpacked_shards_are_a_folder_to_train_on(tmp_path):
    out, unpacked = tmp_path / "out", tmp_path / "unpacked"
    prepare(write_folder(tmp_path / "in"), out, "--shard_size", "2")
    unpacked.mkdir()
    for name, members in ((f"{i}", sample) for i, sample in enumerate(samples(out))):
        members["jpg"].save(unpacked / f"{name}.jpg")
        (unpacked / f"{name}.txt").write_bytes(members["txt"])
    prepare(unpacked, tmp_path / "again")
    assert [s["txt"] for s in samples(tmp_path / "again")] == [s["txt"] for s in samples(out)]


def test_any_number_of_workers_makes_the_same_files(tmp_path):
    source = write_folder(tmp_path / "in", 30)
    (source / "009.txt").write_bytes(b"\xff\xfe")
    (source / "010.jpg").write_bytes(b"")
    for workers in (0, 1, 3):
        prepare(source, tmp_path / f"out{workers}", "--shard_size", "4", workers=workers)
    assert len(list((tmp_path / "out0").glob("*.tar"))) == 8
    assert content(tmp_path / "out1") == content(tmp_path / "out0")
    assert content(tmp_path / "out3") == content(tmp_path / "out0")


def write_shards(folder: Path) -> Path:
    """Three shards: a whole one, one that is cut, and one with an unreadable sample."""
    for shard in range(3):
        members = {
            f"{shard}{i}": {
                "jpg": encoded(picture(10 * shard + i)),
                "txt": f"caption\n{shard}{i}".encode(),
                "json": json.dumps({"NSFW": "NSFW", "original_width": 4000}).encode(),
            }
            for i in range(4)
        }
        if shard == 2:
            members["20"]["jpg"] = b"no picture"
        path = write_shard(folder / f"{shard}.tar", members)
        if shard == 1:
            path.write_bytes(path.read_bytes()[:-12000])
    return folder


def test_shards_keep_their_metadata_and_nothing_is_filtered(tmp_path, caplog):
    out = tmp_path / "out"
    with caplog.at_level("INFO"):
        prepare(write_shards(tmp_path / "in"), out, "--use_webdataset")
    got = samples(out)
    names = [sample["json"]["prepared_from"] for sample in got]
    assert names[:4] == ["0.tar/00", "0.tar/01", "0.tar/02", "0.tar/03"]
    assert names[-3:] == ["2.tar/21", "2.tar/22", "2.tar/23"]
    for sample, name in zip(got, names, strict=True):
        assert sample["json"]["NSFW"] == "NSFW"
        assert sample["json"]["original_width"] == 4000
        assert sample["json"]["original_height"] == SIZE[1]
        assert sample["txt"].decode() == f"caption {name[-2:]}"
    assert caplog.text.count("skipped 2.tar/20") == 1
    assert caplog.text.count("1.tar: ") == 1
    assert "left out: 1 damaged shards, 1 unreadable images" in caplog.text


def test_captions_of_alamy_are_taken_from_the_metadata(tmp_path):
    metadata = json.dumps({"lc": "en", "caption": "a fox"}).encode()
    members = {"a": {"jpg": encoded(picture()), "json": metadata}}
    source = write_shard(tmp_path / "in" / "0.tar", members)
    prepare(source, tmp_path / "out", "--use_webdataset", "--wds_dataset_name", "alamy")
    (sample,) = samples(tmp_path / "out")
    assert sample["json"]["captions"] == ["a fox"]
    assert sample["json"]["lc"] == "en"


def test_all_languages_of_alamy_are_prepared(tmp_path):
    members = {
        language: {
            "jpg": encoded(picture()),
            "json": json.dumps({"lc": language, "caption": "a fox"}).encode(),
        }
        for language in ("de", "en")
    }
    source = write_shard(tmp_path / "in" / "0.tar", members)
    prepare(source, tmp_path / "out", "--use_webdataset", "--wds_dataset_name", "alamy")
    assert [sample["json"]["lc"] for sample in samples(tmp_path / "out")] == ["de", "en"]


@pytest.mark.parametrize("count", [1, 2])
def test_what_a_launcher_left_in_the_environment_divides_nothing(tmp_path, monkeypatch, count):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for number in range(count):
        members = {"a": {"jpg": encoded(picture()), "txt": b"caption"}}
        write_shard(tmp_path / "in" / f"{number}.tar", members)
    prepare(tmp_path / "in", tmp_path / "out", "--use_webdataset")
    assert len(samples(tmp_path / "out")) == count


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere names of files are text")
@pytest.mark.parametrize("data", [b"", encoded(picture())], ids=["bad", "good"])
def test_names_that_are_no_text_stop_nothing(tmp_path, data):
    source = write_folder(tmp_path / "in")
    (source / os.fsdecode(b"\xffd.jpg")).write_bytes(data)
    (source / os.fsdecode(b"\xffd.txt")).write_text("caption")
    command = [sys.executable, "-m", "glide_finetune.prepare", "--num_workers", "0"]
    command += ["--data_dir", source, "--output_dir", tmp_path / "out"]
    result = subprocess.run(command, capture_output=True, check=False)
    assert (result.returncode, result.stderr) == (0, b"")
    assert f"{5 + bool(data)} samples in" in result.stdout.decode()
    assert (b"xffd.jpg" in result.stdout or b"udcffd.jpg" in result.stdout) != bool(data)


@pytest.mark.parametrize("shard_size", [1, 2, 3, 1000])
@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_a_start_after_the_last_one_changes_nothing(tmp_path, kind, shard_size, caplog):
    if kind == "folder":
        source, flags = write_folder(tmp_path / "in", 7), ("--shard_size", shard_size)
        (source / "sub" / "005.jpg").write_bytes(b"")
    else:
        source, flags = tmp_path / "in", ("--use_webdataset", "--shard_size", shard_size)
        members = {f"{i}": {"jpg": encoded(picture(i)), "txt": b"caption"} for i in range(7)}
        path = write_shard(source / "0.tar", members)
        path.write_bytes(path.read_bytes()[:-11000])
    reports = []
    for start in range(3):
        caplog.clear()
        with caplog.at_level("INFO"):
            prepare(source, tmp_path / "out", *flags)
        reports.append(caplog.messages[-2:])
        if start == 0:
            before = content(tmp_path / "out")
    assert reports[0] == reports[1] == reports[2]
    assert "left out: 1 " in reports[0][0]
    assert content(tmp_path / "out") == before
    shards = {path.stem for path in (tmp_path / "out").glob("*.tar")}
    stats = (tmp_path / "out").glob("*_stats.json")
    assert {path.name.removesuffix("_stats.json") for path in stats} == shards


@pytest.mark.parametrize("kind", ["folder", "shards"])
@pytest.mark.parametrize("shards_left", range(5))
def test_a_later_start_goes_on_where_the_last_one_ended(tmp_path, kind, shards_left, caplog):
    if kind == "folder":
        source, flags = write_folder(tmp_path / "in", 9), ()
        (source / "000.jpg").write_bytes(b"")
        (source / "004.jpg").write_bytes(b"")
    else:
        source, flags = write_shards(tmp_path / "in"), ("--use_webdataset",)
    out = tmp_path / "out"
    prepare(source, out, *flags, "--shard_size", "2")
    whole = content(out)
    for number in range(shards_left, 10):
        for name in (f"{number:05}.tar", f"{number:05}_stats.json"):
            (out / name).unlink(missing_ok=True)
    # what a killed process may leave: a shard without its statistics, half a file
    if f"{shards_left:05}.tar" in whole:
        (out / f"{shards_left:05}.tar").write_bytes(b"older")
    (out / f"{shards_left:05}_stats.json.tmp").write_bytes(b"half")
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob("*_stats.json")}
    caplog.clear()
    with caplog.at_level("INFO"):
        prepare(source, out, *flags, "--shard_size", "2")
    assert content(out) == whole
    assert {name: (out / name).stat().st_mtime_ns for name in kept} == kept
    assert "left out: 2" in caplog.text or "left out: 1 damaged shards, 1 unr" in caplog.text


@pytest.mark.slow
def test_what_is_killed_is_made_whole_by_the_next_start(tmp_path):
    source = write_folder(tmp_path / "in", 400)
    command = [sys.executable, "-m", "glide_finetune.prepare", "--data_dir", source]
    command += ["--num_workers", "2", "--shard_size", "20", "--output_dir"]
    subprocess.run([*command, tmp_path / "whole"], check=True)
    out = tmp_path / "out"
    for shards in (1, 5, 12):
        process = subprocess.Popen([*command, out])
        while not (out / f"{shards:05}.tar").exists() and process.poll() is None:
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    subprocess.run([*command, out], check=True)
    assert content(out) == content(tmp_path / "whole")


@pytest.mark.slow
def test_a_killed_process_leaves_no_workers(tmp_path):
    """Not those either that are about to send more than a pipe holds."""
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    (tmp_path / "in").mkdir()
    for i in range(400):
        (tmp_path / "in" / f"{i}.txt").write_text("noise")
        Image.fromarray(noise).save(tmp_path / "in" / f"{i}.png")
    command = [sys.executable, "-m", "glide_finetune.prepare", "--data_dir", tmp_path / "in"]
    command += ["--num_workers", "2", "--side_x", "128", "--side_y", "128"]
    command += ["--shard_size", "20", "--output_dir", tmp_path / "out"]
    process = subprocess.Popen(command, start_new_session=True)
    while not (tmp_path / "out" / "00001.tar").exists() and process.poll() is None:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    for _ in range(200):
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    pytest.fail("its workers are still there after 20 seconds")


def test_two_processes_do_not_prepare_into_one_folder(tmp_path, capsys):
    source, out = write_folder(tmp_path / "in"), tmp_path / "out"
    prepare(source, out)
    script = (
        "import pathlib, sys; from glide_finetune.folder_lock import locked\n"
        "with locked(pathlib.Path(sys.argv[1]), ''): print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, out], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout.readline() == b"held\n"
        capsys.readouterr()
        prepare(source, out, status=1)
        assert f"in use by process {other.pid} on" in error_line(capsys)
        other.stdin.close()
    prepare(source, out)


def test_other_settings_are_refused_in_the_same_folder(tmp_path, capsys):
    source, out = write_folder(tmp_path / "in"), tmp_path / "out"
    prepare(source, out)
    before = content(out)
    prepare(source, out, "--resize_ratio", "0.5", status=2)
    assert "--resize_ratio is 0.5, but" in error_line(capsys)
    prepare(source, out, "--shard_size", "7", status=2)
    assert "was begun with 1000" in error_line(capsys)
    write_folder(source, 6)
    prepare(source, out, status=1)
    assert "has other files than when" in error_line(capsys)
    assert content(out) == before


@pytest.mark.parametrize(
    "spoil", [lambda shard: shard.unlink(), lambda shard: os.truncate(shard, 1000)]
)
def test_a_shard_that_was_lost_or_cut_is_made_again(tmp_path, caplog, spoil):
    source, out = write_folder(tmp_path / "in", 7), tmp_path / "out"
    prepare(source, out, "--shard_size", "2")
    before = content(out)
    spoil(out / "00001.tar")
    prepare(source, out, "--shard_size", "2")
    assert "00001.tar is not as it was written: it is made again" in caplog.text
    assert content(out) == before


def test_a_record_of_a_shard_that_holds_nothing_is_told(tmp_path, capsys):
    source, out = write_folder(tmp_path / "in"), tmp_path / "out"
    prepare(source, out)
    (out / "00000_stats.json").write_text("{}")
    prepare(source, out, status=1)
    assert "00000_stats.json lacks after: delete it" in error_line(capsys)


def test_a_caption_that_was_changed_is_told(tmp_path, capsys):
    source, out = write_folder(tmp_path / "in"), tmp_path / "out"
    prepare(source, out)
    record = out / "prepare.json"
    next(source.glob("*.txt")).write_text("something else altogether")
    prepare(source, out, status=1)
    assert "have other sizes than when" in error_line(capsys)
    earlier = json.loads(record.read_text())  # of a version that did not keep them
    record.write_text(json.dumps({k: v for k, v in earlier.items() if k != "sizes"}))
    prepare(source, out)


def test_a_picture_that_is_too_long_for_a_jpeg_is_left_out(tmp_path, caplog):
    source, out = write_folder(tmp_path / "in"), tmp_path / "out"
    Image.new("RGB", (70_000, 40)).save(source / "long.png")
    (source / "long.txt").write_text("a strip")
    prepare(source, out, "--side_x", "40", "--side_y", "40")
    assert "long.png: 70000x40 pixels are no JPEG" in caplog.text


def test_the_same_shards_may_be_named_in_another_way(tmp_path, monkeypatch):
    write_shard(tmp_path / "in/a.tar", {"0": {"jpg": encoded(picture()), "txt": b"a cat"}})
    monkeypatch.chdir(tmp_path)
    prepare(Path("in"), Path("out"), "--use_webdataset")
    before = content(tmp_path / "out")
    prepare(tmp_path / "in", Path("out"), "--use_webdataset")
    assert content(tmp_path / "out") == before


def test_a_folder_with_other_things_is_refused_and_left_alone(tmp_path, capsys):
    source, out = write_folder(tmp_path / "in"), tmp_path / "out"
    out.mkdir()
    (out / "thesis.tmp").write_text("mine")
    prepare(source, out, status=2)
    assert "holds other things, such as thesis.tmp" in error_line(capsys)
    assert content(out) == {"thesis.tmp": b"mine"}
    prepare(source, out / "thesis.tmp", status=2)
    assert "is a file, not a folder" in error_line(capsys)
    for inside in (source, source / "new"):
        prepare(source, inside, status=2)
        assert "--output_dir" in error_line(capsys)
    assert not (source / "new").exists()


def test_unreadable_samples_are_named_once_and_counted(tmp_path, caplog):
    source, out = write_folder(tmp_path / "in", 8), tmp_path / "out"
    (source / "000.jpg").write_bytes(b"not a picture")
    (source / "002.txt").write_bytes(b"\xff\xfe")
    (source / "004.txt").unlink()
    with caplog.at_level("INFO"):
        prepare(source, out)
    assert caplog.text.count("000.jpg: not an image") == 1
    assert caplog.text.count("002.jpg: ") == 1
    assert "5 samples in" in caplog.text
    left_out = "left out: 1 unreadable captions, 1 unreadable images, 1 without a caption"
    assert left_out in caplog.text
    stats = json.loads((out / "00000_stats.json").read_text())
    assert [Path(skipped["name"]).name for skipped in stats["skipped"]] == ["000.jpg", "002.jpg"]


@pytest.mark.parametrize(
    ("flags", "settings"),
    [
        ((), {"wds_dataset_name": "generic"}),
        (("--train_upsample", "--upscale_factor", "8"), {"train_upsample": True}),
        (("--no-use_captions",), {"use_captions": False}),
        (("--resize_ratio", "0.5"), {"resize_ratio": 0.5}),
        (("--use_webdataset",), {"wds_dataset_name": "laion"}),  # else the unsafe come along
        (("--use_webdataset", "--wds_dataset_name", "alamy"), {"wds_dataset_name": "alamy"}),
    ],
)
def test_the_end_names_the_flags_that_train_on_the_shards_as_on_their_source(
    tmp_path, caplog, flags, settings
):
    source, out = tmp_path / "in", tmp_path / "out put"
    if "--use_webdataset" in flags:
        metadata = {"NSFW": "UNLIKELY", "caption": "cat", "language": "en"}
        sample = {"jpg": encoded(picture()), "txt": b"cat", "json": json.dumps(metadata).encode()}
        write_shard(source / "0.tar", {"a": sample})
    else:
        write_folder(source, 1)
    with caplog.at_level("INFO"):
        prepare(source, out, *flags)
    advice = caplog.records[-1].getMessage().removeprefix("train on them with ")
    config = parse_config(shlex.split(advice))
    assert config.data_dir == str(out)
    assert config.use_webdataset
    assert (config.side_x, config.side_y) == (16, 8)
    assert config.upscale_factor == (8 if "--upscale_factor" in flags else 4)
    assert config == replace(config, **settings)


def test_where_nothing_can_be_used_one_line_says_so(tmp_path, capsys):
    source, out = write_folder(tmp_path / "in", 1), tmp_path / "out"
    (source / "000.jpg").write_bytes(b"")
    prepare(source, out, status=1)
    assert "000.jpg: not an image" in error_line(capsys)
    assert not list(out.glob("*.tar"))
    write_folder(source, 1)
    prepare(source, out)  # mended
    assert len(samples(out)) == 1
    empty = tmp_path / "empty"
    empty.mkdir()
    prepare(empty, tmp_path / "other", status=1)
    assert "no images in" in error_line(capsys)
    write_shard(empty / "0.tar", {"a": {"txt": b"caption"}})
    prepare(empty, tmp_path / "other", "--use_webdataset", status=1)
    assert "no sample can be used; left out: 1 unreadable images" in error_line(capsys)
    prepare(tmp_path / "nowhere", tmp_path / "another", status=1)
    assert "does not exist" in error_line(capsys)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--side_x", "0"), "--side_x is 0"),
        (("--resize_ratio", "nan"), "--resize_ratio is nan"),
        (("--shard_size", "0"), "--shard_size is 0"),
        (("--num_workers", "-1"), "--num_workers is -1"),
    ],
)
def test_mistakes_are_told_in_one_line(tmp_path, capsys, flags, message):
    prepare(tmp_path, tmp_path / "out", *flags, status=2)
    assert message in error_line(capsys)


def test_help_and_mistakes_need_no_torch():
    code = "import sys; from glide_finetune.prepare import build_parser; build_parser(); "
    code += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
