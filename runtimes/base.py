"""What every runtime offers, and how the best one on this machine is chosen."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from edgedit.errors import BundleError, InputError

if TYPE_CHECKING:
    from edgedit.bundle import Bundle

__all__ = ["RUNTIMES", "Choice", "Runtime", "RuntimeOptions", "Session", "choose_backend", "open_runtime"]


class Session(Protocol):
    """One component, open and ready to run."""

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Evaluate the component. Names, dtypes and shapes are those of its manifest entry."""
        ...

    def close(self) -> None:
        """Free the weights. The session cannot be used afterwards."""
        ...


class Runtime(Protocol):
    """A backend that opens the components of one bundle."""

    name: str

    def open(self, component: str) -> Session:
        """Load a component's weights and return its session. Raises BundleError when the bundle lacks it."""
        ...

    def describe(self) -> dict[str, str]:
        """Backend, version and device, for recipes and benchmarks."""
        ...


@dataclass(frozen=True)
class RuntimeOptions:
    """Choices that apply to every backend; one that a backend cannot honour is refused by it, never ignored.

    Attributes:
        threads: worker threads within an operator; None lets the backend choose (all physical cores).
        providers: execution providers by name, most wanted first, or MLX's device; None is the CPU, and MLX's GPU.
        graph_cache: folder in which optimised graphs are kept between runs; None keeps none.
        memory_limit: bytes that the backend's allocator should stay within; None leaves its own limit.
        interpreter: evaluate Core ML programs with the numpy interpreter instead of Core ML.
        emulate_fp16: have the interpreter round every value that the program declares float16.
        compute_units: what Core ML may run on: "all", "cpu", "gpu" (with the CPU) or "ne" (Neural Engine with the CPU).
    """

    threads: int | None = None
    providers: tuple[str, ...] | None = None
    graph_cache: Path | None = None
    memory_limit: int | None = None
    interpreter: bool = False
    emulate_fp16: bool = False
    compute_units: str | None = None

    def only_for_coreml(self) -> str | None:
        """The flag of an option in use that only Core ML has, or None."""
        used = {
            "--interpreter": self.interpreter,
            "--emulate-fp16": self.emulate_fp16,
            "--compute-units": self.compute_units is not None,
        }
        return next((flag for flag, given in used.items() if given), None)


#: Backend name → "module:class", imported when it is asked for. Order is preference for `auto`, platforms aside.
RUNTIMES = {
    "onnx": "edgedit.runtimes.onnx:OnnxRuntime",
    "coreml": "edgedit.runtimes.coreml:CoremlRuntime",
    "mlx": "edgedit.runtimes.mlx:MlxRuntime",
}


@dataclass(frozen=True)
class Choice:
    """The backend that `auto` takes, and why, in a few words."""

    backend: str
    reason: str


def choose_backend(bundle: Bundle) -> Choice:
    """The best backend on this machine that has artefacts for every component of `bundle`.

    On a Mac that is Core ML, and without its packages MLX; anywhere else ONNX Runtime, and MLX's CPU build where the
    bundle has nothing else.

    Raises BundleError when no backend has artefacts for every component.
    """
    whole = [name for name in RUNTIMES if _has_whole(bundle, name)]
    if "coreml" in whole and sys.platform == "darwin":
        return Choice("coreml", "Core ML has the GPU and the Neural Engine of this Mac")
    if "mlx" in whole and importlib.import_module("edgedit.runtimes.mlx").has_gpu():
        return Choice("mlx", "MLX has a GPU on this machine")
    if whole:
        only = "the bundle was converted for nothing else" if len(whole) == 1 else "the fastest on a CPU"
        return Choice(whole[0], only)
    raise _lacks(bundle, "auto")


def _has_whole(bundle: Bundle, backend: str) -> bool:
    return all(backend in component.artefacts for component in bundle.manifest.components.values())


def _lacks(bundle: Bundle, backend: str) -> BundleError:
    has = sorted({name for component in bundle.manifest.components.values() for name in component.artefacts})
    return BundleError(
        f"{bundle.path.name} has no artefacts for backend {backend!r} (it has: {', '.join(has) or 'none'}); "
        "convert it again with --to"
    )


def open_runtime(bundle: Bundle, backend: str = "auto", options: RuntimeOptions | None = None) -> Runtime:
    """Open `bundle` with a backend by name, or with the one that `choose_backend` takes ("auto").

    Raises:
        InputError: unknown backend, or an option that it does not have.
        BundleError: the bundle has no artefacts for it.
        RuntimeUnavailableError: the backend or one of its providers is not on this machine.
    """
    if backend != "auto" and backend not in RUNTIMES:
        raise InputError(f"unknown backend {backend!r}; choose one of: auto, {', '.join(RUNTIMES)}")
    options = options or RuntimeOptions()
    name = choose_backend(bundle).backend if backend == "auto" else backend
    if name != "coreml" and (flag := options.only_for_coreml()) is not None:
        raise InputError(f"{flag} goes with --backend coreml only, not with {name}")
    if not _has_whole(bundle, name):
        raise _lacks(bundle, name)
    module, _, attribute = RUNTIMES[name].partition(":")
    runtime: Runtime = getattr(importlib.import_module(module), attribute)(bundle, options)
    return runtime
