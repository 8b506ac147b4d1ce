"""ONNX Runtime: weights memory-mapped, the CPU form of a graph if there is one, optimised graphs cached on request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache as once
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgedit.device import return_large_blocks
from edgedit.errors import BundleError, InputError, RuntimeUnavailableError
from edgedit.runtimes.graph_cache import through_cache
from edgedit.runtimes.prompt_static import PromptStaticSession
from edgedit.runtimes.schedule_static import open_divided

if TYPE_CHECKING:
    from edgedit.bundle import Bundle
    from edgedit.runtimes.base import RuntimeOptions

__all__ = ["CPU", "PROVIDERS", "OnnxRuntime", "OnnxSession"]

CPU = "CPUExecutionProvider"

#: Components whose maps are far larger than their weights, and which run once a picture.
AUTOENCODERS = ("decoder", "encoder", "tiny_decoder")

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


@once
def _share_arena(ort: Any) -> None:
    """An arena of the process that grows by what is asked for and no more."""
    info = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    ort.create_and_register_allocator(info, ort.OrtArenaCfg({"arena_extend_strategy": 1}))


class OnnxSession:
    """One component open in ONNX Runtime.

    `arena` says where its maps come from. "own": ONNX Runtime's arena, for what is evaluated again and again at one
    size. "none": from the system and back, map by map; the least memory, and up to 1.4 times the time, which goes into
    mapping pages. "shared": an arena of the process that gives everything back after each evaluation; up to 1.6 times
    the memory of "none".
    """

    def __init__(
        self,
        graph: Path,
        providers: Sequence[str],
        threads: int | None,
        cache: Path | None,
        label: str,
        *,
        arena: str = "own",
        part: tuple[str, bytes] | None = None,
    ) -> None:
        ort = _onnxruntime()
        options = ort.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = threads
        self._run_options = None
        if arena != "own":
            # Its own arena doubles its blocks and keeps them: an autoencoder's peak is twice as high with it.
            options.enable_mem_pattern = False
            return_large_blocks()
        if arena == "none":
            options.enable_cpu_mem_arena = False
        if arena == "shared":
            _share_arena(ort)
            options.add_session_config_entry("session.use_env_allocators", "1")
            self._run_options = ort.RunOptions()
            self._run_options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        # Block-quantised weights stay exact: the default level quantises activations to int8 as well.
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        self.label = label
        try:
            self._session = _create(ort, graph, options, list(providers), cache, part)
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
            return dict(zip(self.outputs, self._session.run(None, dict(inputs), self._run_options), strict=True))
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


def _create(
    ort: Any,
    graph: Path,
    options: Any,
    providers: list[str],
    cache: Path | None,
    part: tuple[str, bytes] | None,
) -> Any:
    """Create a session, through the cache of optimised graphs when there is one.

    `part` is a model made of a part of `graph`, with its name; its weights lie where the graph's do.
    """

    def create() -> Any:
        if part is None:
            return ort.InferenceSession(str(graph), options, providers=providers)
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(graph.parent))
        return ort.InferenceSession(part[1], options, providers=providers)

    if cache is None or providers != [CPU]:
        return create()

    def make(folder: Path, fresh: bool) -> Any:
        if not fresh:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
            return ort.InferenceSession(str(folder / "graph.onnx"), options, providers=providers)
        options.optimized_model_filepath = str(folder / "graph.onnx")
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "graph.onnx.data")
        options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
        return create()

    name = "whole" if part is None else part[0]
    return through_cache(cache, graph, ["onnxruntime", ort.__version__, name], make)


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

    def open(self, component: str, *, lean: bool = False) -> OnnxSession | PromptStaticSession:
        """Open a component; on the CPU its fused form, when the bundle has one, and a transformer in parts.

        `lean`: an autoencoder takes the least memory rather than the least time.
        """
        artefact = self.bundle.component(component).artefacts["onnx"]
        graph = artefact.graph
        if artefact.fused_graph is not None and self.providers == [CPU] and not self.options.standard_graph:
            graph = artefact.fused_graph.path
        label = f"{self.bundle.path.name}/{component}"
        path, arena = self.bundle.file(graph), "own"
        if component in AUTOENCODERS:
            arena = "none" if lean or self.providers != [CPU] else "shared"

        def session(part: tuple[str, bytes] | None) -> OnnxSession:
            threads, cache = self.options.threads, self.options.graph_cache
            return OnnxSession(path, self.providers, threads, cache, label, arena=arena, part=part)

        if component == "transformer" and self.providers == [CPU]:
            divided = open_divided(path, lambda name, model: session((name, model)), label)
            if divided is not None:
                return divided
        return session(None)

    def open_lean(self, component: str) -> OnnxSession | PromptStaticSession:
        """Open a component for the least memory."""
        return self.open(component, lean=True)

    def open_piece(self, component: str, graph: str, *, lean: bool = False) -> OnnxSession:
        """Open one piece of a component that runs in tiles: `graph` is its file name beside the plan of the tiles."""
        tiles = self.bundle.component(component).artefacts["onnx"].tiles
        if tiles is None:
            raise BundleError(f"{self.bundle.path.name}: its {component} was converted without tiles; convert it again")
        path = self.bundle.file(f"{tiles.rpartition('/')[0]}/{graph}")
        arena = "none" if lean or self.providers != [CPU] else "shared"
        return OnnxSession(path, self.providers, self.options.threads, None, f"{component} {graph}", arena=arena)

    def open_part(self, component: str, graph: str) -> OnnxSession:
        """Open one part of a transformer that is cut between its blocks: `graph` lies beside the plan of the parts."""
        plan = self.bundle.component(component).artefacts["onnx"].parts or ""
        path = self.bundle.file(f"{plan.rpartition('/')[0]}/{graph}")
        return OnnxSession(path, self.providers, self.options.threads, self.options.graph_cache, f"{component} {graph}")

    def open_canonical(self, component: str) -> OnnxSession:
        """Open the canonical graph (standard operators only): the reference that `verify` compares with."""
        artefact = self.bundle.component(component).artefacts["onnx"]
        label = f"{self.bundle.path.name}/{component} (canonical)"
        return OnnxSession(self.bundle.file(artefact.graph), [CPU], self.options.threads, None, label)

    def describe(self) -> dict[str, str]:
        """Backend name, ONNX Runtime's version and the providers in use."""
        return {"backend": "onnx", "onnxruntime": _onnxruntime().__version__, "providers": ", ".join(self.providers)}
