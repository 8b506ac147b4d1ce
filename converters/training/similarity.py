"""How near pictures are to other pictures: one by one (PSNR, SSIM, structure) and as a distribution (Fréchet distance).

Inception and VGG features need weights that cannot be downloaded here and were trained on photographs. So the features
are defined instead of trained, and are the same everywhere: mean colours on an 8 × 8 grid (192 numbers: what is where)
and histograms of edge directions on a 4 × 4 grid (128 numbers: which shapes; Dalal and Triggs, "Histograms of Oriented
Gradients", 2005). Distances in them compare models of flat scenes with each other; they are not FID and not LPIPS.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image

__all__ = ["features", "frechet_distance", "psnr", "ssim", "structure_distance"]

Picture = npt.NDArray[np.uint8]

_GRID, _COARSE, _DIRECTIONS = 8, 4, 8
_SIDE = 128


def psnr(picture: Picture, reference: Picture) -> float:
    """Peak signal-to-noise ratio in decibels, at most 100 (equal pictures)."""
    error = float(np.mean((picture.astype(np.float64) - reference.astype(np.float64)) ** 2))
    return 100.0 if error == 0 else min(100.0, 10 * float(np.log10(255**2 / error)))


def _blurred(image: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Gaussian window of 11 × 11 with sigma 1.5, without padding."""
    offsets = np.arange(-5, 6)
    window = np.exp(-(offsets**2) / (2 * 1.5**2))
    window /= window.sum()
    for axis in (0, 1):
        image = np.apply_along_axis(np.convolve, axis, image, window, mode="valid")
    return image


def ssim(picture: Picture, reference: Picture) -> float:
    """Structural similarity of the luma, at most 1 (Wang et al., 2004, with their window and constants)."""
    x, y = (np.asarray(Image.fromarray(p).convert("L"), np.float64) for p in (picture, reference))
    mean_x, mean_y = _blurred(x), _blurred(y)
    var_x, var_y = _blurred(x * x) - mean_x**2, _blurred(y * y) - mean_y**2
    covariance = _blurred(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    above = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return float(np.mean(above / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))))


def _edge_histograms(picture: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Strength of edges by direction, (4, 4, 8), the strongest of the three channels at each pixel."""
    down, across = np.gradient(picture, axis=(0, 1))
    strength = np.hypot(down, across)
    channel = strength.argmax(-1)[..., None]
    down, across, strength = (np.take_along_axis(part, channel, -1)[..., 0] for part in (down, across, strength))
    direction = (np.arctan2(down, across) / np.pi % 1) * _DIRECTIONS
    low = np.floor(direction).astype(int) % _DIRECTIONS
    share = direction - np.floor(direction)
    cell = _SIDE // _COARSE
    result = np.zeros((_COARSE, _COARSE, _DIRECTIONS))
    rows, columns = (np.arange(_SIDE) // cell,) * 2
    for offset, weight in ((0, 1 - share), (1, share)):
        np.add.at(result, (rows[:, None], columns[None], (low + offset) % _DIRECTIONS), strength * weight)
    return result / cell


def features(picture: Picture) -> npt.NDArray[np.float64]:
    """The 320 features of a picture, after resizing it to 128 × 128. Colours are in [0, 1]."""
    image = Image.fromarray(picture)
    if image.size != (_SIDE, _SIDE):
        image = image.resize((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    values = np.asarray(image.convert("RGB"), np.float64) / 255
    cell = _SIDE // _GRID
    colours = values.reshape(_GRID, cell, _GRID, cell, 3).mean((1, 3))
    return np.concatenate([colours.ravel(), _edge_histograms(values).ravel()])


def structure_distance(picture: Picture, reference: Picture) -> float:
    """Root mean square distance of the features of two pictures, 0 for equal ones."""
    return float(np.sqrt(np.mean((features(picture) - features(reference)) ** 2)))


def frechet_distance(pictures: Sequence[Picture], references: Sequence[Picture]) -> float:
    """Distance of two sets of pictures as Gaussians in the features (Heusel et al., 2017, equation 6).

    It falls with the number of pictures even between equal distributions: compare sets of equal size only.
    """
    a, b = (np.stack([features(picture) for picture in group]) for group in (pictures, references))
    cov_a, cov_b = (np.cov(x, rowvar=False) for x in (a, b))
    # The square root of the product has the trace of the square roots of its eigenvalues, which are not negative.
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    mixed = np.sqrt(np.clip(np.linalg.eigvalsh(root @ cov_b @ root), 0, None)).sum()
    return float(max(0.0, np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(cov_a) + np.trace(cov_b) - 2 * mixed))
