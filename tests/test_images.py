"""One path from any image file to the right pixels."""

import io
import random

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from glide_finetune.data.bad_samples import BadSample
from glide_finetune.data.images import crop_box, read_crop, read_image, shrink, to_pil, to_tensor


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
@pytest.mark.parametrize("image_format", ["JPEG", "PNG"])
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
    assert psnr(read_crop(data, (24, 16)), upright.resize((24, 16), Image.Resampling.BOX)) > 27


def test_of_an_animation_the_first_frame_is_taken():
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue", "green")]
    data = saved(frames[0], "GIF", save_all=True, append_images=frames[1:], duration=10)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert colours(data) == [(255, 0, 0), (255, 0, 0)]


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
        (saved(photo(64, 64), "PNG")[:3000], "truncated"),
        (saved(photo(64, 64), "JPEG")[:900], "truncated"),
        (saved(photo(64, 64), "PNG")[:40], "."),
    ],
    ids=["zero bytes", "text", "cut PNG", "cut JPEG", "PNG header"],
)
def test_what_is_no_complete_image_is_a_bad_sample_with_a_reason(data, reason):
    with pytest.raises(BadSample, match=reason) as error:
        read_crop(data, (8, 8))
    assert str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_decompression_bomb_is_refused_before_it_is_decoded():
    """A file of 100 bytes that claims 30,000 x 30,000, and one a little above our own limit."""
    for side in (30_000, 12_000):
        data = bytearray(saved(Image.new("1", (1, 1)), "BMP"))
        data[18:26] = side.to_bytes(4, "little") * 2
        with pytest.raises(BadSample, match="too many pixels"):
            read_crop(bytes(data), (8, 8))


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
