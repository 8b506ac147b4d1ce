"""The process that a contender runs in: it opens each stage, runs it on given inputs, and writes down what that took.

Run as `python -m edgedit.bench.child ORDER.json`. The order names a function "module:function" to call; what it returns
is written to the order's `result`, or `{"error": ...}` with the class and message of what the user can mend.
"""

from __future__ import annotations

import contextlib
import gc
import json
import sys
import time
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from edgedit.bench.energy import EnergyMeter
from edgedit.device import peak_memory
from edgedit.errors import EdgeditError

__all__ = ["Contender", "measure", "open_bundle_contender"]


class Stage(Protocol):
    """A component, open."""

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]: ...
    def close(self) -> None: ...


class Contender(Protocol):
    """Something that can open the stages of a model."""

    def open(self, stage: str) -> Stage: ...
    def describe(self) -> dict[str, str]: ...
    def precision(self, stage: str) -> str: ...


class _BundleContender:
    """A bundle, with one of edgedit's runtimes."""

    def __init__(self, order: Mapping[str, Any]) -> None:
        from edgedit.bundle import open_bundle

        base = import_module("edgedit.runtimes.base")
        options = base.RuntimeOptions(
            threads=order["threads"], engine=order["engine"], standard_graph=order.get("standard_graph", False)
        )
        self.bundle = open_bundle(order["path"])
        self.runtime = base.open_runtime(self.bundle, order["backend"], options)

    def open(self, stage: str) -> Stage:
        session: Stage = self.runtime.open(stage)
        return session

    def describe(self) -> dict[str, str]:
        return dict(self.runtime.describe())

    def precision(self, stage: str) -> str:
        return self.bundle.artefact(stage, self.runtime.name).precision


def open_bundle_contender(order: Mapping[str, Any]) -> Contender:
    """The contender of a bundle: `path`, `backend`, `engine` and `threads`, as `edgedit.load` takes them."""
    return _BundleContender(order)


def measure(order: Mapping[str, Any]) -> dict[str, Any]:
    """Open and run every stage of the order's contender.

    The order: `contender` ("module:function" that is given `settings`), `spawned` (time.time() when the process was
    started), `stages` (name → .npz of its inputs), `repeat` (evaluations after the first), `outputs` (folder for the
    outputs of each stage as NAME.npy, or None), `warm` (whether to open each stage once more; by default yes).
    """
    contender: Contender = _function(order["contender"])(order["settings"])
    start = time.time() - order["spawned"]
    stages = []
    for name, file in order["stages"].items():
        with np.load(file) as inputs:
            again = order.get("warm", True)
            stages.append(_stage(contender, name, dict(inputs), order["repeat"], order["outputs"], again))
    return {"start_seconds": start, "runtime": contender.describe(), "stages": stages}


def _stage(
    contender: Contender, name: str, inputs: Mapping[str, np.ndarray], repeat: int, outputs: str | None, again: bool
) -> dict[str, Any]:
    _forget_peak()
    started = time.perf_counter()
    stage = contender.open(name)
    opened = time.perf_counter()
    found = stage.run(inputs)
    first = time.perf_counter() - opened
    if outputs is not None:
        (value,) = found.values()
        np.save(Path(outputs) / f"{name}.npy", value)
    del found
    runs, meter = [], EnergyMeter()
    for _ in range(repeat):
        begin = time.perf_counter()
        stage.run(inputs)
        runs.append(time.perf_counter() - begin)
    joules, peak = meter.joules(), _peak()
    stage.close()
    del stage
    gc.collect()
    warm = None
    if again:
        begin = time.perf_counter()
        stage = contender.open(name)
        warm = time.perf_counter() - begin
        stage.close()
        del stage
        gc.collect()
    return {
        "name": name,
        "precision": contender.precision(name),
        "shapes": {key: list(value.shape) for key, value in inputs.items()},
        "cold_seconds": opened - started,
        "warm_seconds": warm,
        "first_seconds": first,
        "seconds": runs,
        "peak_rss": peak,
        "joules": None if joules is None else joules / repeat,
    }


def _forget_peak() -> None:
    """Begin a new peak of resident memory, where the system can (Linux); otherwise the process's own goes on."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int | None:
    """Unlike getrusage's, the peak in /proc does not begin with that of the parent, and can be begun anew."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return peak_memory()


def _function(place: str) -> Callable[[Any], Any]:
    module, _, attribute = place.partition(":")
    function: Callable[[Any], Any] = getattr(import_module(module), attribute)
    return function


def _main(path: str) -> int:
    order = json.loads(Path(path).read_text(encoding="utf-8"))
    try:
        result = _function(order["call"])(order)
    except EdgeditError as error:
        result = {"error": {"kind": type(error).__name__, "message": str(error)}}
    Path(order["result"]).write_text(json.dumps(result), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1]))
