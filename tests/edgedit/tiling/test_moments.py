"""Moments of tiles are those of the whole map."""

from __future__ import annotations

import numpy as np
import pytest

from edgedit.tiling.moments import GroupMoments


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_moments_of_tiles_of_any_size_are_those_of_float64(seed: int, offset: float) -> None:
    rng = np.random.default_rng((seed, int(offset)))
    groups, height, width = (int(n) for n in rng.integers((2, 100, 100), (9, 400, 400)))
    values = rng.standard_normal((1, 4 * groups, height, width), np.float32) + np.float32(offset)
    # A picture's tone differs from part to part.
    values[:, :, : height // 2] += 3 * rng.standard_normal(4 * groups, np.float32)[:, None, None]
    values[:, ::2] *= 3
    moments = GroupMoments(groups)
    rows = int(rng.integers(1, height))
    for part in (values[:, :, :rows], values[:, :, rows:]):
        moments.add(np.ascontiguousarray(part))
    mean, reciprocal_std = moments.result(4 * groups, 1e-5)
    wanted = values.astype(np.float64).reshape(groups, -1)
    np.testing.assert_allclose(mean[::4, 0, 0], wanted.mean(1), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(reciprocal_std[::4, 0, 0], 1 / np.sqrt(wanted.var(1) + 1e-5), rtol=1e-6)
