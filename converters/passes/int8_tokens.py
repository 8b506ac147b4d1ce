"""Matrix products whose inputs are rounded to int8 token by token, for ONNX Runtime's CPU provider.

One range for a whole tensor is wasted on tokens much smaller than the largest one. Here each row has its own scale, the
largest magnitude over 127, as ViDiT-Q rounds activations. Codes are uint8 about 128: products of int8 with int8 take
several times as long on x86.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

__all__ = ["per_token_product"]

#: Rows smaller than this are zeros.
_LEAST = 1e-30

Make = Callable[..., ir.Value]
"""(operator, inputs, *attributes, domain="") → the output of a new node."""


def per_token_product(made: Make, x: ir.Value, codes: ir.Value, scales: ir.Value, bias: ir.Value | None) -> ir.Value:
    """x · (codes · scales) + bias, computed in int8.

    Args:
        made: makes a node.
        x: float32 [..., K].
        codes: int8 weights [K, N].
        scales: a scale for each output channel [N].
        bias: [N].
    """

    def constant(array: np.ndarray) -> ir.Value:
        return made("Constant", [], ir.AttrTensor("value", ir.tensor(array)))

    one, most = constant(np.array(1, np.float32)), constant(np.array(127, np.float32))
    centre, last = constant(np.array(128, np.uint8)), constant(np.array([-1]))
    largest = made("ReduceMax", [made("Abs", [x]), last], ir.AttrInt64("keepdims", 1))
    bounded = made("Max", [largest, constant(np.array(_LEAST, np.float32))])
    rounded = made("QuantizeLinear", [made("Mul", [x, made("Div", [most, bounded])]), one, centre])
    product = made("MatMulIntegerToFloat", [rounded, codes, one, scales, centre], domain="com.microsoft")
    y = made("Mul", [product, made("Div", [bounded, most])])
    return y if bias is None else made("Add", [y, bias])
