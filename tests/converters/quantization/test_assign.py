"""Mixed precision: the integer programme against every combination there is."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from edgedit.converters.quantization.assign import as_record, assign, curve, least_loss, least_size
from edgedit.converters.quantization.form import Form
from edgedit.converters.quantization.sensitivity import Choice, Sensitivity


@pytest.fixture
def table() -> Sensitivity:
    rng = np.random.default_rng()
    choices = {}
    for number in range(5):
        size, loss = int(rng.integers(1000, 9000)), float(np.exp(rng.normal(-8, 2)))
        choices[f"layer{number}"] = [
            Choice(Form(bits, 64 if bits < 8 else None), size * bits, loss * 4.0 ** (2 - bits) * rng.uniform(0.5, 1))
            for bits in (2, 3, 4, 8)
        ]
    return Sensitivity(choices, peak=6.0, energy=1.3)


def every_combination(table: Sensitivity) -> list[tuple[int, float]]:
    return [
        (sum(c.bytes for c in chosen), sum(c.loss for c in chosen))
        for chosen in itertools.product(*table.choices.values())
    ]


def test_no_combination_within_a_size_loses_less(table: Sensitivity) -> None:
    found = every_combination(table)
    for share in (0.05, 0.3, 0.7):
        size = least_size(table) + share * (max(s for s, _ in found) - least_size(table))
        chosen = assign(table, size=size)
        assert set(chosen) == set(table.choices)
        assert sum(c.bytes for c in chosen.values()) <= size
        best = min(loss for bytes, loss in found if bytes <= size)
        assert sum(c.loss for c in chosen.values()) <= best * (1 + 1e-4)


def test_no_combination_within_a_loss_is_smaller(table: Sensitivity) -> None:
    found = every_combination(table)
    for factor in (1.5, 20.0, 300.0):
        loss = factor * least_loss(table)
        chosen = assign(table, loss=loss)
        assert sum(c.loss for c in chosen.values()) <= loss * (1 + 1e-5)
        assert sum(c.bytes for c in chosen.values()) <= min(size for size, lost in found if lost <= loss) * (1 + 1e-5)


def test_decibels_and_losses_are_each_others_inverse(table: Sensitivity) -> None:
    assert table.decibels(table.loss(35.0)) == pytest.approx(35.0)
    # Loss 1 is an error as large as the prediction: its mean square is the energy.
    assert table.decibels(1.0) == pytest.approx(10 * np.log10(36 / 1.3))


def test_the_curve_rises_and_the_record_marks_what_was_chosen(table: Sensitivity) -> None:
    points = curve(table, points=5)
    assert [d for _, d in points] == sorted(d for _, d in points)
    chosen = assign(table, size=float(least_size(table)))
    record = as_record(table, chosen, 100, dict.fromkeys(chosen, 10))
    assert record["bytes"] == 100 + least_size(table)
    assert record["average_bits"] == 2
    assert {layer["chosen"] for layer in record["layers"].values()} == {2}
