"""What the rules of the MIL table share: types, constants, casts, and values that wait for the node that uses them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edgedit.converters.lowerings.driver import NodeInfo, Quantized, Static, Weight, dense, is_static
from edgedit.converters.lowerings.mil.codes import Coded, decompress
from edgedit.converters.lowerings.mil.compression import SMALLEST, Palette, Scaled, WeightForm
from edgedit.runtimes.coreml_engine import coremltools

__all__ = ["FLOAT16_MAX", "MASK", "MilBuilder", "Pending", "Rule", "rules", "shape_of"]

FLOAT16_MAX = 65504.0

#: What stands for a masking constant that float16 cannot hold. The score of a real token is lost beside it, and two of
#: them still add up to a finite number.
MASK = 30000.0

KEPT = "the recipe keeps its weight in 32 bits"

#: Constants below this many values are written in the type that is computed in, larger ones in the stored type.
_SMALL = 1024

Var = Any
Rule = Callable[..., Any]
_RULES: dict[str, Rule] = {}


def rules(*operators: str) -> Callable[[Rule], Rule]:
    """Register a function `rule(builder, node, *inputs)` for these ONNX operators."""

    def register(rule: Rule) -> Rule:
        for operator in operators:
            _RULES[operator] = rule
        return rule

    return register


@dataclass(eq=False)
class Pending:
    """A value that is written when it is used, since its user may have a shorter form for it.

    Attributes:
        kind: "broadcast", "reshape", "channels", "product", "sigmoid" or "tokens".
        base: the MIL value that it is made of.
        make: writes it; called at most once.
        first: writes it with channels first, in the Neural Engine's form.
        detail: the order of "channels", the weight of "product".
    """

    kind: str
    shape: tuple[int, ...]
    base: Any
    make: Callable[[], Var]
    first: Callable[[], Var] | None = None
    detail: Any = None
    written: Var = None

    def write(self) -> Var:
        """The MIL value."""
        if self.written is None:
            self.written = self.make()
        return self.written


def shape_of(value: Any) -> tuple[int, ...]:
    """Shape of a MIL, pending or static value."""
    return tuple(int(size) for size in value.shape)


@dataclass
class MilBuilder:
    """Writes one component's functions; one builder serves all sizes, so that they share their arrays.

    Attributes:
        half: compute in float16 outside the islands.
        islands: node name → why it is computed in float32; rules add to it when a constant does not fit into float16.
        store_half: keep the weights of islands as float16 all the same (`constexpr_cast` widens them when the model is
            loaded).
        fused_attention: use `scaled_dot_product_attention`; otherwise matmul, softmax, matmul.
        form: how large weights of linear layers and convolutions are stored; None leaves them as they are.
        codes: weights that a recipe has rounded, by name.
        keep32: weights that a recipe keeps in 32 bits: what is multiplied with them is an island.
        neural: the Neural Engine's form: at most four axes, tokens as maps of one row, 1×1 convolutions for layers.
        score_bytes: attention written out is cut along the queries when its scores would take more than this.
        norms: filled by the rules: nodes whose inner sums are in float32 while their results are not.
        origins: MIL name → what it was made from, the name of a node for operations.
    """

    half: bool = False
    islands: dict[str, str] = field(default_factory=dict)
    store_half: bool = False
    fused_attention: bool = True
    form: WeightForm | None = None
    codes: Mapping[str, Coded] = field(default_factory=dict)
    keep32: frozenset[str] = frozenset()
    neural: bool = False
    score_bytes: int = 256 << 20
    norms: dict[str, str] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        library = coremltools()
        from coremltools.converters.mil import Builder
        from coremltools.converters.mil.mil import types

        self.library, self.mb, self.types = library, Builder, types
        self._arrays: dict[tuple[str, str], np.ndarray] = {}
        self._too_large: dict[str, bool] = {}
        self._compressed: dict[tuple[str, str], dict[str, np.ndarray]] = {}
        self.begin()

    def begin(self) -> None:
        """Forget the values of the function before."""
        self._casts: dict[tuple[Any, str], Var] = {}
        self.kept: dict[tuple[Any, str], Var] = {}
        self._constants: dict[tuple[str, str], Var] = {}
        self._names: dict[str, int] = {}

    @property
    def table(self) -> Mapping[str, Rule]:
        """The rules, for the driver."""

        def bound(rule: Rule) -> Rule:
            return lambda node, *inputs: rule(self, node, *inputs)

        return {operator: bound(rule) for operator, rule in _RULES.items()}

    def name(self, text: str) -> str:
        """A MIL name, used once."""
        plain = re.sub(r"\W", "_", text).strip("_") or "value"
        plain = f"n_{plain}" if plain[0].isdigit() else plain
        count = self._names.get(plain, 0)
        self._names[plain] = count + 1
        found = f"{plain}_{count}" if count else plain
        self.origins[found] = text
        return found

    def real(self, node: NodeInfo, *values: Any) -> str:
        """The float type that `node` computes in: "fp16", or "fp32" in an island.

        A constant among `values` that float16 cannot hold makes the node an island, unless it is a mask.
        """
        if not self.half or node.name in self.islands:
            return "fp32"
        if any(getattr(value, "name", None) in self.keep32 for value in values if is_static(value)):
            self.islands[node.name] = KEPT
            return "fp32"
        for value in values:
            if value is not None and is_static(value) and self.overflows(value):
                self.islands[node.name] = "a constant is too large for float16"
                return "fp32"
        return "fp16"

    def overflows(self, value: Static) -> bool:
        owner = getattr(value, "name", None)
        if owner is None:
            return _too_large(value)
        if owner not in self._too_large:
            self._too_large[owner] = _too_large(value)
        return self._too_large[owner]

    def is_float(self, value: Any) -> bool:
        """Whether a value holds floating point numbers."""
        if isinstance(value, Pending):
            return value.base is None or self.is_float(value.base)
        if isinstance(value, Quantized):
            return True
        if isinstance(value, Weight):
            return bool(value.dtype.is_floating_point())
        if is_static(value):
            return bool(np.asarray(value).dtype.kind not in "iub")
        return bool(self.types.is_float(value.dtype))

    def var(self, value: Any, real: str | None = None) -> Var:
        """`value` as a MIL value; floats in the type `real` ("fp32", "fp16", or None for the type that they have)."""
        if isinstance(value, Pending):
            value = value.write()
        if is_static(value):
            return self.constant(value, real or "fp32")
        if real is None or not self.types.is_float(value.dtype):
            return value
        return self.cast(value, real)

    def cast(self, value: Var, real: str) -> Var:
        """A MIL value as another type, converted once however often it is asked for."""
        if self.types.builtin_to_string(value.dtype) == real:
            return value
        key = (value, real)
        if key not in self._casts:
            self._casts[key] = self.mb.cast(x=value, dtype=real, name=self.name(f"{value.name}_to_{real}"))
        return self._casts[key]

    def array(self, value: Static, change: Callable[[np.ndarray], np.ndarray] | None, key: str) -> np.ndarray:
        """A static value as the array that is written, `change` applied; the same object for all functions."""
        owner = getattr(value, "name", None)
        if owner is None:
            return _plain(dense(value), change)
        if (owner, key) not in self._arrays:
            array = _plain(dense(value), change)
            if array.dtype == np.float32 and self.half and _fits(array) and (self.store_half or key.endswith("fp16")):
                array = array.astype(np.float16)
            self._arrays[owner, key] = array
        return self._arrays[owner, key]

    def constant(
        self, value: Static, real: str, change: Callable[[np.ndarray], np.ndarray] | None = None, form: str = ""
    ) -> Var:
        """A static value as a MIL constant.

        Floats become `real`, whole numbers int32. `change` is applied to the array first and named by `form`.
        """
        owner = getattr(value, "name", None)
        key = f"{form}{shape_of(value)}:{real}"
        if owner is not None and (owner, key) in self._constants:
            return self._constants[owner, key]
        array = self.array(value, change, key)
        name = self.name(owner or "constant")
        if array.dtype.kind == "f" and real == "fp16" and array.dtype != np.float16:
            array = _narrow(array)
        if array.dtype.kind == "f" and real == "fp32" and array.dtype == np.float16:
            if array.size >= _SMALL:
                stored = self._shared(self.mb.const(val=array, name=self.name(f"{name}_stored")), owner, key)
                result = self.mb.constexpr_cast(source_val=stored, output_dtype="fp32", name=name)
                return self._remember(owner, key, result)
            array = array.astype(np.float32)
        return self._remember(owner, key, self._shared(self.mb.const(val=array, name=name), owner, key))

    @staticmethod
    def _shared(constant: Var, owner: str | None, key: str) -> Var:
        """Functions that use one weight in one form share its bytes in the file: coremltools goes by this mark."""
        if owner is not None:
            constant.op.weight_id = f"{owner}:{key}"
        return constant

    def _remember(self, owner: str | None, key: str, result: Var) -> Var:
        if owner is not None:
            self._constants[owner, key] = result
        return result

    def kernel(
        self, value: Static, real: str, change: Callable[[np.ndarray], np.ndarray] | None = None, form: str = ""
    ) -> Var:
        """The weight [out, in, …] of a linear layer or a convolution, in the form that is asked for.

        `change` brings the array into that order and is named by `form`.
        """
        owner = getattr(value, "name", None)
        change = change or np.asarray
        if isinstance(value, Quantized):
            return self._written(value.name, f"{form}:{real}:codes", lambda: self._quantized(value, real, change))
        coded = self.codes.get(owner or "")
        if coded is not None:
            axes = change(np.broadcast_to(np.float32(0), shape_of(value))).ndim
            return self._written(
                str(owner), f"{form}:{real}:recipe", lambda: coded.arrays(self.numpy_type(real), self.types, axes)
            )
        small = int(np.prod(shape_of(value))) < SMALLEST
        if self.form is None or owner is None or small:
            return self.constant(value, real, change, form)
        chosen = self.form
        key = f"{form}{shape_of(value)}:{real}:{chosen.name}"
        return self._written(
            owner, key, lambda: self._arrays_of(chosen.compress(change(dense(value).astype(np.float32))), real)
        )

    @staticmethod
    def numpy_type(real: str) -> type[np.floating[Any]]:
        """numpy's name for a float type."""
        return np.float16 if real == "fp16" else np.float32

    def _written(self, owner: str, key: str, make: Callable[[], dict[str, np.ndarray]]) -> Var:
        """What decompresses the arrays that `make` gives; all functions of a package share them."""
        if (owner, key) in self._constants:
            return self._constants[owner, key]
        if (owner, key) not in self._compressed:
            self._compressed[owner, key] = make()
        stored = {
            part: self._shared(self.mb.const(val=array, name=self.name(f"{owner}_{part}")), owner, f"{key}:{part}")
            for part, array in self._compressed[owner, key].items()
        }
        if "offset" in stored:
            result = self.mb.constexpr_blockwise_shift_scale(**stored, name=self.name(owner))
        elif "scale" in stored or "mask" in stored:
            result = decompress(self.mb, stored, lambda: self.name(owner))
        else:
            result = self.mb.constexpr_lut_to_dense(**stored, name=self.name(owner))
        return self._remember(owner, key, result)

    def _arrays_of(self, weight: Scaled | Palette, real: str) -> dict[str, np.ndarray]:
        float_type = self.numpy_type(real)
        if isinstance(weight, Scaled):
            kind = self.types.np_int4_dtype if weight.bits == 4 else np.dtype(np.int8)
            return {"data": weight.codes.astype(kind), "scale": weight.scale.astype(float_type)}
        kind = self.types.string_to_nptype(f"uint{weight.bits}")
        return {"indices": weight.indices.astype(kind), "lut": weight.table.astype(float_type)}

    def _quantized(
        self, value: Quantized, real: str, change: Callable[[np.ndarray], np.ndarray]
    ) -> dict[str, np.ndarray]:
        """Codes, scales and zero points as they are. `change` moves axes."""
        names = {
            (4, True): self.types.np_int4_dtype,
            (4, False): self.types.np_uint4_dtype,
            (8, True): np.dtype(np.int8),
            (8, False): np.dtype(np.uint8),
        }
        if (value.bits, value.signed) not in names:
            raise ValueError(f"{value.bits}-bit codes of {value.name} have no Core ML form that holds them as they are")
        kind = names[value.bits, value.signed]
        parts = {
            "data": np.ascontiguousarray(change(value.codes)).astype(kind),
            "scale": np.ascontiguousarray(change(value.scale)).astype(self.numpy_type(real)),
        }
        if value.zero_point is not None:
            parts["offset"] = np.ascontiguousarray(change(value.zero_point)).astype(kind)
        return parts

    def input_of(self, weight: Static, x: Var) -> Var:
        """The input of a layer, rounded to int8 and back where the layer computes in int8: Core ML makes one product
        of integers of that and the codes."""
        coded = self.codes.get(getattr(weight, "name", None) or "")
        if coded is None or coded.input_scale is None:
            return x
        key = (x, f"int8 {coded.input_scale}")
        if key not in self._casts:
            scale = self.numpy_type(self.types.builtin_to_string(x.dtype))(coded.input_scale)
            codes = self.mb.quantize(input=x, scale=scale, output_dtype="int8", name=self.name(f"{x.name}_int8"))
            self._casts[key] = self.mb.dequantize(input=codes, scale=scale, name=self.name(f"{x.name}_rounded"))
        return self._casts[key]


def _plain(array: np.ndarray, change: Callable[[np.ndarray], np.ndarray] | None) -> np.ndarray:
    if change is not None:
        array = change(array)
    if array.dtype.kind == "b":
        return np.ascontiguousarray(array)
    if array.dtype.kind in "iu":
        return np.ascontiguousarray(array, np.int32)
    return np.ascontiguousarray(array, np.float16 if array.dtype == np.float16 else np.float32)


def _fits(array: np.ndarray) -> bool:
    return array.size == 0 or float(np.abs(array).max()) <= FLOAT16_MAX


def _too_large(value: Static) -> bool:
    """Whether a constant overflows float16 and is no mask (a single value far below zero)."""
    if isinstance(value, Quantized):
        return not _fits(value.scale)
    array = dense(value)
    if array.dtype.kind != "f" or _fits(array):
        return False
    return not bool(np.all((np.abs(array) <= FLOAT16_MAX) | (array <= -1e9)))


def _narrow(array: np.ndarray) -> np.ndarray:
    return np.where(array <= -1e9, -MASK, array).astype(np.float16)
