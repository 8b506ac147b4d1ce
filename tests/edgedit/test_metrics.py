from __future__ import annotations

import numpy as np
import pytest

from edgedit.metrics import compare


def test_equal_tensors_agree_perfectly() -> None:
    value = np.random.default_rng().standard_normal((2, 3)).astype(np.float32)
    found = compare(value, value)
    assert (found.cosine, found.psnr_db, found.max_abs, found.relative_l2) == (pytest.approx(1.0), 200.0, 0.0, 0.0)


def test_figures_follow_their_definitions() -> None:
    rng = np.random.default_rng()
    reference, noise = rng.standard_normal(1000), rng.standard_normal(1000) * 0.01
    found = compare(reference + noise, reference)
    assert found.relative_l2 == pytest.approx(np.linalg.norm(noise) / np.linalg.norm(reference))
    assert found.max_abs == pytest.approx(np.abs(noise).max())
    peak = reference.max() - reference.min()
    assert found.psnr_db == pytest.approx(10 * np.log10(peak**2 / np.mean(noise**2)))


def test_not_a_number_never_passes() -> None:
    found = compare(np.array([1.0, np.nan]), np.array([1.0, 2.0]))
    assert found.relative_l2 == np.inf
    assert found.cosine == -1.0


def test_shapes_must_match() -> None:
    with pytest.raises(ValueError, match="shapes differ"):
        compare(np.zeros(2), np.zeros(3))
