"""One path from any image file to the right pixels."""

import io
import os
import random
import struct
import subprocess
import sys
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageOps

from glide_finetune.data.bad_samples import BadSample
from glide_finetune.data.image_files import upright_size
from glide_finetune.data.images import (
    crop_box,
    prepared_size,
    read_crop,
    read_image,
    read_prepared,
    shrink,
    to_pil,
    to_rgb,
    to_tensor,
)


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth noise with some detail, as a stand-in for a photograph."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (width, height))
    for cells, weight in ((4, 1.0), (16, 0.5), (64, 0.25)):
        noise = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        image = Image.blend(image, noise.resize((width, height), Image.Resampling.BICUBIC), weight)
    return image


def saved(image: Image.Image, image_format: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


def psnr(a: Image.Image, b: Image.Image) -> float:
    error = np.mean((np.asarray(a, dtype=float) - np.asarray(b, dtype=float)) ** 2)
    return 10 * np.log10(255**2 / max(error, 1e-6))


def colours(data: bytes, size: tuple[int, int] = (8, 8)) -> list[tuple[int, int, int]]:
    """The pixels of the upper left and lower right corners."""
    image = read_crop(data, size)
    assert image.mode == "RGB"
    assert image.size == size
    return [image.getpixel((0, 0)), image.getpixel((size[0] - 1, size[1] - 1))]


def near(got: tuple, want: tuple, tolerance: int = 2) -> bool:
    return all(abs(a - b) <= tolerance for a, b in zip(got, want, strict=True))


def half_and_half(mode: str, left, right, size: int = 64) -> Image.Image:
    image = Image.new(mode, (size, size), left)
    image.paste(right, (size // 2, 0, size, size))
    return image


def png(
    width: int, height: int, depth: int, colour: int, pixels: bytes, transparent: bytes = b""
) -> bytes:
    """A PNG of any kind; `pixels` are its rows, each after a zero byte."""

    def chunk(name: bytes, data: bytes) -> bytes:
        checksum = zlib.crc32(name + data)
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(pixels)), (b"IEND", b"")]
    if transparent:
        chunks.insert(1, (b"tRNS", transparent))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*parts) for parts in chunks)


WHITE = (255, 255, 255)


def test_transparent_pixels_become_white():
    image = half_and_half("RGBA", (255, 0, 0, 255), (0, 0, 0, 0))
    assert colours(saved(image, "PNG")) == [(255, 0, 0), WHITE]


def test_half_transparent_pixels_are_mixed_with_white():
    image = Image.new("RGBA", (64, 64), (255, 0, 0, 128))
    assert near(colours(saved(image, "PNG"))[0], (255, 127, 127))


def test_a_palette_with_transparency_is_composited_on_white():
    image = Image.new("P", (64, 64), 0)
    image.putpalette([0, 0, 0, 0, 0, 255])
    image.paste(1, (32, 0, 64, 64))
    assert colours(saved(image, "PNG", transparency=0)) == [WHITE, (0, 0, 255)]
    assert colours(saved(image, "PNG", transparency=b"\x00\x80")) == [WHITE, (127, 127, 255)]


def test_an_opaque_palette_keeps_its_colours():
    image = Image.new("P", (64, 64), 0)
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.paste(1, (32, 0, 64, 64))
    assert colours(saved(image, "PNG")) == [(10, 20, 30), (200, 100, 50)]


def test_a_transparent_colour_of_an_rgb_image_becomes_white():
    image = half_and_half("RGB", (1, 2, 3), (9, 8, 7))
    assert colours(saved(image, "PNG", transparency=(1, 2, 3))) == [WHITE, (9, 8, 7)]


def test_grey_and_grey_with_alpha_come_out_grey():
    assert colours(saved(half_and_half("L", 50, 200), "PNG")) == [(50,) * 3, (200,) * 3]
    assert colours(saved(half_and_half("LA", (50, 255), (0, 0)), "PNG")) == [(50,) * 3, WHITE]


