"""Calibration sees what torch sees, takes up where it was, and says which layer is broken."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file

import edgedit
from edgedit.converters.quantization import calibrate, methods
from edgedit.converters.quantization.workspace import Workspace
from edgedit.errors import ConversionError, InputError

PROMPTS = "a red cat on a blue square\nthe small dog and a circle\n"


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text(PROMPTS)
    return path


class StoppedError(Exception):
    pass


def convert(source: Path, bundle: Path, prompts: object, dtype: str = "w4", **more: Any) -> Any:
    options = {"components": ("transformer",), "measure": False, **more}
    return edgedit.convert(source, bundle, dtype=dtype, calibration=str(prompts), **options)


def test_statistics_are_those_that_hooks_in_torch_see(
    quantizable: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: dict[str, Any] = {}
    observe = calibrate.Calibration.observe

    def remember(self: calibrate.Calibration, *arguments: Any, **more: Any) -> Any:
        kept["calls"] = self.calls("transformer")
        kept["statistics"] = observe(self, *arguments, **more)
        kept["moments"] = {name: one.load() for name, one in kept["statistics"].items() if one.load is not None}
        return kept["statistics"]

    monkeypatch.setattr(calibrate.Calibration, "observe", remember)
    convert(quantizable, tmp_path / "q.edgedit", prompts)
    model = diffusers.PixArtTransformer2DModel.from_pretrained(quantizable, subfolder="transformer").eval()
    seen: dict[str, list[np.ndarray]] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(
                lambda _, x, name=name: seen.setdefault(name, []).append(
                    x[0].detach().numpy().reshape(-1, x[0].shape[-1])
                )
            )
    assert len(kept["calls"]) == 2 * calibrate.MOST_STEPS
    with torch.no_grad():
        for call in kept["calls"]:
            model(
                torch.from_numpy(call["latents"]),
                encoder_hidden_states=torch.from_numpy(call["encoder_hidden_states"]),
                timestep=torch.from_numpy(call["timestep"]),
                encoder_attention_mask=torch.from_numpy(call["encoder_attention_mask"]),
                added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            )
    assert len(kept["statistics"]) > 20
    for name, one in kept["statistics"].items():
        rows = np.concatenate(seen[name])
        expected = rows.astype(np.float64).T @ rows
        assert one.rows == len(rows)
        if name.startswith("adaln_single"):
            assert one.distinct == calibrate.MOST_STEPS, "one input a timestep, however many pictures"
        np.testing.assert_allclose(one.peaks, np.abs(rows).max(0), rtol=1e-3, atol=1e-4)
        assert np.linalg.norm(kept["moments"][name] - expected) < 1e-3 * np.linalg.norm(expected)


def test_an_interrupted_conversion_goes_on_and_gives_the_same(
    quantizable: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, bundle = tmp_path / "whole.edgedit", tmp_path / "again.edgedit"
    convert(quantizable, whole, prompts)
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".work")] == []
    encode = methods.encode
    rounded: list[int] = []

    def stop_at_the_fourth(*arguments: Any) -> Any:
        if len(rounded) == 3:
            raise StoppedError
        rounded.append(1)
        return encode(*arguments)

    monkeypatch.setattr(methods, "encode", stop_at_the_fourth)
    with pytest.raises(StoppedError):
        convert(quantizable, bundle, prompts)
    assert not bundle.exists()
    assert (tmp_path / ".again.edgedit.work").is_dir()
    with pytest.raises(InputError, match="unfinished run with other options"):
        convert(quantizable, bundle, "self")
    again: list[int] = []
    monkeypatch.setattr(methods, "encode", lambda *arguments: (again.append(1), encode(*arguments))[1])
    monkeypatch.setattr(calibrate, "_Recorder", None)
    monkeypatch.setattr(calibrate, "run_in_segments", None)
    convert(quantizable, bundle, prompts)
    layers = json.loads((bundle / "quantization" / "transformer.json").read_text())["layers"]
    adaptive = sum(layer.get("rounding") == "adaptive" for layer in layers.values())
    plain = sum(layer["bits"] <= 8 and layer.get("rounding") != "adaptive" for layer in layers.values())
    assert len(again) == adaptive - 3 + 2 * plain, "what was rounded before the stop is not rounded again"
    for path in (whole / "onnx").iterdir():
        assert path.read_bytes() == (bundle / "onnx" / path.name).read_bytes(), path.name
    assert not (tmp_path / ".again.edgedit.work").exists()


OFF = {"int": "bits = 4, block = 64", "fp4": 'bits = 4, block = 64, format = "fp4"'}


@pytest.mark.parametrize("format", OFF)
def test_with_every_method_off_the_weights_are_those_without_methods_bit_for_bit(
    format: str, quantizable: Path, prompts: Path, tmp_path: Path
) -> None:
    """A layer's methods touch that layer alone, and a method that is off touches nothing."""
    off = f'{OFF[format]}, rounding = "nearest", rotate = false, activations = "none"'
    recipe = tmp_path / "off.toml"
    recipe.write_text(f'[transformer]\n"*" = {{{off}}}\n')
    plain, written, one = (tmp_path / f"{name}.edgedit" for name in ("plain", "off", "one"))
    edgedit.convert(
        quantizable, plain, dtype={"int": "w4"}.get(format, format), components=("transformer",), measure=False
    )
    edgedit.convert(quantizable, written, dtype=str(recipe), components=("transformer",), measure=False)
    for path in (plain / "onnx").iterdir():
        assert path.read_bytes() == (written / "onnx" / path.name).read_bytes(), path.name

    treated = "transformer_blocks.0.ff.net.2"
    recipe.write_text(recipe.read_text() + f'"{treated}" = {{{OFF[format]}, rounding = "adaptive"}}\n')
    convert(quantizable, one, prompts, dtype=str(recipe))
    before, after = (weights(bundle) for bundle in (plain, one))
    assert before.keys() == after.keys()
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed
    assert all(name.startswith(treated) for name in changed), changed


