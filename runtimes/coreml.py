"""Core ML: packages of fixed sizes behind sessions that take any batch and any prompt that fits.

A package has one function for each picture size. A session finds the one that fits the inputs, evaluates a batch row by
row, and fills text up with tokens that the mask leaves out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgedit.device import cache_dir
from edgedit.errors import BundleError, InputError
from edgedit.manifest import Function, TensorSpec
from edgedit.runtimes.coreml_engine import CoremlEngine, Engine, InterpreterEngine, chained, require_macos

if TYPE_CHECKING:
    from edgedit.bundle import Bundle
    from edgedit.runtimes.base import RuntimeOptions

__all__ = ["CoremlRuntime", "CoremlSession"]

#: Sizes that a session fits to a function: rows are run one by one, text is filled up.
_FITTED = ("batch", "length")


class CoremlSession:
    """One component open on an engine.

    Args:
        inputs, outputs, functions: of the manifest.
        label: what messages call the component.
    """

    def __init__(
        self,
        engine: Engine,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        functions: Sequence[Function],
        label: str,
    ) -> None:
        self.engine, self.inputs, self.outputs, self.label = engine, inputs, outputs, label
        self.functions = tuple(functions)

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Evaluate the component once.

        Raises InputError for a size that the package was not made for, with those that it was.
        """
        wrong = set(inputs) ^ {spec.name for spec in self.inputs}
        if wrong:
            raise InputError(f"{self.label} takes {sorted(spec.name for spec in self.inputs)}; got {sorted(inputs)}")
        sizes = self._sizes(inputs)
        function = self._function(sizes)
        rows = [self._row(inputs, row, sizes, function) for row in range(sizes.get("batch", 1))]
        return {spec.name: np.concatenate([row[spec.name] for row in rows]) for spec in self.outputs}

    def close(self) -> None:
        """Free the weights. The session cannot be used afterwards."""
        self.engine.close()

    def _sizes(self, inputs: Mapping[str, np.ndarray]) -> dict[str, int]:
        """The value of every named size, from the inputs' shapes."""
        sizes: dict[str, int] = {}
        for spec in self.inputs:
            shape = np.shape(inputs[spec.name])
            fits = len(shape) == len(spec.shape)
            for name, size in zip(spec.shape, shape, strict=False):
                fits &= size == (name if isinstance(name, int) else sizes.setdefault(name, size))
            if not fits:
                raise InputError(f"{self.label}: {spec.name} must be {list(spec.shape)}, not {list(shape)}")
        return sizes

    def _function(self, sizes: Mapping[str, int]) -> Function:
        """The function of these sizes; of several, the one with the least room for text that is enough."""
        rigid = {name: size for name, size in sizes.items() if name not in _FITTED}
        found = [f for f in self.functions if all(f.sizes.get(name) == size for name, size in rigid.items())]
        if not found:
            there = "; ".join(_plain({n: s for n, s in f.sizes.items() if n in rigid}) for f in self.functions)
            raise InputError(
                f"{self.label} was not converted for Core ML at {_plain(rigid)} (only: {there}); "
                "convert it again with --size"
            )
        length = sizes.get("length", 0)
        roomy = sorted((f for f in found if f.sizes.get("length", 0) >= length), key=lambda f: f.sizes.get("length", 0))
        if not roomy:
            most = max(f.sizes.get("length", 0) for f in found)
            raise InputError(
                f"{self.label} takes at most {most} text tokens on Core ML, not {length}; shorten the prompt"
            )
        return roomy[0]

    def _row(
        self, inputs: Mapping[str, np.ndarray], row: int, sizes: Mapping[str, int], function: Function
    ) -> dict[str, np.ndarray]:
        length = sizes.get("length", 0)
        room = function.sizes.get("length", 0) - length
        given: dict[str, np.ndarray] = {}
        for spec in self.inputs:
            value = np.asarray(inputs[spec.name])
            if "batch" in spec.shape:
                value = value.take([row], axis=spec.shape.index("batch"))
            if "length" in spec.shape and room:
                value = np.pad(value, [(0, room if name == "length" else 0) for name in spec.shape])
            whole = value.dtype.kind in "iub"
            given[spec.name] = np.ascontiguousarray(value, np.int32 if whole else np.float32)
        found = self.engine.run(function.name, given)
        results: dict[str, np.ndarray] = {}
        for spec in self.outputs:
            if spec.name not in found:
                raise BundleError(f"{self.label}: the package gives no {spec.name}; convert the model again")
            value = found[spec.name].astype(np.dtype(spec.dtype), copy=False)
            cut = tuple(slice(0, length) if name == "length" else slice(None) for name in spec.shape)
            results[spec.name] = value[cut]
        return results


def _plain(sizes: Mapping[str, int]) -> str:
    return " ".join(f"{name} {size}" for name, size in sizes.items())


class CoremlRuntime:
    """Opens the `coreml` artefacts of a bundle: with Core ML on a Mac, with the interpreter where that is asked for."""

    name = "coreml"

    def __init__(self, bundle: Bundle, options: RuntimeOptions) -> None:
        for flag, given in (
            ("--threads", options.threads is not None),
            ("--provider", options.providers is not None),
            ("--graph-cache", options.graph_cache is not None),
            ("a memory limit", options.memory_limit is not None),
        ):
            if given:
                raise InputError(f"{flag} does not go with --backend coreml; leave it out")
        if options.emulate_fp16 and not options.interpreter:
            raise InputError("--emulate-fp16 is a mode of the interpreter; add --interpreter")
        if options.interpreter and options.compute_units is not None:
            raise InputError("the interpreter has no compute units; leave out --compute-units or --interpreter")
        if not options.interpreter:
            require_macos()
        self.bundle, self.options = bundle, options

    def open(self, component: str) -> CoremlSession:
        """Open a component. Raises BundleError when the bundle has no package for it or a damaged one."""
        entry = self.bundle.component(component)
        artefact = self.bundle.artefact(component, "coreml")
        label = f"{self.bundle.path.name}/{component}"
        if not artefact.functions:
            raise BundleError(f"{label}: the manifest does not say what sizes the package has; convert it again")
        packages = [self.bundle.path / path for path in artefact.chunks or (artefact.graph,)]
        engine = chained([(package, self._engine(package)) for package in packages])
        return CoremlSession(engine, entry.inputs, entry.outputs, artefact.functions, label)

    def _engine(self, package: Path) -> Engine:
        if self.options.interpreter:
            return InterpreterEngine(package, emulate_fp16=self.options.emulate_fp16)
        return CoremlEngine(package, compute_units=self.options.compute_units or "all", cache=cache_dir() / "coreml")

    def describe(self) -> dict[str, str]:
        """Backend name and what evaluates it."""
        if self.options.interpreter:
            rounding = ", float16 emulated" if self.options.emulate_fp16 else ""
            return {"backend": "coreml", "engine": f"numpy interpreter{rounding}"}
        return {"backend": "coreml", "engine": "Core ML", "compute_units": self.options.compute_units or "all"}