def test_black_and_white_come_out_black_and_white():
    assert colours(saved(half_and_half("1", 0, 1), "PNG")) == [(0, 0, 0), WHITE]


def test_sixteen_bit_grey_is_scaled_and_not_clipped():
    values = np.full((64, 64), 100 * 257, dtype=np.uint16)
    values[:, 32:] = 0xFFFF
    data = saved(Image.fromarray(values), "PNG")
    assert colours(data) == [(100, 100, 100), WHITE]
    assert colours(saved(Image.fromarray(values), "TIFF")) == [(100, 100, 100), WHITE]


@pytest.mark.parametrize(
    ("colour", "pixel", "want"),
    [
        (2, (100 * 257, 50 * 257, 0xFFFF), (100, 50, 255)),
        (6, (100 * 257, 50 * 257, 0, 0x8000), (177, 152, 127)),
        (4, (100 * 257, 0xFFFF), (100, 100, 100)),
        (4, (100 * 257, 0), WHITE),
    ],
    ids=["RGB", "RGBA", "opaque grey", "transparent grey"],
)
def test_sixteen_bit_colours_are_scaled(colour, pixel, want):
    row = b"\0" + struct.pack(f">{len(pixel)}H", *pixel) * 16
    assert near(colours(png(16, 16, 16, colour, row * 16))[0], want)


@pytest.mark.parametrize(
    ("depth", "colour", "transparent", "clear", "opaque", "want"),
    [
        (1, 0, b"\0\0", b"\x00" * 2, b"\xff" * 2, 255),
        (1, 0, b"\0\1", b"\xff" * 2, b"\x00" * 2, 0),
        (2, 0, b"\0\1", b"\x55" * 4, b"\xaa" * 4, 170),
        (4, 0, b"\0\3", b"\x33" * 8, b"\x55" * 8, 85),
        (8, 0, b"\0\3", b"\x03" * 16, b"\x04" * 16, 4),
        (16, 0, b"\x11\xff", b"\x11\xff" * 16, b"\x12\x00" * 16, 18),
        (8, 2, b"\0\x11" * 3, b"\x11" * 48, b"\x12" * 48, 18),
        (16, 2, b"\x11\xff" * 3, b"\x11\xff" * 48, b"\x12\x00" * 48, 18),
    ],
)
def test_the_transparent_colour_of_a_png_of_any_depth_becomes_white(
    depth, colour, transparent, clear, opaque, want
):
    rows = (b"\0" + clear) * 8 + (b"\0" + opaque) * 8
    assert colours(png(16, 16, depth, colour, rows, transparent)) == [WHITE, (want,) * 3]


def test_every_opacity_of_every_value_is_mixed_with_white_exactly():
    value, alpha = np.mgrid[:256, :256].astype(np.uint8)
    image = Image.fromarray(np.dstack([value, value, value, alpha]))
    white = Image.new("RGBA", image.size, "white")
    want = Image.alpha_composite(white, image).convert("RGB")
    assert np.array_equal(to_rgb(image), want)


@pytest.mark.parametrize("dtype", ["<u2", ">u2"])
def test_sixteen_bit_tiffs_of_either_byte_order_are_read(dtype):
    values = np.full((64, 64), 100 * 257, dtype=dtype)
    image = Image.fromarray(values)
    assert colours(saved(image, "TIFF"))[0] == (100, 100, 100)


def test_every_mode_with_transparency_is_put_on_white():
    image = half_and_half("RGBA", (200, 0, 0, 255), (0, 0, 0, 0))
    grey = half_and_half("LA", (200, 255), (0, 0))
    palette = Image.new("P", (64, 64))
    palette.putpalette([200, 0, 0])
    palette.putalpha(grey.getchannel("A"))
    assert palette.mode == "PA"
    for source in (image, image.convert("RGBa"), grey, grey.convert("La"), palette):
        converted = to_rgb(source)
        assert converted.mode == "RGB"
        assert converted.getpixel((0, 0))[0] == 200, source.mode
        assert converted.getpixel((63, 0)) == WHITE, source.mode


