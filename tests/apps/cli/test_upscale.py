"""`edgedit upscale`, run for real on a tiny model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import edgedit
from edgedit.metadata import read_recipe

Run = Callable[..., Any]


@pytest.fixture
def picture(draw: Run) -> str:
    assert draw("a red cat", "-s", 3, "-o", "small.png").status == 0
    return "small.png"


def test_a_picture_is_drawn_larger_as_the_python_api_does(cli: Run, bundle: Path, picture: str) -> None:
    done = cli("upscale", picture, "-m", bundle, "--scale", 2, "--strength", 0.5, "--steps", 4, "-s", 9, "-o", "a.png")
    assert (done.status, done.out) == (0, "a.png\n"), done.err
    with edgedit.load(bundle, threads=1) as pipe:
        wanted = pipe.generate(
            "a red cat", seed=9, steps=4, width=32, height=32, image=picture, strength=0.5, denoise_tile=16
        )
    with Image.open("a.png") as image:
        assert np.array_equal(np.asarray(image), np.asarray(wanted.images[0]))
    recipe = read_recipe("a.png")
    assert (recipe["prompt"], recipe["denoise_tile"], recipe["strength"]) == ("a red cat", 16, 0.5)
    assert recipe["image"]["path"] == picture
    again = cli("generate", "-C", "a.png", "-m", bundle, "-o", "b.png")
    assert again.status == 0, again.err
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()


def test_a_photo_needs_no_prompt_and_a_side_that_does_not_divide_is_said(cli: Run, bundle: Path) -> None:
    Image.effect_noise((17, 20), 60).convert("RGB").save("photo.jpg")
    done = cli("upscale", "photo.jpg", "-m", bundle, "--steps", 3, "--strength", 0.4, "-o", "a.png")
    assert done.status == 0, done.err
    assert "34x40 is drawn as 36x40: its sides must be multiples of 4" in done.err
    with Image.open("a.png") as image:
        assert image.size == (36, 40)


def test_a_size_that_the_model_draws_is_drawn_whole(cli: Run, bundle: Path) -> None:
    Image.new("RGB", (8, 8), "red").save("tiny.png")
    assert cli("upscale", "tiny.png", "-m", bundle, "--steps", 4, "-o", "a.png").status == 0
    assert "denoise_tile" not in read_recipe("a.png")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["none.png"], "no such picture"),
        (["small.png", "--scale", 0], "--scale must be above 0"),
        (["small.png", "--scale", 17], "--scale must be above 0 and at most 16"),
        (["small.png", "--strength", 0], "strength must be above 0"),
        (["small.png", "--denoise-tile", 12], "not made for windows of 12x12"),
        (["small.png", "--scale", 0.5], "not made for windows of 8x8"),
        (["small.png", "--max-memory", "10M"], "do not suffice"),
    ],
    ids=["file", "zero", "huge", "strength", "window", "smaller", "memory"],
)
def test_bad_input_is_one_line(cli: Run, bundle: Path, picture: str, flags: list[Any], words: str) -> None:
    done = cli("upscale", *flags, "-m", bundle, "--steps", 4, "-o", "a.png")
    assert done.status == 2
    assert words in done.err
    assert len([line for line in done.err.splitlines() if line.startswith("error:")]) == 1
    assert not Path("a.png").exists()
