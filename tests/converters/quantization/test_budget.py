"""Mixed precision: what is measured with all layers rounded decides, not what was thought to add up."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from quantizable import fresh_graph, outputs_of

from edgedit.converters.quantization import budget, prepare
from edgedit.converters.quantization.calibrate import Calibration
from edgedit.converters.quantization.form import Form
from edgedit.converters.quantization.layers import find_layers
from edgedit.converters.quantization.probe import Probe
from edgedit.converters.quantization.recipe import Recipe
from edgedit.converters.quantization.sensitivity import Choice, Sensitivity
from edgedit.converters.quantization.transform import change_weight
from edgedit.errors import ConversionError
from edgedit.schedules import make_schedule
from edgedit.solvers import make_solver

BITS = (2, 3, 4, 8)


class FakeMeter:
    """Loses what a function of the bits by layer says."""

    def __init__(self, lost: Any) -> None:
        self.lost, self.asked = lost, 0

    def loss(self, forms: Mapping[str, Form]) -> float:
        self.asked += 1
        return float(self.lost({name: form.bits for name, form in forms.items()}))


@pytest.fixture
def table() -> Sensitivity:
    rng = np.random.default_rng()
    choices = {}
    for number in range(6):
        name, size = f"{'blocks.' if number < 4 else ''}{number}", int(rng.integers(1000, 3000))
        loss = float(np.exp(rng.normal(-6, 1)))
        choices[name] = [Choice(Form(bits), size * bits, loss * 4.0 ** (2 - bits)) for bits in BITS]
    return Sensitivity(choices, peak=6.0, energy=1.0)


def summed(table: Sensitivity, bits: Mapping[str, int]) -> float:
    return sum(next(c.loss for c in table.choices[name] if c.form.bits == b) for name, b in bits.items())


def size_of(table: Sensitivity, bits: int) -> int:
    return sum(next(c.bytes for c in options if c.form.bits == bits) for options in table.choices.values())


def test_a_uniform_choice_that_loses_less_beats_the_programmes(table: Sensitivity) -> None:
    """Here whatever is not uniform loses ten times as much as its layers do by themselves."""
    meter = FakeMeter(lambda bits: summed(table, bits) * (1 if len(set(bits.values())) == 1 else 10))
    chosen, lost = budget._best(table, meter, size_of(table, 3))  # type: ignore[arg-type]
    assert {choice.form.bits for choice in chosen.values()} == {3}
    assert lost == pytest.approx(summed(table, dict.fromkeys(table.choices, 3)))
    honest = FakeMeter(lambda bits: summed(table, bits))
    _, less = budget._best(table, honest, size_of(table, 3))  # type: ignore[arg-type]
    assert less <= lost


def test_decibels_that_were_asked_for_are_there_though_losses_do_not_add_up(table: Sensitivity) -> None:
    meter = FakeMeter(lambda bits: 4 * summed(table, bits))
    best = table.decibels(4 * summed(table, dict.fromkeys(table.choices, 8)))
    recipe = Recipe("mixed", {}, budget=best - 12, budget_unit="dB")
    chosen, lost = budget._smallest(recipe, table, meter)  # type: ignore[arg-type]
    assert table.decibels(lost) >= best - 12
    assert sum(choice.bytes for choice in chosen.values()) <= size_of(table, 8)
    with pytest.raises(ConversionError, match=r"reaches \d+\.\d dB with the best forms; ask for less"):
        budget._smallest(Recipe("mixed", {}, budget=best + 1, budget_unit="dB"), table, meter)  # type: ignore[arg-type]


def test_losses_are_those_of_the_network_with_other_weights(quantizable: Path, tmp_path: Path) -> None:
    model, inputs = fresh_graph(quantizable)
    other = {**inputs, "latents": inputs["latents"] * np.float32(0.5)}
    calls = [inputs, other]
    expected = [outputs_of(fresh_graph(quantizable)[0], call, tmp_path) for call in calls]
    layers = find_layers(model)
    names = ["transformer_blocks.0.ff.net.2", "transformer_blocks.1.attn1.to_q"]
    changed = {name: layers[name].value.const_value.numpy() * np.float32(0.9) for name in names}  # type: ignore[union-attr]
    probe = Probe(model, {name: layers[name] for name in names}, calls, [0.5, 1.5], tmp_path / "probe")
    found = probe.loss(changed)
    probe.close()
    assert not (tmp_path / "probe").exists()
    again, _ = fresh_graph(quantizable)
    for name, layer in find_layers(again).items():
        if name in changed:
            change_weight(layer.value, lambda w: w * np.float32(0.9))
    moved = [outputs_of(again, call, tmp_path) for call in calls]
    errors = [((a - b).astype(np.float64) ** 2).mean() for a, b in zip(moved, expected, strict=True)]
    energy = [(b.astype(np.float64) ** 2).mean() for b in expected]
    assert found == pytest.approx(np.dot([0.5, 1.5], errors) / np.dot([0.5, 1.5], energy), rel=1e-3)


def test_losses_are_measured_on_prompts_that_rounding_has_not_seen() -> None:
    calls: list[Any] = list(range(80))
    rounding, held = prepare._divided(calls, 8)
    assert (calls[rounding], calls[held]) == (calls[:60], calls[60:])
    rounding, held = prepare._divided(calls[:20], 2)
    assert (calls[:20][rounding], calls[:20][held]) == (calls[:10], calls[10:20])
    assert prepare._divided(calls[:10], 1) == (slice(None), slice(None))


@pytest.mark.parametrize("kind", ["flow", "vp"])
def test_an_error_counts_as_much_as_an_euler_step_moves_the_picture(kind: str) -> None:
    config = {"sampler": "euler", "path": "flow", "prediction": "flow", "shift": 3.0}
    if kind == "vp":
        config = {"sampler": "ddim", "path": "vp", "prediction": "epsilon"}
    schedule = make_schedule(config, 6)
    fake = SimpleNamespace(recipe=SimpleNamespace(schedule=schedule), calls=lambda _: [{}] * 24, prompts=["a", "b"])
    found = Calibration.influence(fake)  # type: ignore[arg-type]
    assert len(found) == 24
    rng = np.random.default_rng()
    x, out, change = (rng.standard_normal((1, 4, 3, 3)).astype(np.float32) for _ in range(3))
    noise = lambda shape: np.zeros(shape, np.float32)  # noqa: E731
    for i in range(6):
        moved = []
        for prediction in (out, out + change):
            solver = make_solver(schedule.sampler, schedule)
            moved.append(solver.step(i, x, prediction, noise))
        expected = ((moved[1] - moved[0]) ** 2).sum() / (change**2).sum()
        # Two calls a step, as with guidance; two pictures.
        assert found[2 * i] == found[2 * i + 1] == found[12 + 2 * i]
        assert found[2 * i] == pytest.approx(expected, rel=1e-3, abs=1e-9)
