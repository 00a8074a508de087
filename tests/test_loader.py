"""Local folders: what is found, what is skipped, and the same batches for the same seed."""

import errno
import gc
import itertools
import logging
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
import weakref
from multiprocessing.connection import Connection

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from glide_finetune.data.bad_samples import BadSample, DataAccount, Tally
from glide_finetune.data.caption_split import split_by_caption
from glide_finetune.data.captions import read_captions
from glide_finetune.data.dataloading import make_dataloader
from glide_finetune.data.folder_index import check_folder
from glide_finetune.data.images import to_tensor
from glide_finetune.data.shared_integer import SharedInteger
from glide_finetune.data.validation_split import split_validation
from glide_finetune.loader import TextImageDataset
from stub_tokenizer import StubTokenizer, caption_of

# torch advises against more workers than cores; here it is about the order.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

SIZE = (40, 30)


def write_image(path, seed: int = 0, caption: str | None = "a caption") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize(SIZE, Image.Resampling.BICUBIC).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")


def write_images(folder, count: int) -> None:
    for i in range(count):
        write_image(folder / f"{i:03}.png", i, f"caption {i}\nanother of {i}\n\n   \nthird of {i}")


def dataset(folder, **settings) -> TextImageDataset:
    defaults = {"side_x": 16, "side_y": 8, "tokenizer": StubTokenizer(), "use_captions": True}
    return TextImageDataset(folder, **{**defaults, **settings})


def batches(data, batch_size=4, epoch=0, start_batch=0, num_workers=0, **settings):
    loader = make_dataloader(
        data, batch_size, seed=5, num_workers=num_workers, device="cpu", **settings
    )
    loader.set_epoch(epoch, start_batch)
    return list(loader)


