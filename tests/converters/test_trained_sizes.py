"""Sizes that checkpoints were made for, against the tables of diffusers' pipelines."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from diffusers.image_processor import PixArtImageProcessor
from diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha import (
    ASPECT_RATIO_256_BIN,
    ASPECT_RATIO_512_BIN,
    ASPECT_RATIO_1024_BIN,
)
from diffusers.pipelines.pixart_alpha.pipeline_pixart_sigma import ASPECT_RATIO_2048_BIN
from diffusers.pipelines.sana.pipeline_sana import ASPECT_RATIO_4096_BIN

import edgedit
from edgedit.bundle import open_bundle
from edgedit.converters.families import FAMILIES
from edgedit.converters.trained_sizes import trained_sizes
from edgedit.errors import InputError
from edgedit.sizes import check_size, size_of_aspect

TABLES: dict[int, dict[str, list[float]]] = {
    256: ASPECT_RATIO_256_BIN,
    512: ASPECT_RATIO_512_BIN,
    1024: ASPECT_RATIO_1024_BIN,
    2048: ASPECT_RATIO_2048_BIN,
    4096: ASPECT_RATIO_4096_BIN,
}


def of_diffusers(side: int) -> list[tuple[int, int]]:
    return [(int(width), int(height)) for height, width in TABLES[side].values()]


@pytest.mark.parametrize("side", sorted(TABLES))
def test_the_buckets_are_those_of_diffusers_and_an_aspect_ratio_chooses_the_same_one(side: int) -> None:
    sizes = [(width, height) for width, height in trained_sizes((side,), side)]
    assert sizes[0] == (side, side)
    assert sorted(sizes) == sorted(of_diffusers(side))
    seed = random.randrange(2**32)
    generator = random.Random(seed)
    for _ in range(300):
        width, height = generator.randint(64, 5000), generator.randint(64, 5000)
        rows, columns = PixArtImageProcessor.classify_height_width_bin(height, width, TABLES[side])
        assert size_of_aspect(sizes, width, height) == (columns, rows), (seed, width, height)


def test_another_side_has_its_square_only() -> None:
    assert trained_sizes((512, 1024), 768) == [[768, 768]]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_family_has_buckets_at_the_size_of_its_example(family: Any) -> None:
    named = re.search(r"(\d{3,4})(px|-MS)", family.example)
    assert named is not None
    assert {int(named[1])} <= set(family.bucketed) <= set(TABLES)


def test_a_bundle_lists_the_buckets_of_its_checkpoint(
    saved_pipeline: Callable[[str], tuple[Any, Path, int]], tmp_path: Path
) -> None:
    """The tiny PixArt-alpha has 128 latents of 2 pixels a side: 256 pixels."""
    edgedit.convert(saved_pipeline("pixart-alpha")[1], tmp_path / "a.edgedit", measure=False)
    recommended = open_bundle(tmp_path / "a.edgedit").manifest.recommended
    assert recommended is not None
    assert (recommended.width, recommended.height) == recommended.sizes[0] == (256, 256)
    assert sorted(recommended.sizes) == sorted(of_diffusers(256))


def test_a_refusal_names_the_nearest_sizes_in_one_line() -> None:
    sizes = [(width, height) for width, height in trained_sizes((1024,), 1024)]
    check_size(sizes, 1152, 896)
    check_size([], 17, 3)
    with pytest.raises(InputError, match="made for 1000x900 pixels; take one of 1024x960, ") as caught:
        check_size(sizes, 1000, 900)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="does not say which sizes"):
        size_of_aspect([], 16, 9)
