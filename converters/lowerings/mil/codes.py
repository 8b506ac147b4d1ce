"""Weights that a recipe has rounded, in MIL: the quantizer's own codes behind the `constexpr_*` that open them.

| Form | Operators |
|---|---|
| 8 bits a channel, 4 bits a block | `blockwise_shift_scale` of int8 or int4 |
| 3 and 2 bits a block | `lut_to_dense` with the codes themselves as entries, then `blockwise_shift_scale` |
| palette of int8 entries | `lut_to_dense`, then `blockwise_shift_scale` with a scale a channel |
| zeros | the same as `lut_to_sparse` and `sparse_blockwise_shift_scale`, then `sparse_to_dense` |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgedit.converters.quantization.form import Form
from edgedit.converters.quantization.packing import unpack

__all__ = ["Coded", "decompress"]

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Coded:
    """One weight as a recipe stores it.

    Attributes:
        form: fitted to the layer.
        kind: the layer's: "matrix" [in, out], "convolution" [out, …] or "table" [rows, width].
        load: makes the quantizer's arrays, by the end of their name.
        input_scale: one step of the layer's input in int8; None where the input is not rounded.
    """

    form: Form
    kind: str
    load: Callable[[], Mapping[str, np.ndarray]]
    input_scale: float | None = None

    def arrays(self, real: type[np.floating[Any]], types: Any, axes: int) -> Arrays:
        """Arguments of the operators, for a weight of `axes` axes, outputs first.

        Args:
            real: type of the weight that is computed with.
            types: coremltools' types, which has those narrower than a byte.
        """
        stored = {name: np.asarray(array) for name, array in self.load().items()}
        if "sign" in stored:
            stored[""] = unpack(stored.pop(""), stored.pop("sign"))
        parts = {name: self._turned(array, axes) for name, array in stored.items() if name != "entries"}
        codes = parts.pop("")
        if not self.form.is_coded:
            return _sparse(codes.astype(real), codes != 0, types)
        found = {"scale": self._scale(parts, codes.ndim).astype(real)}
        if self.form.format == "palette":
            entries, kind = stored["entries"], types.string_to_nptype(f"uint{self.form.index_bits}")
            found["lut"] = entries.reshape(*[1] * axes, *entries.shape)
            if "mask" in parts:
                return found | _sparse(codes.astype(kind), parts["mask"] != 0, types)
            return found | {"indices": codes.astype(kind)}
        if self.form.sparsity is not None:
            return found | _sparse(codes, codes != 0, types)
        if self.form.bits in (2, 3):
            low = 1 << (self.form.bits - 1)
            found["lut"] = np.arange(-low, low, dtype=np.int8).reshape(*[1] * axes, -1, 1)
            kind = types.string_to_nptype(f"uint{self.form.bits}")
            return found | {"indices": (codes.astype(np.int16) + low).astype(np.uint8).astype(kind)}
        return found | {"data": codes.astype(types.np_int4_dtype if self.form.bits == 4 else np.int8)}

    def _turned(self, array: np.ndarray, axes: int) -> np.ndarray:
        """Outputs first, and ones for the axes of a kernel that a matrix has not."""
        if self.kind == "matrix" and array.ndim == 2:
            array = array.T
        return np.ascontiguousarray(array).reshape(*array.shape, *[1] * (axes - array.ndim))

    def _scale(self, parts: Arrays, axes: int) -> np.ndarray:
        """[out, blocks, 1 …]."""
        scale = parts["scale"].astype(np.float32)
        if "multiplier" in parts:
            scale = parts["multiplier"] * scale.reshape(-1, *[1] * (axes - 1))
        return scale if scale.ndim == axes and scale.shape[0] > 1 else scale.reshape(-1, *[1] * (axes - 1))


def _sparse(values: np.ndarray, kept: np.ndarray, types: Any) -> Arrays:
    return {"nonzero": values[kept], "mask": kept.astype(np.uint8).astype(types.string_to_nptype("uint1"))}


def decompress(mb: Any, values: Mapping[str, Any], name: Callable[[], str]) -> Any:
    """The weight as a MIL value, from the constants that hold `Coded.arrays`; `name` gives names not yet used."""
    vector: dict[str, Any] = {}
    if "lut" in values and values["lut"].shape[-1] > 1:
        vector["vector_axis"] = np.int32(0)
    if "mask" not in values:
        data = values.get("data")
        if data is None:
            data = mb.constexpr_lut_to_dense(indices=values["indices"], lut=values["lut"], name=name(), **vector)
        return mb.constexpr_blockwise_shift_scale(data=data, scale=values["scale"], name=name())
    mask, data = values["mask"], values["nonzero"]
    if "lut" in values:
        mask, data = mb.constexpr_lut_to_sparse(
            indices_mask=mask, indices_nonzero_data=data, lut=values["lut"], name=name(), **vector
        )
    if "scale" in values:
        mask, data = mb.constexpr_sparse_blockwise_shift_scale(
            data_mask=mask, nonzero_data=data, scale=values["scale"], name=name()
        )
    return mb.constexpr_sparse_to_dense(nonzero_data=data, mask=mask, name=name())
