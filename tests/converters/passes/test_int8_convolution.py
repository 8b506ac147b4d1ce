"""Int8 convolutions against torch on the same codes, and on the embedded model's pictures."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from onnx import helper, numpy_helper

import edgedit
from edgedit.converters.passes.int8_convolution import Int8Convolution, MapRanges
from edgedit.converters.training.evaluate import held_out_prompts

MODEL = Path(__file__).parents[3] / "models" / "scenes"


def convolution(outputs: int, inputs: int, kernel: int, stride: int, biased: bool) -> onnx.ModelProto:
    weights = {
        "c.weight": np.random.randint(-127, 128, (outputs, inputs, kernel, kernel)).astype(np.int8),
        "c.weight/scale": np.random.uniform(1e-4, 1e-3, outputs).astype(np.float32),
        **({"c.bias": np.random.randn(outputs).astype(np.float32)} if biased else {}),
    }
    nodes = [
        helper.make_node("DequantizeLinear", ["c.weight", "c.weight/scale"], ["w"], name="c.weight/dequantize", axis=0),
        helper.make_node(
            "Conv", ["x", "w", *(["c.bias"] if biased else [])], ["y"], name="c", pads=[1] * 4, strides=[stride] * 2
        ),
    ]
    maps = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, None, None, None]) for name in "xy"]
    stored = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "g", maps[:1], maps[1:], stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)


@pytest.mark.parametrize("biased", [True, False])
def test_a_convolution_agrees_with_torch_on_the_same_codes(biased: bool, tmp_path: Path) -> None:
    outputs, inputs, kernel, stride = (random.randint(3, 70), random.randint(3, 70), random.randint(1, 4), 1)
    stride = random.randint(1, 2)
    proto = convolution(outputs, inputs, kernel, stride, biased)
    stored = {value.name: numpy_helper.to_array(value) for value in proto.graph.initializer}
    weight = torch.from_numpy(stored["c.weight"] * stored["c.weight/scale"][:, None, None, None]).double()
    bias = torch.from_numpy(stored["c.bias"].copy()).double() if biased else None
    x = torch.nn.functional.silu(3 * torch.randn(1, inputs, random.randint(4, 30), random.randint(4, 30)))
    step = float(x.max() - x.min()) / 255
    zero = round(float(-x.min()) / step)
    rounded = ((torch.round(x / step) + zero).clamp(0, 255) - zero).double() * step
    wanted = torch.nn.functional.conv2d(rounded, weight, bias, stride=stride, padding=1).numpy()
    ranges = MapRanges((float(x.min()), float(x.max())), (min(0.0, wanted.min()), max(0.0, wanted.max())))
    model = ir.from_proto(proto)
    change = Int8Convolution({"c": ranges})
    assert change(model).modified
    assert change.changes == 1
    assert "Conv" not in {node.op_type for node in model.graph}
    ir.save(model, tmp_path / "c.onnx")
    session = ort.InferenceSession(str(tmp_path / "c.onnx"), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": x.numpy()})
    # Half a step of the output, half a step of the bias, and one more where a value lies between two codes.
    out_step = (ranges.output[1] - ranges.output[0]) / 255
    assert np.abs(found - wanted).max() <= 1.01 * out_step
    assert np.abs(found - wanted).mean() <= 0.3 * out_step


def test_a_convolution_of_which_nothing_is_known_stays_as_it_is() -> None:
    model = ir.from_proto(convolution(8, 8, 3, 1, True))
    assert not Int8Convolution({"other": MapRanges((0.0, 1.0), (0.0, 1.0))})(model).modified


@pytest.fixture(scope="module")
def w8a8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("w8a8")
    texts = "\n".join(prompt.text for prompt in held_out_prompts(6, seed=5))
    (place / "prompts.txt").write_text(texts + "\n")
    edgedit.convert(
        MODEL,
        place / "w8a8.edgedit",
        dtype="w8a8",
        calibration=str(place / "prompts.txt"),
        components=("text_encoder", "transformer", "decoder"),
        measure=False,
    )
    return place / "w8a8.edgedit"


def test_the_embedded_decoder_keeps_40_db_and_its_tiles_give_the_whole(w8a8: Path) -> None:
    ratios = []
    with edgedit.load() as pipe, edgedit.load(w8a8) as quantized:
        for prompt in held_out_prompts(6, seed=random.randrange(2**31)):
            latents = pipe.generate(prompt.text, seed=prompt.seed, steps=6, decode=False).latents
            whole = quantized.decode(latents, output="array")
            ratios.append(4 / np.square(whole - pipe.decode(latents, output="array")).mean())
            tiled = quantized.decode(latents, output="array", tiling="exact", tile_size=64)
            # Where a value lies between two codes a tile may get the other one: still less than what int8 loses.
            assert 10 * np.log10(4 / np.square(tiled - whole).mean()) >= 50, prompt
    assert 10 * np.log10(ratios).mean() >= 40


def test_the_record_says_what_was_measured(w8a8: Path) -> None:
    record = json.loads((w8a8 / "quantization" / "decoder.json").read_text())
    taken = record["maps"]["layers"]
    assert taken
    assert record["maps"]["psnr_db"] >= 45
    assert set(taken) <= set(record["maps"]["alone_db"])
    for name, layer in record["layers"].items():
        assert (name in taken) == ("activations" in layer)
        if name in taken:
            assert layer["kind"] == "convolution"
            assert all(low <= 0 <= high and low < high for low, high in taken[name].values())


def test_a_decoder_in_int8_is_refused_without_calibration(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text('[decoder]\n"*" = {bits = 8, activations = "int8"}\n')
    with pytest.raises(edgedit.EdgeditError, match="need calibration; add --calibration self"):
        edgedit.convert(MODEL, tmp_path / "x.edgedit", dtype=str(recipe), measure=False)
    assert not (tmp_path / "x.edgedit").exists()
