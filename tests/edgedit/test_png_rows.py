"""PNGs written band by band."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgedit.errors import InputError
from edgedit.image import to_uint8
from edgedit.metadata import read_recipe
from edgedit.png_rows import png_rows

RECIPE = {"prompt": "ein Kreis, größer", "seed": 3}


def write(path: Path, picture: np.ndarray, bands: list[int], recipe: dict[str, object] | None = None) -> bytes:
    with png_rows(path, picture.shape[3], picture.shape[2], recipe) as rows:
        for top, bottom in zip(bands, [*bands[1:], picture.shape[2]], strict=True):
            rows(top, picture[:, :, top:bottom])
    return path.read_bytes()


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_the_picture_is_that_of_pillow_and_does_not_depend_on_the_bands(tmp_path: Path, channels: int) -> None:
    rng = np.random.default_rng()
    ramp = np.linspace(-1.2, 1.2, 37, dtype=np.float32)[None, None, :, None]
    picture = (ramp + 0.1 * rng.standard_normal((1, channels, 37, 23))).astype(np.float32)
    first = write(tmp_path / "a.png", picture, [0], RECIPE)
    assert write(tmp_path / "b.png", picture, [0, 1, 8, 36], RECIPE) == first
    with Image.open(tmp_path / "a.png") as found:
        np.testing.assert_array_equal(np.asarray(found), np.asarray(to_uint8(picture)[0]))
    assert read_recipe(tmp_path / "a.png") == RECIPE


def test_a_picture_larger_than_one_chunk_is_whole(tmp_path: Path) -> None:
    picture = np.random.default_rng().uniform(-1, 1, (1, 3, 400, 400)).astype(np.float32)
    data = write(tmp_path / "a.png", picture, [0, 399])
    assert data.count(b"IDAT") > 1
    with Image.open(tmp_path / "a.png") as found:
        np.testing.assert_array_equal(np.asarray(found), np.asarray(to_uint8(picture)[0]))


def write_bands(path: Path, picture: np.ndarray, tops: list[int]) -> None:
    with png_rows(path, 4, 12, None) as rows:
        for top in tops:
            rows(top, picture[:, :, :5])


@pytest.mark.parametrize("bands", [[0, 5], [5]], ids=["missing", "late"])
def test_rows_that_are_missing_leave_no_file(tmp_path: Path, bands: list[int]) -> None:
    picture = np.zeros((1, 3, 10, 4), np.float32)
    with pytest.raises(InputError):
        write_bands(tmp_path / "a.png", picture, bands)
    assert list(tmp_path.iterdir()) == []


def test_a_value_that_is_no_number_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not finite"), png_rows(tmp_path / "a.png", 4, 2, None) as rows:
        rows(0, np.full((1, 3, 2, 4), np.nan, np.float32))
    assert list(tmp_path.iterdir()) == []
