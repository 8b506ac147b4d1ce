"""MLX: Apple's GPU on a Mac; on Linux its CPU build, which computes the same and is slow.

A component's graph is turned into MLX calls once for each set of shapes. On a GPU those are compiled, which fuses what
lies between the products; on a CPU compiling would call the C++ compiler for every shape, so they are replayed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgedit.errors import BundleError, ConversionError, InputError, RuntimeUnavailableError

if TYPE_CHECKING:
    from edgedit.bundle import Bundle
    from edgedit.runtimes.base import RuntimeOptions

__all__ = ["DEVICES", "MlxRuntime", "MlxSession", "has_gpu"]

#: What `providers` may name.
DEVICES = ("gpu", "cpu")
#: Shapes whose programs are kept open at once: a picture needs two or three, a server that draws every size many.
_PROGRAMS = 16
#: Of a memory limit, what MLX may keep in freed buffers for the next step.
_CACHE_SHARE = 4


def _mlx() -> Any:
    try:
        return import_module("mlx.core")
    except ImportError as error:
        wanted = "mlx" if sys.platform == "darwin" else "'mlx[cpu]'"
        raise RuntimeUnavailableError(f"MLX cannot be imported ({error}); run: pip install {wanted}") from error


def has_gpu() -> bool:
    """Whether MLX is installed here and has a GPU."""
    try:
        return bool(_mlx().is_available(_mlx().gpu))
    except RuntimeUnavailableError:
        return False


class MlxSession:
    """One component open in MLX. Weights are read from the file when they are first used.

    Args:
        graph, weights: the two files of the artefact.
        device: "gpu" or "cpu".
        compiled: fuse operations with `mx.compile`.

    Raises:
        BundleError: a file is damaged, or the two do not belong together.
    """

    def __init__(self, graph: Path, weights: Path, *, device: str, compiled: bool, label: str) -> None:
        mx = _mlx()
        lowering = import_module("edgedit.converters.lowerings.mlx")
        self.label = label
        self._mx, self._program = mx, lowering.Program
        self._device, self._compiled = getattr(mx, device), compiled
        self._description: Any = lowering.read(graph)
        try:
            with mx.stream(self._device):
                self._weights: dict[str, Any] = mx.load(str(weights))
        except Exception as error:
            raise BundleError(
                f"{label}: {weights.name} cannot be read ({_first_line(error)}); convert it again"
            ) from error
        if set(self._weights) != self._description.tensors:
            odd = sorted(set(self._weights) ^ self._description.tensors)[0]
            raise BundleError(f"{label}: {weights.name} and its graph disagree on {odd}; convert the model again")
        self._functions: dict[Any, Callable[..., list[Any]]] = {}

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Evaluate the component once. A set of shapes that is new costs the walk over the graph."""
        if self._description is None:
            raise BundleError(f"{self.label}: the session is closed")
        names = self._description.inputs
        if set(inputs) != set(names):
            raise InputError(f"{self.label} takes {sorted(names)}; got {sorted(inputs)}")
        mx = self._mx
        with mx.stream(self._device):
            arrays = {name: mx.array(np.asarray(inputs[name])) for name in names}
            function = self._function(arrays)
            try:
                outputs = function(arrays, self._weights)
                mx.eval(outputs)
            except (RuntimeError, MemoryError) as error:
                reason = _first_line(error)
                if "alloc" in reason.lower() or isinstance(error, MemoryError):
                    raise BundleError(
                        f"{self.label}: out of memory; try a smaller size or --low-ram ({reason})"
                    ) from error
                raise InputError(f"{self.label}: MLX stopped: {reason}") from error
        return {name: np.array(output) for name, output in zip(self._description.outputs, outputs, strict=True)}

    def _function(self, arrays: Mapping[str, Any]) -> Callable[..., list[Any]]:
        key = tuple((name, tuple(array.shape), str(array.dtype)) for name, array in arrays.items())
        function = self._functions.pop(key, None)
        if function is None:
            try:
                program = self._program(self._description, self._weights, arrays)
            except (ConversionError, ValueError) as error:
                raise InputError(f"{self.label}: {_first_line(error)}") from error
            function = self._mx.compile(program) if self._compiled else program
        self._functions[key] = function
        while len(self._functions) > _PROGRAMS:
            del self._functions[next(iter(self._functions))]
        return function

    def close(self) -> None:
        """Free the weights and what MLX keeps of freed buffers."""
        self._description = None
        self._weights = {}
        self._functions.clear()
        self._mx.clear_cache()


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__


class MlxRuntime:
    """Opens the `mlx` artefacts of a bundle.

    `providers` names a device, "gpu" or "cpu"; by default the GPU where there is one. `memory_limit` bounds what MLX
    holds, and a quarter of it what it keeps in freed buffers.
    """

    name = "mlx"

    def __init__(self, bundle: Bundle, options: RuntimeOptions) -> None:
        mx = _mlx()
        if options.threads is not None:
            raise InputError("MLX has no setting for the number of threads; leave --threads out")
        if options.graph_cache is not None:
            raise InputError("MLX keeps no optimised graphs on disk; leave --graph-cache out")
        wanted = [name.lower() for name in options.providers or (("gpu",) if has_gpu() else ("cpu",))]
        if wanted not in (["gpu"], ["cpu"]):
            raise InputError(f"MLX runs on one of {' or '.join(DEVICES)}, not on {', '.join(wanted)}; name one")
        if wanted == ["gpu"] and not has_gpu():
            raise RuntimeUnavailableError("this MLX has no GPU; leave --provider out, or run on a Mac")
        self.device = wanted[0]
        if options.memory_limit is not None:
            if options.memory_limit < 1:
                raise InputError(f"the memory limit must be at least 1 byte, not {options.memory_limit}")
            mx.set_memory_limit(options.memory_limit)
            mx.set_cache_limit(options.memory_limit // _CACHE_SHARE)
        self.bundle, self.options = bundle, options

    def open(self, component: str) -> MlxSession:
        """Open a component."""
        artefact = self.bundle.artefact(component, "mlx")
        graph = self.bundle.file(artefact.graph)
        weights = [path for path in artefact.files if path.endswith(".safetensors")]
        if len(weights) != 1:
            raise BundleError(f"{self.bundle.path}: {component} has no weights for MLX; convert the model again")
        return MlxSession(
            graph,
            self.bundle.file(weights[0]),
            device=self.device,
            compiled=self.device == "gpu",
            label=f"{self.bundle.path.name}/{component}",
        )

    def describe(self) -> dict[str, str]:
        """Backend name, MLX's version and the device."""
        mx = _mlx()
        chip = mx.device_info(getattr(mx, self.device)).get("device_name", "unknown")
        return {"backend": "mlx", "mlx": mx.__version__, "device": f"{self.device} ({chip})"}