def equal(first, second) -> bool:
    """Whether two items, batches or lists of them hold the same values."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(equal, first, second))
    return first == second


def test_items_have_the_promised_shapes_types_and_range(tmp_path):
    write_images(tmp_path, 1)
    tokens, mask, image, key = dataset(tmp_path, text_ctx_len=20, return_keys=True)[0]
    assert (tokens.shape, tokens.dtype) == ((20,), torch.int64)
    assert (mask.shape, mask.dtype) == ((20,), torch.bool)
    assert (image.shape, image.dtype) == ((3, 8, 16), torch.float32)
    assert image.min() >= -1
    assert image.max() <= 1
    assert key == "000.png"


def test_the_default_tokenizer_is_glides_own(tmp_path):
    write_image(tmp_path / "a.png", caption="A cat.")
    tokens, mask, _ = dataset(tmp_path, tokenizer=None)[0]
    assert tokens.shape == (128,)
    assert tokens[:3].tolist() == [64, 3797, 13]
    assert tokens[3:].unique().tolist() == [50256]
    assert mask.tolist() == [True] * 3 + [False] * 125


def test_upsampler_pairs_show_the_same_crop(tmp_path):
    write_images(tmp_path, 3)
    data = dataset(tmp_path, enable_glide_upsample=True, upscale_factor=3, random_hflip=True)
    for item in data:
        _, _, low_res, high_res = item
        assert low_res.shape == (3, 8, 16)
        assert high_res.shape == (3, 24, 48)
        averaged = torch.nn.functional.avg_pool2d(high_res, 3)
        assert (low_res - averaged).abs().max() <= 0.6 / 127.5  # stored in 8 bits


def test_all_suffixes_are_found_in_any_case_and_depth(tmp_path):
    names = ["a.jpg", "b.JPG", "c.jpeg", "x/d.PNG", "x/y/e.webp", "x/y/f.bmp", "g.gif", "h.TIFF"]
    for name in [*names, "i.tif"]:
        write_image(tmp_path / name)
    write_image(tmp_path / ".hidden.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "notes.txt").write_text("no image")
    data = dataset(tmp_path)
    assert data.keys == sorted([*names, "i.tif"])
    assert all(len(item) == 3 for item in data)


def test_equal_stems_in_different_folders_are_different_samples(tmp_path):
    write_image(tmp_path / "fruit/lemon.png", 1, "a lemon")
    write_image(tmp_path / "cartoon/lemon.png", 2, "a drawn lemon")
    data = dataset(tmp_path, return_keys=True)
    captions = {key: caption_of(tokens, mask) for tokens, mask, _, key in data}
    assert captions == {"fruit/lemon.png": "a lemon", "cartoon/lemon.png": "a drawn lemon"}


def test_a_symbolic_link_to_a_folder_is_followed_and_a_loop_is_not(tmp_path):
    write_image(tmp_path / "elsewhere/a.png")
    (tmp_path / "data").mkdir()
    os.symlink(tmp_path / "elsewhere", tmp_path / "data/linked")
    os.symlink(tmp_path / "data", tmp_path / "data/loop")
    assert dataset(tmp_path / "data").keys == ["linked/a.png"]


def test_images_without_a_caption_are_left_out_and_counted(tmp_path, caplog):
    write_images(tmp_path, 2)
    write_image(tmp_path / "z.png", caption=None)
    data = dataset(tmp_path)
    assert (len(data), data.without_caption) == (2, 1)
    assert "1 of 3 images" in caplog.text
    assert len(dataset(tmp_path, use_captions=False)) == 3


def test_without_captions_every_sample_has_the_empty_caption(tmp_path):
    write_images(tmp_path, 2)
    for tokens, mask, _ in dataset(tmp_path, use_captions=False):
        assert not mask.any()
        assert tokens.unique().tolist() == [0]


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda folder: folder / "missing", "missing does not exist"),
        (lambda folder: folder, "no images in .*looked for .jpg .jpeg .png"),
        (lambda folder: write_image(folder / "a.png", caption=None) or folder, "no captions in"),
        (lambda folder: write_image(folder / "a.png") or folder / "a.png", "not a folder"),
    ],
)
def test_nothing_to_train_on_is_an_error_in_one_line(tmp_path, prepare, message):
    folder = prepare(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        dataset(folder)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=message):
        check_folder(folder, use_captions=True)


@pytest.mark.parametrize(
    ("name", "text", "fault"),
    [
        ("metadata.csv", "file_name;text\na.png;words\n", "names no column file_name"),
        ("metadata.jsonl", '{"image": "a.png", "text": "words"}\n', "line 1: .*file_name"),
        ("metadata.jsonl", '{"file_name": "b.png", "text": "words"}\n', "no image sub/b.png"),
    ],
)
def test_what_is_wrong_with_the_metadata_is_told_where_no_image_has_a_caption(
    tmp_path, name, text, fault
):
    write_image(tmp_path / "sub" / "a.png", caption=None)
    (tmp_path / "sub" / name).write_text(text)
    with pytest.raises(ValueError, match=f"no captions in .*; sub/{name}.*{fault}"):
        check_folder(tmp_path, use_captions=True)


@pytest.mark.parametrize("suffix", ["jfif", "JFIF", "avif", "jp2"])
def test_images_are_found_by_rarer_suffixes_too(tmp_path, suffix):
    write_image(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / f"a.{suffix}")
    assert len(dataset(tmp_path)) == 1
    dataset(tmp_path)[0]


def test_a_caption_of_marks_that_show_nothing_is_blank(tmp_path):
    write_image(tmp_path / "a.png", caption="\u200b\n a fox \n\ufeff\u200e\n")
    assert read_captions(tmp_path / "a.txt") == ["a fox"]


def test_a_hundred_bad_samples_are_named_and_the_rest_counted(caplog):
    account = DataAccount()
    for number in range(300):
        tally = Tally(samples=3)
        tally.skip(f"{number}", BadSample("broken"))
        account.add(tally)
    assert [text.split(":")[0] for text in caplog.messages[:100]] == [
        f"skipped {number}" for number in range(100)
    ]
    assert caplog.messages[100:] == ["further ones are only counted"]
    assert account.describe() == "300 unreadable images"


def test_the_quick_check_of_a_folder_accepts_what_the_dataset_does(tmp_path):
    write_image(tmp_path / "a.png", caption=None)
    check_folder(tmp_path, use_captions=False)
    write_image(tmp_path / "b/c.png")
    check_folder(tmp_path, use_captions=True)
    assert len(dataset(tmp_path)) == 1


def test_a_stand_in_does_not_count_its_cut_caption_a_second_time(tmp_path):
    write_images(tmp_path, 2)
    (tmp_path / "000.png").write_bytes(b"")
    (tmp_path / "001.txt").write_text("word " * 500)
    data, tally = dataset(tmp_path), Tally()
    for index in range(2):
        data.draw(index, 0, tally=tally)
    assert tally.captions_cut == 1


@pytest.mark.parametrize(
    "setting", [{"resize_ratio": 0}, {"uncond_p": 1.5}, {"side_x": 0}, {"text_ctx_len": 0}]
)
def test_settings_out_of_range_are_refused(tmp_path, setting):
    write_images(tmp_path, 1)
    with pytest.raises(ValueError, match=next(iter(setting)).split("_")[0]):
        dataset(tmp_path, **setting)


def test_each_line_of_a_caption_file_is_drawn_and_blank_ones_never(tmp_path):
    write_images(tmp_path, 1)
    data = dataset(tmp_path)
    drawn = [caption_of(*data.draw(0, epoch)[:2]) for epoch in range(60)]
    assert set(drawn) == {"caption 0", "another of 0", "third of 0"}
    assert min(map(drawn.count, set(drawn))) >= 8


def test_a_long_caption_is_cut_at_the_context_length(tmp_path):
    write_image(tmp_path / "a.png", caption="abcdefgh" * 100)
    tokens, mask, _ = dataset(tmp_path, text_ctx_len=16)[0]
    assert caption_of(tokens, mask) == "abcdefgh" * 2


def test_captions_are_dropped_as_often_as_asked(tmp_path):
    write_images(tmp_path, 1)
    data = dataset(tmp_path, uncond_p=0.25)
    dropped = sum(not data.draw(0, epoch)[1].any() for epoch in range(400))
    assert 70 <= dropped <= 130


def test_flips_mirror_about_half_of_the_images_and_change_nothing_else(tmp_path):
    write_images(tmp_path, 1)
    plain, flipping = dataset(tmp_path), dataset(tmp_path, random_hflip=True)
    flips = 0
    for epoch in range(100):
        (*text, image), (*text_too, other) = plain.draw(0, epoch), flipping.draw(0, epoch)
        assert equal(text, text_too)
        flips += equal(image.flip(-1), other)
        assert equal(image, other) or equal(image.flip(-1), other)
    assert 35 <= flips <= 65


def break_file(path, kind: str) -> str:
    """Spoil an image or its caption; returns what the warning should say."""
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:200])
        return "truncated"
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("not an image")
    elif kind == "blank caption":
        path.with_suffix(".txt").write_text(" \n\n")
        return "caption file is blank"
    elif kind == "latin caption":
        path.with_suffix(".txt").write_bytes("h\u00e9".encode("latin-1"))
        return "not UTF-8"
    else:
        path.with_suffix(".txt").write_bytes("a caption".encode("utf-16-le"))
        return "NUL bytes"
    return "not an image"


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize(
    "kind", ["truncated", "empty", "text", "blank caption", "latin caption", "wide caption"]
)
def test_a_bad_file_is_named_once_and_another_sample_stands_in(tmp_path, caplog, kind, shuffle):
    write_images(tmp_path, 4)
    reason = break_file(tmp_path / "001.png", kind)
    data = dataset(tmp_path, return_keys=True, shuffle=shuffle)
    with caplog.at_level(logging.WARNING):
        stand_ins = []
        for epoch in range(20):
            data.set_epoch(epoch)
            stand_ins.append(data[1])
    assert len(caplog.records) == 1
    assert "001.png" in caplog.text
    assert reason in caplog.text
    keys = {key for *_, key in stand_ins}
    assert keys == ({"000.png", "002.png", "003.png"} if shuffle else {"002.png"})
    assert equal(stand_ins[3], data.draw(1, 3))


def test_a_folder_of_bad_files_is_an_error_that_names_one(tmp_path):
    write_images(tmp_path, 5)
    for path in tmp_path.glob("*.png"):
        path.write_bytes(b"")
    for shuffle in (False, True):
        with pytest.raises(ValueError, match=r"no sample can be read.*\d+\.png: not an image"):
            dataset(tmp_path, shuffle=shuffle)[0]


def test_a_file_that_vanished_is_skipped(tmp_path):
    write_images(tmp_path, 2)
    data = dataset(tmp_path, return_keys=True)
    (tmp_path / "000.png").unlink()
    assert data[0][-1] == "001.png"


def test_a_draw_depends_on_seed_epoch_and_key_alone(tmp_path):
    write_images(tmp_path, 3)
    data = dataset(tmp_path)
    item = data.draw(2, epoch=7)
    assert not equal(item, data.draw(2, epoch=8))
    assert not equal(item, data.draw(2, epoch=7, repeat=1))
    assert not equal(item, dataset(tmp_path, seed=1).draw(2, epoch=7))
    assert equal(item, data.draw(2, epoch=7))
    write_image(tmp_path / "000a.png")
    assert equal(item, dataset(tmp_path).draw(3, epoch=7))


def test_indexing_follows_the_epoch_that_was_set(tmp_path):
    write_images(tmp_path, 2)
    data = dataset(tmp_path)
    data.set_epoch(0)
    assert equal(data[1], data.draw(1, epoch=0))
    data.set_epoch(3)
    assert equal(data[-1], data.draw(1, epoch=3))
    with pytest.raises(IndexError):
        data[2]


def test_a_pickled_dataset_gives_the_same_items(tmp_path):
    """So it does in the workers of systems that do not fork."""
    write_images(tmp_path, 2)
    data = dataset(tmp_path, tokenizer=None)
    data.set_epoch(2)
    assert equal(pickle.loads(pickle.dumps(data))[1], data[1])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_loop_that_sets_no_epoch_draws_anew_in_every_one(tmp_path, num_workers):
    write_images(tmp_path, 4)
    loader = DataLoader(dataset(tmp_path, resize_ratio=0.3), batch_size=2, num_workers=num_workers)

    def epochs():
        torch.manual_seed(0)
        return [list(loader) for _ in range(2)]

    first, second = epochs()
    assert not equal(first, second)
    assert equal(epochs(), [first, second])  # as torch's random state has it


def test_one_of_several_captions_is_drawn_each_time(tmp_path):
    write_images(tmp_path, 1)
    (caption,) = tmp_path.glob("*.txt")
    caption.write_text("one\ntwo\nthree\n")
    data = dataset(tmp_path)
    assert len({tuple(data[0][0].tolist()) for _ in range(50)}) == 3


def test_the_evaluation_copy_has_nothing_random(tmp_path):
    write_images(tmp_path, 2)
    data = dataset(tmp_path, uncond_p=1.0, random_hflip=True, resize_ratio=0.1)
    fixed = data.for_evaluation()
    item = fixed[0]
    fixed.set_epoch(5)
    assert equal(item, fixed[0])
    assert caption_of(*item[:2]) == "caption 0"
    with Image.open(tmp_path / "000.png") as image:
        centre = image.resize((16, 8), Image.Resampling.BICUBIC, box=(0, 5, 40, 25))
    assert (item[2] - to_tensor(centre)).abs().max() < 0.02
    assert not data[0][1].any(), "the original still drops its captions"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    write_images(folder, 22)
    (folder / "004.png").write_bytes(b"")
    return folder


def full_dataset(folder) -> TextImageDataset:
    return dataset(folder, uncond_p=0.3, random_hflip=True, return_keys=True, shuffle=True)


def test_batches_do_not_depend_on_the_workers_and_persistent_ones_follow_the_epoch(folder):
    epochs = [batches(full_dataset(folder), epoch=epoch) for epoch in (0, 1)]
    assert not equal(*epochs)
    for num_workers in (1, 3):
        data = full_dataset(folder)
        loader = make_dataloader(data, 4, seed=5, num_workers=num_workers, device="cpu")
        for epoch, want in enumerate(epochs):
            loader.set_epoch(epoch)
            assert len(loader) == 5
            assert equal(list(loader), want)
        loader.set_epoch(1, start_batch=3)
        assert equal(list(loader), epochs[1][3:])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_workers_that_are_started_beforehand_make_the_same(folder, num_workers):
    want = batches(full_dataset(folder), epoch=1, start_batch=2)
    others = set(multiprocessing.active_children())
    loader = make_dataloader(full_dataset(folder), 4, seed=5, num_workers=num_workers, device="cpu")
    loader.start_workers()
    started = set(multiprocessing.active_children()) - others
    assert len(started) == num_workers
    assert equal(list(loader), batches(full_dataset(folder)))
    loader.set_epoch(1, start_batch=2)
    assert equal(list(loader), want)
    assert set(multiprocessing.active_children()) - others == started


def test_ctrl_c_while_workers_are_started_waits_until_they_are_up(tmp_path):
    write_images(tmp_path, 4)
    code = f"""
