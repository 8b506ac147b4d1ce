"""What is fastest here is measured once, kept for this machine, and used."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgedit
from edgedit import tuning, tuning_record
from edgedit.bundle import Bundle, open_bundle
from edgedit.errors import BundleError, EdgeditError, InputError
from edgedit.runtimes.base import RuntimeOptions, open_runtime
from edgedit.runtimes.onnx import OnnxRuntime
from edgedit.runtimes.tuned import TunedRuntime
from edgedit.tuning import tune
from edgedit.tuning_record import ComponentChoice, TuningRecord

Saved = Callable[[str], tuple[Any, Path, int]]
CPU, STANDARD = ComponentChoice("onnxruntime", 1, "cpu"), ComponentChoice("onnxruntime", 1, "standard")


@pytest.fixture(scope="module")
def bundle(saved_pipeline: Saved, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    path = tmp_path_factory.mktemp("bundle") / "x.edgedit"
    edgedit.convert(saved_pipeline("pixart-sigma")[1], path)
    return open_bundle(path)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEDIT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[tuple[str, ComponentChoice]]]:
    """Evaluations that take the seconds of a table and give outputs that far from the standard graph's."""

    def install(seconds: dict[ComponentChoice, Any], errors: dict[ComponentChoice, float] | None = None) -> list[Any]:
        turns: list[tuple[str, ComponentChoice]] = []

        def turn(
            bundle: Bundle, name: str, inputs: Path, choice: ComponentChoice, outputs: Path | None, place: Path
        ) -> list[float]:
            turns.append((name, choice))
            taken = seconds[choice]
            if isinstance(taken, Exception):
                raise taken
            if outputs is not None:
                np.save(outputs / f"{name}.npy", np.array([1.0, 1.0]) * (1 + (errors or {}).get(choice, 0.0)))
            return list(taken)

        monkeypatch.setattr(tuning, "_turn", turn)
        return turns

    return install


def test_candidates_really_run_and_the_winner_is_used(bundle: Bundle) -> None:
    pytest.importorskip("openvino")
    found = tune(bundle.path, width=16, height=16, length=5, seconds=0.01, components=["decoder"], threads=[1])
    choices = [item.choice for item in found.measured]
    engines = {choice.engine for choice in choices}
    assert engines == {"onnxruntime", "openvino"}
    assert all(len(item.seconds) >= 2 and item.relative_l2 < 1e-4 and not item.refused for item in found.measured)
    assert tuning_record.load(bundle) == found
    runtime = open_runtime(bundle, "onnx", RuntimeOptions(engine="auto"))
    assert isinstance(runtime, TunedRuntime)
    assert found.components["decoder"].engine in runtime.describe()["tuned"]


def test_the_fastest_by_median_wins_and_those_far_behind_run_once(bundle: Bundle, pretend: Any) -> None:
    slow = ComponentChoice("onnxruntime", 2, "cpu")
    other = ComponentChoice("onnxruntime", 2, "standard")
    times = {slow: [9.0, 9.0], CPU: [1.0, 3.0], other: [2.1, 2.1], STANDARD: [1.9, 1.95]}
    turns = pretend(times)
    found = tune(
        bundle.path, width=16, height=16, seconds=1000, components=["text_encoder"], engines=["onnxruntime"],
        threads=[1, 2],
    )  # fmt: skip
    assert found.components["text_encoder"] == STANDARD
    assert turns.count(("text_encoder", slow)) == 1
    assert turns[:8] == [("text_encoder", choice) for choice in (slow, CPU, other, STANDARD, CPU, other, STANDARD, CPU)]


def test_what_fails_or_computes_something_else_is_not_chosen_and_says_why(bundle: Bundle, pretend: Any) -> None:
    vino = ComponentChoice("openvino", 1, "standard")
    pretend({CPU: [2.0], STANDARD: EdgeditError("no memory"), vino: [1.0]}, {vino: 0.02})
    options: dict[str, Any] = {"width": 16, "height": 16, "seconds": 1, "components": ["text_encoder"], "threads": [1]}
    found = tune(bundle.path, engines=["onnxruntime", "openvino"], **options)
    assert found.components["text_encoder"] == CPU
    refused = {item.choice: item.refused for item in found.measured}
    assert refused[STANDARD] == "no memory"
    assert "too far" in str(refused[vino])
    pretend({CPU: EdgeditError("broken")})
    with pytest.raises(EdgeditError, match="broken"):
        tune(bundle.path, engines=["onnxruntime"], **options)


