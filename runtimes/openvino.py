"""OpenVINO: a second engine for the `onnx` artefacts of a bundle, which reads their canonical graphs as they are.

Arithmetic is float32 whatever the weights are stored in, unless the artefact was converted to compute in 8 bits. Where
ranges of activations are written into the graph (`QuantizeLinear`), OpenVINO computes those layers in int8 by itself.
Where they are not, its own dynamic quantization of activations is switched on, one scale for each group of channels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgedit.device import return_large_blocks
from edgedit.errors import BundleError, InputError, RuntimeUnavailableError
from edgedit.runtimes.graph_cache import through_cache
from edgedit.runtimes.onnx import OnnxRuntime, OnnxSession
from edgedit.runtimes.prompt_static import PROMPT_INPUTS, PromptStaticSession

if TYPE_CHECKING:
    from edgedit.bundle import Bundle
    from edgedit.runtimes.base import RuntimeOptions

__all__ = ["OpenVinoRuntime", "OpenVinoSession", "group_size", "open_session", "version"]

#: Channels that share a scale may be no fewer: smaller groups cost more than they gain.
SMALLEST_GROUP = 32
#: Nodes between a product and the codes of its weight.
_UNPACKING = ("Reshape", "Transpose", "Multiply", "Subtract", "Convert")
_CODES = ("i8", "u8", "i4", "u4", "i2", "u2", "u3", "u6", "nf4", "f4e2m1")


def _openvino() -> Any:
    try:
        import openvino
    except ImportError as error:
        raise RuntimeUnavailableError(
            f"the engine openvino cannot be imported ({error}); run: pip install 'edgedit[openvino]'"
        ) from error
    return openvino


def version() -> str:
    """OpenVINO's version, as "2026.4.1". Raises RuntimeUnavailableError when it is not installed."""
    return str(_openvino().__version__).partition("-")[0]


