"""A tiny PixArt-Sigma pipeline whose matrices are just large enough to be quantized, and its graphs."""

from __future__ import annotations

from pathlib import Path

import diffusers
import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch
from tiny_pipelines import build_pipeline, randomize
from transformers import T5Config, T5EncoderModel

from edgedit.converters.checkpoint import open_checkpoint
from edgedit.converters.families import builder
from edgedit.converters.graph import bind, build
from edgedit.example_inputs import example_inputs

__all__ = ["fresh_graph", "outputs_of", "save_quantizable"]

WIDTH = 64


def save_quantizable(folder: Path, seed: int, *, layers: int = 2, head_dim: int = 16) -> None:
    """Random weights, but input channels of very different sizes, as trained networks have them."""
    pipeline = build_pipeline("pixart-sigma", seed)
    transformer = diffusers.PixArtTransformer2DModel(
        num_attention_heads=WIDTH // head_dim,
        attention_head_dim=head_dim,
        in_channels=4,
        out_channels=8,
        num_layers=layers,
        cross_attention_dim=WIDTH,
        caption_channels=WIDTH,
        sample_size=8,
        interpolation_scale=1,
        use_additional_conditions=False,
    )
    config = T5Config(
        vocab_size=64,
        d_model=WIDTH,
        d_kv=16,
        d_ff=64,
        num_layers=1,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )
    encoder = T5EncoderModel(config)
    for index, module in enumerate((transformer, encoder)):
        randomize(module, seed + 10 + index)
        module.eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for block in transformer.transformer_blocks:
            block.scale_shift_table.mul_(torch.exp(torch.randn(WIDTH, generator=generator)))
    pipeline.register_modules(transformer=transformer, text_encoder=encoder)
    pipeline.save_pretrained(folder)


def fresh_graph(folder: Path, component: str = "transformer") -> tuple[ir.Model, dict[str, np.ndarray]]:
    """The canonical graph of a component of a saved pipeline, and inputs for it."""
    source = open_checkpoint(folder).components[component]
    described = builder(source.class_name, component)(source.config)
    model = build(described)
    bind(model, source.tensors, drop=described.drop, config=source.config)
    return model, example_inputs(component, described.inputs, described.runtime)


def outputs_of(model: ir.Model, inputs: dict[str, np.ndarray], place: Path) -> np.ndarray:
    """The graph's first output in ONNX Runtime, block-quantized weights exact."""
    ir.save(model, place / "m.onnx")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = ort.InferenceSession(str(place / "m.onnx"), options, providers=["CPUExecutionProvider"])
    result: np.ndarray = session.run(None, inputs)[0]
    return result