TIFFS = {
    "raw": {},
    "LZW": {"compression": "tiff_lzw"},
    "deflate": {"compression": "tiff_adobe_deflate"},
    "packbits": {"compression": "packbits"},
    "JPEG": {"compression": "jpeg", "quality": 95},
    "BigTIFF": {"big_tiff": True},
    "pages": {"save_all": True, "append_images": [Image.new("RGB", (64, 64))]},
}


@pytest.mark.parametrize("options", TIFFS.values(), ids=TIFFS)
def test_tiffs_of_all_kinds_are_read(options):
    image = half_and_half("RGB", (255, 0, 0), (255, 255, 255))
    red, white = colours(saved(image, "TIFF", **options))
    assert near(red, (255, 0, 0), 3)
    assert near(white, WHITE, 3)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "RGBA"])
def test_tiffs_of_all_modes_are_read(mode):
    image = half_and_half("RGB", (0, 0, 0), (255, 255, 255)).convert(mode)
    black, white = colours(saved(image, "TIFF"))
    assert near(black, (0, 0, 0))
    assert near(white, WHITE)


def test_values_of_unknown_range_are_refused():
    for values in (np.full((8, 8), 1e6, dtype=np.int32), np.full((8, 8), 0.5, dtype=np.float32)):
        with pytest.raises(BadSample, match="range is unknown"):
            read_crop(saved(Image.fromarray(values), "TIFF"), (4, 4))


def test_cmyk_jpegs_come_out_in_their_colours():
    image = half_and_half("RGB", (255, 0, 0), (255, 255, 255)).convert("CMYK")
    red, white = colours(saved(image, "JPEG", quality=95))
    assert near(red, (255, 0, 0), 6)
    assert near(white, WHITE, 6)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied(orientation, image_format):
    upright = Image.new("RGB", (240, 160), "white")  # a red corner, a blue one, not square
    draw = ImageDraw.Draw(upright)
    draw.rectangle((0, 0, 59, 59), fill="red")
    draw.rectangle((180, 100, 239, 159), fill="blue")
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(undo[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(stored, image_format, exif=exif)
    assert upright_size(data) == upright.size
    assert read_prepared(data, (24, 16), 1.0)[1] == upright.size
    assert psnr(read_crop(data, (24, 16)), upright.resize((24, 16), Image.Resampling.BOX)) > 27


def exif_bytes(orientation_type: int, value: int) -> bytes:
    """EXIF data of one entry, the orientation, in a type and with a value of choice."""
    entry = struct.pack("<HHII", 0x0112, orientation_type, 1, value)
    return b"Exif\0\0II*\0\x08\0\0\0" + b"\x01\0" + entry + b"\0\0\0\0"


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0garbage",
        b"Exif\0\0II*\0\xff\xff\xff\x7f",
        exif_bytes(3, 6)[:-9],
        exif_bytes(3, 9999),
        exif_bytes(2, 0xFFFFFF),
        exif_bytes(99, 6),
    ],
    ids=["garbage", "far offset", "cut", "no such value", "text", "no such type"],
)
def test_broken_exif_loses_no_image_and_warns_nobody(exif, image_format, recwarn):
    data = saved(half_and_half("RGB", (255, 0, 0), WHITE), image_format, exif=exif)
    red, white = colours(data)
    assert near(red, (255, 0, 0), 8)
    assert near(white, WHITE, 8)
    assert not recwarn


@pytest.mark.parametrize("image_format", ["GIF", "WEBP", "PNG", "TIFF", "MPO"])
def test_of_several_frames_the_first_one_is_taken(image_format):
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue", "lime")]
    data = saved(frames[0], image_format, save_all=True, append_images=frames[1:])
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert near(colours(data)[0], (255, 0, 0), 4)


@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 5000), (5000, 1), (7, 300), (9, 9)])
def test_slivers_are_bad_samples(width, height):
    data = saved(Image.new("RGB", (width, height)), "PNG")
    with pytest.raises(BadSample, match=f"too small or narrow .{width}x{height}"):
        read_crop(data, (32, 48))