def open_session(
    graph: Path, threads: int | None, cache: Path | None, label: str, *, int8: bool = False, divide: bool = False
) -> OpenVinoSession | PromptStaticSession:
    """A component compiled by OpenVINO for the CPU.

    Args:
        graph: a canonical ONNX graph; its weights may lie beside it.
        threads: None takes one for each physical core.
        cache: folder in which compiled graphs are kept; None keeps none.
        int8: the artefact was made to compute in 8 bits: activations are quantized as they come, see `group_size`.
        divide: compute what depends on the prompt alone once a prompt, see `edgedit.runtimes.prompt_static`.

    Raises:
        RuntimeUnavailableError: OpenVINO is not installed.
        BundleError: OpenVINO does not take the graph.
    """
    ov = _openvino()
    settings: dict[str, Any] = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": "1",
        "INFERENCE_PRECISION_HINT": "f32",
        # Batches of pictures run several processes side by side; pinned, they would share the same cores.
        "ENABLE_CPU_PINNING": False,
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
    }
    if threads is not None:
        settings["INFERENCE_NUM_THREADS"] = threads
    try:
        core = ov.Core()
        model = core.read_model(str(graph))
        if int8:
            settings["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = str(group_size(model))

        def session(name: str, part: Any) -> OpenVinoSession:
            if cache is None:
                return OpenVinoSession(core.compile_model(part, "CPU", settings), label)
            made = through_cache(
                cache,
                graph,
                ["openvino", ov.__version__, name, repr(sorted(settings.items()))],
                lambda folder, _: core.compile_model(part, "CPU", {**settings, "CACHE_DIR": str(folder)}),
            )
            return OpenVinoSession(made, label)

        parts = _divided(ov, model) if divide else None
        if parts is None:
            return session("whole", model)
        prompt, step, values = parts
        return PromptStaticSession(session("prompt", prompt), session("step", step), values, label)
    except (MemoryError, OSError) as error:
        raise BundleError(f"{label}: cannot be opened by OpenVINO: {_reason(error)}") from error
    except RuntimeError as error:
        raise BundleError(
            f"{label}: OpenVINO refuses the graph: {_reason(error)}; run it with --engine onnxruntime"
        ) from error


class OpenVinoSession:
    """A compiled graph."""

    def __init__(self, compiled: Any, label: str) -> None:
        self.label = label
        self.inputs = {port.get_any_name(): port for port in compiled.inputs}
        self.outputs = [(str(port.get_any_name()), port) for port in compiled.outputs]
        self._request = compiled.create_infer_request()

    def executed(self) -> list[tuple[str, str]]:
        """(layer, kernel) of every node of the compiled graph, as ("FullyConnected", "brgemm_avx512_I8")."""
        if self._request is None:
            raise BundleError(f"{self.label}: the session is closed")
        nodes = self._request.get_compiled_model().get_runtime_model().get_ops()
        facts = [node.get_rt_info() for node in nodes]
        return [(str(fact["layerType"].value), str(fact["primitiveType"].value)) for fact in facts]

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Evaluate the component once."""
        if self._request is None:
            raise BundleError(f"{self.label}: the session is closed")
        if set(inputs) != set(self.inputs):
            raise InputError(f"{self.label} takes {sorted(self.inputs)}; got {sorted(inputs)}")
        for name, port in self.inputs.items():
            value, wanted = inputs[name], port.get_element_type().to_dtype()
            if value.dtype != wanted:
                raise InputError(f"{self.label} takes {name} as {wanted}; got {value.dtype}")
            if not port.get_partial_shape().compatible(_openvino().PartialShape(list(value.shape))):
                raise InputError(f"{self.label} takes {name} as {port.get_partial_shape()}; got {list(value.shape)}")
        try:
            results = self._request.infer({name: np.ascontiguousarray(value) for name, value in inputs.items()})
            return {name: results[port] for name, port in self.outputs}
        except (RuntimeError, MemoryError) as error:
            reason = _reason(error)
            if "alloc" in reason.lower() or isinstance(error, MemoryError):
                raise BundleError(f"{self.label}: out of memory; try a smaller size or --low-ram ({reason})") from error
            raise InputError(f"{self.label}: OpenVINO stopped: {reason}") from error

    def close(self) -> None:
        """Free the weights."""
        self._request = None
        self.inputs, self.outputs = {}, []


def group_size(model: Any) -> int:
    """Channels that share a scale when activations are quantized as they come: one token, one scale, where that fits.

    OpenVINO takes one number for the whole graph, and computes in float32 whatever it does not divide: it is the
    greatest common divisor of the rows of all quantized matrices inside blocks, and of the blocks of their scales. 0,
    which is off, where that is below 32 or there are none.
    """
    common = 0
    for node in model.get_ops():
        if node.get_type_name() == "MatMul":
            common = math.gcd(common, _rows_of_codes(node))
    return common if common >= SMALLEST_GROUP else 0


def _rows_of_codes(node: Any) -> int:
    """Weights to a scale along the input axis of a product with a quantized matrix inside a block; 0 for another."""
    shape = node.get_input_partial_shape(1)
    if shape.is_dynamic or len(shape) != 2:
        return 0
    rows = int(shape[1 if node.get_attributes()["transpose_b"] else 0].get_length())
    source = node.input_value(1).get_node()
    while source.get_type_name() in _UNPACKING:
        scaled = source.get_output_partial_shape(0)
        if source.get_type_name() == "Multiply" and len(scaled) == 3:
            # blocks of scales: [blocks, rows in a block, columns]
            rows = int(scaled[1].get_length())
        source = source.input_value(0).get_node()
    quantized = source.get_type_name() == "Constant" and source.get_output_element_type(0).to_string() in _CODES
    return rows if quantized and "blocks." in source.get_friendly_name() else 0


def _divided(ov: Any, model: Any) -> tuple[Any, Any, tuple[str, ...]] | None:
    """The part of a model that depends on the prompt alone, the rest, and the names of what passes between them.

    None where there is no such part. The model is taken apart.
    """
    depends: dict[str, frozenset[str]] = {}
    for node in model.get_ordered_ops():
        if node.get_type_name() == "Parameter":
            needs = frozenset({str(node.output(0).get_any_name())})
        else:
            needs = frozenset().union(*(depends[value.get_node().get_friendly_name()] for value in node.input_values()))
        depends[node.get_friendly_name()] = needs
    passed = []
    for node in model.get_ordered_ops():
        if depends[node.get_friendly_name()] and depends[node.get_friendly_name()] <= PROMPT_INPUTS:
            for output in node.outputs():
                users = [port for port in output.get_target_inputs() if _leaves(port, depends)]
                if users and node.get_type_name() != "Parameter":
                    passed.append((output, users))
    if not passed:
        return None
    parameters, results = model.get_parameters(), model.get_results()
    values, entries = [], []
    for number, (output, users) in enumerate(passed):
        values.append(f"from_prompt.{number}")
        entry = ov.opset13.parameter(output.get_partial_shape(), output.get_element_type(), name=values[-1])
        entry.output(0).set_names({values[-1]})
        entries.append(entry)
        for port in users:
            port.replace_source_output(entry.output(0))
    finals = [ov.opset13.result(output) for output, _ in passed]
    for final, name in zip(finals, values, strict=True):
        final.output(0).set_names({name})
    text = [item for item in parameters if str(item.output(0).get_any_name()) in PROMPT_INPUTS]
    prompt = ov.Model(finals, [item for item in text if _is_used(finals, item)])
    step = ov.Model(results, [item for item in parameters if _is_used(results, item)] + entries)
    return prompt, step, tuple(values)


def _leaves(port: Any, depends: Mapping[str, frozenset[str]]) -> bool:
    return not depends[port.get_node().get_friendly_name()] <= PROMPT_INPUTS


def _is_used(results: Sequence[Any], parameter: Any) -> bool:
    """Whether any of the results is computed from the parameter."""
    seen, open_ = set(), list(results)
    while open_:
        node = open_.pop()
        if node.get_friendly_name() == parameter.get_friendly_name():
            return True
        for value in node.input_values():
            source = value.get_node()
            if source.get_friendly_name() not in seen:
                seen.add(source.get_friendly_name())
                open_.append(source)
    return False


def _reason(error: BaseException) -> str:
    """The last line that says something: OpenVINO puts places in its source before it, one a line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = [line for line in lines if not line.startswith(("Exception from", "Check '"))]
    return (said or lines or [type(error).__name__])[0][:300]


class OpenVinoRuntime:
    """Opens the `onnx` artefacts of a bundle with OpenVINO.

    Pieces of tiled autoencoders and the canonical graphs that `verify` compares with are run by ONNX Runtime: a piece
    is open for seconds only, less than compiling it takes.
    """

    name = "onnx"

    def __init__(self, bundle: Bundle, options: RuntimeOptions) -> None:
        _openvino()
        if options.threads is not None and options.threads < 1:
            raise InputError(f"threads must be at least 1, not {options.threads}")
        if options.memory_limit is not None:
            raise InputError("OpenVINO has no memory limit; leave it out, or use low_ram")
        if options.providers is not None:
            raise InputError("execution providers are ONNX Runtime's; leave --provider out, or --engine openvino")
        self.bundle, self.options = bundle, options

    def open(self, component: str) -> OpenVinoSession | PromptStaticSession:
        """Open a component."""
        artefact = self.bundle.artefact(component, "onnx")
        return_large_blocks()
        return open_session(
            self.bundle.file(artefact.graph),
            self.options.threads,
            self.options.graph_cache,
            f"{self.bundle.path.name}/{component}",
            int8=artefact.precision.endswith("a8"),
            divide=component == "transformer",
        )

    def open_piece(self, component: str, graph: str, *, lean: bool = False) -> OnnxSession:
        """Open one piece of a component that runs in tiles, in ONNX Runtime."""
        piece: OnnxSession = self._onnxruntime().open_piece(component, graph, lean=lean)
        return piece

    def open_canonical(self, component: str) -> OnnxSession:
        """Open the canonical graph in ONNX Runtime: the reference that `verify` compares with."""
        session: OnnxSession = self._onnxruntime().open_canonical(component)
        return session

    def _onnxruntime(self) -> OnnxRuntime:
        return OnnxRuntime(self.bundle, self.options)

    def describe(self) -> dict[str, str]:
        """Backend name, engine and its version."""
        return {"backend": "onnx", "engine": "openvino", "openvino": version()}
