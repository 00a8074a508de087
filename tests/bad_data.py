"""A zoo of bad data: folders and shards that hold one of each kind, beside good samples."""

import io
import json
import os
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image


class Bad(NamedTuple):
    """A kind of bad thing: what it is counted as, and a pattern of the reason in the log."""

    kind: str
    reason: str
    make: Callable


def picture(seed: int = 0, size: tuple[int, int] = (40, 30)) -> Image.Image:
    """Another picture for each seed, as no two files of the zoo shall be the same by chance."""
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str) -> bytes:
    data = io.BytesIO()
    image.save(data, kind)
    return data.getvalue()


def bomb() -> bytes:
    """A PNG of about a hundred bytes that claims 30000 x 30000 pixels."""

    def chunk(name: bytes, content: bytes) -> bytes:
        checksum = zlib.crc32(name + content)
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        (chunk(b"IHDR", header), chunk(b"IDAT", pixels), chunk(b"IEND", b""))
    )


def forbid(path: Path) -> None:
    """Make a file unreadable, also for root, whom permissions do not hold."""
    path.chmod(0)
    if os.access(path, os.R_OK):
        path.unlink()
        path.symlink_to("/proc/self/mem")  # a regular file whose first byte cannot be read


def instead(make: Callable[[Path], object]) -> Callable[[Path], None]:
    """Something else in the place of a file."""

    def replace(path: Path) -> None:
        path.unlink()
        make(path)

    return replace


def content(data: bytes) -> Callable[[Path], int]:
    return lambda path: path.write_bytes(data)


HTML = b"<!DOCTYPE html><html><body><h1>403 Forbidden</h1></body></html>\n" * 20
LONG = b"so many words " * 7300  # 100 KB

# ------------------------------------------------------------------- local folders
# By the name of the image, which is good before `make` spoils it.
BAD_IMAGES = {
    "zero-byte.jpg": Bad("image", "not an image", content(b"")),
    "cut-jpeg.jpg": Bad("image", "(?i)truncated", content(encoded(picture(1), "jpeg")[:500])),
    "cut-png.png": Bad("image", "(?i)truncated", content(encoded(picture(2), "png")[:200])),
    "text.jpg": Bad("image", "not an image", content(b"I am text, whatever my name says.")),
    "page.png": Bad("image", "not an image", content(HTML)),
    "bomb.png": Bad("image", "too many pixels", content(bomb())),
    "1x1.png": Bad("image", "1x1", content(encoded(picture(3, (1, 1)), "png"))),
    "1x5000.png": Bad("image", "1x5000", content(encoded(picture(4, (1, 5000)), "png"))),
    "unreadable.png": Bad("image", "Permission denied|Input/output error", forbid),
    "\udcff\udcfe.png": Bad("image", "not an image", content(b"whose name is not UTF-8 either")),
}
# By the name of the image, which stays good; `make` spoils the caption beside it.
BAD_CAPTIONS = {
    "empty-caption.png": Bad("caption", "blank", content(b"")),
    "blank-caption.png": Bad("caption", "blank", content(b" \n\t\n\n")),
    "latin-caption.png": Bad("caption", "not UTF-8", content("caf\u00e9".encode("latin-1"))),
    "utf-16-caption.png": Bad("caption", "not UTF-8", content("words".encode("utf-16"))),
    "utf-16-le-caption.png": Bad("caption", "NUL", content("words".encode("utf-16-le"))),
    "nul-caption.png": Bad("caption", "NUL", content(b"a\0caption")),
    "long-caption.png": Bad("caption", "longer than", content(LONG)),
    "unreadable-caption.png": Bad("caption", "Permission denied|Input/output error", forbid),
    "pipe-caption.png": Bad("caption", "not a regular file", instead(os.mkfifo)),
    "folder-caption.png": Bad("caption", "not a regular file", instead(Path.mkdir)),
    "looping-caption.png": Bad(
        "caption", "Too many levels", instead(lambda path: path.symlink_to(path))
    ),
}
BAD_FILES = BAD_IMAGES | BAD_CAPTIONS

WITHOUT_CAPTION = "without-caption.png"

# What has the name of an image, but is no file; counted nowhere.
NO_FILES = {
    "folder.png": Bad("", "folder", Path.mkdir),
    "pipe.jpg": Bad("", "not a regular file", os.mkfifo),
    "dangling.png": Bad("", "No such file", lambda path: path.symlink_to(path.with_name("none"))),
    "loop.png": Bad("", "Too many levels", lambda path: path.symlink_to(path)),
}


