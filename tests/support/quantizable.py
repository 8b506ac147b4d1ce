"""A tiny PixArt-Sigma pipeline whose matrices are just large enough to be quantized."""

from __future__ import annotations

from pathlib import Path

import diffusers
import torch
from tiny_pipelines import build_pipeline, randomize
from transformers import T5Config, T5EncoderModel

__all__ = ["save_quantizable"]

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
