"""Which forms of a recipe each backend holds as they are, and how those of three bits get to one that has no table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from edgedit.converters.quantization.encode import Encoded
from edgedit.converters.quantization.form import Form
from edgedit.converters.quantization.layers import Layer
from edgedit.converters.quantization.levels import LEVELS
from edgedit.converters.quantization.packing import unpack
from edgedit.errors import ConversionError

__all__ = ["check_backends", "in_whole_codes"]

Encode = Callable[[Layer, Form, npt.NDArray[np.float32]], Encoded]


def check_backends(
    recipe: str,
    component: str,
    forms: Mapping[str, Form],
    layers: Mapping[str, Layer],
    backends: Iterable[str],
    *,
    calibrated: bool,
) -> None:
    """Raises ConversionError for the first layer whose form a backend lacks, with what to do instead.

    Args:
        forms: fitted to the layers.
        calibrated: whether the ranges of inputs will be known.
    """
    for backend in backends:
        for name, form in forms.items():
            lack = _lack(backend, form, layers[name], calibrated)
            if lack is not None:
                raise ConversionError(f"{recipe}: [{component}] {name} ({form.describe()}): {lack}")


def _lack(backend: str, form: Form, layer: Layer, calibrated: bool) -> str | None:
    if backend != "onnx" and form.format in LEVELS:
        return f'format "{form.format}" is for ONNX Runtime only; use format = "int", or leave {backend} out'
    if backend == "coreml":
        if form.per_token:
            return 'Core ML has one range for an input, not one a token; use activations = "int8"'
        if form.int8_activations and layer.kind == "matrix" and not calibrated:
            return "Core ML rounds inputs to ranges that are known at conversion; add --calibration self"
        return None
    if form.sparsity is not None:
        return f"only Core ML stores no zeros, and this is for {backend}; leave sparsity out"
    if backend == "onnx":
        if form.format == "palette" and form.index_bits != 8:
            return f"ONNX stores a byte for each entry's number; set vector = {8 // form.bits}, or convert for coreml"
        return None
    if form.format == "palette":
        return 'MLX has no palettes; use format = "int"'
    if form.int8_activations:
        return "MLX computes with float activations; leave activations out"
    return None


def in_whole_codes(forms: Mapping[str, Form], encode: Encode) -> tuple[dict[str, Form], Encode]:
    """The same forms and codes, but that those of three bits come as numbers and not as planes of their bits.

    They are called 4-bit codes then, the narrowest type that ONNX has for them.
    """
    three = {name for name, form in forms.items() if form.bits == 3}

    def encode_whole(layer: Layer, form: Form, weight: npt.NDArray[np.float32]) -> Encoded:
        if layer.name not in three:
            return encode(layer, form, weight)
        # What does not fit into three bits was fitted to more before; the form that is stored is asked for again.
        found = encode(layer, forms[layer.name], weight)
        parts = dict(found.parts)
        parts[""] = unpack(np.asarray(parts.pop("")), np.asarray(parts.pop("sign")))
        return Encoded(parts, found.value)

    return {name: replace(form, bits=4) if name in three else form for name, form in forms.items()}, encode_whole
