"""The networks of a diffusers checkpoint as other tools run them: torch itself, and the exporters of ONNX and OpenVINO.

What bundles are timed against. Every network is wrapped to take the inputs of the bundle's component by name, so that
all contenders are given the same arrays.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from edgedit.errors import CheckpointError, InputError

__all__ = ["EXPORTS", "TorchContender", "export_onnx", "export_openvino", "load_network", "open_torch"]

#: Part of the checkpoint that a component is made of.
PARTS = {"transformer": "transformer", "text_encoder": "text_encoder", "decoder": "vae", "encoder": "vae"}


class _Transformer(torch.nn.Module):
    """A PixArt or SANA transformer; a condition that it does not take is refused by `forward` itself."""

    def __init__(self, net: torch.nn.Module) -> None:
        super().__init__()
        self.net = net
        self.takes = set(inspect.signature(net.forward).parameters)

    def forward(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_attention_mask: torch.Tensor,
        resolution: torch.Tensor | None = None,
        aspect_ratio: torch.Tensor | None = None,
        guidance: torch.Tensor | None = None,
    ) -> torch.Tensor:
        more: dict[str, Any] = {}
        if "added_cond_kwargs" in self.takes:
            more["added_cond_kwargs"] = {"resolution": resolution, "aspect_ratio": aspect_ratio}
        if guidance is not None:
            more["guidance"] = guidance
        result: torch.Tensor = self.net(
            latents,
            encoder_hidden_states=encoder_hidden_states,
            timestep=timestep,
            encoder_attention_mask=encoder_attention_mask,
            return_dict=False,
            **more,
        )[0]
        return result


class _TextEncoder(torch.nn.Module):
    def __init__(self, net: torch.nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.net(input_ids, attention_mask=attention_mask, return_dict=False)[0]
        return result


class _Decoder(torch.nn.Module):
    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net = net

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.net.decode(latents, return_dict=False)[0]
        return result


class _Encoder(torch.nn.Module):
    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net = net

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        encoded = self.net.encode(image, return_dict=False)[0]
        result: torch.Tensor = getattr(encoded, "parameters", encoded)
        return result


WRAPPERS = {"transformer": _Transformer, "text_encoder": _TextEncoder, "decoder": _Decoder, "encoder": _Encoder}


def load_network(source: Path, stage: str) -> torch.nn.Module:
    """The network of a bundle's component in float32, from a diffusers folder or that of one component.

    Raises CheckpointError when the folder has no such network.
    """
    part = PARTS[stage]
    index = source / "model_index.json"
    try:
        if index.exists():
            library, name = json.loads(index.read_text(encoding="utf-8"))[part]
            folder = source / part
        else:
            library, folder = "diffusers", source
            name = json.loads((source / "config.json").read_text(encoding="utf-8"))["_class_name"]
        cls = getattr(import_module(library), name)
    except (OSError, KeyError, ValueError, AttributeError, ImportError) as error:
        raise CheckpointError(
            f"{source}: torch finds no {part} there ({error}); give the diffusers folder that the bundle was made from"
        ) from error
    return WRAPPERS[stage](cls.from_pretrained(folder, torch_dtype=torch.float32)).eval()


def _taken(network: torch.nn.Module, inputs: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    names = inspect.signature(network.forward).parameters
    return {name: torch.from_numpy(np.ascontiguousarray(inputs[name])) for name in names if name in inputs}


class _TorchStage:
    def __init__(self, network: torch.nn.Module) -> None:
        self._network: torch.nn.Module | None = network

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        assert self._network is not None
        with torch.inference_mode():
            return {"output": self._network(**_taken(self._network, inputs)).numpy()}

    def close(self) -> None:
        self._network = None


class TorchContender:
    """torch eager, float32, with the attention that diffusers chooses."""

    def __init__(self, source: Path, threads: int | None) -> None:
        self.source = source
        if threads is not None:
            torch.set_num_threads(threads)

    def open(self, stage: str) -> _TorchStage:
        """The network of one stage with its weights."""
        return _TorchStage(load_network(self.source, stage))

    def describe(self) -> dict[str, str]:
        """Versions of torch and diffusers."""
        return {
            "engine": "torch eager",
            "torch": torch.__version__,
            "diffusers": import_module("diffusers").__version__,
        }

    def precision(self, stage: str) -> str:
        """Everything is float32."""
        return "fp32"


def open_torch(order: Mapping[str, Any]) -> TorchContender:
    """A contender of `edgedit.bench`: `source` and `threads`."""
    return TorchContender(Path(order["source"]), order["threads"])


def export_onnx(network: torch.nn.Module, inputs: Mapping[str, np.ndarray], path: Path, precision: str) -> None:
    """What `torch.onnx.export` makes of a network for inputs of these shapes.

    It writes `Squeeze` of an axis that is longer than 1 where torch's `squeeze` does nothing (PixArt has one), which no
    engine opens: those nodes are left out.
    """
    values = _taken(network, inputs)
    with torch.inference_mode():
        program = torch.onnx.export(network, (), kwargs=values, input_names=list(values), dynamo=True, verbose=False)
    assert program is not None
    for node in list(program.model.graph):
        if node.op_type == "Squeeze" and _keeps_shape(node):
            assert node.inputs[0] is not None
            ir.convenience.replace_all_uses_with(node.outputs[0], node.inputs[0], replace_graph_outputs=True)
            program.model.graph.remove(node, safe=True)
    program.save(path, external_data=True)


def _keeps_shape(node: ir.Node) -> bool:
    """Whether a Squeeze has an axis that is longer than 1, which torch lets be."""
    source, axes = node.inputs[0], node.inputs[1] if len(node.inputs) > 1 else None
    constant = None if axes is None else ir.convenience.get_const_tensor(axes)
    if source is None or source.shape is None or constant is None:
        return False
    sides = [source.shape[int(axis)] for axis in constant.numpy().reshape(-1)]
    return any(isinstance(side, int) and side != 1 for side in sides)


def export_openvino(network: torch.nn.Module, inputs: Mapping[str, np.ndarray], path: Path, precision: str) -> None:
    """What OpenVINO's own exporter makes of a network, for inputs of these shapes.

    precision: "fp32"; "w8", weights compressed to int8 by NNCF; or "w8a8", quantized by NNCF after training with these
        inputs as the calibration set.
    """
    openvino = import_module("openvino")
    values = _taken(network, inputs)
    with torch.inference_mode():
        model = openvino.convert_model(network, example_input=values)
    for port in model.inputs:
        # The tracer leaves names of its own beside those of the arguments.
        port.set_names(port.get_names() & values.keys())
    model.reshape({port: list(values[port.get_any_name()].shape) for port in model.inputs})
    if precision != "fp32":
        nncf = import_module("nncf")
        if precision == "w8":
            model = nncf.compress_weights(model)
        else:
            data = nncf.Dataset([{name: value.numpy() for name, value in values.items()}])
            model = nncf.quantize(model, data, subset_size=1, model_type=nncf.ModelType.TRANSFORMER)
    openvino.save_model(model, path, compress_to_fp16=False)


EXPORTS = {"onnxruntime": (export_onnx, "onnx"), "openvino": (export_openvino, "xml")}


def export(order: Mapping[str, Any]) -> dict[str, Any]:
    """Export every stage of the order: `source`, `engine`, `precision`, `stages` (name → .npz of inputs), `folder`."""
    function, suffix = EXPORTS[order["engine"]]
    for stage, file in order["stages"].items():
        network = load_network(Path(order["source"]), stage)
        with np.load(file) as inputs:
            try:
                function(network, dict(inputs), Path(order["folder"]) / f"{stage}.{suffix}", order["precision"])
            except Exception as error:
                said = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
                raise InputError(f"{order['label']}: the {stage} cannot be exported: {said}") from error
    return {}
