"""Graphs that other tools exported, run by an engine with the settings that it comes with: what bundles are timed
against."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from edgedit.errors import InputError

__all__ = ["ExportedGraphs", "open_exported"]


class ExportedGraphs:
    """`folder` holds STAGE.onnx or STAGE.xml for each stage; `precision` is what they compute in."""

    def __init__(self, folder: Path, engine: str, threads: int | None, precision: str) -> None:
        self.folder, self.engine, self.threads, self._precision = folder, engine, threads, precision
        self._module = import_module(engine)

    def open(self, stage: str) -> Any:
        """A session for one stage. Raises InputError when nothing was exported for it."""
        path = self.folder / f"{stage}.{'onnx' if self.engine == 'onnxruntime' else 'xml'}"
        if not path.exists():
            raise InputError(f"nothing was exported for the stage {stage!r}")
        if self.engine == "onnxruntime":
            return _OnnxGraph(self._module, path, self.threads)
        return _OpenVinoGraph(self._module, path, self.threads, exact=self._precision == "fp32")

    def describe(self) -> dict[str, str]:
        """The engine and its version."""
        return {"engine": self.engine, self.engine: str(self._module.__version__).partition("-")[0]}

    def precision(self, stage: str) -> str:
        """The same for every stage."""
        return self._precision


class _OnnxGraph:
    def __init__(self, ort: Any, path: Path, threads: int | None) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = threads
        self._session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._takes = [value.name for value in self._session.get_inputs()]
        self._gives = [value.name for value in self._session.get_outputs()]

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return dict(zip(self._gives, self._session.run(None, {n: inputs[n] for n in self._takes}), strict=True))

    def close(self) -> None:
        self._session = None


class _OpenVinoGraph:
    """`exact`: in float32 also on a processor with bfloat16, where OpenVINO computes in that when nothing is said."""

    def __init__(self, openvino: Any, path: Path, threads: int | None, *, exact: bool) -> None:
        settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
        if exact:
            settings["INFERENCE_PRECISION_HINT"] = "f32"
        if threads is not None:
            settings["INFERENCE_NUM_THREADS"] = threads
        compiled = openvino.Core().compile_model(str(path), "CPU", settings)
        self._takes = [port.get_any_name() for port in compiled.inputs]
        self._request = compiled.create_infer_request()

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        results = self._request.infer({name: inputs[name] for name in self._takes})
        return {str(index): value for index, value in enumerate(results.values())}

    def close(self) -> None:
        self._request = None


def open_exported(order: Mapping[str, Any]) -> ExportedGraphs:
    """A contender of `edgedit.bench`: `folder`, `engine` ("onnxruntime" or "openvino"), `threads`, `precision`."""
    return ExportedGraphs(Path(order["folder"]), order["engine"], order["threads"], order["precision"])
