"""Likeness of pictures: against definitions computed another way, and in cases with a known answer."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.linalg import sqrtm
from scipy.ndimage import gaussian_filter

from edgedit.converters.training.data import training_scenes
from edgedit.converters.training.similarity import features, frechet_distance, psnr, ssim, structure_distance
from edgedit.converters.training.world import render


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng()


def pictures(count: int, seed: int) -> list[np.ndarray]:
    return [render(scene) for scene in training_scenes(count, seed=seed)]


def test_equal_pictures_are_as_near_as_can_be() -> None:
    picture = pictures(1, 3)[0]
    assert psnr(picture, picture) == 100
    assert ssim(picture, picture) == pytest.approx(1)
    assert structure_distance(picture, picture) == 0


def test_psnr_is_its_definition(rng: np.random.Generator) -> None:
    picture = rng.integers(10, 200, (16, 16, 3)).astype(np.uint8)
    assert psnr(picture + 5, picture) == pytest.approx(20 * np.log10(255 / 5))


def test_ssim_is_that_of_a_gaussian_filter(rng: np.random.Generator) -> None:
    x = rng.integers(0, 256, (40, 36)).astype(np.uint8)
    y = np.clip(x + rng.normal(0, 20, x.shape), 0, 255).astype(np.uint8)

    def blur(z: np.ndarray) -> np.ndarray:
        return gaussian_filter(z, 1.5, truncate=3.5)[5:-5, 5:-5]

    a, b = x.astype(float), y.astype(float)
    ma, mb = blur(a), blur(b)
    va, vb, cov = blur(a * a) - ma**2, blur(b * b) - mb**2, blur(a * b) - ma * mb
    c1, c2 = 6.5025, 58.5225
    expected = ((2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2))).mean()
    found = ssim(*(np.repeat(z[..., None], 3, -1) for z in (x, y)))
    assert found == pytest.approx(expected, abs=2e-3)


def test_frechet_distance_is_its_formula() -> None:
    a, b = pictures(40, 1), pictures(40, 2)
    x, y = (np.stack([features(picture) for picture in group]) for group in (a, b))
    ca, cb = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    # The covariances are singular with so few pictures, which scipy's root of the plain product does not take.
    root = sqrtm(ca + 1e-10 * np.eye(len(ca)))
    mixed = np.trace(sqrtm(root @ cb @ root + 1e-10 * np.eye(len(ca)))).real
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(ca) + np.trace(cb) - 2 * mixed
    assert frechet_distance(a, b) == pytest.approx(expected, rel=0.01, abs=0.01)
    assert frechet_distance(a, a) < 1e-6


def test_features_tell_colours_places_and_shapes_apart() -> None:
    def drawn(shape: str, colour: str, x: float) -> np.ndarray:
        from edgedit.converters.training.world import Item, Scene

        return render(Scene("white", (Item(shape, colour, "medium", 34, x, 64),)))

    same = drawn("circle", "red", 40)
    near = structure_distance(drawn("circle", "red", 41), same)
    for other in (drawn("circle", "blue", 40), drawn("star", "red", 40), drawn("circle", "red", 90)):
        assert structure_distance(other, same) > 2 * near
