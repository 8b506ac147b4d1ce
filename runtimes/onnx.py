"""ONNX Runtime: weights memory-mapped, the CPU form of a graph if there is one, optimised graphs cached on request."""

from __future__ import annotations

import hashlib
import platform
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgedit.device import return_large_blocks
from edgedit.errors import BundleError, InputError, RuntimeUnavailableError

if TYPE_CHECKING:
    from edgedit.bundle import Bundle
    from edgedit.runtimes.base import RuntimeOptions

__all__ = ["CPU", "PROVIDERS", "OnnxRuntime", "OnnxSession"]

CPU = "CPUExecutionProvider"

#: Components whose maps are far larger than their weights, and which run once a picture.
WITHOUT_ARENA = ("decoder", "encoder")

#: Short names that people type for ONNX Runtime's execution providers.
PROVIDERS = {
    "cpu": CPU,
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "rocm": "ROCMExecutionProvider",
    "migraphx": "MIGraphXExecutionProvider",
    "dml": "DmlExecutionProvider",
    "directml": "DmlExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
    "webgpu": "WebGpuExecutionProvider",
    "xnnpack": "XnnpackExecutionProvider",
}


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise RuntimeUnavailableError(
            f"onnxruntime cannot be imported ({error}); run: pip install onnxruntime"
        ) from error
    onnxruntime.set_default_logger_severity(3)
    return onnxruntime


class OnnxSession:
    """One component open in ONNX Runtime."""

    def __init__(
        self,
        graph: Path,
        providers: Sequence[str],
        threads: int | None,
        cache: Path | None,
        label: str,
        *,
        arena: bool = True,
    ) -> None:
        ort = _onnxruntime()
        options = ort.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = threads
        if not arena:
            # The arena keeps every block it ever needed: an autoencoder's peak is twice as high with it.
            options.enable_cpu_mem_arena = False
            options.enable_mem_pattern = False
            return_large_blocks()
        # Block-quantised weights stay exact: the default level quantises activations to int8 as well.
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        self.label = label
        try:
            self._session = _create(ort, graph, options, list(providers), cache)
        except (MemoryError, OSError) as error:
            raise BundleError(f"{label}: cannot be opened by ONNX Runtime: {_first_line(error)}") from error
        except Exception as error:
            raise BundleError(
                f"{label}: ONNX Runtime refuses the graph: {_first_line(error)}; check the bundle with: edgedit verify"
            ) from error
        self.inputs = {value.name: value for value in self._session.get_inputs()}
        self.outputs = [value.name for value in self._session.get_outputs()]

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Evaluate the component once."""
        if self._session is None:
            raise BundleError(f"{self.label}: the session is closed")
        wrong = set(inputs) ^ set(self.inputs)
        if wrong:
            raise InputError(f"{self.label} takes {sorted(self.inputs)}; got {sorted(inputs)}")
        try:
            return dict(zip(self.outputs, self._session.run(None, dict(inputs)), strict=True))
        except Exception as error:
            message = _first_line(error)
            if "alloc" in message.lower() or isinstance(error, MemoryError):
                raise BundleError(
                    f"{self.label}: out of memory; try a smaller size or --low-ram ({message})"
                ) from error
            raise InputError(f"{self.label}: ONNX Runtime stopped: {message}") from error

    def close(self) -> None:
        """Free the weights."""
        self._session = None


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__


def _create(ort: Any, graph: Path, options: Any, providers: list[str], cache: Path | None) -> Any:
    """Create a session, through the cache of optimised graphs when there is one.

    The optimised graph depends on ONNX Runtime's version and the processor, so both are part of its key. It is written
    beside its final place and renamed, so that a run that dies leaves nothing half written.
    """
    if cache is None or providers != [CPU]:
        return ort.InferenceSession(str(graph), options, providers=providers)
    key = hashlib.sha256()
    key.update(graph.read_bytes())
    for part in (ort.__version__, platform.machine(), platform.processor(), *_weights_identity(graph)):
        key.update(part.encode())
    folder = cache / key.hexdigest()[:32]
    if folder.is_dir():
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        return ort.InferenceSession(str(folder / "graph.onnx"), options, providers=providers)
    cache.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=cache))
    try:
        options.optimized_model_filepath = str(partial / "graph.onnx")
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "graph.onnx.data")
        options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
        session = ort.InferenceSession(str(graph), options, providers=providers)
        try:
            partial.rename(folder)
        except OSError:
            if not folder.is_dir():  # another process may have been first; anything else is an error
                raise
        return session
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _weights_identity(graph: Path) -> list[str]:
    """Size and modification time of the weights beside a graph: they change whenever a bundle is written again."""
    data = graph.parent / (graph.name.replace(".cpu.onnx", ".onnx") + ".data")
    if not data.exists():
        return []
    stat = data.stat()
    return [str(stat.st_size), str(stat.st_mtime_ns), str(data.resolve())]


class OnnxRuntime:
    """Opens the `onnx` artefacts of a bundle."""

    name = "onnx"

    def __init__(self, bundle: Bundle, options: RuntimeOptions) -> None:
        available = _onnxruntime().get_available_providers()
        wanted = [PROVIDERS.get(name.lower(), name) for name in options.providers or ("cpu",)]
        for provider in wanted:
            if provider not in available:
                raise RuntimeUnavailableError(
                    f"execution provider {provider} is not in this onnxruntime; it has: {', '.join(available)}. "
                    "Install the onnxruntime build for your device, or leave --provider out"
                )
        if options.threads is not None and options.threads < 1:
            raise InputError(f"threads must be at least 1, not {options.threads}")
        if options.memory_limit is not None:
            raise InputError("ONNX Runtime has no memory limit; leave it out, or use low_ram")
        self.bundle, self.options, self.providers = bundle, options, wanted

    def open(self, component: str) -> OnnxSession:
        """Open a component; on the CPU its fused form, when the bundle has one."""
        artefact = self.bundle.component(component).artefacts["onnx"]
        graph = artefact.graph
        if artefact.fused_graph is not None and self.providers == [CPU]:
            graph = artefact.fused_graph.path
        label = f"{self.bundle.path.name}/{component}"
        return OnnxSession(
            self.bundle.file(graph),
            self.providers,
            self.options.threads,
            self.options.graph_cache,
            label,
            arena=component not in WITHOUT_ARENA,
        )

    def open_piece(self, component: str, graph: str) -> OnnxSession:
        """Open one piece of a component that runs in tiles: `graph` is its file name beside the plan of the tiles."""
        tiles = self.bundle.component(component).artefacts["onnx"].tiles
        if tiles is None:
            raise BundleError(f"{self.bundle.path.name}: its {component} was converted without tiles; convert it again")
        path = self.bundle.file(f"{tiles.rpartition('/')[0]}/{graph}")
        return OnnxSession(path, self.providers, self.options.threads, None, f"{component} {graph}", arena=False)

    def open_canonical(self, component: str) -> OnnxSession:
        """Open the canonical graph (standard operators only): the reference that `verify` compares with."""
        artefact = self.bundle.component(component).artefacts["onnx"]
        label = f"{self.bundle.path.name}/{component} (canonical)"
        return OnnxSession(self.bundle.file(artefact.graph), [CPU], self.options.threads, None, label)

    def describe(self) -> dict[str, str]:
        """Backend name, ONNX Runtime's version and the providers in use."""
        return {"backend": "onnx", "onnxruntime": _onnxruntime().__version__, "providers": ", ".join(self.providers)}