import multiprocessing, os, signal
from glide_finetune.data.dataloading import make_dataloader
from glide_finetune.loader import TextImageDataset
fork = os.fork
def fork_and_press():
    pid = fork()
    if pid:
        os.killpg(0, signal.SIGINT)
    return pid
os.fork = fork_and_press
loader = make_dataloader(TextImageDataset({str(tmp_path)!r}, 8, 8), 1, seed=0, num_workers=2,
                         device="cpu")
try:
    loader.start_workers()
except KeyboardInterrupt:
    print(len(multiprocessing.active_children()), len(list(loader)))
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], check=False, capture_output=True, text=True,
        start_new_session=True,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("2 4\n", "")


@pytest.fixture
def no_shared_memory(monkeypatch):
    """For workers that start from now on, and an end to a test that waits for them in vain."""

    def full(*_):
        raise RuntimeError("unable to allocate shared memory(shm): No space left on device (28)")

    signal.alarm(100)
    yield lambda: monkeypatch.setattr(torch.UntypedStorage, "_share_fd_cpu_", full)
    signal.alarm(0)


def test_batches_are_the_same_where_shared_memory_has_no_room(folder, no_shared_memory):
    want = batches(full_dataset(folder))
    loader = make_dataloader(full_dataset(folder), 4, seed=5, num_workers=2, device="cpu")
    no_shared_memory()
    assert equal(list(loader), want)


