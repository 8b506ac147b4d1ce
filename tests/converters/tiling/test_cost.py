"""What graphs are said to take at their peak, where ONNX Runtime does otherwise than one operator after the other."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from edgedit.converters.tiling.cost import cost_of
from edgedit.converters.tiling.positions import infer_layouts

#: Bytes of one pixel of a map of 32 channels.
MAP = 32 * 4


def maps_at_the_peak(body: str, channels: int = 32) -> float:
    """Maps of 32 channels that `body` takes beside its input x, a map of 32 channels."""
    signature = f"g (float[1, 32, h, w] x) => (float[1, {channels}, h, w] y)"
    text = f'<ir_version: 10, opset_import: ["" : 23]> {signature} {{{body}}}'
    model = ir.from_proto(onnx.parser.parse_model(text))
    free = {v.name: v for node in model.graph for v in node.inputs if v is not None and v.name in ("w", "narrow")}
    for name, value in free.items():
        value.const_value = ir.tensor(np.zeros((32 if name == "w" else 3, 32, 3, 3), np.float32), name=name)
        value.shape = value.const_value.shape
        value.type = ir.TensorType(ir.DataType.FLOAT)
        model.graph.initializers[name] = value
    layouts = infer_layouts(model, 1)
    return cost_of(list(model.graph), model.graph.outputs, layouts, Fraction(1)).workspace / MAP


CONV = "Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]>"


@pytest.mark.parametrize(
    ("body", "maps"),
    [
        # Elementwise work on a fresh map is done in place while shapes have names.
        ("a = Neg(x) y = Sqrt(a)", 1),
        # A convolution reads a copy of its input in blocks of channels, and its result is copied back.
        (f"y = {CONV}(x, w)", 2),
        # Between two convolutions nothing is copied.
        (f"a = {CONV}(x, w) y = {CONV}(a, w)", 2),
        # Three channels make no block.
        (f"y = {CONV}(x, narrow)", 3 / 32),
        # SiLU is one operator with one result, not a sigmoid and a product.
        (f"a = {CONV}(x, w) s = Sigmoid(a) y = Mul(a, s)", 2),
    ],
)
def test_peaks_are_those_of_the_kernels(body: str, maps: float) -> None:
    assert maps_at_the_peak(body, 3 if "narrow" in body else 32) == maps