def write_good(folder: Path, count: int) -> list[str]:
    """Good samples, some of them odd in ways that do no harm; returns the images' names."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"good-{i:03}.png" for i in range(count - 2)]
    for i, name in enumerate([*names, "good-png.jpg", "good-\udce9.png"]):
        (folder / name).write_bytes(encoded(picture(100 + i), "png"))
        (folder / name).with_suffix(".txt").write_text(f"caption {i}\nanother of {i}\n")
    return [*names, "good-png.jpg", "good-\udce9.png"]


def write_bad(folder: Path) -> None:
    """One of each kind of `BAD_FILES` and `NO_FILES`, an image without caption, looping folders."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, (name, bad) in enumerate(BAD_FILES.items()):
        image = folder / name
        image.write_bytes(encoded(picture(200 + i), "png"))
        image.with_suffix(".txt").write_text(f"of {i}")
        bad.make(image if name in BAD_IMAGES else image.with_suffix(".txt"))
    for name, bad in NO_FILES.items():
        bad.make(folder / name)
        (folder / name).with_suffix(".txt").write_text("a caption")
    (folder / WITHOUT_CAPTION).write_bytes(encoded(picture(300), "png"))
    (folder / "inside").mkdir()
    (folder / "inside" / "again").symlink_to(folder)


# ------------------------------------------------------------------- shards
Members = dict[str, bytes]  # of a sample: content by suffix


def good_sample(seed: int = 0, **changes: bytes) -> Members:
    """A sample as LAION has them; a change to None leaves the member out."""
    metadata = {"NSFW": "UNLIKELY", "similarity": 0.3, "original_width": 40, "original_height": 30}
    members = {
        "jpg": encoded(picture(seed), "jpeg"),
        "txt": f"caption {seed}".encode(),
        "json": json.dumps(metadata).encode(),
    }
    return {suffix: data for suffix, data in (members | changes).items() if data is not None}


def write_tar(path: Path, samples: dict[str, Members]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, members in samples.items():
            for suffix, data in members.items():
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return path


# By key; `make` gives the members.
BAD_SAMPLES = {
    "zero-byte": Bad("image", "not an image", lambda: good_sample(jpg=b"")),
    "truncated": Bad(
        "image", "(?i)truncated", lambda: good_sample(jpg=good_sample(1)["jpg"][:500])
    ),
    "text": Bad("image", "not an image", lambda: good_sample(jpg=b"I am text.")),
    "bomb": Bad("image", "too many pixels", lambda: good_sample(jpg=bomb())),
    "1x1": Bad("image", "1x1", lambda: good_sample(jpg=encoded(picture(1, (1, 1)), "png"))),
    "latin": Bad("caption", "not UTF-8", lambda: good_sample(txt="caf\u00e9".encode("latin-1"))),
    "utf-16": Bad("caption", "not UTF-8", lambda: good_sample(txt="words".encode("utf-16"))),
    "nul": Bad("caption", "NUL", lambda: good_sample(txt=b"a\0caption")),
    "long": Bad("caption", "longer than", lambda: good_sample(txt=LONG)),
    "not-json": Bad("metadata", "JSON", lambda: good_sample(json=b"{'no': json}")),
    "json-list": Bad("metadata", "JSON", lambda: good_sample(json=b"[1, 2]")),
    "deep-json": Bad("metadata", "JSON", lambda: good_sample(json=b"[" * 100_000)),
    "without-image": Bad("image", "no .jpg", lambda: good_sample(jpg=None)),
    "blank": Bad("caption", "blank", lambda: good_sample(txt=b" \n")),
    "../outside": Bad("name", "leads out", lambda: good_sample(1)),
    "/absolute": Bad("name", "leads out", lambda: good_sample(2)),
}
BAD_SHARDS = {
    "cut.tar": Bad("shard", "unexpected end", lambda path: path.write_bytes(cut_tar(path))),
    "empty.tar": Bad("shard", "empty file", content(b"")),
    "noise.tar": Bad("shard", "invalid header", content(np.random.default_rng(0).bytes(5000))),
    "page.tar": Bad("shard", "invalid header", content(HTML)),
    "page.tar.gz": Bad("shard", "invalid header", content(HTML)),
}


def cut_tar(path: Path) -> bytes:
    """A shard that ends within its third sample."""
    write_tar(path, {f"cut-{i}": good_sample(500 + i) for i in range(3)})
    with tarfile.open(path) as tar:
        end = tar.getmember("cut-2.jpg").offset_data + 100
    return path.read_bytes()[:end]


def pickle_bomb(path: Path) -> bytes:
    """A pickle that makes a file at `path` if it is read."""
    return b"cbuiltins\nopen\n(V" + os.fsencode(path) + b"\nVw\ntR."


GOOD_A_SHARD = 16


def write_good_shards(folder: Path, shards: int, trap: Path) -> None:
    """Shards of `GOOD_A_SHARD` good samples; `trap` appears if anything in them is unpickled."""
    evil = pickle_bomb(trap)
    for shard in range(shards):
        seeds = range(1000 + GOOD_A_SHARD * shard, 1000 + GOOD_A_SHARD * (shard + 1))
        samples = {f"good-{seed}": good_sample(seed) for seed in seeds}
        samples[f"good-{seeds[0]}"] |= {"pyd": evil, "pkl": evil, "pth": evil}
        write_tar(folder / f"good-{shard}.tar", samples)


def write_bad_shards(folder: Path) -> None:
    """One of each kind of bad sample and shard, and a sample without a caption."""
    samples = {key: bad.make() for key, bad in BAD_SAMPLES.items()}
    write_tar(folder / "samples.tar", samples | {"without-caption": good_sample(txt=None)})
    for name, bad in BAD_SHARDS.items():
        bad.make(folder / name)