KILLED = r"a data worker was killed.*lower --num_workers"


def kill_a_worker():
    worker = multiprocessing.active_children()[0]
    worker.kill()
    worker.join()


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_worker_that_was_killed_is_told_when_its_next_batch_is_due(folder, num_workers):
    loader = make_dataloader(full_dataset(folder), 4, seed=5, num_workers=num_workers, device="cpu")
    before = signal.getsignal(signal.SIGCHLD)
    received = iter(loader)
    next(received)
    assert signal.getsignal(signal.SIGCHLD) is before
    kill_a_worker()
    with pytest.raises(ChildProcessError, match=KILLED):
        list(received)


def test_a_worker_that_was_killed_between_epochs_is_told(folder):
    loader = make_dataloader(full_dataset(folder), 4, seed=5, num_workers=1, device="cpu")
    list(loader)
    kill_a_worker()
    with pytest.raises(ChildProcessError, match=KILLED):
        list(loader)


def test_a_worker_that_was_killed_while_it_sends_is_told(folder, no_shared_memory):
    data = dataset(folder, side_x=128, side_y=128)  # a batch is more than a pipe holds
    loader = make_dataloader(data, 4, seed=5, num_workers=2, device="cpu")
    no_shared_memory()
    received = iter(loader)
    next(received)
    time.sleep(0.5)  # until they wait for the pipe to empty
    kill_a_worker()
    with pytest.raises(ChildProcessError, match=KILLED):
        list(received)


