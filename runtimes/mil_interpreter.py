"""Evaluates a Core ML ML Program with numpy, on any OS: the reference runtime for what the Core ML lowering writes.

What it proves is that the program and the weights on disk compute what they should, bit-true to the stored weights.
What Apple's compiler and processors make of them (order of sums, placement, fused kernels) it cannot show.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgedit.errors import BundleError, InputError
from edgedit.runtimes.mil_constants import DECOMPRESS
from edgedit.runtimes.mil_kernels import KERNELS
from edgedit.runtimes.mil_package import Blob, MilFunction, MilOperation, MilPackage, MilType, read_package

__all__ = ["MilInterpreter"]

FLOAT16_MAX = 65504.0

#: Weights are kept between runs, as float32, when they take at most so many bytes.
KEEP_BELOW = 2 << 30


class MilInterpreter:
    """A package, open.

    Attributes:
        package: what is on disk.
        rounded: names of the operations whose results are rounded with `emulate_fp16`; None for all of them.
        overflows: operation → largest magnitude, for values that the program declares float16 and that it cannot hold,
            over all runs so far.

    Args:
        package: the `.mlpackage`.
        emulate_fp16: round every value that the program declares float16, as a float16 processor with float32
            accumulators does; otherwise values are the exact ones of the stored weights.

    Raises:
        BundleError: not a whole package, or an operator that is not known here, named.
    """

    def __init__(self, package: str | Path | MilPackage, *, emulate_fp16: bool = False) -> None:
        self.package = package if isinstance(package, MilPackage) else read_package(package)
        self.emulate_fp16 = emulate_fp16
        self.rounded: frozenset[str] | None = None
        self.overflows: dict[str, float] = {}
        for function in self.package.functions.values():
            for operation in function.operations:
                if operation.kind not in KERNELS and operation.kind not in DECOMPRESS and operation.kind != "cast":
                    raise BundleError(
                        f"{self.package.path}: the interpreter has no operator {operation.kind} "
                        f"(operation {operation.name}); run the package on a Mac"
                    )
        self._kept: dict[Any, np.ndarray] = {}
        self._keep = _weight_bytes(self.package) <= KEEP_BELOW

    def run(self, inputs: Mapping[str, Any], function: str | None = None) -> dict[str, np.ndarray]:
        """Evaluate one function, the package's default when none is named.

        Raises:
            InputError: no such function, or inputs of other names or shapes than it takes.
            BundleError: the weights are damaged, or the program contradicts itself.
        """
        name = function or self.package.default
        if name not in self.package.functions:
            raise InputError(f"{self.package.path.name} has no function {name}; it has: {', '.join(self.functions)}")
        program = self.package.functions[name]
        values = self._inputs(program, inputs)
        last = _last_uses(program)
        for index, operation in enumerate(program.operations):
            for (output, kind), result in zip(operation.outputs, self._evaluate(operation, values), strict=True):
                values[output] = self._declared(operation, kind, result)
            for used in last.get(index, ()):
                values.pop(used, None)
        return {output: np.ascontiguousarray(self._plain(values[output])) for output in program.outputs}

    @property
    def functions(self) -> list[str]:
        """Names of the package's functions."""
        return list(self.package.functions)

    def _inputs(self, program: MilFunction, inputs: Mapping[str, Any]) -> dict[str, Any]:
        if set(inputs) != set(program.inputs):
            raise InputError(f"{self.package.path.name} takes {sorted(program.inputs)}; got {sorted(inputs)}")
        values: dict[str, Any] = {}
        for name, kind in program.inputs.items():
            array = np.asarray(inputs[name])
            if tuple(array.shape) != kind.shape:
                raise InputError(
                    f"{self.package.path.name}: {name} must have the shape {list(kind.shape)}, not {list(array.shape)}"
                )
            values[name] = array.astype(np.float32 if kind.dtype.startswith("fp") else kind.dtype)
        return values

    def _evaluate(self, operation: MilOperation, values: Mapping[str, Any]) -> list[Any]:
        if operation.kind in DECOMPRESS:
            return self._constant(operation, values)
        arguments = {name: self._argument(value, values) for name, value in operation.inputs.items() if name != "name"}
        try:
            with np.errstate(all="ignore"):
                if operation.kind == "cast":
                    result: Any = _cast(arguments["x"], str(arguments["dtype"]))
                else:
                    result = KERNELS[operation.kind](**arguments)
        except (TypeError, ValueError, IndexError, NotImplementedError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise BundleError(
                f"{self.package.path}: operation {operation.name} ({operation.kind}) cannot be evaluated: {reason}"
            ) from error
        return result if isinstance(result, list) else [result]

    def _constant(self, operation: MilOperation, values: Mapping[str, Any]) -> list[Any]:
        """A constant stays where it is until somebody uses it; what is decompressed is kept as one that is not."""
        if operation.kind == "const":
            return [operation.inputs["val"]]
        parts = {name: _load(values[v]) if isinstance(v, str) and v in values else _load(v)
                 for name, v in operation.inputs.items()}  # fmt: skip
        result = DECOMPRESS[operation.kind](**parts)
        return list(result) if isinstance(result, tuple) else [result]

    def _argument(self, value: Any, values: Mapping[str, Any]) -> Any:
        if isinstance(value, list):
            return [self._argument(item, values) for item in value]
        if isinstance(value, str):
            value = values.get(value, value)
        return self._plain(value)

    def _plain(self, value: Any) -> Any:
        """A value ready for a kernel: weights read, float16 as float32."""
        if isinstance(value, Blob):
            key = value.offset, value.type.dtype
            if key in self._kept:
                return self._kept[key]
            array = _wide(value.load())
            if self._keep:
                self._kept[key] = array
            return array
        return _wide(value) if isinstance(value, (np.ndarray, np.generic)) else value

    def _declared(self, operation: MilOperation, kind: MilType, result: Any) -> Any:
        """Check a result against the shape that the program declares, and round it where asked."""
        if not isinstance(result, (np.ndarray, np.generic)):
            return result
        if -1 not in kind.shape and tuple(result.shape) != kind.shape:
            raise BundleError(
                f"{self.package.path}: operation {operation.name} ({operation.kind}) gives the shape "
                f"{list(result.shape)}, the program declares {list(kind.shape)}"
            )
        if kind.dtype != "fp16" or operation.kind in DECOMPRESS:
            return result
        largest = float(np.abs(result).max(initial=0.0))
        if not largest <= FLOAT16_MAX:
            self.overflows[operation.name] = max(largest, self.overflows.get(operation.name, 0.0))
        if not self.emulate_fp16 or (self.rounded is not None and operation.name not in self.rounded):
            return result
        with np.errstate(over="ignore"):
            return np.asarray(result).astype(np.float16).astype(np.float32)


def _wide(value: Any) -> Any:
    return value.astype(np.float32) if value.dtype == np.float16 else value


def _load(value: Any) -> Any:
    return value.load() if isinstance(value, Blob) else value


def _cast(x: np.ndarray, dtype: str) -> np.ndarray:
    """To a MIL type; float16 stays float32 here, `_declared` rounds it."""
    kinds = {"fp16": np.float32, "fp32": np.float32, "int32": np.int32, "bool": np.bool_, "int16": np.int16,
             "uint16": np.uint16, "int8": np.int8, "uint8": np.uint8}  # fmt: skip
    return np.asarray(x).astype(kinds[dtype])


def _last_uses(program: MilFunction) -> dict[int, list[str]]:
    """Index of an operation → values that nobody uses after it."""
    last: dict[str, int] = {}
    for index, operation in enumerate(program.operations):
        for value in operation.inputs.values():
            for name in value if isinstance(value, list) else [value]:
                if isinstance(name, str):
                    last[name] = index
        for name, _ in operation.outputs:
            last.setdefault(name, index)
    found: dict[int, list[str]] = {}
    for name, index in last.items():
        if name not in program.outputs:
            found.setdefault(index, []).append(name)
    return found


def _weight_bytes(package: MilPackage) -> int:
    """Bytes of all weights as float32, those that functions share once."""
    sizes: Counter[int] = Counter()
    for function in package.functions.values():
        for operation in function.operations:
            for value in operation.inputs.values():
                if isinstance(value, Blob):
                    sizes[value.offset] = 4 * int(np.prod(value.type.shape, dtype=np.int64))
    return sum(sizes.values())
