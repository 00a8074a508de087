"""The zoo of bad data, in the loaders and in whole runs: skipped, named once, counted."""

import contextlib
import json
import logging
import os
import re
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest

import bad_data
from glide_finetune.data.bad_samples import in_one_line
from glide_finetune.data.dataloading import make_dataloader
from glide_finetune.loader import TextImageDataset
from glide_finetune.metrics import read_metrics
from glide_finetune.wds_loader import glide_wds_loader
from stub_tokenizer import StubTokenizer

# torch advises against more workers than cores; here it is about what is skipped.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

ROOT = Path(__file__).parent.parent
SIDE = 8
GOOD = 60


class Epochs(NamedTuple):
    """What two epochs gave: the keys of each, the lines of the log, and what was left out."""

    keys: list[list[str]]
    log: list[str]
    left_out: Counter[str]

    def lines_about(self, name: str) -> list[str]:
        return [line for line in self.log if re.search(rf"[ /]{re.escape(name)}: ", line)]


@contextlib.contextmanager
def log_lines():
    lines, handler = [], logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("glide_finetune")
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)


def two_epochs(dataset, num_workers: int) -> Epochs:
    keys, left_out = [], Counter()
    with log_lines() as log:
        loader = make_dataloader(dataset, 1, seed=0, num_workers=num_workers, device="cpu")
        for epoch in range(2):
            loader.set_epoch(epoch)
            keys.append([])
            for batch in loader:
                keys[-1] += batch[-1]
                left_out += batch.left_out
    return Epochs(keys, log, left_out)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("folder")
    bad_data.write_good(folder, GOOD)
    bad_data.write_bad(folder)
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    bad_data.write_good_shards(folder, 4, folder / "trap")
    bad_data.write_bad_shards(folder)
    return folder


@pytest.fixture(scope="module", params=[0, 2], ids=["alone", "2 workers"])
def from_folder(request, folder) -> Epochs:
    with log_lines() as log:
        data = TextImageDataset(
            folder, SIDE, SIDE, tokenizer=StubTokenizer(), use_captions=True, return_keys=True
        )
    epochs = two_epochs(data, request.param)
    return epochs._replace(log=log + epochs.log)


@pytest.fixture(scope="module", params=[0, 2], ids=["alone", "2 workers"])
def from_shards(request, shards) -> Epochs:
    data = glide_wds_loader(
        shards, base_x=SIDE, base_y=SIDE, tokenizer=StubTokenizer(), return_keys=True,
        min_original_height=0, min_original_width=0,
    )  # fmt: skip
    return two_epochs(data, request.param)


def assert_named_once(epochs: Epochs, name: str, reason: str) -> None:
    name = in_one_line(name)
    (line,) = epochs.lines_about(name)
    assert line.startswith("skipped ")
    assert re.search(reason, line.split(f"{name}: ")[1])


class TestFolders:
    @pytest.mark.parametrize("name", bad_data.BAD_FILES, ids=ascii)
    def test_each_bad_file_is_skipped_and_named_once_with_its_reason(self, from_folder, name):
        assert_named_once(from_folder, name, bad_data.BAD_FILES[name].reason)
        assert not any(name in keys for keys in from_folder.keys)

    @pytest.mark.parametrize("name", bad_data.NO_FILES)
    def test_what_is_no_file_is_named_once_with_its_reason(self, from_folder, name):
        assert_named_once(from_folder, name, bad_data.NO_FILES[name].reason)

    def test_every_good_file_comes_in_every_epoch(self, from_folder, tmp_path):
        good = set(bad_data.write_good(tmp_path, GOOD))
        assert all(set(keys) == good for keys in from_folder.keys)

    def test_what_is_skipped_is_counted(self, from_folder):
        assert from_folder.left_out == {
            "skipped_image": 2 * (len(bad_data.BAD_IMAGES) + len(bad_data.NO_FILES)),
            "skipped_caption": 2 * len(bad_data.BAD_CAPTIONS),
            "filtered_no_caption": 2,
        }

    def test_every_epoch_ends_with_a_summary(self, from_folder):
        summaries = [line for line in from_folder.log if line.startswith("this epoch left out")]
        assert len(summaries) == 2
        for line in summaries:
            assert f"{len(bad_data.BAD_IMAGES)} unreadable images" in line
            assert f"{len(bad_data.BAD_CAPTIONS)} unreadable captions" in line


class TestShards:
    @pytest.mark.parametrize("key", bad_data.BAD_SAMPLES)
    def test_each_bad_sample_is_skipped_and_named_once_with_its_reason(self, from_shards, key):
        assert_named_once(from_shards, f"samples.tar/{key}", bad_data.BAD_SAMPLES[key].reason)
        assert not any(f"samples.tar/{key}" in keys for keys in from_shards.keys)

    @pytest.mark.parametrize("name", bad_data.BAD_SHARDS)
    def test_each_damaged_shard_is_named_once_with_its_reason(self, from_shards, name):
        assert_named_once(from_shards, name, bad_data.BAD_SHARDS[name].reason)

    def test_every_good_sample_comes_in_every_epoch(self, from_shards):
        for keys in from_shards.keys:
            good = {key for key in keys if "/good-" in key}
            assert len(good) == 4 * bad_data.GOOD_A_SHARD
            assert {key for key in keys if key.startswith("cut.tar")} == {
                "cut.tar/cut-0",
                "cut.tar/cut-1",
            }

    def test_what_is_skipped_and_what_is_not_wanted_is_counted(self, from_shards):
        kinds = Counter(bad.kind for bad in bad_data.BAD_SAMPLES.values())
        want = {f"skipped_{kind}": 2 * count for kind, count in kinds.items()}
        want |= {"skipped_shard": 2 * len(bad_data.BAD_SHARDS), "filtered_no_caption": 2}
        assert from_shards.left_out == want
        summaries = [line for line in from_shards.log if line.startswith("this epoch left out")]
        assert len(summaries) == 2
        for line in summaries:
            assert f"{kinds['metadata']} unreadable metadata" in line
            assert f"{len(bad_data.BAD_SHARDS)} damaged shards" in line
            assert "1 no caption" in line

    def test_nothing_is_unpickled(self, from_shards, shards):
        assert "good-0.tar/good-1000" in from_shards.keys[0]
        assert not (shards / "trap").exists()


