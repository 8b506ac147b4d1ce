"""A model of scenes that is small enough to be trained in a test, in the classes of the embedded one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL

from edgedit.converters.training.export import TRANSFORMER, export_pipeline
from edgedit.converters.training.loop import save_file
from edgedit.converters.training.teacher import build_transformer
from edgedit.converters.training.text_encoder import build_text_encoder

TINY_AUTOENCODER: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [4, 4, 8, 8],
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 2,
    "sample_size": 128,
}
TINY_TEXT: dict[str, Any] = {
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 1,
    "num_heads": 2,
    "dropout_rate": 0.0,
    "feed_forward_proj": "gated-gelu",
    "is_encoder_decoder": False,
    "use_cache": False,
}
TINY_TRANSFORMER: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "cross_attention_dim": 16,
    "sample_size": 16,
    "patch_size": 2,
    "caption_channels": 16,
    "interpolation_scale": 1,
    "use_additional_conditions": False,
}


def write_tiny_scenes(work: Path, folder: Path, seed: int) -> Path:
    """A pipeline folder with random weights; `work` is an empty folder for what it is made from."""
    torch.manual_seed(seed)
    transformer = build_transformer(TINY_TRANSFORMER)
    torch.nn.init.normal_(transformer.proj_out.weight, std=0.05)
    parts = {
        TRANSFORMER: transformer,
        "text-encoder-final.pt": build_text_encoder(TINY_TEXT),
        "autoencoder-final.pt": AutoencoderKL(**TINY_AUTOENCODER),
    }
    for name, module in parts.items():
        save_file({"averaged": module.state_dict()}, work / name)
    export_pipeline(
        work,
        folder,
        autoencoder_config=TINY_AUTOENCODER,
        text_config=TINY_TEXT,
        transformer_config=TINY_TRANSFORMER,
    )
    return folder
