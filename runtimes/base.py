"""What every runtime offers, and how the best one on this machine is chosen."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from edgedit.errors import BundleError, InputError

if TYPE_CHECKING:
    from edgedit.bundle import Bundle

__all__ = ["RUNTIMES", "Runtime", "RuntimeOptions", "Session", "open_runtime"]


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
        providers: execution providers by name, most wanted first; None is the CPU.
        graph_cache: folder in which optimised graphs are kept between runs; None keeps none.
    """

    threads: int | None = None
    providers: tuple[str, ...] | None = None
    graph_cache: Path | None = None


#: Backend name → "module:class", imported when it is asked for. Order is preference for `auto`.
RUNTIMES = {"onnx": "edgedit.runtimes.onnx:OnnxRuntime"}


def open_runtime(bundle: Bundle, backend: str = "auto", options: RuntimeOptions | None = None) -> Runtime:
    """Open `bundle` with a backend by name, or with the first that has artefacts for every component ("auto").

    Raises:
        InputError: unknown backend.
        BundleError: the bundle has no artefacts for it.
        RuntimeUnavailableError: the backend or one of its providers is not on this machine.
    """
    if backend != "auto" and backend not in RUNTIMES:
        raise InputError(f"unknown backend {backend!r}; choose one of: auto, {', '.join(RUNTIMES)}")
    components = bundle.manifest.components.values()
    for name in RUNTIMES if backend == "auto" else [backend]:
        if all(name in component.artefacts for component in components):
            module, _, attribute = RUNTIMES[name].partition(":")
            runtime: Runtime = getattr(importlib.import_module(module), attribute)(bundle, options or RuntimeOptions())
            return runtime
    has = sorted({name for component in components for name in component.artefacts})
    raise BundleError(
        f"{bundle.path.name} has no artefacts for backend {backend!r} (it has: {', '.join(has) or 'none'}); "
        "convert it again with --to"
    )
