from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edgedit.errors import InputError
from edgedit.metadata import parameters_text, read_recipe, save_image

SUFFIXES = [".png", ".jpg", ".jpeg", ".webp", ".PNG"]


def random_text(rng: random.Random) -> str:
    letters = "abc ABC,:\n\"'\\{}<>&%äßñ漢字привет🦊\u202e\x00\x1b"
    return "".join(rng.choices(letters, k=rng.randint(0, 60)))


def random_recipe(rng: random.Random) -> dict[str, Any]:
    return {
        "prompt": random_text(rng),
        "negative_prompt": random_text(rng),
        "seed": rng.randrange(2**64),
        "steps": rng.randint(1, 50),
        "width": 64 * rng.randint(1, 64),
        "height": 64 * rng.randint(1, 64),
        "guidance_scale": rng.choice([4.5, rng.random() * 10, 1]),
        "sampler": "dpmpp_2m",
        "sigmas": rng.choice([None, [1.0, 0.5, rng.random()]]),
        "strength": rng.choice([None, 0.6]),
        "rng": "philox",
        "model": random_text(rng),
        "model_hash": rng.randbytes(32).hex(),
        "edgedit": "0.1.0",
    }


def picture(rng: random.Random, mode: str = "RGB") -> Image.Image:
    size = rng.randint(4, 60), rng.randint(4, 60)
    return Image.frombytes(mode, size, rng.randbytes(size[0] * size[1] * len(mode)))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_recipe_comes_back_from_the_picture_as_it_went_in(tmp_path: Path, suffix: str, rng: random.Random) -> None:
    for _ in range(20):
        recipe = random_recipe(rng)
        path = tmp_path / f"picture{suffix}"
        save_image(picture(rng), path, recipe)
        assert read_recipe(path) == recipe
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("suffix", [".png", ".webp"])
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_png_and_webp_keep_every_pixel(tmp_path: Path, suffix: str, mode: str, rng: random.Random) -> None:
    image = picture(rng, mode)
    if mode == "RGBA":
        image.putalpha(255)
    save_image(image, tmp_path / f"picture{suffix}", random_recipe(rng))
    with Image.open(tmp_path / f"picture{suffix}") as again:
        assert np.array_equal(np.asarray(again.convert(mode)), np.asarray(image))


def test_a_jpeg_stays_close_and_drops_transparency(tmp_path: Path, rng: random.Random) -> None:
    gradient = Image.linear_gradient("L").convert("RGBA")
    save_image(gradient, tmp_path / "picture.jpg", random_recipe(rng))
    with Image.open(tmp_path / "picture.jpg") as again:
        assert again.mode == "RGB"
        assert np.abs(np.asarray(again).astype(int) - np.asarray(gradient.convert("RGB")).astype(int)).max() <= 4


def test_a_png_carries_the_recipe_as_json_and_as_the_text_other_tools_read(tmp_path: Path) -> None:
    recipe = {
        "prompt": "a fox",
        "negative_prompt": "rain, fog",
        "seed": 7,
        "steps": 20,
        "width": 512,
        "height": 768,
        "guidance_scale": 4.5,
        "sampler": "dpmpp_2m",
        "strength": None,
        "model": "cat: v2",
        "model_hash": "0123456789abcdef" * 4,
        "edgedit": "0.1.0",
    }
    save_image(Image.new("RGB", (8, 8)), tmp_path / "picture.png", recipe)
    with Image.open(tmp_path / "picture.png") as image:
        assert json.loads(image.info["edgedit"]) == recipe
        assert image.info["parameters"] == (
            "a fox\nNegative prompt: rain, fog\n"
            "Steps: 20, Sampler: dpmpp_2m, CFG scale: 4.5, Seed: 7, Size: 512x768, Model hash: 0123456789, "
            'Model: "cat: v2", Version: edgedit 0.1.0'
        )