def weights(bundle: Path) -> dict[str, np.ndarray]:
    graphs = [onnx.load(path).graph for path in sorted((bundle / "onnx").glob("*.onnx"))]
    return {value.name: onnx.numpy_helper.to_array(value) for graph in graphs for value in graph.initializer}


def damaged(source: Path, target: Path, key: str) -> Path:
    shutil.copytree(source, target)
    path = target / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors[key].view(-1)[0] = float("nan")
    save_file(tensors, path)
    return target


def test_a_layer_with_values_that_are_not_numbers_is_named(quantizable: Path, tmp_path: Path) -> None:
    source = damaged(quantizable, tmp_path / "nan", "transformer_blocks.1.ff.net.2.weight")
    with pytest.raises(ConversionError, match=r"layer transformer_blocks\.1\.ff\.net\.2 holds values that are not"):
        edgedit.convert(source, tmp_path / "x.edgedit", dtype="w4", components=("transformer",))
    assert not (tmp_path / "x.edgedit").exists()


def test_an_input_that_is_not_finite_names_its_layer(quantizable: Path, tmp_path: Path) -> None:
    from quantizable import fresh_graph

    from edgedit.converters.quantization.layers import find_layers
    from edgedit.converters.quantization.statistics import Observer, input_of

    model, _ = fresh_graph(quantizable)
    layers = find_layers(model)
    observer = Observer("transformer", layers, frozenset(), Workspace(tmp_path / "w", {}))
    value = input_of(layers["transformer_blocks.0.ff.net.2"])
    assert value is not None
    with pytest.raises(ConversionError, match=r"input of layer transformer_blocks\.0\.ff\.net\.2 .* \(call 3\)"):
        observer.add(2, value, np.full((1, 2, 256), np.inf, np.float32))


def test_calibration_without_prompts_or_without_a_pipeline_is_refused(quantizable: Path, tmp_path: Path) -> None:
    (tmp_path / "none.txt").write_text("\n \n")
    with pytest.raises(InputError, match="holds no prompts"):
        convert(quantizable, tmp_path / "x.edgedit", tmp_path / "none.txt")
    with pytest.raises(InputError, match="cannot be read"):
        convert(quantizable, tmp_path / "x.edgedit", tmp_path / "absent.txt")
    with pytest.raises(ConversionError, match="calibration draws pictures and needs the whole pipeline"):
        convert(quantizable / "transformer", tmp_path / "x.edgedit", "self")


@pytest.mark.parametrize("dtype", ["mixed:300k", "mixed:33dB"])
def test_mixed_precision_keeps_its_budget(dtype: str, quantizable: Path, prompts: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "m.edgedit"
    convert(quantizable, bundle, prompts, dtype)
    record = json.loads((bundle / "quantization" / "transformer.json").read_text())
    told = record["sensitivity"]
    assert (bundle / "quantization" / "transformer.png").stat().st_size > 1000
    chosen = {name: layer["bits"] for name, layer in record["layers"].items() if name in told["layers"]}
    assert chosen == {name: layer["chosen"] for name, layer in told["layers"].items()}
    if dtype.endswith("k"):
        assert told["bytes"] <= 300_000
        assert (bundle / "onnx" / "transformer.onnx.data").stat().st_size <= 1.05 * 300_000
    else:
        assert told["psnr_db"] >= 33 - 1e-3
    for layer in told["layers"].values():
        assert all(choice["loss"] >= 0 for choice in layer["choices"])


@pytest.mark.parametrize(
    ("dtype", "said"),
    [
        ("mixed:10k", r"weights take 0\.\d+ MB at least; give mixed:0\.\d+M"),
        ("mixed:150dB", r"reaches \d+\.\d dB with"),
    ],
)
def test_a_budget_that_cannot_be_kept_says_which_can(
    dtype: str, said: str, quantizable: Path, prompts: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConversionError, match=said):
        convert(quantizable, tmp_path / "m.edgedit", prompts, dtype)
    assert not (tmp_path / "m.edgedit").exists()
