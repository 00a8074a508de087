"""The notebook in `notebooks/`, cell by cell, with tiny models in place of its settings."""

import ast
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from glide_finetune.data import images
from glide_finetune.samples import CELL_WIDTH, PADDING
from test_generate import pixels, text_of, write_run
from tiny_training import SIDE

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "glide_finetune.ipynb"
LARGE = 4 * SIDE  # pixels of a side after upsampling


@pytest.fixture(scope="module")
def cells() -> list[dict]:
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> dict:
    """What the first code cell sets, with runs, a picture and a mask made here."""
    folder = tmp_path_factory.mktemp("notebook")
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (LARGE, LARGE, 3), dtype=np.uint8)
    mask = np.zeros((LARGE, LARGE), dtype=np.uint8)
    mask[LARGE // 4 : LARGE // 2] = 255
    Image.fromarray(image).save(folder / "image.png")
    Image.fromarray(mask).save(folder / "mask.png")
    return {
        "BASE": str(write_run(folder / "base")),
        "UPSAMPLER": str(write_run(folder / "upsample", "upsample")),
        "INPAINT_BASE": str(write_run(folder / "base-inpaint", "base-inpaint")),
        "INPAINT_UPSAMPLER": str(write_run(folder / "upsample-inpaint", "upsample-inpaint")),
        "PROMPT": "a cat",
        "INPAINT_PROMPT": "a hat",
        "IMAGE": str(folder / "image.png"),
        "MASK": str(folder / "mask.png"),
        "NUM_IMAGES": 2,
        "SEED": 3,
        "STEPS": "2",
        "UPSAMPLE_STEPS": "2",
        "OUTPUT_DIR": str(folder / "out"),
    }


def execute(cells, **settings):
    """The notebook's names after all its cells, and what it displayed."""
    displayed = []
    names = {**settings, "display": displayed.append}
    _, *code = [cell for cell in cells if cell["cell_type"] == "code"]
    for cell in code:
        exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
    return names, displayed


@pytest.fixture(scope="module")
def executed(cells, settings):
    return execute(cells, **settings)


def as_bytes(picture):
    """A tensor in [-1, 1] as the pixels of a file."""
    return np.asarray(images.to_pil(picture))


def width_of(columns, side):
    return columns * (side * max(1, CELL_WIDTH // side) + PADDING) + PADDING


def test_the_first_code_cell_holds_all_settings_and_nothing_else(cells, settings):
    first = next(cell for cell in cells if cell["cell_type"] == "code")
    statements = ast.parse("".join(first["source"])).body
    assert all(isinstance(statement, ast.Assign) for statement in statements)
    assert [statement.targets[0].id for statement in statements] == list(settings)


def test_no_results_are_stored(cells):
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


def test_pictures_have_the_size_of_their_stage_and_are_shown(executed):
    names, displayed = executed
    assert names["pictures"].shape == (2, 3, SIDE, SIDE)
    assert names["large"].shape == (2, 3, LARGE, LARGE)
    assert names["repainted"].shape == (2, 3, LARGE, LARGE)
    assert [grid.width for grid in displayed] == [
        width_of(2, SIDE), width_of(2, LARGE), width_of(2, LARGE),
    ]  # fmt: skip
    for name in ("pictures", "large", "repainted"):
        one, other = names[name]
        assert not one.equal(other)


def test_known_pixels_are_untouched_and_the_others_painted(executed, settings):
    names, displayed = executed
    image, mask = pixels(settings["IMAGE"]), pixels(settings["MASK"])
    for picture in names["repainted"]:
        drawn = as_bytes(picture)
        assert (drawn[mask == 0] == image[mask == 0]).all()
        assert (drawn[mask == 255] != image[mask == 255]).any(axis=-1).mean() > 0.9
    scale = CELL_WIDTH // LARGE
    corner = np.asarray(displayed[-1])[PADDING : PADDING + CELL_WIDTH : scale]
    shown = corner[:, PADDING : PADDING + CELL_WIDTH : scale]
    assert (shown[mask == 0] == image[mask == 0]).all()
    assert (shown[mask == 255] == 128).all()


def test_the_files_hold_the_pictures_that_were_shown(executed):
    names, _ = executed
    for path, picture, seed in zip(names["paths"], names["large"], (3, 4), strict=True):
        assert (pixels(path) == as_bytes(picture)).all()
        assert text_of(path)["seed"] == str(seed)


def test_both_upsamplers_may_be_left_out(cells, settings):
    names, displayed = execute(
        cells, **settings | {"UPSAMPLER": None, "INPAINT_UPSAMPLER": None, "NUM_IMAGES": 1}
    )
    assert names["repainted"].shape == (1, 3, SIDE, SIDE)
    assert len(displayed) == 2
    assert pixels(names["paths"][0]).shape == (SIDE, SIDE, 3)
