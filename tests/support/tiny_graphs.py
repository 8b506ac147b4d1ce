"""Tiny canonical graphs of every architecture, with random configurations and weights and no torch: what a lowering
has to agree with ONNX Runtime on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from edgedit.converters.architectures import (
    autoencoder_dc,
    autoencoder_kl,
    autoencoder_tiny,
    gemma2,
    pixart,
    sana,
    t5,
)
from edgedit.converters.graph import LAYOUT, Component, bind, build
from edgedit.converters.tensors import TensorRef
from edgedit.example_inputs import example_inputs
from edgedit.runtimes.onnx import CPU, OnnxSession

__all__ = ["ARCHITECTURES", "HALF_PRECISION", "TinyGraph"]


def _pixart(random: np.random.Generator, **fixed: Any) -> dict[str, Any]:
    heads, head_dim = 3 * int(random.integers(1, 3)), int(random.choice([4, 8, 12]))
    channels = int(random.integers(1, 5))
    return {
        "num_attention_heads": heads,
        "attention_head_dim": head_dim,
        "in_channels": channels,
        "out_channels": 2 * channels,
        "num_layers": 2,
        "cross_attention_dim": heads * head_dim,
        "attention_bias": bool(random.integers(2)),
        "sample_size": int(random.choice([8, 16])),
        "patch_size": 2,
        "caption_channels": int(random.integers(6, 30)),
        "use_additional_conditions": False,
        **fixed,
    }


def _compressed(sampling: str) -> dict[str, Any]:
    return {"kv_compress_config": {"sampling": sampling, "scale_factor": 2, "kv_compress_layer": [1]}}


def _sana(random: np.random.Generator, **fixed: Any) -> dict[str, Any]:
    heads, head_dim = int(random.integers(1, 4)), int(random.choice([8, 16]))
    return {
        "in_channels": int(random.integers(1, 6)),
        "out_channels": None,
        "num_attention_heads": heads,
        "attention_head_dim": head_dim,
        "num_layers": 2,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": int(random.choice([6, 56, 72])),
        "cross_attention_dim": heads * head_dim,
        "caption_channels": int(random.integers(6, 30)),
        "mlp_ratio": 2.5,
        "sample_size": 8,
        "patch_size": 1,
        "interpolation_scale": None,
        **fixed,
    }


def _t5(random: np.random.Generator, **fixed: Any) -> dict[str, Any]:
    return {
        "vocab_size": int(random.integers(30, 90)),
        "d_model": int(random.integers(12, 40)),
        "d_kv": int(random.integers(3, 12)),
        "d_ff": int(random.integers(10, 50)),
        "num_layers": 2,
        "num_heads": int(random.integers(1, 5)),
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 20,
        "feed_forward_proj": "gated-gelu",
        **fixed,
    }


def _gemma(random: np.random.Generator, **fixed: Any) -> dict[str, Any]:
    groups, heads = int(random.integers(1, 3)), int(random.integers(1, 4))
    return {
        "vocab_size": int(random.integers(30, 90)),
        "hidden_size": int(random.integers(16, 40)),
        "intermediate_size": int(random.integers(10, 50)),
        "num_hidden_layers": 2,
        "num_attention_heads": groups * heads,
        "num_key_value_heads": groups,
        "head_dim": 2 * int(random.integers(2, 8)),
        "sliding_window": 4,
        **fixed,
    }


def _kl(random: np.random.Generator, **fixed: Any) -> dict[str, Any]:
    groups = int(random.choice([2, 3]))
    return {
        "block_out_channels": [groups * int(random.integers(2, 5)) for _ in range(2)],
        "down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"],
        "up_block_types": ["AttnUpDecoderBlock2D", "UpDecoderBlock2D"],
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": groups,
        "act_fn": str(random.choice(["silu", "gelu", "mish"])),
        **fixed,
    }


def _dc(random: np.random.Generator, **fixed: Any) -> dict[str, Any]:
    halves: dict[str, Any] = {}
    for half in ("encoder", "decoder"):
        halves |= {
            f"{half}_block_types": ["ResBlock", "EfficientViTBlock"],
            f"{half}_block_out_channels": [16, 32],
            f"{half}_layers_per_block": [1, 1],
            f"{half}_qkv_multiscales": [[], [5]],
        }
    # Of 16 channels after a ReLU some are left at every position; of 4 often one that is all but zero, and a quotient
    # of two such numbers says nothing of either network.
    return {"latent_channels": int(random.choice([4, 8])), "attention_head_dim": 16, **halves, **fixed}


def _tiny(random: np.random.Generator, **fixed: Any) -> dict[str, Any]:
    width = int(random.integers(3, 10))
    return {
        "encoder_block_out_channels": [width] * 3,
        "decoder_block_out_channels": [width] * 3,
        "num_encoder_blocks": [1, 1, 1],
        "num_decoder_blocks": [1, 1, 1],
        "latent_channels": 4,
        "upsampling_scaling_factor": int(random.choice([2, 3])),
        **fixed,
    }


_Draw = Callable[[np.random.Generator], Component]


def _architecture(build_: Callable[..., Component], draw: Callable[..., dict[str, Any]], **fixed: Any) -> _Draw:
    return lambda random: build_(draw(random, **fixed))


_RESAMPLED = {"upsample_block_type": "interpolate", "downsample_block_type": "conv"}
_BATCH = {"decoder_norm_types": ["rms_norm", "batch_norm"], "decoder_act_fns": ["silu", "mish"]}

#: A component of every architecture, and of every branch in it that a lowering sees, by name.
ARCHITECTURES: dict[str, _Draw] = {
    "pixart": _architecture(pixart.build_transformer, _pixart),
    "pixart-alpha": _architecture(pixart.build_transformer, _pixart, use_additional_conditions=True),
    "pixart-conv-compressed": _architecture(pixart.build_transformer, _pixart, **_compressed("conv")),
    "pixart-uniform-compressed": _architecture(
        pixart.build_transformer, _pixart, **_compressed("uniform"), qk_norm="layer_norm_across_heads"
    ),
    "sana": _architecture(sana.build_transformer, _sana),
    "sana-sprint": _architecture(sana.build_transformer, _sana, guidance_embeds=True, qk_norm="rms_norm_across_heads"),
    "sana-positions": _architecture(sana.build_transformer, _sana, interpolation_scale=1, patch_size=2),
    "t5": _architecture(t5.build_text_encoder, _t5),
    "umt5": _architecture(t5.build_text_encoder, _t5, model_type="umt5", feed_forward_proj="relu"),
    "gemma2": _architecture(gemma2.build_text_encoder, _gemma),
    "gemma2-uncapped": _architecture(gemma2.build_text_encoder, _gemma, attn_logit_softcapping=None),
    "kl-decoder": _architecture(autoencoder_kl.build_decoder, _kl),
    "kl-encoder": _architecture(autoencoder_kl.build_encoder, _kl),
    "dc-decoder": _architecture(autoencoder_dc.build_decoder, _dc),
    "dc-encoder": _architecture(autoencoder_dc.build_encoder, _dc),
    "dc-decoder-interpolate": _architecture(autoencoder_dc.build_decoder, _dc, **_RESAMPLED, **_BATCH),
    "dc-encoder-conv": _architecture(autoencoder_dc.build_encoder, _dc, **_RESAMPLED),
    **{
        f"tiny-decoder-{mode}": _architecture(autoencoder_tiny.build_decoder, _tiny, upsample_fn=mode)
        for mode in ("nearest", "bilinear", "bicubic")
    },
    "tiny-encoder": _architecture(autoencoder_tiny.build_encoder, _tiny),
}


#: Linear attention with heads as wide as published models have them. In a head of four channels every sixteenth query
#: is zero after its ReLU, and float16 then decides whether 0 / 0 or a quotient of two small numbers is read.
_WIDE_SANA: dict[str, Any] = {
    "in_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "cross_attention_dim": 64,
}
_WIDE_DC: dict[str, Any] = {
    "attention_head_dim": 32,
    "encoder_block_out_channels": [32, 64],
    "decoder_block_out_channels": [32, 64],
}

#: What can be asked to agree in float16.
HALF_PRECISION: dict[str, _Draw] = {
    **{name: draw for name, draw in ARCHITECTURES.items() if not name.startswith(("sana", "sprint", "dc-"))},
    "sana-wide": _architecture(sana.build_transformer, _sana, **_WIDE_SANA),
    "sprint-wide": _architecture(
        sana.build_transformer, _sana, guidance_embeds=True, qk_norm="rms_norm_across_heads", **_WIDE_SANA
    ),
    "dc-decoder-wide": _architecture(autoencoder_dc.build_decoder, _dc, **_WIDE_DC, **_RESAMPLED),
    "dc-encoder-wide": _architecture(autoencoder_dc.build_encoder, _dc, **_WIDE_DC, **_RESAMPLED),
}


@dataclass
class TinyGraph:
    """One architecture with a drawn configuration and weights. The same name and seed give the same network."""

    name: str
    seed: int

    def __post_init__(self) -> None:
        self.component, _ = self._bound()

    def _bound(self) -> tuple[Component, ir.Model]:
        random = np.random.default_rng(self.seed)
        component = (ARCHITECTURES | HALF_PRECISION)[self.name](random)
        model = build(component)
        tensors = {}
        for key, value in model.graph.initializers.items():
            if value.const_value is None:
                shape = tuple(int(d) for d in value.shape.numpy())
                shape = shape[::-1] if value.metadata_props.get(LAYOUT) == "transposed" else shape
                tensors[key] = _tensor(key, shape, random)
        bind(model, tensors)
        return component, model

    def model(self) -> ir.Model:
        """The bound graph, made anew: lowerings take it apart."""
        return self._bound()[1]

    def inputs(self, tokens: tuple[int, int] = (6, 4), length: int = 9, batch: int = 1) -> dict[str, np.ndarray]:
        """Inputs of those sizes."""
        component = self.component
        return example_inputs(
            component.name, component.inputs, component.runtime, tokens=tokens, length=length, batch=batch
        )

    def reference(self, folder: Path) -> OnnxSession:
        """The canonical graph in ONNX Runtime, saved in `folder`."""
        ir.save(self.model(), folder / "canonical.onnx")
        return OnnxSession(folder / "canonical.onnx", [CPU], 1, None, self.name)


def _tensor(key: str, shape: tuple[int, ...], random: np.random.Generator) -> TensorRef:
    """Values that keep activations near one and leave nothing at zero or one."""
    noise = random.standard_normal(shape).astype(np.float32)
    if key.endswith("running_var"):
        array = np.float32(0.5) + np.abs(noise)
    elif len(shape) > 1:
        array = noise * np.float32((shape[0] / noise.size) ** 0.5)
    elif key.endswith("weight"):
        array = 1 + np.float32(0.2) * noise
    else:
        array = np.float32(0.3) * noise
    return TensorRef(name=key, dtype="float32", shape=shape, load=array.copy)
