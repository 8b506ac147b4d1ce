"""One evaluation of the whole transformer of SANA 0.6B, with random weights, in a process of its own.

    python tests/bench/sana_step.py [--pixels 4096] [--layers 28] [--dtype fp32] [--threads 2]

Prints seconds and bytes as JSON. A picture of 4096 × 4096 pixels has 16,384 tokens. Needs 2.4 GB of disk for the
weights in float32, half of that in float16.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from run_alone import Cost, run_alone

from edgedit.converters.architectures.sana import build_transformer
from edgedit.converters.graph import build
from edgedit.converters.lowerings import onnx as onnx_lowering
from edgedit.converters.quantization.layers import find_layers
from edgedit.converters.quantization.presets import PRESETS, recipe_of
from edgedit.converters.quantization.record import Quantization

#: Pixels of a token's side: DC-AE's factor, patches of one.
PIXELS = 32
#: SANA 0.6B; a test takes fewer layers and heads.
SHAPE = {"num_layers": 28, "num_attention_heads": 36, "attention_head_dim": 32}
TEXT = {"num_cross_attention_heads": 16, "cross_attention_head_dim": 72, "cross_attention_dim": 1152}


def _random(shape: tuple[int, ...], seed: int, name: str) -> Callable[[], ir.TensorProtocol]:
    def load() -> ir.TensorProtocol:
        spread = (shape[0] / math.prod(shape)) ** 0.5 if len(shape) > 1 else 0.1
        values = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
        return ir.tensor(values * np.float32(spread), name=name)

    return load


def step(config: dict[str, Any], pixels: int, *, dtype: str, threads: int, repeat: int, length: int = 300) -> Cost:
    """Write the network with random weights to a temporary folder and evaluate it once for a square picture."""
    component = build_transformer(config)
    model = build(component)
    for seed, (name, value) in enumerate(model.graph.initializers.items()):
        if value.const_value is None:
            shape = tuple(int(side) for side in value.shape.numpy())
            value.const_value = ir.LazyTensor(
                _random(shape, seed, name), dtype=ir.DataType.FLOAT, shape=value.shape, name=name, cache=False
            )
    side = pixels // PIXELS
    inputs: dict[str, Any] = {
        "latents": {"shape": [1, component.runtime["in_channels"], side, side]},
        "timestep": {"shape": [1], "fill": 500.0},
        "encoder_hidden_states": {"shape": [1, length, component.runtime["caption_channels"]]},
        "encoder_attention_mask": {"shape": [1, length], "fill": 1.0},
    }
    with tempfile.TemporaryDirectory() as place:
        recipe = recipe_of(dtype, calibrated=False)
        forms = None if recipe is None else Quantization(recipe, recipe.resolve("transformer", find_layers(model)))
        artefact = onnx_lowering.write(model, Path(place), "transformer", dtype=dtype, quantization=forms)
        graph = Path(place) / (artefact.fused_graph or artefact.graph)
        return run_alone(graph, inputs, threads=threads, repeat=repeat)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pixels", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=SHAPE["num_layers"])
    parser.add_argument("--dtype", choices=("fp32", "fp16", *PRESETS), default="fp32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=1)
    options = parser.parse_args(arguments)
    config = {**SHAPE, **TEXT, "num_layers": options.layers}
    cost = step(config, options.pixels, dtype=options.dtype, threads=options.threads, repeat=options.repeat)
    tokens = (options.pixels // PIXELS) ** 2
    print(json.dumps({"pixels": options.pixels, "tokens": tokens, "dtype": options.dtype, **cost.as_dict()}, indent=2))


if __name__ == "__main__":
    main()
