"""`edgedit generate -C PICTURE`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edgedit.attention_scale import entropy_scale
from edgedit.metadata import read_recipe, save_image

Run = Callable[..., Any]


@pytest.fixture
def picture(draw: Run) -> Path:
    flags = ["-n", "a dog", "--sampler", "euler", "--cfg", 3, "--rng", "torch", "-W", 20, "--force-size"]
    flags += ["--guidance-interval", "0:0.9"]
    assert draw("a red cat", "-s", 77, *flags, "-o", "first.png", steps=3).status == 0
    return Path("first.png")


def test_a_replay_gives_the_same_bytes(draw: Run, picture: Path) -> None:
    done = draw("-C", picture, "-o", "again.png", steps=None)
    assert done.status == 0, done.err
    assert Path("again.png").read_bytes() == picture.read_bytes()
    assert "another model" not in done.err


def test_a_flag_replaces_its_part_of_the_recipe_and_nothing_else(draw: Run, picture: Path) -> None:
    before = read_recipe(picture)
    changes: list[tuple[list[Any], dict[str, Any]]] = [
        (["a blue dog"], {"prompt": "a blue dog"}),
        (["-s", 5], {"seed": 5}),
        (["--steps", 2], {"steps": 2}),
        # Another size has another scale: 30 tokens and not 20, where 16 are trained.
        (["-H", 24, "--force-size"], {"height": 24, "attention_scale": entropy_scale(30, 16)}),
        (["--attention-scale", 1.5], {"attention_scale": 1.5}),
        (["--sampler", "dpmpp_2m"], {"sampler": "dpmpp_2m"}),
        (["--guidance-interval", ":0.5"], {"guidance_interval": [0.0, 0.5]}),
        (["-n", ""], {"negative_prompt": ""}),
    ]
    for flags, expected in changes:
        done = draw("-C", picture, *flags, "-o", "again.png", steps=None)
        assert done.status == 0, done.err
        assert read_recipe("again.png") == {**before, **expected}


def test_steps_replace_the_recipe_s_sigmas_and_sigmas_its_steps(draw: Run, picture: Path) -> None:
    assert draw("-C", picture, "--sigmas", "5,2,0", "-o", "b.png", steps=None).status == 0
    assert read_recipe("b.png")["steps"] == 2
    assert draw("-C", "b.png", "-o", "c.png", steps=None).status == 0
    assert Path("b.png").read_bytes() == Path("c.png").read_bytes()
    assert draw("-C", "b.png", "--steps", 4, "-o", "d.png", steps=None).status == 0
    assert (read_recipe("d.png")["sigmas"], read_recipe("d.png")["steps"]) == (None, 4)


def test_a_batch_continues_from_the_recipe_s_seed(draw: Run, picture: Path) -> None:
    done = draw("-C", picture, "-b", 3, steps=None)
    assert done.lines == ["edgedit-77.png", "edgedit-78.png", "edgedit-79.png"]
    assert Path("edgedit-77.png").read_bytes() == picture.read_bytes()


def test_an_image_to_image_replay_needs_the_same_starting_picture(draw: Run, picture: Path) -> None:
    assert draw("a dog", "-s", 1, "-i", picture, "--strength", 0.5, "-o", "b.png", steps=4).status == 0
    assert draw("-C", "b.png", "-o", "c.png", steps=None).status == 0
    assert Path("b.png").read_bytes() == Path("c.png").read_bytes()

    Image.new("RGB", (20, 16), "red").save(picture)
    changed = draw("-C", "b.png", "-o", "d.png", steps=None)
    assert changed.status == 2
    assert "changed since; pass --image" in changed.err
    assert draw("-C", "b.png", "-i", picture, "-o", "d.png", steps=None).status == 0
    assert Path("b.png").read_bytes() != Path("d.png").read_bytes()

    picture.unlink()
    assert "is not there; pass --image" in draw("-C", "b.png", "-o", "e.png", steps=None).err


def test_a_replay_from_given_latents_gives_the_same_bytes(draw: Run) -> None:
    np.save("noise.npy", np.random.default_rng().standard_normal((1, 4, 8, 8), dtype=np.float32))
    draw("a cat", "--latents-in", "noise.npy", "-o", "a.png")
    assert draw("-C", "a.png", "-o", "b.png", steps=None).status == 0
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()


def test_the_model_is_found_by_its_hash_under_another_name(cli: Run, bundle: Path, picture: Path) -> None:
    shutil.copytree(bundle, "renamed.edgedit")
    done = cli("generate", "-C", picture, "-t", 1, "-o", "again.png")
    assert done.status == 0, done.err
    assert Path("again.png").read_bytes() == picture.read_bytes()


def test_of_two_copies_of_a_model_the_one_of_the_same_name_is_taken(cli: Run, bundle: Path, picture: Path) -> None:
    for name in ("a-copy", "tiny", "z-copy"):
        shutil.copytree(bundle, f"{name}.edgedit")
        manifest = json.loads(Path(f"{name}.edgedit/manifest.json").read_text())
        Path(f"{name}.edgedit/manifest.json").write_text(json.dumps({**manifest, "name": name}))
    done = cli("generate", "-C", picture, "-t", 1, "-o", "again.png")
    assert done.status == 0, done.err
    assert Path("again.png").read_bytes() == picture.read_bytes()


def test_a_model_that_is_not_at_hand_is_asked_for(cli: Run, picture: Path) -> None:
    done = cli("generate", "-C", picture)
    assert done.status == 2
    assert "drawn with 'tiny'" in done.err
    assert "which is not at hand" in done.err


def test_another_model_is_said(draw: Run, picture: Path) -> None:
    recipe = {**read_recipe(picture), "model_hash": "0" * 64}
    save_image(Image.new("RGB", (8, 8)), "other.png", recipe)
    done = draw("-C", "other.png", "-o", "a.png", steps=None)
    assert done.status == 0
    assert "drawn with another model" in done.err


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("prompt", 5),
        ("seed", "seven"),
        ("seed", True),
        ("steps", 2.5),
        ("width", None),
        ("sigmas", ["a"]),
        ("sigmas", 4),
        ("guidance_interval", [0, 0.5, 1]),
        ("guidance_scale", "much"),
        ("image", "/etc/passwd"),
        ("image", {"path": "/etc/hostname", "sha256": "0"}),
        ("model_hash", ["x"]),
        ("sampler", {}),
    ],
)
def test_a_forged_recipe_is_refused_in_one_line(draw: Run, picture: Path, key: str, value: Any) -> None:
    recipe = json.loads(json.dumps({**read_recipe(picture), key: value}))
    save_image(Image.new("RGB", (8, 8)), "forged.png", recipe)
    done = draw("-C", "forged.png", "-o", "a.png", steps=None)
    if value is None:
        assert done.status == 0, done.err
        return
    assert (done.status, done.out, len(done.err.splitlines())) == (2, "", 1), done.err
    assert done.err.startswith("error: ")
    assert not Path("a.png").exists()
