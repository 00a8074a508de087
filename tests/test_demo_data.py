"""The drawn set: complete, reproducible, never over somebody's files, and easy to judge."""

import numpy as np
import pytest
from PIL import Image, ImageFilter

from glide_finetune.demo_data import (
    COLOURS,
    POSITIONS,
    SHAPES,
    demo_captions,
    draw_image,
    draw_shape,
    write_demo_set,
)
from glide_finetune.loader import TextImageDataset
from shape_judge import judge


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_every_kind_of_picture_has_its_own_caption():
    captions = demo_captions()
    assert len({caption for caption, *_ in captions}) == len(captions)
    assert len(captions) == len(COLOURS) * len(SHAPES) * len(POSITIONS)
    assert ("a red circle on the left", "red", "circle", "on the left") in captions


def test_the_set_is_images_with_captions_that_the_loader_reads(tmp_path):
    folder = write_demo_set(tmp_path / "new/shapes", count=210)
    data = TextImageDataset(folder, 32, 32, use_captions=True)
    assert len(data) == 210
    assert data.without_caption == 0
    captions = [path.read_text().strip() for path in sorted(folder.glob("*.txt"))]
    assert captions == [caption for caption, *_ in demo_captions() + demo_captions()[:10]]
    with Image.open(folder / "00000.png") as image:
        assert (image.size, image.mode) == ((64, 64), "RGB")


def test_the_set_follows_from_its_seed(tmp_path):
    sets = [
        contents(write_demo_set(tmp_path / name, count=20, seed=seed))
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    assert sets[0] == sets[1]
    assert sets[0]["00003.png"] != sets[2]["00003.png"]


def test_a_complete_set_is_used_again_and_anything_else_is_left_alone(tmp_path):
    folder = write_demo_set(tmp_path / "shapes", count=12)
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert write_demo_set(folder, count=12) == folder
    assert times == {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    with pytest.raises(ValueError, match="not a complete demo set of these settings"):
        write_demo_set(folder, count=13)
    (folder / "00003.png").unlink()
    with pytest.raises(ValueError, match="not a complete demo set"):
        write_demo_set(folder, count=12)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "holiday.jpg").write_bytes(b"precious")
    with pytest.raises(ValueError, match="mine is not a complete demo set"):
        write_demo_set(mine)
    assert contents(mine) == {"holiday.jpg": b"precious"}
    (tmp_path / "file").write_text("a file")
    with pytest.raises(ValueError, match="file is not a complete demo set"):
        write_demo_set(tmp_path / "file")


def test_an_empty_folder_is_filled_and_an_interrupted_drawing_leaves_nothing(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    assert len(contents(write_demo_set(tmp_path / "empty", count=3))) == 7

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("glide_finetune.demo_data.draw_image", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_demo_set(tmp_path / "other", count=3)
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_shapes_are_large_whole_and_where_the_caption_says():
    for number, (_, colour, shape, position) in enumerate(demo_captions()):
        image = np.asarray(draw_image(colour, shape, position, number=number), dtype=int)
        inside = np.abs(image - COLOURS[colour]).max(axis=-1) < 30
        rows, columns = inside.any(axis=1).nonzero()[0], inside.any(axis=0).nonzero()[0]
        assert len(rows) >= 0.4 * 64
        assert rows[0] > 0
        assert rows[-1] < 63
        assert columns[0] > 0
        assert columns[-1] < 63
        x, y = columns.mean() / 63 - 0.5, rows.mean() / 63 - 0.5
        assert (x, y) == pytest.approx(POSITIONS[position], abs=0.06)


def test_an_unknown_shape_is_refused():
    with pytest.raises(ValueError, match="unknown shape 'cube'"):
        draw_shape(None, "cube", (0, 0), 1, 0)


@pytest.mark.parametrize(("noise", "blur"), [(0, 0.0), (20, 0.8)])
def test_the_judge_knows_small_noisy_and_blurred_pictures(noise, blur):
    rng = np.random.default_rng(0)
    kinds = demo_captions()
    verdicts = []
    for number in range(0, 1000, 5):
        _, colour, shape, position = kinds[number * 7 % len(kinds)]
        image = draw_image(colour, shape, position, number=number)
        image = image.resize((32, 32), Image.Resampling.BOX)
        image = np.asarray(image.filter(ImageFilter.GaussianBlur(blur)))
        image = np.clip(image + rng.normal(0, noise, image.shape), 0, 255).astype(np.uint8)
        verdicts.append(np.equal(judge(image), (colour, shape)))
    right_colour, right_shape = np.mean(verdicts, axis=0)
    assert right_colour >= 0.97
    assert right_shape >= 0.95
