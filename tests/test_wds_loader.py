"""Tar shards: filters, skipping, the split among workers and reproducible batches."""

import io
import json
import logging
import multiprocessing
import tarfile
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from glide_finetune.config import TrainConfig
from glide_finetune.data import shard_stream
from glide_finetune.data.dataloading import make_dataloader
from glide_finetune.loader import TextImageDataset
from glide_finetune.training_data import make_training_data
from glide_finetune.wds_loader import glide_wds_loader
from stub_tokenizer import StubTokenizer, caption_of

# torch advises against more workers than cores; here it is about the order.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


def jpeg(seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((30, 20)).save(file, "JPEG")
    return file.getvalue()


def laion(**fields) -> bytes:
    metadata = {"similarity": 0.3, "NSFW": "UNLIKELY", "original_width": 400}
    return json.dumps({**metadata, "original_height": 300, **fields}).encode()


def write_shard(path, samples: dict[str, dict[str, bytes]]):
    with tarfile.open(path, "w") as tar:
        for key, members in samples.items():
            for suffix, data in members.items():
                if data is None:
                    continue
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def one(seed: int = 0, caption: str = "a caption", **fields) -> dict[str, bytes]:
    return {"jpg": jpeg(seed), "txt": caption.encode(), "json": laion(**fields)}


def stream(urls, **settings):
    defaults = {"base_x": 12, "base_y": 8, "uncond_p": 0.0, "return_keys": True}
    return glide_wds_loader(urls, **{**defaults, "tokenizer": StubTokenizer(), **settings})


def keys(items) -> list[str]:
    """Keys without their shard, in order."""
    return [key.split("/", 1)[1] for *_, key in items]


def kept(path, samples, **settings) -> list[str]:
    """Sorted keys of the samples that come through, or [] if none does."""
    try:
        return sorted(keys(stream(write_shard(path / "shard.tar", samples), **settings)))
    except ValueError:
        return []


def test_items_are_as_from_a_local_folder(tmp_path):
    shard = write_shard(tmp_path / "s.tar", {"000": one(caption="two\nlines  of it")})
    (item,) = stream(shard, text_ctx_len=20)
    tokens, mask, image, key = item
    assert caption_of(tokens, mask) == "two lines of it"
    assert (tokens.shape, tokens.dtype) == ((20,), torch.int64)
    assert mask.dtype == torch.bool
    assert (image.shape, image.dtype) == ((3, 8, 12), torch.float32)
    assert key == "s.tar/000"
    assert len(next(iter(stream(shard, return_keys=False)))) == 3


def test_upsampler_items_are_pairs(tmp_path):
    shard = write_shard(tmp_path / "s.tar", {"000": one()})
    (item,) = stream(shard, enable_upsample=True, upscale_factor=2)
    low_res, high_res = item[2:4]
    assert (low_res.shape, high_res.shape) == ((3, 8, 12), (3, 16, 24))
    averaged = torch.nn.functional.avg_pool2d(high_res, 2)
    assert (low_res - averaged).abs().max() <= 0.6 / 127.5


def test_text_or_images_can_be_left_out(tmp_path):
    shard = write_shard(tmp_path / "s.tar", {"000": {"jpg": jpeg()}})
    (item,) = stream(shard, enable_text=False)
    assert not item[1].any()
    shard = write_shard(tmp_path / "t.tar", {"000": {"txt": b"words"}})
    (item,) = stream(shard, enable_image=False, return_keys=False)
    assert caption_of(*item) == "words"


def test_members_are_found_by_the_keys_given(tmp_path):
    members = {"png": jpeg(), "cap": b"words", "meta": laion(similarity=0.1)}
    shard = write_shard(tmp_path / "s.tar", {"000": members})
    settings = {"image_key": "png", "caption_key": "cap", "metadata_key": "meta"}
    assert keys(stream(shard, **settings)) == ["000"]
    with pytest.raises(ValueError, match="1 similarity"):
        list(stream(shard, similarity_threshold_lower=0.2, **settings))
    message = "no sample of the shards can be used: 1 unreadable image.*give the suffix"
    with pytest.raises(ValueError, match=message):
        list(stream(shard))


def test_captions_are_dropped_as_often_as_asked(tmp_path):
    shard = write_shard(tmp_path / "s.tar", {f"{i:03}": one() for i in range(200)})
    dropped = sum(not mask.any() for _, mask, *_ in stream(shard, uncond_p=0.2))
    assert 25 <= dropped <= 55


def test_similarity_bounds_are_included(tmp_path):
    values = (0.19, 0.2, 0.25, 0.3, 0.31, None, "0.25", float("nan"))
    samples = {f"{i}": one(similarity=value) for i, value in enumerate(values)}
    limits = {"similarity_threshold_lower": 0.2, "similarity_threshold_upper": 0.3}
    assert kept(tmp_path, samples, **limits) == ["1", "2", "3", "6"]
    assert kept(tmp_path, samples, similarity_threshold_lower=0.3) == ["3", "4"]
    assert kept(tmp_path, samples, similarity_threshold_upper=0.2) == ["0", "1"]
    assert len(kept(tmp_path, samples)) == len(samples), "no limit where none is given"


def test_aspect_ratio_and_size_bounds_are_included(tmp_path):
    sizes = [(256, 256), (255, 256), (256, 255), (512, 256), (513, 256), (256, 512), (256, 513)]
    samples = {f"{i}": one(original_width=w, original_height=h) for i, (w, h) in enumerate(sizes)}
    assert kept(tmp_path, samples) == ["0", "3", "5"]
    settings = {"ar_lower": 0.9, "ar_upper": 1.1, "min_original_width": 0, "min_original_height": 0}
    assert kept(tmp_path, samples, **settings) == ["0", "1", "2"]


def test_unsafe_samples_are_left_out_unless_allowed(tmp_path):
    samples = {
        rating: one(NSFW=rating) for rating in ("UNLIKELY", "UNSURE", "LIKELY", "NSFW", "nsfw")
    }
    assert kept(tmp_path, samples) == ["UNLIKELY", "UNSURE"]
    assert len(kept(tmp_path, samples, nsfw_filter=False)) == 5


def test_missing_and_null_metadata_reject_nothing(tmp_path):
    names = ("similarity", "NSFW", "original_width", "original_height")
    samples = {f"null {name}": one(**{name: None}) for name in names}
    samples |= {"empty": {**one(), "json": b"{}"}, "no json": {"jpg": jpeg(), "txt": b"words"}}
    samples["zero"] = one(original_height=0)
    assert kept(tmp_path, samples) == sorted(set(samples) - {"zero"})


def test_metadata_is_not_read_when_it_is_off(tmp_path):
    samples = {"a": {**one(), "json": b"not json"}, "b": one(NSFW="NSFW", original_width=1)}
    assert kept(tmp_path, samples, enable_metadata=False) == ["a", "b"]
    assert kept(tmp_path, samples, dataset_name="generic") == ["a", "b"]


def test_words_to_skip_are_whole_words_in_any_case(tmp_path):
    captions = ("A Stock photo", "stockings", "fine", "not, for sale!", "for a sale")
    samples = {caption: one(caption=caption) for caption in captions}
    left = kept(tmp_path, samples, words_to_skip=["stock", "for sale"])
    assert left == ["fine", "for a sale", "stockings"]


def test_alamy_takes_english_captions_from_the_metadata(tmp_path):
    def alamy(**metadata):
        return {"jpg": jpeg(), "json": json.dumps(metadata).encode()}

    samples = {
        "english": alamy(lc="en", caption="from the metadata"),
        "british": alamy(lc="en-GB", caption="the same"),
        "german": alamy(lc="de", caption="deutsch"),
        "unknown": alamy(caption="no code"),
        "silent": alamy(lc="en"),
        "number": alamy(lc="en", caption=5),
    }
    settings = {"dataset_name": "alamy", "shuffle_buffer": 0}
    items = list(stream(write_shard(tmp_path / "s.tar", samples), **settings))
    assert keys(items) == ["english", "british"]
    assert caption_of(*items[0][:2]) == "from the metadata"


def test_an_unknown_dataset_name_and_crossed_limits_are_refused(tmp_path):
    shard = write_shard(tmp_path / "s.tar", {"000": one()})
    with pytest.raises(ValueError, match="choose one of laion, alamy, generic"):
        stream(shard, dataset_name="lion")
    with pytest.raises(ValueError, match=r"limit 0.5 is above the upper one, 0.0"):
        stream(shard, similarity_threshold_lower=0.5, similarity_threshold_upper=0.0)


@pytest.mark.parametrize(
    ("members", "settings", "message"),
    [
        ({"cap": b"words"}, {}, r"1 no caption; give .* captions as --wds_caption_key$"),
        ({"json": b'{"lc": "en"}'}, {"dataset_name": "alamy"}, r"1 no caption; give .* generic"),
        (
            {"json": b'{"caption": "words"}'},
            {"dataset_name": "alamy"},
            r"1 not English; give --wds_dataset_name generic",
        ),
    ],
)
def test_where_nothing_is_left_the_flag_that_helps_is_told(tmp_path, members, settings, message):
    shard = write_shard(tmp_path / "s.tar", {"0": {"jpg": jpeg(), **members}})
    with pytest.raises(ValueError, match=message):
        list(stream(shard, **settings))


def test_where_no_shard_can_be_read_the_reason_is_told(tmp_path):
    (tmp_path / "broken.tar").write_bytes(b"x" * 2000)
    with pytest.raises(
        ValueError, match=r"1 damaged shards, such as .*broken.tar: .*; mend the da"
    ):
        list(stream(tmp_path / "broken.tar"))


def test_filters_that_reject_everything_end_with_the_counts(tmp_path):
    samples = {f"{i}": one(original_width=10) for i in range(3)} | {"x": one(NSFW="NSFW")}
    shard = write_shard(tmp_path / "s.tar", samples)
    message = "no sample of the shards can be used: 3 too small, 1 not safe for work"
    with pytest.raises(ValueError, match=message):
        list(stream(shard))
    for num_workers in (0, 1):
        loader = make_dataloader(stream(shard), 2, seed=0, num_workers=num_workers, device="cpu")
        with pytest.raises(ValueError, match=message):
            list(loader)


DOTTED = {f"{number}.jpg": jpeg() for number in range(50)}
# reason in the log, what it is counted as, the sample
BAD_SAMPLES = {
    "empty": ("", "image", {**one(), "jpg": b""}),
    "cut": ("", "image", {**one(), "jpg": jpeg()[:300]}),
    "imageless": ("no .jpg among its members .txt, .json", "image", {**one(), "jpg": None}),
    "dots": (r", … (a name ends at its first dot)", "image", DOTTED),
    "latin": ("not UTF-8", "caption", {**one(), "txt": "h\u00e9".encode("latin-1")}),
    "wide": ("not UTF-8", "caption", {**one(), "txt": "words".encode("utf-16")}),
    "wide-le": ("NUL bytes", "caption", {**one(), "txt": "words".encode("utf-16-le")}),
    "long": ("longer than", "caption", one(caption="words " * 20_000)),
    "blank": ("blank", "caption", one(caption=" \n ")),
    "json": ("not JSON", "metadata", {**one(), "json": b"{'no': json}"}),
    "zero": ("not JSON", "metadata", {**one(), "json": b""}),
    "list": ("no JSON object", "metadata", {**one(), "json": b"[1]"}),
    "../out": ("leads out of the shard", "name", one()),
    "/etc/root": ("leads out of the shard", "name", one()),
    "a/../../b": ("leads out of the shard", "name", one()),
}  # fmt: skip


def test_bad_samples_are_skipped_named_once_and_counted(tmp_path, caplog):
    samples = {f"good{i:02}": one(i) for i in range(20)}
    samples |= {key: members for key, (*_, members) in BAD_SAMPLES.items()}
    samples |= {"textless": {"jpg": jpeg(), "json": laion()}, "small": one(original_width=5)}
    data = stream(write_shard(tmp_path / "s.tar", samples))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert sorted(keys(data)) == [f"good{i:02}" for i in range(20)]
    for key, (reason, *_) in BAD_SAMPLES.items():
        (line,) = [text for text in caplog.messages if text.startswith(f"skipped s.tar/{key}: ")]
        assert reason in line
    kinds = [kind for _, kind, _ in BAD_SAMPLES.values()]
    counts = {"unreadable images": "image", "unreadable captions": "caption",
              "unreadable metadata": "metadata", "unusable names": "name"}  # fmt: skip
    summary = caplog.messages[-1]
    for words, kind in counts.items():
        assert f"{kinds.count(kind)} {words}" in summary
    assert "1 no caption" in summary
    assert "1 too small" in summary
    assert list(tmp_path.iterdir()) == [tmp_path / "s.tar"]


def test_broken_shards_are_skipped_and_what_is_whole_in_them_is_read(tmp_path, caplog):
    for name in "abcde":
        write_shard(tmp_path / f"{name}.tar", {f"{name}{i:02}": one(i) for i in range(20)})
    with tarfile.open(tmp_path / "a.tar") as tar:
        cut = tar.getmember("a10.jpg").offset_data + 100
    (tmp_path / "a.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:cut])
    (tmp_path / "b.tar").write_bytes(b"")
    (tmp_path / "c.tar").write_bytes(b"this is no tar file at all" * 100)
    write_shard(tmp_path / "f.tar", {})
    data = stream([tmp_path, "pipe:exit 3"])
    (tmp_path / "e.tar").unlink()
    with caplog.at_level(logging.WARNING):
        got = sorted(keys(data))
    assert got == [f"a{i:02}" for i in range(10)] + [f"d{i:02}" for i in range(20)]
    reasons = {
        f"{tmp_path}/a.tar": "unexpected end of data", f"{tmp_path}/b.tar": "empty file",
        f"{tmp_path}/c.tar": "invalid header", f"{tmp_path}/e.tar": "No such file or directory",
        f"{tmp_path}/f.tar": "it holds no samples",
        "pipe:exit 3": "the command ended with status 3",
    }  # fmt: skip
    for shard, reason in reasons.items():
        assert f"skipped {shard}: {reason}" in caplog.messages
    assert "left out 6 damaged shards" in caplog.text


def test_what_only_a_filter_could_miss_is_not_missed_in_a_cut_sample(tmp_path):
    """The metadata that would reject the last sample lies behind the cut."""
    shard = write_shard(tmp_path / "s.tar", {"a": one(), "b": one(1), "c": one(NSFW="NSFW")})
    with tarfile.open(shard) as tar:
        cut = tar.getmember("c.json").offset
    shard.write_bytes(shard.read_bytes()[:cut])
    assert keys(stream(shard, shuffle_buffer=0)) == ["a", "b"]


def test_shards_of_the_same_name_in_two_folders_stay_apart(tmp_path):
    for name in "xy":
        (tmp_path / name).mkdir()
        write_shard(tmp_path / name / "0.tar", {"000": one()})
    data = stream(tmp_path, shuffle_buffer=0)
    assert [key for *_, key in data] == ["x/0.tar/000", "y/0.tar/000"]
    assert [key for *_, key in data.without({"y/0.tar/000"})] == ["x/0.tar/000"]


def test_captions_listed_in_the_metadata_are_drawn_from(tmp_path):
    texts = ["first  one", "second\none", " ", "third"]
    members = {
        "jpg": jpeg(),
        "txt": b"not this",
        "json": laion(captions=texts, lc="en", caption="nor this", prepared_from="a.png"),
    }
    shard = write_shard(tmp_path / "s.tar", {"000": members})
    for name in ("laion", "alamy", "generic"):
        data, drawn = stream(shard, dataset_name=name), set()
        for epoch in range(20):
            data.set_epoch(epoch)
            drawn |= {caption_of(*item[:2]) for item in data}
        assert drawn == {"first one", "second one", "third"}
        (fixed,) = data.for_evaluation()
        assert caption_of(*fixed[:2]) == "first one"
    (item,) = stream(shard, words_to_skip=["first", "second"])
    assert caption_of(*item[:2]) == "third"
    with pytest.raises(ValueError, match="1 word to skip"):
        list(stream(shard, words_to_skip=["one", "third"]))


@pytest.mark.parametrize("captions", [[], "text", None, {}])
def test_without_a_list_of_captions_the_sample_has_its_own(tmp_path, captions):
    metadata = {"captions": captions, "prepared_from": "a.png"}
    shard = write_shard(tmp_path / "s.tar", {"000": one(caption="own", **metadata)})
    (item,) = stream(shard)
    assert caption_of(*item[:2]) == "own"


@pytest.mark.parametrize("captions", [["foreign"], [{"text": "foreign"}]])
@pytest.mark.parametrize("name", ["laion", "alamy", "generic"])
def test_a_list_of_captions_that_prepare_did_not_write_is_none(tmp_path, captions, name):
    json_caption = "own" if name == "alamy" else "not this"
    members = {
        "jpg": jpeg(),
        "txt": b"own",
        "json": laion(captions=captions, lc="en", caption=json_caption),
    }
    (item,) = stream(write_shard(tmp_path / "s.tar", {"000": members}), dataset_name=name)
    assert caption_of(*item[:2]) == "own"


def test_the_shuffle_buffer_holds_a_limited_number_of_bytes(tmp_path, monkeypatch):
    samples = {f"{i:02}": one(i, caption=f"caption {i}") for i in range(40)}
    shard = write_shard(tmp_path / "s.tar", samples)
    whole = keys(stream(shard, shuffle_buffer=1000, epoch=0))
    room = 5 * max(sum(map(len, members.values())) for members in samples.values())
    monkeypatch.setattr(shard_stream, "BUFFER_BYTES", room)
    order = keys(stream(shard, shuffle_buffer=1000, epoch=0))
    assert order == keys(stream(shard, shuffle_buffer=1000, epoch=0))
    assert sorted(order) == sorted(samples)
    assert order not in (whole, sorted(samples))
    assert all(int(key) <= place + 10 for place, key in enumerate(order)), "only a few are held"
    monkeypatch.setattr(shard_stream, "BUFFER_BYTES", 1)
    assert keys(stream(shard, shuffle_buffer=1000)) == sorted(samples)


@pytest.mark.parametrize("caption", [5, "\ud800", "a\0b", "  ", ["a"], "x" * 70_000])
def test_a_caption_in_the_metadata_that_is_none_cannot_be_read(tmp_path, caption, caplog):
    def members(caption):
        return {"jpg": jpeg(), "json": json.dumps({"lc": "en", "caption": caption}).encode()}

    samples = {"bad": members(caption), "good": members("words"), "third": members("more")}
    with caplog.at_level(logging.WARNING):
        assert kept(tmp_path, samples, dataset_name="alamy") == ["good", "third"]
    assert "skipped shard.tar/bad: the caption " in caplog.text


def test_shards_that_hold_something_else_are_given_up_before_their_end(tmp_path):
    members = {"png": jpeg(), "txt": b"words"}
    shard = write_shard(tmp_path / "s.tar", {f"{i:04}": members for i in range(1200)})
    message = (
        "50[01] of the first 50[01] samples cannot be read.* no .jpg among its members .png, .txt"
    )
    with pytest.raises(ValueError, match=message):
        next(iter(stream(shard)))
    with pytest.raises(ValueError, match="1000 of the first 1000 samples cannot be read"):
        next(iter(stream(shard).for_evaluation()))


def test_in_stored_order_many_bad_samples_at_the_start_are_no_reason_to_give_up(tmp_path):
    samples = {f"{i:04}": {"jpg": b"", "txt": b"words"} for i in range(999)} | {"999": one()}
    data = stream(write_shard(tmp_path / "s.tar", samples)).for_evaluation()
    assert keys(data) == ["999"]


@pytest.mark.parametrize("suffixes", [("jpg", "txt", "json"), (".JPG", ".txt", ".Json")])
def test_suffixes_may_be_given_with_their_dot_and_in_capitals(tmp_path, suffixes):
    names = dict(zip(("image_key", "caption_key", "metadata_key"), suffixes, strict=True))
    assert kept(tmp_path, {"a": one(), "b": one(original_width=5)}, **names) == ["a"]


def test_the_log_tells_when_the_first_samples_are_all_rejected(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(shard_stream, "PATIENCE", 5)
    samples = {f"{i:02}": one(original_width=5) for i in range(9)} | {"10": one()}
    data = stream(write_shard(tmp_path / "s.tar", samples), shuffle_buffer=0)
    with caplog.at_level(logging.WARNING):
        assert keys(data) == ["10"]
    assert caplog.messages.count("no sample could be used yet: 5 too small") == 1


def test_nothing_in_a_shard_is_unpickled(tmp_path):
    evil = b"cposix\nsystem\n(S'touch " + bytes(tmp_path / "owned") + b"'\ntR."
    samples = {"000": {**one(), "pyd": evil, "pickle": evil, "pth": evil}}
    assert kept(tmp_path, samples) == ["000"]
    assert not (tmp_path / "owned").exists()


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Five shards of 9 samples, of different lengths after one bad image each in two of them."""
    folder = tmp_path_factory.mktemp("shards")
    for shard in range(5):
        samples = {f"{shard}{i:02}": one(10 * shard + i, f"caption {i}") for i in range(9)}
        if shard in (1, 3):
            samples[f"{shard}04"]["jpg"] = b"broken"
        write_shard(folder / f"s-{shard}.tar", samples)
    return folder


EVERY_KEY = sorted(
    f"{shard}{i:02}" for shard in range(5) for i in range(9) if (shard, i) not in ((1, 4), (3, 4))
)


@pytest.mark.parametrize("num_workers", [0, 3])
def test_no_sample_is_seen_twice_and_none_is_lost(shards, num_workers):
    loader = DataLoader(stream(shards), batch_size=None, num_workers=num_workers)
    assert sorted(keys(loader)) == EVERY_KEY


def test_order_and_draws_change_with_the_epoch_and_repeat_with_the_seed(shards):
    def epoch_of(epoch, **settings):
        items = list(stream(shards, epoch=epoch, **settings))
        return keys(items), torch.stack([item[2] for item in sorted(items, key=lambda i: i[-1])])

    first, images = epoch_of(0)
    assert first != EVERY_KEY
    again, same_images = epoch_of(0)
    assert again == first
    assert torch.equal(images, same_images)
    other, other_images = epoch_of(1)
    assert sorted(other) == EVERY_KEY
    assert other != first
    assert not torch.equal(images, other_images)
    assert epoch_of(0, seed=1)[0] != first
    stored, _ = epoch_of(0, shuffle_buffer=0)
    assert stored == EVERY_KEY
    shard_wise, _ = epoch_of(0, shuffle_buffer=1)
    assert shard_wise != EVERY_KEY
    assert sorted(shard_wise) == EVERY_KEY


def test_the_evaluation_copy_has_nothing_random(shards):
    fixed = stream(shards, uncond_p=1.0, random_hflip=True).for_evaluation()
    items = list(fixed)
    assert keys(items) == EVERY_KEY
    assert all(mask.any() for _, mask, *_ in items)
    fixed.set_epoch(4)
    assert all(torch.equal(a[2], b[2]) for a, b in zip(items, fixed, strict=True))


def test_held_back_samples_do_not_come(shards):
    smaller = stream(shards).without({"s-2.tar/203"}).without(["s-0.tar/000"])
    assert sorted(keys(smaller)) == [key for key in EVERY_KEY if key not in ("203", "000")]
    assert len(list(smaller.for_evaluation())) == len(EVERY_KEY) - 2


def epoch_batches(loader, epoch: int, start_batch: int = 0) -> list[tuple]:
    loader.set_epoch(epoch, start_batch)
    return [(images.numpy().tobytes(), batch_keys) for _, _, images, batch_keys in loader]


@pytest.mark.parametrize("num_workers", [0, 3])
def test_workers_that_are_started_beforehand_make_the_same(shards, num_workers):
    def new_loader():
        return make_dataloader(stream(shards), 4, seed=0, num_workers=num_workers, device="cpu")

    first, want = epoch_batches(new_loader(), 0), epoch_batches(new_loader(), 1, start_batch=2)
    others = set(multiprocessing.active_children())
    loader = new_loader()
    loader.start_workers()
    started = set(multiprocessing.active_children()) - others
    assert len(started) == num_workers
    assert len(list(loader)) == len(first), "without a call of set_epoch"
    assert epoch_batches(loader, 1, start_batch=2) == want
    assert set(multiprocessing.active_children()) - others == started


@pytest.mark.parametrize("num_workers", [0, 3])
def test_batches_repeat_for_the_same_workers_and_resume_in_mid_epoch(shards, num_workers, caplog):
    def new_loader():
        data = stream(shards, uncond_p=0.3)
        return make_dataloader(data, 4, seed=0, num_workers=num_workers, device="cpu")

    loader = new_loader()
    first, second = epoch_batches(loader, 0), epoch_batches(loader, 1)
    assert first != second
    assert all(len(batch_keys) == 4 for _, batch_keys in first)
    assert caplog.messages.count("this epoch left out 2 unreadable images") == 2
    resumed = new_loader()
    for start_batch in (1, 5, len(second) - 1, len(second)):
        assert epoch_batches(resumed, 1, start_batch) == second[start_batch:]
    assert epoch_batches(resumed, 0) == first


def test_workers_with_very_different_shares_resume_too(tmp_path):
    for name, count in (("a", 17), ("b", 3), ("c", 6)):
        write_shard(tmp_path / f"{name}.tar", {f"{name}{i:02}": one(i) for i in range(count)})
    loader = make_dataloader(stream(tmp_path), 4, seed=0, num_workers=3, device="cpu")
    whole = epoch_batches(loader, 0)
    assert len(whole) == 4 + 1 + 1
    for start_batch in range(1, len(whole)):
        assert epoch_batches(loader, 0, start_batch) == whole[start_batch:]


def test_what_is_skipped_on_resuming_is_not_decoded(shards, monkeypatch):
    data = stream(shards)
    made = []
    make = data.make
    monkeypatch.setattr(data, "make", lambda raw, *rest: made.append(raw.key) or make(raw, *rest))
    loader = make_dataloader(data, 4, seed=0, num_workers=0, device="cpu")
    assert len(epoch_batches(loader, 0, start_batch=9)) == 2
    assert len(made) <= 9 + 1, "and the first, in case that the last ones are unreadable"


def test_a_stream_smaller_than_a_batch_fills_it(tmp_path):
    shard = write_shard(tmp_path / "s.tar", {f"{i}": one(i) for i in range(3)})
    for num_workers in (0, 2):
        loader = make_dataloader(stream(shard), 8, seed=0, num_workers=num_workers, device="cpu")
        ((_, _, images, batch_keys),) = loader
        assert images.shape[0] == 8
        assert {batch_keys.count(key) for key in set(batch_keys)} == {2, 3}


def write_marked(path, marks: str) -> None:
    """A shard with a sample for each mark; "x" makes an unreadable one."""
    samples = {f"{path.stem}{i:03}": one(i, f"caption {i}") for i in range(len(marks))}
    for mark, members in zip(marks, samples.values(), strict=True):
        if mark == "x":
            members["jpg"] = b"broken"
    write_shard(path, samples)


@pytest.mark.parametrize(
    "marks",
    [
        ("oooooxxx", "oooooooo", "oooxxxxx"),
        ("xxxxxxoooo", "oooooooo", "xxxxxxxooxxx"),
        ("xxxxxxxxx", "oooooooo", "oxxxxxxxxx"),
        ("xx", "oooooooooo", "xo"),
    ],
    ids=["at the end", "at the start", "a whole share", "less than a batch"],
)
@pytest.mark.parametrize("num_workers", [0, 3])
@pytest.mark.parametrize("shuffle_buffer", [0, 100])
def test_unreadable_samples_anywhere_leave_the_later_batches_in_their_place(
    tmp_path, marks, num_workers, shuffle_buffer
):
    for name, of_shard in zip("abc", marks, strict=True):
        write_marked(tmp_path / f"{name}.tar", of_shard)

    def new_loader():
        data = stream(tmp_path, shuffle_buffer=shuffle_buffer)
        loader = make_dataloader(data, 3, seed=0, num_workers=num_workers, device="cpu")
        loader._account._trial = 0  # to stop on too many of them is another matter
        return loader

    whole = epoch_batches(new_loader(), 0)
    resumed = new_loader()
    for start_batch in range(1, len(whole) + 1):
        assert epoch_batches(resumed, 0, start_batch) == whole[start_batch:]


def test_processes_that_train_together_share_the_shards(shards, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    found = []
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        data = stream(shards)
        here = keys(DataLoader(data, batch_size=None, num_workers=2))
        assert len({key[0] for key in here}) == data.shards_here == 3 - rank
        found += here
    assert sorted(found) == EVERY_KEY
    monkeypatch.setenv("WORLD_SIZE", "6")
    with pytest.raises(ValueError, match="5 shards cannot be divided among 6 processes"):
        stream(shards)


def endless(data, samples: int, batch_size: int = 4, num_workers: int = 0):
    return make_dataloader(
        data, batch_size, seed=0, num_workers=num_workers, device="cpu", epoch_samples=samples
    )


@pytest.mark.parametrize("num_workers", [0, 3])
def test_an_epoch_of_so_many_samples_repeats_or_cuts_the_shards(shards, num_workers):
    for samples, batches in ((10, 2), (16, 4), (135, 33)):
        loader = endless(stream(shards), samples, num_workers=num_workers)
        assert len(loader) == batches
        epochs = [epoch_batches(loader, epoch) for epoch in (0, 1, 0)]
        assert [len(epoch) for epoch in epochs] == [batches] * 3
        assert epochs[0] == epochs[2] != epochs[1]
    seen = [key for _, batch_keys in epochs[0] for key in batch_keys]
    assert {key.split("/")[1] for key in seen} == set(EVERY_KEY)
    assert len({images for images, _ in epochs[0]}) == batches, "each pass has draws of its own"


@pytest.mark.parametrize("num_workers", [0, 3])
def test_an_epoch_of_so_many_samples_resumes_in_the_middle(shards, num_workers):
    loader = endless(stream(shards), 150, num_workers=num_workers)
    whole = epoch_batches(loader, 1)
    resumed = endless(stream(shards), 150, num_workers=num_workers)
    for start_batch in (1, 8, 20, 36, 37):
        assert epoch_batches(resumed, 1, start_batch) == whole[start_batch:]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_endless_command_makes_epochs_too(shards, num_workers):
    command = f"pipe:while cat {shards}/s-0.tar; do :; done"
    once = f"pipe:cat {shards}/s-1.tar"
    loader = endless(stream([once, command]), 40, num_workers=num_workers)
    assert len(epoch_batches(loader, 0)) == len(epoch_batches(loader, 1)) == 10


def test_processes_that_train_together_have_epochs_of_the_same_length(shards, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        assert len(epoch_batches(endless(stream(shards), 80), 0)) == 10
    with pytest.raises(ValueError, match="an epoch of 7 samples makes no batch of 4 in each of 2"):
        endless(stream(shards), 7)


@pytest.mark.parametrize("num_workers", [0, 3])
def test_a_worker_without_samples_leaves_the_epoch_to_the_others(tmp_path, num_workers):
    write_marked(tmp_path / "a.tar", "ooooo")
    write_marked(tmp_path / "b.tar", "xx")
    write_shard(tmp_path / "c.tar", {f"{i}": one(original_width=5) for i in range(3)})
    loader = endless(stream(tmp_path), 40, num_workers=num_workers)
    whole = epoch_batches(loader, 0)
    assert len(whole) == 10
    for start_batch in (1, 4, 9):
        assert epoch_batches(loader, 0, start_batch) == whole[start_batch:]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("samples", [0, 40])
def test_nothing_to_train_on_is_told_instead_of_waited_for(tmp_path, num_workers, samples):
    for name in "ab":
        write_shard(tmp_path / f"{name}.tar", {f"{i}": one(original_width=5) for i in range(3)})
    loader = endless(stream(tmp_path), samples, num_workers=num_workers)
    with pytest.raises(ValueError, match=r"no sample of the shards can be used: \d+ too small"):
        list(loader)
    for name in "ab":
        write_marked(tmp_path / f"{name}.tar", "xxx")
    loader = endless(stream(tmp_path), samples, num_workers=num_workers)
    with pytest.raises(ValueError, match=r"\d+ unreadable images"):
        list(loader)


def test_an_incomplete_last_batch_is_dropped(shards):
    loader = make_dataloader(stream(shards), 10, seed=0, num_workers=0, device="cpu")
    assert [len(batch[-1]) for batch in loader] == [10] * 4


def test_the_length_of_a_stream_is_not_known(shards):
    loader = make_dataloader(stream(shards), 4, seed=0, num_workers=0, device="cpu")
    with pytest.raises(TypeError):
        len(loader)


@pytest.mark.parametrize("num_workers", [0, 1, 3, 5])
def test_the_ends_of_the_workers_shares_make_batches_too(tmp_path, num_workers):
    """None of the 35 samples is given twice, and less than a batch is left out."""
    for shard in "abcde":
        write_shard(tmp_path / f"{shard}.tar", {f"{shard}{i}": one(i) for i in range(7)})
    data = stream(tmp_path)
    loader = make_dataloader(data, 4, seed=0, num_workers=num_workers, device="cpu")
    whole = [tuple(batch[-1]) for batch in loader]
    assert [len(keys) for keys in whole] == [4] * 8
    assert len(set(sum(whole, ()))) == 32
    for start in (1, 4, 7, 8):
        loader.set_epoch(0, start)
        assert [tuple(batch[-1]) for batch in loader] == whole[start:]


def test_unreadable_samples_at_the_start_of_stored_order_are_passed_over(tmp_path):
    """As when it is made sure that there is a sample; they say little of all."""
    write_shard(tmp_path / "0.tar", {f"a{i:04}": one() | {"jpg": b""} for i in range(600)})
    write_shard(tmp_path / "1.tar", {"b": one()})
    assert len(next(iter(stream(tmp_path).for_evaluation()))) > 1


@pytest.mark.parametrize(
    "settings", [{}, {"num_workers": 2}, {"num_workers": 2, "persistent_workers": True}]
)
def test_a_loop_that_sets_no_epoch_gets_another_order_in_every_one(tmp_path, settings):
    shards = [
        write_shard(tmp_path / f"{n}.tar", {f"{n}{i}": one(10 * n + i) for i in range(5)})
        for n in range(4)
    ]
    loader = DataLoader(stream(shards), batch_size=None, **settings)
    first, second = (keys(loader) for _ in range(2))
    assert sorted(first) == sorted(second)
    assert len(set(first)) == 20
    assert first != second
    given = stream(shards, epoch=3)
    assert keys(given) == keys(given)


def test_samples_that_no_filter_can_look_at_are_told(tmp_path, caplog):
    samples = {f"{i}": {**one(i), "json": None} for i in range(3)} | {"3": one(3)}
    shard = write_shard(tmp_path / "s.tar", samples)
    loader = make_dataloader(stream(shard), 2, seed=0, num_workers=0, device="cpu")
    left_out = sum((batch.left_out for batch in loader), Counter())
    assert left_out == {"without_metadata": 3}
    caplog.set_level("INFO")
    assert "samples without metadata are taken, since" in caplog.text
    list(make_dataloader(stream(shard), 2, seed=0, num_workers=0, device="cpu"))
    assert "samples without metadata to filter by: 3" in caplog.text


def test_a_caption_has_the_same_tokens_from_a_shard_as_from_a_folder(tmp_path):
    caption = "a  red\u00a0\tfox"
    shard = write_shard(tmp_path / "s.tar", {"0": one(caption=caption)})
    (tmp_path / "0.jpg").write_bytes(jpeg())
    (tmp_path / "0.txt").write_text(caption)
    folder = TextImageDataset(tmp_path, 12, 8, tokenizer=StubTokenizer(), use_captions=True)
    (item,) = stream(shard)
    assert torch.equal(item[0], folder[0][0])


def test_an_upsampler_may_have_one_sample(tmp_path):
    write_shard(tmp_path / "s.tar", {"0": one()})
    config = TrainConfig(
        data_dir=str(tmp_path), use_webdataset=True, train_upsample=True, side_x=8, side_y=8,
        num_workers=0, uncond_p=0.0, wds_dataset_name="generic",
    )  # fmt: skip
    data = make_training_data(config, "cpu")
    assert data.low_res.shape == (1, 3, 8, 8)
    assert len(list(data.loader)) == 1