@pytest.mark.parametrize("suffix", [".jpg", ".webp"])
def test_jpeg_and_webp_carry_the_text_as_exif_user_comment(tmp_path: Path, suffix: str, rng: random.Random) -> None:
    recipe = random_recipe(rng) | {"prompt": "一只 fox 🦊", "model": "m"}
    save_image(picture(rng), tmp_path / f"picture{suffix}", recipe)
    with Image.open(tmp_path / f"picture{suffix}") as image:
        comment = image.getexif().get_ifd(0x8769)[0x9286]
    assert comment[:8] == b"UNICODE\0"
    assert comment[8:].decode("utf-16-be") == parameters_text(recipe)


def test_the_text_of_a_recipe_without_extras_is_the_prompt_and_what_is_known() -> None:
    assert parameters_text({"prompt": "p", "negative_prompt": "", "steps": 1}) == "p\nSteps: 1"


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_without_a_recipe_a_picture_carries_nothing(tmp_path: Path, suffix: str, rng: random.Random) -> None:
    path = tmp_path / f"picture{suffix}"
    save_image(picture(rng), path, None)
    with Image.open(path) as image:
        assert "parameters" not in image.info
        assert not image.getexif()
    with pytest.raises(InputError, match="carries no edgedit recipe"):
        read_recipe(path)


def test_a_picture_of_another_program_has_no_recipe(tmp_path: Path, rng: random.Random) -> None:
    exif = Image.Exif()
    exif[0x010E] = "holiday"
    picture(rng).save(tmp_path / "picture.jpg", exif=exif)
    with pytest.raises(InputError, match="carries no edgedit recipe"):
        read_recipe(tmp_path / "picture.jpg")
    exif[0x010E] = "[" * 50_000
    picture(rng).save(tmp_path / "deep.jpg", exif=exif)
    with pytest.raises(InputError, match="carries no edgedit recipe"):
        read_recipe(tmp_path / "deep.jpg")


def test_reading_a_recipe_from_what_is_no_picture_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("hello")
    for name in ("text.png", "nothing.png", "."):
        with pytest.raises(InputError) as caught:
            read_recipe(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_a_long_prompt_fits_into_a_jpeg_without_the_text_and_too_long_a_one_is_refused(tmp_path: Path) -> None:
    recipe = {"prompt": "word " * 8000}
    save_image(Image.new("RGB", (8, 8)), tmp_path / "long.jpg", recipe)
    assert read_recipe(tmp_path / "long.jpg") == recipe
    for suffix in ("png", "webp"):
        save_image(Image.new("RGB", (8, 8)), tmp_path / f"long.{suffix}", {"prompt": "word " * 40_000})
        assert read_recipe(tmp_path / f"long.{suffix}") == {"prompt": "word " * 40_000}
    with pytest.raises(InputError, match=r"too long for a JPEG; save as \.png"):
        save_image(Image.new("RGB", (8, 8)), tmp_path / "longer.jpg", {"prompt": "word " * 20_000})
    assert not (tmp_path / "longer.jpg").exists()


def test_another_suffix_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"\.png, \.jpg"):
        save_image(Image.new("RGB", (8, 8)), tmp_path / "picture.tga", None)


def test_a_picture_that_cannot_be_written_whole_leaves_the_old_one(tmp_path: Path) -> None:
    child = (
        "import resource, sys, os; from PIL import Image; from edgedit.errors import InputError\n"
        "from edgedit.metadata import save_image\n"
        "image = Image.frombytes('RGB', (64, 64), os.urandom(64 * 64 * 3))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, -1))\n"
        "try: save_image(image, sys.argv[1], {'prompt': 'p'})\n"
        "except InputError as error: print(error)"
    )
    save_image(Image.new("RGB", (8, 8)), tmp_path / "a.png", {"prompt": "old"})
    run = subprocess.run([sys.executable, "-c", child, tmp_path / "a.png"], capture_output=True, text=True, check=True)
    assert "cannot be written" in run.stdout
    assert read_recipe(tmp_path / "a.png") == {"prompt": "old"}
    assert list(tmp_path.iterdir()) == [tmp_path / "a.png"]
