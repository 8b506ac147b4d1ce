"""The table of positions against diffusers' own."""

from __future__ import annotations

import secrets
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.embeddings import PatchEmbed, get_2d_sincos_pos_embed

from edgedit.errors import BundleError, InputError
from edgedit.positions import pos_embed_table


def positions(**changes: Any) -> dict[str, Any]:
    return {"kind": "sincos_2d", "dim": 24, "base_size": 8, "interpolation_scale": 1, "patch_size": 2, **changes}


def off_by_more_than_rounding(actual: np.ndarray, expected: np.ndarray) -> bool:
    # One unit in the last place of a float32 sine: numpy's and torch's float64 sines need not agree to the last bit.
    return actual.shape != expected.shape or actual.dtype != np.float32 or float(np.abs(actual - expected).max()) > 6e-8


@pytest.mark.parametrize("case", range(20))
def test_table_equals_diffusers_for_any_grid(case: int) -> None:
    seed = secrets.randbits(31)
    random = np.random.default_rng(seed)
    rows, columns, base = (int(size) for size in random.integers(1, 80, 3))
    patch, width = int(random.choice([1, 2, 3, 4])), 4 * int(random.integers(1, 300))
    scale = float(random.choice([0.5, 1, 2, 4, random.uniform(0.3, 5)]))
    table = pos_embed_table(
        positions(dim=width, base_size=base, interpolation_scale=scale, patch_size=patch), rows * patch, columns * patch
    )
    expected = get_2d_sincos_pos_embed(width, (rows, columns), base_size=base, interpolation_scale=scale)
    assert not off_by_more_than_rounding(table, expected.float()[None].numpy()), f"seed {seed}, case {case}"


@pytest.mark.parametrize("scale", [0.5, 1, 2, 4])
@pytest.mark.parametrize("latent", [(128, 128), (96, 160), (256, 256), (64, 18)])
def test_table_is_what_patch_embed_adds(scale: float, latent: tuple[int, int]) -> None:
    height, width = latent
    layer = PatchEmbed(height=128, width=128, patch_size=2, in_channels=1, embed_dim=72, interpolation_scale=scale)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
        expected = layer(torch.zeros(1, 1, height, width)).numpy()
    table = pos_embed_table(positions(dim=72, base_size=64, interpolation_scale=scale), height, width)
    assert not off_by_more_than_rounding(table, expected)


@pytest.mark.parametrize(
    ("height", "width", "named"), [(7, 8, "height 7"), (8, 5, "width 5"), (0, 8, "height 0"), (8, -2, "width -2")]
)
def test_a_size_that_patches_do_not_divide_is_refused(height: int, width: int, named: str) -> None:
    with pytest.raises(InputError, match=named):
        pos_embed_table(positions(), height, width)


def test_an_unknown_kind_of_positions_is_refused() -> None:
    with pytest.raises(BundleError, match="rope_2d"):
        pos_embed_table(positions(kind="rope_2d"), 8, 8)
