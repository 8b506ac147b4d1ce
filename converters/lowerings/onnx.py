"""Lowering to ONNX Runtime: the canonical graph, its weights in one file, and a CPU form that shares them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from edgedit.converters.passes.fuse_cpu import FuseForCpu
from edgedit.converters.passes.int8_convolution import Int8Convolution
from edgedit.converters.passes.quantize import Int8MatMul, QuantizeWeights
from edgedit.converters.passes.store_half import StoreHalf
from edgedit.converters.quantization.record import Quantization
from edgedit.errors import ConversionError

__all__ = ["OnnxArtefact", "write"]


@dataclass(frozen=True)
class OnnxArtefact:
    """Files of one component, relative to the bundle.

    `fused_graph` is None when the CPU form would be the same graph, `tiles` when the graph was not cut for tiles,
    `parts` when it was not cut between its blocks.
    """

    precision: str
    graph: str
    fused_graph: str | None
    files: tuple[str, ...]
    tiles: str | None = None
    parts: str | None = None


def write(
    model: ir.Model,
    root: Path,
    component: str,
    *,
    dtype: str,
    quantization: Quantization | None = None,
    folder: str = "onnx",
    on_tensor: Callable[[int, int], None] | None = None,
) -> OnnxArtefact:
    """Write FOLDER/COMPONENT.onnx, its weights and its CPU form under `root`. Weights are read one at a time.

    Args:
        dtype: "fp32"; "fp16" for weights stored as float16 (arithmetic stays float32); or the name of `quantization`,
            with which everything that it does not quantize is float16.
        quantization: the forms of the layers; None for a float type.
        on_tensor: told (weights written, weights in all).

    Raises:
        ConversionError: a weight does not fit into float16.
    """
    keep: frozenset[str] = frozenset()
    if quantization is not None:
        keep = quantization.float32_layers
        QuantizeWeights(quantization.forms, quantization.encode)(model)
        for node in model.graph:
            # Where onnxscript traced a node from takes more room than some of its weights now do.
            node.metadata_props.clear()
    if dtype != "fp32":
        own = {name for name in model.graph.initializers if name.startswith("quantization/")}
        StoreHalf(keep={f"{name}.weight" for name in keep} | keep | own)(model)
    place = root / folder
    place.mkdir(parents=True, exist_ok=True)
    graph, data, fused = place / f"{component}.onnx", f"{component}.onnx.data", place / f"{component}.cpu.onnx"
    callback = None if on_tensor is None else (lambda _, info: on_tensor(info.index + 1, info.total))
    try:
        ir.save(model, graph, external_data=data, size_threshold_bytes=256, callback=callback)
    except OverflowError as error:
        raise ConversionError(
            f"{component}: weight {error} does not fit into float16; convert with --dtype fp32"
        ) from error
    files = [graph] + ([place / data] if (place / data).exists() else [])
    cpu = ir.load(graph)
    modified = FuseForCpu()(cpu).modified
    if quantization is not None and quantization.int8_layers:
        modified = Int8Convolution(quantization.map_ranges)(cpu).modified or modified
        products = quantization.int8_layers - set(quantization.map_ranges)
        modified = Int8MatMul(products, quantization.per_token_layers)(cpu).modified or modified
    if modified:
        ir.save(cpu, fused)
        files.append(fused)
    return OnnxArtefact(
        precision=dtype,
        graph=graph.relative_to(root).as_posix(),
        fused_graph=fused.relative_to(root).as_posix() if modified else None,
        files=tuple(f.relative_to(root).as_posix() for f in files),
    )