@pytest.mark.parametrize(("width", "height"), [(8, 12), (20, 15), (8, 900)])
def test_small_images_are_enlarged(width, height):
    data = saved(Image.new("RGB", (width, height), (10, 200, 30)), "PNG")
    for seed in range(5):
        crop = read_crop(data, (32, 48), 0.5, random.Random(seed))
        assert crop.size == (32, 48)
        assert crop.getcolors() == [(32 * 48, (10, 200, 30))]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not an image"),
        (b"this is text, not an image", "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n", "not an image"),
        (saved(photo(64, 64), "PNG")[:3000], "truncated"),
        (saved(photo(64, 64), "JPEG")[:900], "truncated"),
        (saved(photo(64, 64), "WEBP")[:900], "."),
        (saved(photo(64, 64), "GIF")[:900], "."),
        (saved(photo(64, 64), "BMP")[:900], "truncated"),
        (saved(photo(64, 64), "TIFF")[:900], "."),
        (saved(photo(64, 64), "PNG")[:40], "."),
    ],
    ids=[
        "nothing",
        "text",
        "PostScript",
        "PNG",
        "JPEG",
        "WebP",
        "GIF",
        "BMP",
        "TIFF",
        "PNG-header",
    ],
)
def test_what_is_no_complete_image_is_a_bad_sample_with_a_reason(data, reason, recwarn):
    for read in (lambda: read_crop(data, (8, 8)), lambda: read_prepared(data, (8, 8), 1.0)):
        with pytest.raises(BadSample, match=reason) as error:
            read()
        assert str(error.value)
        assert "\n" not in str(error.value)
    assert not recwarn


def test_the_content_decides_and_not_the_name(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(saved(Image.new("RGB", (64, 64), (10, 20, 30)), "PNG"))
    assert read_crop(path, (8, 8)).getpixel((0, 0)) == (10, 20, 30)


def bomb(image_format: str, side: int) -> bytes:
    """A small file whose header claims `side` x `side` pixels."""
    if image_format == "PNG":
        return png(side, side, 8, 2, b"")
    data = bytearray(saved(Image.new("RGB", (1, 1)), image_format))
    if image_format == "BMP":
        data[18:26] = struct.pack("<II", side, side)
    elif image_format == "GIF":
        data[6:10] = struct.pack("<HH", side, side)
    elif image_format == "TIFF":
        for tag in (256, 257):
            entry = data.index(struct.pack("<HHI", tag, 4, 1))
            data[entry + 8 : entry + 12] = struct.pack("<I", side)
    elif image_format == "JPEG":
        frame = data.index(b"\xff\xc0")
        data[frame + 5 : frame + 9] = struct.pack(">HH", side, side)
    elif image_format == "WEBP":
        canvas = struct.pack("<I", side - 1)[:3]
        extended = b"VP8X" + struct.pack("<II", 10, 0) + canvas * 2
        data = b"RIFF" + struct.pack("<I", len(data) + 10) + b"WEBP" + extended + data[12:]
    return bytes(data)


@pytest.mark.parametrize("image_format", ["PNG", "BMP", "GIF", "TIFF", "JPEG"])
def test_a_decompression_bomb_is_refused_before_it_is_decoded(image_format, recwarn):
    """A file of some bytes that claims 30,000 x 30,000, and one a little above our own limit."""
    for side in (30_000, 12_000):
        data = bomb(image_format, side)
        assert len(data) < 1000
        for read, *settings in ((read_crop, (8, 8)), (upright_size,), (read_prepared, (8, 8), 1.0)):
            with pytest.raises(BadSample, match="too many pixels"):
                read(data, *settings)
    assert not recwarn


def in_new_process(code: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(["tests", *sys.path])},
        capture_output=True,
        text=True,
        check=True,
    )


