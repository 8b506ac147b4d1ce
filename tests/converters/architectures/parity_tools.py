"""What a parity test needs: fresh seeds, weights that leave nothing at zero, the saved graph run, and a measure."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch
from safetensors.torch import save_file

from edgedit.converters.graph import Component, bind, build
from edgedit.converters.safetensors_file import read_safetensors

__all__ = [
    "BASE_SEED",
    "TOLERANCE",
    "Graph",
    "fresh_seed",
    "padding_mask",
    "parameter_shapes",
    "randomise",
    "relative_l2",
]

#: Relative L2 below which two float32 networks count as the same.
TOLERANCE = 1e-5

#: Drawn anew in every run; set EDGEDIT_TEST_SEED to the number that a failure shows to see it again.
BASE_SEED = int(os.environ.get("EDGEDIT_TEST_SEED") or secrets.randbits(31))


def fresh_seed(case: int) -> int:
    """The seed of the numbered case of a parametrised test. Show it, or BASE_SEED, in the assertion's message."""
    return (BASE_SEED + 7919 * case) % 2**31


def randomise(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Draw every parameter of `module` in place, those that start at zero or one too, and put it in eval mode.

    Matrices and kernels are normal with std 1/sqrt(fan-in), so that activations stay near one; vectors of weights are
    near one; biases and tables have std 0.3.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if not name.endswith("weight"):
                parameter.copy_(0.3 * noise)
            elif parameter.ndim == 1:
                parameter.copy_(1 + 0.2 * noise)
            else:
                parameter.copy_(noise * (parameter.shape[0] / parameter.numel()) ** 0.5)
    return module.eval()


def padding_mask(generator: np.random.Generator, batch: int, length: int) -> np.ndarray:
    """A mask float32 [batch, length] of ones and zeros; every row keeps its first token."""
    mask = (generator.random((batch, length)) < 0.6).astype(np.float32)
    mask[:, 0] = 1
    return mask


def relative_l2(actual: np.ndarray, expected: np.ndarray) -> float:
    """|actual - expected| / |expected|; infinite where the shapes differ or something is not finite."""
    if actual.shape != expected.shape or not np.isfinite(actual).all():
        return float("inf")
    difference = np.linalg.norm(actual.astype(np.float64) - expected.astype(np.float64))
    return float(difference / np.linalg.norm(expected.astype(np.float64)))


def parameter_shapes(component: Component) -> tuple[dict[str, tuple[int, ...]], float]:
    """Shape of every parameter of the built graph as a checkpoint stores it, and the processor seconds it took."""
    started = time.process_time()
    model = build(component)
    seconds = time.process_time() - started
    shapes = {}
    for name, value in model.graph.initializers.items():
        if value.const_value is None:
            shape = tuple(int(size) for size in value.shape.numpy())
            shapes[name] = shape[::-1] if value.metadata_props.get("edgedit.layout") == "transposed" else shape
    return shapes, seconds


class Graph:
    """A component built, bound to a checkpoint, saved and opened with ONNX Runtime, as a conversion does it."""

    def __init__(
        self, component: Component, weights: torch.nn.Module | Mapping[str, torch.Tensor], folder: Path
    ) -> None:
        state = weights.state_dict() if isinstance(weights, torch.nn.Module) else weights
        checkpoint = folder / "checkpoint.safetensors"
        save_file({name: tensor.clone().contiguous() for name, tensor in state.items()}, checkpoint)
        self.model = build(component)
        bind(self.model, read_safetensors(checkpoint), drop=component.drop)
        ir.save(self.model, folder / "model.onnx", external_data="model.onnx.data")
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 4
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        self.session = ort.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])

    def __call__(self, **inputs: np.ndarray | torch.Tensor) -> np.ndarray:
        """The first output for inputs by name; scores are scaled as in training where nothing else is said."""
        feeds = {name: np.asarray(value) for name, value in inputs.items()}
        if any(value.name == "attention_scale" for value in self.session.get_inputs()):
            feeds.setdefault("attention_scale", np.ones(1, np.float32))
        return self.session.run(None, feeds)[0]
