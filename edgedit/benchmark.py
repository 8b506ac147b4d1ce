"""How long each component takes to open and to run on this machine, and how much memory that takes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from edgedit.bundle import Bundle, open_bundle
from edgedit.device import peak_memory
from edgedit.errors import InputError
from edgedit.example_inputs import example_inputs

__all__ = ["BenchmarkReport", "ComponentTimes", "benchmark"]


@dataclass(frozen=True)
class ComponentTimes:
    """Seconds of one component: opening it, the first evaluation, and the median and best of the others.

    `peak_rss` is the process's peak in bytes after it ran; components run in the manifest's order and are freed one by
    one.
    """

    name: str
    precision: str
    shapes: dict[str, list[int]]
    open_seconds: float
    first_seconds: float
    median_seconds: float
    best_seconds: float
    peak_rss: int | None


@dataclass(frozen=True)
class BenchmarkReport:
    """What `benchmark` measured, and on what."""

    bundle: Path
    width: int
    height: int
    repeat: int
    runtime: dict[str, str]
    components: list[ComponentTimes]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "bundle": str(self.bundle)}


def benchmark(
    path: str | Path,
    *,
    backend: str = "auto",
    threads: int | None = None,
    components: Sequence[str] | None = None,
    width: int | None = None,
    height: int | None = None,
    length: int = 120,
    repeat: int = 5,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> BenchmarkReport:
    """Open and run every component (or those named) on noise, for a picture of `width` × `height` pixels.

    Args:
        length: text tokens.
        repeat: evaluations after the first.

    Raises:
        InputError: a size that the model cannot draw, or a repeat below 1.
    """
    if repeat < 1:
        raise InputError(f"repeat must be at least 1, not {repeat}")
    bundle = open_bundle(path)
    base = import_module("edgedit.runtimes.base")
    runtime = base.open_runtime(bundle, backend, base.RuntimeOptions(threads=threads))
    columns, rows = _size(bundle, width, height)
    names = list(components or bundle.manifest.components)
    times = []
    for index, name in enumerate(names):
        if on_progress is not None:
            on_progress(name, index, len(names))
        times.append(_time(bundle, runtime, name, columns, rows, length, repeat))
    return BenchmarkReport(bundle.path, columns, rows, repeat, runtime.describe(), times)


def _size(bundle: Bundle, width: int | None, height: int | None) -> tuple[int, int]:
    manifest = bundle.manifest
    recommended = manifest.recommended
    columns = width or (recommended.width if recommended else 1024)
    rows = height or (recommended.height if recommended else 1024)
    multiple = manifest.latents.size_multiple if manifest.latents else 32
    for value in (columns, rows):
        if value < multiple or value % multiple:
            raise InputError(f"{columns}×{rows} does not divide into units of {multiple} pixels, as this model needs")
    return columns, rows


def _time(bundle: Bundle, runtime: Any, name: str, width: int, height: int, length: int, repeat: int) -> ComponentTimes:
    entry = bundle.component(name)
    space = bundle.manifest.latents
    factor = space.scale_factor if space else int(str(entry.config.get("scale_factor", 8)))
    patch = int(str(entry.config.get("patch_size", 1)))
    tokens = (height // factor // patch, width // factor // patch)
    inputs = example_inputs(name, entry.inputs, entry.config, tokens=tokens, length=length)
    started = time.perf_counter()
    session = runtime.open(name)
    opened = time.perf_counter()
    session.run(inputs)
    first = time.perf_counter() - opened
    runs = []
    for _ in range(repeat):
        begin = time.perf_counter()
        session.run(inputs)
        runs.append(time.perf_counter() - begin)
    session.close()
    return ComponentTimes(
        name=name,
        precision=bundle.artefact(name, runtime.name).precision,
        shapes={key: list(value.shape) for key, value in inputs.items()},
        open_seconds=opened - started,
        first_seconds=first,
        median_seconds=statistics.median(runs),
        best_seconds=min(runs),
        peak_rss=peak_memory(),
    )
