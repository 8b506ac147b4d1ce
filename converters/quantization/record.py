"""What a bundle says of its quantized components: `quantization/COMPONENT.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edgedit.converters.passes.int8_convolution import MapRanges
from edgedit.converters.passes.quantize import Encode, plain_encode
from edgedit.converters.quantization.form import Form
from edgedit.converters.quantization.layers import Layer
from edgedit.converters.quantization.plot import plot
from edgedit.converters.quantization.recipe import Recipe

__all__ = ["FOLDER", "Quantization", "stored_bytes", "write_record"]

FOLDER = "quantization"


@dataclass(frozen=True)
class Quantization:
    """How one component is quantized.

    Attributes:
        recipe: the recipe that the forms come from.
        forms: by layer name, fitted to the layers.
        encode: what rounds the weights.
        facts: what else the record says: calibration, sensitivity.
        input_peaks: largest absolute value of the inputs of layers that compute in int8, where calibration saw them.
        map_ranges: what convolutions that compute in int8 take and give.
    """

    recipe: Recipe
    forms: Mapping[str, Form]
    encode: Encode = plain_encode
    facts: Mapping[str, Any] = field(default_factory=dict)
    input_peaks: Mapping[str, float] = field(default_factory=dict)
    map_ranges: Mapping[str, MapRanges] = field(default_factory=dict)

    @property
    def int8_layers(self) -> frozenset[str]:
        """Layers that compute in int8."""
        return frozenset(name for name, form in self.forms.items() if form.int8_activations)

    @property
    def per_token_layers(self) -> frozenset[str]:
        """Those of them whose tokens are rounded with a range each."""
        return frozenset(name for name in self.int8_layers if self.forms[name].per_token)

    @property
    def float32_layers(self) -> frozenset[str]:
        """Layers that stay as they are."""
        return frozenset(name for name, form in self.forms.items() if form.bits == 32)


def stored_bytes(form: Form, layer: Layer) -> int:
    """Bytes that a layer's weight takes on disk in a form that is fitted to it; scales of 1,024 or more are float16."""
    size = int(np.prod(layer.shape, dtype=np.int64))
    mask = 0
    if form.sparsity is not None:
        # A bit for each weight, or for each entry of a palette, says which are stored.
        mask = -(-size // (8 * (form.width if form.format == "palette" else 1)))
        size -= round(form.sparsity * size)
    if not form.is_coded:
        return size * form.bits // 8 + mask
    outputs = layer.shape[1] if layer.kind == "matrix" else layer.shape[0]
    scales = outputs if form.block is None or form.int8_activations else size // form.block
    return (
        size * form.bits // 8
        + mask
        + scales * (4 if scales < 1024 else 2)
        + (form.width * 2**form.index_bits if form.format == "palette" else 0)
        + (size // form.block if form.block is not None and form.int8_activations else 0)
    )


def write_record(root: Path, component: str, quantization: Quantization, layers: Mapping[str, Layer]) -> None:
    """Write the record of one component into the bundle, and where matplotlib is there the curve of a budget."""
    place = root / FOLDER / f"{component}.json"
    place.parent.mkdir(exist_ok=True)
    document = {
        "recipe": quantization.recipe.name,
        "rules": {rule.pattern: rule.form.as_dict() for rule in quantization.recipe.rules.get(component, ())},
        "layers": {
            name: {
                "kind": layer.kind,
                "shape": list(layer.shape),
                "bytes": stored_bytes(quantization.forms[name], layer),
                **quantization.forms[name].as_dict(),
            }
            for name, layer in layers.items()
        },
        **quantization.facts,
    }
    place.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    if "sensitivity" in quantization.facts:
        plot(quantization.facts["sensitivity"], place.with_suffix(".png"))