def test_a_worker_that_was_killed_while_it_sends_to_a_thread_is_told(
    folder, no_shared_memory, monkeypatch
):
    """To torch's thread that pins batches for CUDA, which has to be pretended here."""
    pretended = {
        "is_available": lambda: True,
        "current_accelerator": lambda *_, **__: torch.device("cuda"),
        "current_device_index": lambda: 0,
        "set_device_index": lambda *_: None,
    }
    for name, answer in pretended.items():
        monkeypatch.setattr(torch.accelerator, name, answer, raising=False)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self, *_: self.clone())
    send, parent, messages = Connection._send, os.getpid(), []

    def die_in_the_middle(self, data, *args):
        if os.getpid() != parent and len(data) > 100_000:
            messages.append(len(data))
            if len(messages) == 3:
                send(self, bytes(data[: len(data) // 2]))
                os.kill(os.getpid(), signal.SIGKILL)
        send(self, data, *args)

    monkeypatch.setattr(Connection, "_send", die_in_the_middle)
    data = dataset(folder, side_x=128, side_y=128)
    loader = make_dataloader(data, 4, seed=5, num_workers=2, device="cuda")
    no_shared_memory()
    with pytest.raises(ChildProcessError, match=KILLED):
        list(itertools.chain.from_iterable(itertools.repeat(loader, 10)))
    del loader
    gc.collect()  # ends the loader's workers, and waited for the thread


# torch stumbles over what it has not made yet as it cleans up.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_workers_that_cannot_all_be_started_are_told_and_ended(folder, monkeypatch):
    fork, made = os.fork, []

    def limited():
        if len(made) == 2:
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        made.append(None)
        return fork()

    monkeypatch.setattr(os, "fork", limited)
    loader = make_dataloader(full_dataset(folder), 4, seed=5, num_workers=3, device="cpu")
    before = multiprocessing.active_children()
    message = r"not all of 3 data workers can be started \(Resource.*lower --num_workers"
    with pytest.raises(OSError, match=message):
        list(loader)
    for worker in multiprocessing.active_children():
        if worker not in before:
            worker.join(10)
            assert worker.exitcode == -signal.SIGKILL


def test_an_error_of_our_own_in_a_worker_is_no_killed_worker(folder, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr(TextImageDataset, "draw", fail)
    loader = make_dataloader(full_dataset(folder), 4, seed=5, num_workers=1, device="cpu")
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        list(loader)


class CountedDraws(TextImageDataset):
    """Counts its draws, in all processes."""

    def __init__(self, *args, **keywords):
        super().__init__(*args, **keywords)
        self.draws = SharedInteger()

    def draw(self, *args, **keywords):
        self.draws.value += 1
        return super().draw(*args, **keywords)


def test_workers_have_the_batches_of_a_step_ready(folder):
    data = CountedDraws(folder, 16, 8, tokenizer=StubTokenizer())
    loader = make_dataloader(data, 1, seed=0, num_workers=1, device="cpu", batches_a_step=6)
    batches = iter(loader)
    next(batches)
    deadline = time.monotonic() + 60
    while data.draws.value < 7 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert data.draws.value >= 7  # the one that was taken and the six behind it


def test_an_epoch_entered_in_the_middle_decodes_nothing_before(folder, monkeypatch):
    data = full_dataset(folder)
    drawn = []
    draw = data.draw
    monkeypatch.setattr(
        data, "draw", lambda *where, **tally: drawn.append(where) or draw(*where, **tally)
    )
    whole = batches(data, epoch=2)
    assert len(drawn) == 20
    drawn.clear()
    assert equal(batches(data, epoch=2, start_batch=3), whole[3:])
    assert len(drawn) == 8
    assert batches(data, epoch=2, start_batch=5) == []


def test_an_epoch_has_every_sample_once_in_an_order_of_its_own(folder):
    data = dataset(folder, return_keys=True).subset(range(5, 20))
    orders = []
    for epoch in range(3):
        keys = [key for batch in batches(data, 5, epoch) for key in batch[-1]]
        assert sorted(keys) == data.keys
        orders.append(keys)
    assert len({tuple(order) for order in [*orders, data.keys]}) == 4


def test_a_folder_smaller_than_a_batch_fills_it_with_other_crops(folder):
    data = dataset(folder, return_keys=True, resize_ratio=0.3).subset([6, 7, 8])
    (batch,) = batches(data, 8)
    tokens, mask, images, keys = batch
    assert tokens.shape == (8, 128)
    assert mask.shape == (8, 128)
    assert images.shape == (8, 3, 8, 16)
    assert all(keys.count(key) in (2, 3) for key in data.keys)
    assert len({image.numpy().tobytes() for image in images}) == 8


def test_iterating_leaves_the_training_random_state_alone(folder):
    torch.manual_seed(3)
    want = torch.rand(4)
    torch.manual_seed(3)
    batches(full_dataset(folder))
    assert torch.equal(torch.rand(4), want)


def test_an_error_in_a_worker_is_one_line_for_the_user(tmp_path):
    write_images(tmp_path, 2)
    for path in tmp_path.glob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="no sample can be read") as error:
        batches(dataset(tmp_path), 2, num_workers=1)
    message = str(error.value)
    del error  # else the worker lives until the traceback is garbage collected, and ends slowly
    assert "\n" not in message


def test_the_validation_part_is_fixed_and_stable_when_files_are_added(tmp_path):
    write_images(tmp_path, 40)
    train, held_back = split_validation(dataset(tmp_path, uncond_p=1.0), 0.2, seed=0)
    assert sorted([*train.keys, *held_back.keys]) == [f"{i:03}.png" for i in range(40)]
    assert 3 <= len(held_back) <= 14
    assert all(mask.any() for _, mask, _ in held_back)
    for i in range(20):
        write_image(tmp_path / f"new{i}.png")
    train_more, held_back_more = split_validation(dataset(tmp_path), 0.2, seed=0)
    assert set(held_back.keys) <= set(held_back_more.keys)
    assert set(train.keys) <= set(train_more.keys)
    assert split_validation(dataset(tmp_path), 0.2, seed=1)[1].keys != held_back_more.keys


def test_at_least_one_sample_is_held_back_and_one_is_left(tmp_path):
    write_images(tmp_path, 2)
    for fraction in (1e-9, 0.99):
        train, held_back = split_validation(dataset(tmp_path), fraction, seed=0)
        assert (len(train), len(held_back)) == (1, 1)
    data = dataset(tmp_path)
    with pytest.raises(ValueError, match="cannot be split"):
        split_validation(data.subset([0]), 0.5, seed=0)
    with pytest.raises(ValueError, match="fraction"):
        split_validation(data, 0.0, seed=0)


@pytest.mark.parametrize("split", [split_validation, split_by_caption])
def test_one_that_can_be_read_is_among_those_held_back(tmp_path, split):
    write_images(tmp_path, 6)
    _, held_back = split(dataset(tmp_path), 1e-9, seed=0)
    (first,) = held_back.keys
    (tmp_path / first).write_bytes(b"")
    train, held_back = split(dataset(tmp_path), 1e-9, seed=0)
    assert first in held_back.keys
    assert len(held_back) == 2
    assert len(train) == 4
    assert len({str(item) for item in held_back}) == 1  # the other one stands in


@pytest.mark.parametrize("split", [split_validation, split_by_caption])
@pytest.mark.parametrize("whole", range(4))
def test_not_all_are_held_back_whichever_can_be_read(tmp_path, split, whole):
    write_images(tmp_path, 4)
    for index in {0, 1, 2, 3} - {whole}:
        (tmp_path / f"{index:03}.png").write_bytes(b"")
    train, held_back = split(dataset(tmp_path), 1e-9, seed=0)
    assert len(train) + len(held_back) == 4
    assert len(train) > 0


def test_a_sample_that_is_skipped_keeps_nothing_alive(tmp_path):
    """Such as the frame of whoever asked for it, with data workers in it."""
    write_images(tmp_path, 2)
    (tmp_path / "000.png").write_bytes(b"")
    data = dataset(tmp_path)

    def ask():
        something = torch.zeros(1)
        data.draw(0, 0)
        return weakref.ref(something)

    gc.disable()
    try:
        assert ask()() is None
    finally:
        gc.enable()


@pytest.mark.slow
def test_a_process_that_forgets_its_workers_ends_all_the_same(tmp_path):
    write_images(tmp_path, 8)
    script = f"""
import sys
from glide_finetune.data.dataloading import make_dataloader
from glide_finetune.loader import TextImageDataset
cycle = [make_dataloader(TextImageDataset({str(tmp_path)!r}, 8, 8), 1, seed=0, num_workers=2,
                         device="cpu")]
cycle.append(cycle)
next(iter(cycle[0]))
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=100)


def test_a_sub_folder_of_unreadable_files_does_not_end_a_run(tmp_path):
    """More of them than stand-ins are tried for one sample, though less than half of all."""
    (tmp_path / "bad").mkdir()
    for i in range(1100):
        (tmp_path / "bad" / f"{i:04}.png").write_bytes(b"")
    write_images(tmp_path / "good", 1)
    for i in range(1, 1300):
        (tmp_path / "good" / f"{i:04}.png").hardlink_to(tmp_path / "good" / "000.png")
    data = TextImageDataset(tmp_path, 8, 8, shuffle=True, use_captions=False)
    loader = make_dataloader(data, 100, seed=0, num_workers=0, device="cpu")
    assert sum(len(batch[0]) for batch in loader) == 2400


def test_an_epoch_entered_near_its_end_is_not_given_up_for_one_bad_sample(tmp_path):
    write_images(tmp_path, 20)
    (tmp_path / "003.png").write_bytes(b"")
    data = dataset(tmp_path)
    for seed in range(10):
        loader = make_dataloader(data, 1, seed=seed, num_workers=0, device="cpu")
        loader.set_epoch(0, 19)
        assert len(list(loader)) == 1


@pytest.mark.slow
def test_a_process_whose_workers_run_to_its_end_ends_in_silence(tmp_path):
    write_images(tmp_path, 8)
    script = f"""
from glide_finetune.data.dataloading import make_dataloader
from glide_finetune.loader import TextImageDataset
loader = make_dataloader(TextImageDataset({str(tmp_path)!r}, 8, 8), 1, seed=0, num_workers=2,
                         device="cpu")
print(len(list(loader)))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], check=True, timeout=100, capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == ("8\n", "")


@pytest.mark.slow
def test_a_process_whose_failed_loader_is_a_cycle_of_references_ends_all_the_same(tmp_path):
    write_images(tmp_path, 8)
    script = f"""
import gc
from glide_finetune.data.dataloading import make_dataloader
from glide_finetune.loader import TextImageDataset
batches = iter(make_dataloader(TextImageDataset({str(tmp_path)!r}, 8, 8), 1, seed=0, num_workers=1,
                               device="cpu"))
next(batches)
cycle = [batches]
cycle.append(cycle)
del batches, cycle
gc.collect()
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=100)


@pytest.mark.parametrize("limit", ["soft", "hard"])
def test_more_batches_than_open_files_are_allowed_can_be_kept(tmp_path, limit):
    """As gradient accumulation does; where the system does not allow more, that is told."""
    write_images(tmp_path, 40)
    script = f"""
import resource
from glide_finetune.data.dataloading import make_dataloader
from glide_finetune.loader import TextImageDataset
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (60, hard if {limit!r} == "soft" else 60))
loader = make_dataloader(TextImageDataset({str(tmp_path)!r}, 8, 8), 1, seed=0, num_workers=1,
                         device="cpu")
try:
    print(len(list(loader)))
except OSError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], check=True, timeout=100, capture_output=True, text=True
    )
    if limit == "soft":
        assert done.stdout == "40\n"
    else:
        assert "raise the limit (ulimit -n), or lower --gradient_accumulation" in done.stdout
