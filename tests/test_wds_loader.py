"""Tar shards: filters, skipping, the split among workers and reproducible batches."""

import gzip
import io
import json
import logging
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from glide_finetune.data.dataloading import make_dataloader
from glide_finetune.data.shards import expand_shards
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
    with pytest.raises(ValueError, match=r"no sample of the shards can be used: 1 no \.jpg"):
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


def bad_samples() -> dict[str, dict[str, bytes]]:
    return {
        "empty": {**one(), "jpg": b""},
        "cut": {**one(), "jpg": jpeg()[:300]},
        "latin": {**one(), "txt": "h\u00e9".encode("latin-1")},
        "wide": {**one(), "txt": "words".encode("utf-16")},
        "json": {**one(), "json": b"{'no': json}"},
        "list": {**one(), "json": b"[1]"},
        "blank": one(caption=" \n "),
        "textless": {"jpg": jpeg(), "json": laion()},
    }


def test_bad_samples_are_skipped_with_a_warning_and_counted(tmp_path, caplog):
    good = {f"good{i}": one(i) for i in range(6)}
    samples = {"first": one(), **bad_samples(), **good}
    data = stream(write_shard(tmp_path / "s.tar", samples))
    with caplog.at_level(logging.WARNING):
        assert sorted(keys(data)) == ["first", *good]
    for name in ("empty", "cut", "latin", "wide", "json", "list"):
        assert f"skipped s.tar/{name}: " in caplog.text
    assert (
        "left out 2 no caption, 2 unreadable captions, 2 unreadable images, 2 unreadable metadata"
        in caplog.text
    )


def test_broken_shards_are_skipped_and_what_is_whole_in_them_is_read(tmp_path, caplog):
    for name in "abcd":
        write_shard(tmp_path / f"{name}.tar", {f"{name}{i:02}": one(i) for i in range(20)})
    with tarfile.open(tmp_path / "a.tar") as tar:
        cut = tar.getmember("a10.jpg").offset_data + 100
    (tmp_path / "a.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:cut])
    (tmp_path / "b.tar").write_bytes(b"")
    (tmp_path / "c.tar").write_bytes(b"this is no tar file at all" * 100)
    data = stream(tmp_path)
    with caplog.at_level(logging.WARNING):
        got = sorted(keys(data))
    assert got[-20:] == [f"d{i:02}" for i in range(20)]
    assert got[:-20] == [f"a{i:02}" for i in range(10)]
    reasons = {"a": "unexpected end of data", "b": "empty file", "c": "invalid header"}
    for name, reason in reasons.items():
        assert f"{name}.tar: {reason}\n" in caplog.text
    assert "left out 3 damaged shards" in caplog.text


def test_pipe_commands_are_read_and_failing_ones_skipped(tmp_path, caplog):
    shard = write_shard(tmp_path / "s.tar", {"000": one()})
    data = stream([f"pipe:cat {shard}", "pipe:exit 3", f"pipe:cat {shard}; exit 3"])
    with caplog.at_level(logging.WARNING):
        assert set(keys(data)) == {"000"}
    assert "skipped pipe:exit 3: " in caplog.text


def test_a_shard_that_vanished_is_skipped(tmp_path, caplog):
    paths = [write_shard(tmp_path / f"{name}.tar", {name: one()}) for name in "ab"]
    data = stream(paths)
    paths[0].unlink()
    with caplog.at_level(logging.WARNING):
        assert keys(data) == ["b"]
    assert "a.tar: No such file or directory" in caplog.text


def test_compressed_shards_are_read(tmp_path):
    shard = write_shard(tmp_path / "s.tar", {"000": one()})
    (tmp_path / "t.tar.gz").write_bytes(gzip.compress(shard.read_bytes()))
    assert keys(stream(tmp_path / "t.tar.gz")) == ["000"]


def test_nothing_in_a_shard_is_unpickled(tmp_path):
    evil = b"cposix\nsystem\n(S'touch " + bytes(tmp_path / "owned") + b"'\ntR."
    samples = {"000": {**one(), "pyd": evil, "pickle": evil, "pth": evil}}
    assert kept(tmp_path, samples) == ["000"]
    assert not (tmp_path / "owned").exists()


def test_shards_are_found_in_every_way_of_naming_them(tmp_path):
    names = [f"s-{i:04}.tar" for i in range(3)]
    paths = [str(write_shard(tmp_path / name, {"000": one()})) for name in names]
    (tmp_path / "README.md").write_text("not a shard")
    assert expand_shards(paths[1]) == paths[1:2]
    assert expand_shards([*paths, paths[0]]) == paths
    assert expand_shards(tmp_path) == paths
    assert expand_shards(f"{tmp_path}/s-*.tar") == paths
    assert expand_shards(f"{tmp_path}/s-{{0000..0002}}.tar") == paths
    assert expand_shards(f"{tmp_path}/s-000{{0,2}}.tar") == [paths[0], paths[2]]
    assert expand_shards("https://host/{a,b}.tar") == ["https://host/a.tar", "https://host/b.tar"]


def test_shards_that_do_not_exist_are_an_error_in_one_line(tmp_path):
    for urls, message in (
        (tmp_path / "none.tar", "no shard .*none.tar"),
        (f"{tmp_path}/s-{{0000..0002}}.tar", "no shard .*s-0000.tar"),
        (f"{tmp_path}/*.tar", "no shard"),
        (tmp_path, "no shards in"),
        ([], "empty"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            stream(urls)
        assert "\n" not in str(error.value)


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
    assert len(made) <= 9


def test_a_stream_smaller_than_a_batch_fills_it(tmp_path):
    shard = write_shard(tmp_path / "s.tar", {f"{i}": one(i) for i in range(3)})
    for num_workers in (0, 2):
        loader = make_dataloader(stream(shard), 8, seed=0, num_workers=num_workers, device="cpu")
        ((_, _, images, batch_keys),) = loader
        assert images.shape[0] == 8
        assert {batch_keys.count(key) for key in set(batch_keys)} == {2, 3}


def test_an_incomplete_last_batch_is_dropped(shards):
    loader = make_dataloader(stream(shards), 10, seed=0, num_workers=0, device="cpu")
    assert [len(batch[-1]) for batch in loader] == [10] * 4


def test_the_length_of_a_stream_is_not_known(shards):
    loader = make_dataloader(stream(shards), 4, seed=0, num_workers=0, device="cpu")
    with pytest.raises(TypeError):
        len(loader)