def half_bad(folder: Path, good: int, bad: int) -> TextImageDataset:
    bad_data.write_good(folder, good)
    for i in range(bad):
        (folder / f"bad-{i}.png").write_bytes(b"")
        (folder / f"bad-{i}.txt").write_text("a caption")
    return TextImageDataset(folder, SIDE, SIDE, tokenizer=StubTokenizer(), use_captions=True)


def error_of(loader) -> str:
    # not with pytest.raises, which keeps the loader's frames and so its workers for a while
    try:
        list(loader)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("num_workers", [0, 2])
def test_more_than_half_bad_stops_with_a_message(tmp_path, num_workers):
    data = half_bad(tmp_path, good=10, bad=11)
    message = error_of(make_dataloader(data, 1, seed=0, num_workers=num_workers, device="cpu"))
    assert re.match(r"11 of the first \d+ samples cannot be read .*bad-\d+.png: not an", message)
    assert "\n" not in message


def test_half_bad_goes_on(tmp_path):
    data = half_bad(tmp_path, good=10, bad=10)
    assert len(list(make_dataloader(data, 1, seed=0, num_workers=0, device="cpu"))) == 20


# ------------------------------------------------------------------- whole runs
MODEL = shlex.split(
    "--model_preset tiny --init scratch --model_options xf_width=16 text_ctx=16 --device cpu "
    f"--side_x {SIDE} --side_y {SIDE} --batch_size 4 --epochs 2 --log_frequency 0 --num_workers 2"
)
KINDS_OF_DATA = {"folder": [], "shards": ["--use_webdataset", "--wds_image_key", "jpg"]}
STAGES = {"base": [], "upsampler": ["--train_upsample", "--upscale_factor", "2"]}


def train(place: Path, *argv: str) -> subprocess.CompletedProcess:
    """Run train_glide.py in the folder `place`, which also is its home and temporary folder."""
    for name in ("home", "tmp"):
        (place / name).mkdir(parents=True, exist_ok=True)
    environment = {
        "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled",
        "HOME": str(place / "home"), "TMPDIR": str(place / "tmp"),
    }  # fmt: skip
    return subprocess.run(
        [sys.executable, str(ROOT / "train_glide.py"), *MODEL, *argv],
        capture_output=True, text=True, cwd=place, env=os.environ | environment, timeout=300,
    )  # fmt: skip


def files_in(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file and link below a folder, with its size and the time of its last change."""
    return {
        os.path.join(path, name): (status.st_size, status.st_mtime_ns)
        for path, _, names in os.walk(folder)
        for name in names
        for status in [os.lstat(os.path.join(path, name))]
    }


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", KINDS_OF_DATA)
def test_a_run_over_the_zoo_ends_well_and_writes_in_its_folder_alone(tmp_path, kind, stage):
    if kind == "folder":
        bad_data.write_good(tmp_path / "data", GOOD)
        bad_data.write_bad(tmp_path / "data")
    else:
        bad_data.write_good_shards(tmp_path / "data", 4, tmp_path / "trap")
        bad_data.write_bad_shards(tmp_path / "data")
    before = files_in(tmp_path)
    process = train(tmp_path, "--data_dir", "data", *KINDS_OF_DATA[kind], *STAGES[stage])
    assert process.returncode == 0, process.stderr
    assert "Traceback" not in process.stderr

    run = tmp_path / "glide_checkpoints" / "0000"
    (last,) = read_metrics(run)[-1:]
    assert last["data/skipped_image"] > 0
    assert last["data/skipped_caption"] > 0
    if kind == "shards":
        assert last["data/skipped_metadata"] > 0
        assert last["data/skipped_shard"] > 0
    assert process.stdout.count("this epoch left out") == 2
    skipped = re.findall(r"^skipped (\S+): ", process.stdout, re.MULTILINE)
    assert len(skipped) == len(set(skipped)) >= 15

    after = files_in(tmp_path)
    outside = {name for name in after if not Path(name).is_relative_to(run)}
    assert {name: after[name] for name in outside} == before
    settings = json.loads((run / "args.json").read_text())
    assert settings["epochs"] == 2


@pytest.mark.slow
def test_a_run_over_more_bad_than_good_stops_with_one_line(tmp_path):
    bad_data.write_good(tmp_path / "data", 5)
    bad_data.write_bad(tmp_path / "data")
    process = train(tmp_path, "--data_dir", "data")
    assert process.returncode == 1
    (line,) = process.stderr.splitlines()
    assert re.search(r"\d+ of the first \d+ samples cannot be read", line)