def test_guidance_in_one_batch_or_two_is_measured_and_used(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([[1.0], [0.4]] * 20)

    def race(bundle: Bundle, name: str, inputs: Path, runners: Any, *rest: Any) -> None:
        for item in runners:
            item.seconds.append(1.0)

    monkeypatch.setattr(tuning, "_race", race)
    monkeypatch.setattr(tuning, "_turn", lambda *rest: next(times))
    found = tune(bundle.path, width=16, height=16, seconds=1e-9, components=["transformer"], threads=[1])
    assert found.guidance_seconds == (1.0, 0.8)
    assert found.guidance_together is False
    with edgedit.load(bundle.path, threads=1) as pipe:
        assert pipe.transformer.guides_together(found.tokens) is False
        assert pipe.transformer.guides_together(found.tokens * 4) is True


def record(**changes: Any) -> TuningRecord:
    whole = TuningRecord(width=16, height=16, tokens=16, components={"transformer": STANDARD, "decoder": CPU})
    return replace(whole, **changes)


def test_a_record_chooses_form_and_threads_and_pictures_stay_the_same(bundle: Bundle) -> None:
    def draw(**options: Any) -> np.ndarray:
        with edgedit.load(bundle.path, use_cache=False, **options) as pipe:
            found: np.ndarray = pipe.generate("a red cat", seed=1, steps=2, width=16, height=16).latents
            return found

    plain = draw(threads=1)
    tuning_record.save(bundle, record())
    opened = open_runtime(bundle, "onnx", RuntimeOptions(engine="auto"))
    assert isinstance(opened, TunedRuntime)
    assert np.linalg.norm(draw() - plain) < 1e-4 * np.linalg.norm(plain)
    assert isinstance(open_runtime(bundle, "onnx", RuntimeOptions(engine="onnxruntime")), OnnxRuntime)
    assert isinstance(open_runtime(bundle, "onnx", RuntimeOptions(engine="auto", providers=("cpu",))), OnnxRuntime)
    assert isinstance(open_runtime(bundle, "onnx"), OnnxRuntime)


def test_a_record_belongs_to_its_machine_and_versions(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    tuning_record.save(bundle, record())
    assert tuning_record.load(bundle) == record()
    monkeypatch.setattr(tuning_record, "processor_name", lambda: "another")
    assert tuning_record.load(bundle) is None
    assert not tuning_record.forget(bundle)


@pytest.mark.parametrize("damage", ["", "{", "[]", "null", '{"version": 1}', "deep", "choice", "component", "cut"])
def test_a_damaged_record_is_one_line_and_is_ignored(
    bundle: Bundle, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    path = tuning_record.save(bundle, record())
    text = path.read_text()
    changed = {
        "deep": "[" * 100_000,
        "choice": text.replace("onnxruntime", "tensorrt"),
        "component": text.replace('"decoder"', '"unet"'),
        "cut": text[: len(text) // 2],
    }
    path.write_text(changed.get(damage, damage))
    with caplog.at_level(logging.WARNING, logger="edgedit"):
        assert isinstance(open_runtime(bundle, "onnx", RuntimeOptions(engine="auto")), OnnxRuntime)
    (line,) = caplog.messages
    assert "damaged" in line
    assert "edgedit tune" in line
    assert "\n" not in line
    tuning_record.save(bundle, record())
    assert tuning_record.load(bundle) == record()
    assert tuning_record.forget(bundle)
    assert json.loads(json.dumps(record().as_dict()))["components"]["decoder"]["form"] == "cpu"


def test_what_cannot_be_tuned_is_refused(bundle: Bundle) -> None:
    with pytest.raises(InputError, match="above 0 seconds"):
        tune(bundle.path, seconds=0)
    with pytest.raises(InputError, match="does not divide"):
        tune(bundle.path, width=17, height=16)
    with pytest.raises(BundleError, match="unet"):
        tune(bundle.path, components=["unet"])