@pytest.mark.slow
def test_bombs_take_no_memory():
    """In a process of its own, whose peak of memory nothing else has raised."""
    code = """
import resource, sys
from test_images import bomb, read_crop
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for image_format in ("PNG", "BMP", "GIF", "TIFF", "JPEG", "WEBP"):
    try:
        read_crop(bomb(image_format, 30_000 if image_format != "WEBP" else 16_383), (8, 8))
    except ValueError:
        continue
    raise SystemExit(f"{image_format} was read")
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    result = in_new_process(code)
    assert int(result.stdout) < 20  # MB
    assert not result.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("depth", "colour", "row"),
    [(8, 6, b"\x11" * 4 * 11_000), (16, 0, b"\x11" * 2 * 11_000)],
    ids=["RGBA", "16-bit grey"],
)
def test_the_largest_images_take_one_gigabyte(tmp_path, depth, colour, row):
    path = tmp_path / "large.png"
    path.write_bytes(png(11_000, 11_000, depth, colour, (b"\0" + row) * 11_000))
    code = f"""
import resource
from test_images import read_crop
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
read_crop({str(path)!r}, (64, 64))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    assert int(in_new_process(code).stdout) < 1100  # MB


def test_large_images_below_the_limit_are_read_without_warning(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64 - 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_crop(saved(Image.new("RGB", (64, 64)), "PNG"), (8, 8)).size == (8, 8)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
def test_a_named_pipe_is_a_bad_sample_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.png")
    with pytest.raises(BadSample, match="not a regular file"):
        read_crop(tmp_path / "x.png", (8, 8))


def test_a_missing_file_and_a_folder_are_bad_samples(tmp_path):
    (tmp_path / "x.png").mkdir()
    for path, reason in ((tmp_path / "x.png", "regular"), (tmp_path / "none.png", "No such")):
        with pytest.raises(BadSample, match=reason):
            read_crop(path, (8, 8))


def test_random_windows_keep_the_shape_and_at_least_the_area_asked_for():
    rng = random.Random(0)
    areas, lefts, uppers = [], [], []
    for _ in range(2000):
        left, upper, right, lower = crop_box((300, 100), (32, 48), 0.6, rng)
        assert 0 <= left < right <= 300
        assert 0 <= upper < lower <= 100
        assert (right - left) / (lower - upper) == pytest.approx(32 / 48)
        areas.append((right - left) * (lower - upper) / (100 * 100 * 32 / 48))
        lefts.append(left)
        uppers.append(upper)
    assert 0.6 <= min(areas) < 0.62
    assert 0.98 < max(areas) <= 1.0001
    assert min(lefts) < 5
    assert max(lefts) > 230
    assert min(uppers) < 1
    assert max(uppers) > 15


def test_without_a_generator_the_window_is_the_largest_in_the_centre():
    assert crop_box((300, 100), (64, 64)) == (100, 0, 200, 100)
    assert crop_box((100, 300), (64, 32)) == (0, 125, 100, 175)


@pytest.mark.parametrize("size", [(64, 64), (48, 96)])
def test_circles_stay_circles(size):
    image = Image.new("RGB", (500, 200), "white")
    ImageDraw.Draw(image).ellipse((200, 50, 300, 150), fill="black")
    dark = np.asarray(read_crop(saved(image, "PNG"), size).convert("L")) < 128
    assert dark.any(axis=0).sum() == pytest.approx(dark.any(axis=1).sum(), abs=1)


@pytest.mark.parametrize(("width", "height"), [(1600, 1200), (517, 391), (200, 333)])
def test_reduced_decoding_is_close_to_full_resampling(width, height):
    data = saved(photo(width, height), "JPEG", quality=92)
    exact = Image.open(io.BytesIO(data)).convert("RGB")
    for seed in range(3):
        box = crop_box((width, height), (64, 64), 0.8, random.Random(seed))
        want = exact.resize((64, 64), Image.Resampling.BICUBIC, box=box)
        assert psnr(read_crop(data, (64, 64), 0.8, random.Random(seed)), want) > 35


@pytest.mark.parametrize("target", [(64, 64), (48, 96), (128, 128)])
@pytest.mark.parametrize(("width", "height"), [(1600, 1200), (517, 391), (333, 1000), (120, 90)])
def test_crops_of_a_prepared_image_are_those_of_the_image(width, height, target):
    data = saved(photo(width, height), "JPEG", quality=92)
    image, size = read_prepared(data, target, 0.8)
    assert size == (width, height)
    assert image.size == prepared_size(size, target, 0.8)
    prepared = saved(image, "PNG")
    for seed in range(5):
        want = read_crop(data, target, 0.8, random.Random(seed))
        assert psnr(read_crop(prepared, target, 0.8, random.Random(seed)), want) > 35


@pytest.mark.parametrize("orientation", range(1, 9))
def test_what_decoding_rounds_neither_moves_nor_stretches_an_image(orientation):
    x, y = np.arange(8 * 250 + 1), np.arange(8 * 125 + 1)[:, None]
    waves = 127 + 60 * np.sin(x / 19.0) + 60 * np.sin(y / 19.0)
    stored = Image.fromarray(waves.astype(np.uint8)).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(stored, "JPEG", quality=95, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    prepared, _ = read_prepared(data, (16, 16), 1.0)
    assert psnr(prepared, upright.resize(prepared.size, Image.Resampling.LANCZOS)) > 40
    box = crop_box(upright.size, (32, 32), 0.5, random.Random(0))
    crop = read_crop(data, (32, 32), 0.5, random.Random(0))
    assert psnr(crop, upright.resize(crop.size, Image.Resampling.BICUBIC, box=box)) > 40


@pytest.mark.parametrize("ratio", [0.1, 0.8, 1.0])
def test_a_prepared_image_is_as_small_as_its_smallest_windows_allow(ratio):
    for size in ((4000, 3000), (3000, 4001), (1999, 300), (150, 100), (20, 10)):
        width, height = prepared_size(size, (64, 64), ratio)
        assert width <= size[0]
        assert height <= size[1]
        smallest = min(width, height) * ratio**0.5
        if smallest < 64 * 1.4:
            assert (width, height) == size
        elif (width, height) != size:
            assert smallest < 64 * 1.4 * 1.15
            assert width / size[0] == pytest.approx(height / size[1], rel=0.005)


def test_downscaling_is_antialiased():
    checks = (np.indices((512, 512)).sum(axis=0) % 2 * 255).astype(np.uint8)
    pixels = np.asarray(read_crop(saved(Image.fromarray(checks), "PNG"), (64, 64)))
    assert np.abs(pixels.astype(int) - 127).max() <= 2


def test_shrinking_averages_blocks():
    blocks = np.zeros((8, 12, 3), dtype=np.uint8)
    blocks[:, ::2] = 200
    small = shrink(Image.fromarray(blocks), 4)
    assert small.size == (3, 2)
    assert small.getcolors() == [(6, (100, 100, 100))]


def test_tensors_and_images_convert_without_loss():
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = Image.fromarray(np.stack([levels, levels[::-1], levels.T], axis=-1))
    tensor = to_tensor(image)
    assert tensor.dtype == torch.float32
    assert tensor.shape == (3, 16, 16)
    assert (tensor.min(), tensor.max()) == (-1.0, 1.0)
    assert to_pil(tensor).tobytes() == image.tobytes()


def test_values_are_rounded_and_clipped_on_the_way_to_an_image():
    half_level = 0.5 / 127.5
    values = torch.tensor([-3.0, -1 + 0.9 * half_level, -1 + 1.1 * half_level, 3.0])
    image = to_pil(values.view(1, 2, 2).expand(3, 2, 2))
    assert np.asarray(image)[..., 0].tolist() == [[0, 0], [1, 255]]


def test_read_image_gives_a_batch_of_one_and_takes_width_and_height(tmp_path):
    half_and_half("RGB", (255, 255, 255), (0, 0, 0), 300).save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png", (32, 16))
    assert image.shape == (1, 3, 16, 32)
    assert image[0, 0, 0, 0] == 1
    assert image[0, 0, 0, -1] == -1


def test_read_image_names_the_file_it_cannot_read(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read the image .*missing.png: No such file"):
        read_image(tmp_path / "missing.png", (8, 8))
