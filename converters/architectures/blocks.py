"""Pieces that diffusion transformers share: patches in and out, adaptive layer norm, text projection, feed-forward.

Shapes as in `layers`; a token grid is H × W patches, and `D` is the width of a token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgedit.converters.architectures.layers import (
    ACTIVATIONS,
    Conv2d,
    Empty,
    Linear,
    Module,
    ModuleList,
    Op,
    TimestepEmbedding,
    Value,
    gelu_tanh,
    int64s,
    map_to_tokens,
    silu,
    timestep_sinusoid,
    tokens_to_map,
)
from edgedit.converters.graph import TensorSpec
from edgedit.errors import ConversionError

__all__ = [
    "FEED_FORWARD_ACTIVATIONS",
    "SINUSOID_WIDTH",
    "AdaLayerNormSingle",
    "FeedForward",
    "PatchEmbed",
    "TextProjection",
    "modulate",
    "sincos_positions",
    "table_rows",
    "transformer_inputs",
    "unpatchify",
]

#: Width of the sinusoid that embeds a timestep, a size or a guidance scale (diffusers `Timesteps(num_channels=256)`).
SINUSOID_WIDTH = 256

#: Activations of `FeedForward` by the names that diffusers uses.
FEED_FORWARD_ACTIVATIONS = {"gelu": ACTIVATIONS["gelu"], "gelu-approximate": gelu_tanh}


def modulate(op: Op, x: Value, shift: Value, scale: Value) -> Value:
    """x [B, N, D] · (1 + scale) + shift, both [B, 1, D] (DiT: Peebles and Xie 2023, section 3.2)."""
    return op.Add(op.Mul(x, op.Add(scale, 1.0)), shift)


def table_rows(op: Op, table: Value, conditioning: Value, rows: int) -> list[Value]:
    """adaLN-single (PixArt-alpha, section 2.3): a learned table [rows, D] plus conditioning [B, rows or 1, D], cut into
    `rows` values [B, 1, D]."""
    return list(op.Split(op.Add(conditioning, table), axis=1, num_outputs=rows, _outputs=rows))


class PatchEmbed(Module):
    """diffusers' PatchEmbed: latents [B, C, H·p, W·p] → tokens [B, H·W, D], plus a table [1, H·W, D] if given."""

    def __init__(self, in_channels: int, width: int, patch_size: int) -> None:
        super().__init__()
        self.proj = Conv2d(in_channels, width, patch_size, stride=patch_size)
        self.width = width

    def forward(self, op: Op, latents: Value, pos_embed: Value | None = None) -> Value:
        x = map_to_tokens(op, self.proj(op, latents), self.width)
        return x if pos_embed is None else op.Add(x, pos_embed)


def unpatchify(op: Op, x: Value, grid: Value, size: Value, *, patch_size: int, channels: int) -> Value:
    """Tokens [B, H·W, p·p·C] → map [B, C, H·p, W·p]; `grid` is [H, W] and `size` [H·p, W·p], int64."""
    if patch_size == 1:
        return tokens_to_map(op, x, channels, size)
    x = op.Reshape(x, op.Concat(int64s(op, 0), grid, int64s(op, patch_size, patch_size, channels), axis=0))
    x = op.Transpose(x, perm=[0, 5, 1, 3, 2, 4])
    return op.Reshape(x, op.Concat(int64s(op, 0, channels), size, axis=0))


class TextProjection(Module):
    """diffusers' PixArtAlphaTextProjection: Linear, GELU (tanh), Linear."""

    def __init__(self, in_features: int, width: int) -> None:
        super().__init__()
        self.linear_1, self.linear_2 = Linear(in_features, width), Linear(width, width)

    def forward(self, op: Op, x: Value) -> Value:
        return self.linear_2(op, gelu_tanh(op, self.linear_1(op, x)))


class _ActivatedLinear(Module):
    """diffusers' GELU module: a Linear called `proj`, then the activation."""

    def __init__(self, in_features: int, out_features: int, activation: str) -> None:
        super().__init__()
        self.proj = Linear(in_features, out_features)
        self.activation = FEED_FORWARD_ACTIVATIONS[activation]

    def forward(self, op: Op, x: Value) -> Value:
        return self.activation(op, self.proj(op, x))


class FeedForward(Module):
    """diffusers' FeedForward of width 4·D: net.0.proj, activation, (dropout), net.2."""

    def __init__(self, width: int, activation: str) -> None:
        super().__init__()
        self.net = ModuleList([_ActivatedLinear(width, 4 * width, activation), Empty(), Linear(4 * width, width)])

    def forward(self, op: Op, x: Value) -> Value:
        return self.net[2](op, self.net[0](op, x))


class _TimestepSizeEmbeddings(Module):
    """diffusers' PixArtAlphaCombinedTimestepSizeEmbeddings: timestep, plus picture size and aspect ratio if given."""

    def __init__(self, width: int, size_conditions: bool) -> None:
        super().__init__()
        self.timestep_embedder = TimestepEmbedding(SINUSOID_WIDTH, width)
        if size_conditions:
            self.resolution_embedder = TimestepEmbedding(SINUSOID_WIDTH, width // 3)
            self.aspect_ratio_embedder = TimestepEmbedding(SINUSOID_WIDTH, width // 3)
        self.part = width // 3

    def forward(self, op: Op, timestep: Value, resolution: Value | None, aspect_ratio: Value | None) -> Value:
        embedded = self.timestep_embedder(op, timestep_sinusoid(op, timestep, SINUSOID_WIDTH))
        if resolution is None or aspect_ratio is None:
            return embedded
        # Height and width share one embedder and lie side by side in the channels.
        size = timestep_sinusoid(op, op.Reshape(resolution, int64s(op, -1)), SINUSOID_WIDTH)
        size = op.Reshape(self.resolution_embedder(op, size), int64s(op, -1, 2 * self.part))
        aspect = timestep_sinusoid(op, op.Reshape(aspect_ratio, int64s(op, -1)), SINUSOID_WIDTH)
        aspect = self.aspect_ratio_embedder(op, aspect)
        return op.Add(embedded, op.Concat(size, aspect, axis=-1))


class AdaLayerNormSingle(Module):
    """diffusers' AdaLayerNormSingle: one conditioning for all blocks (PixArt-alpha, section 2.3).

    timestep [B], resolution [B, 2] and aspect_ratio [B, 1] or None → modulation [B, 6, D], embedded timestep [B, D].
    """

    def __init__(self, width: int, *, size_conditions: bool = False) -> None:
        super().__init__()
        self.emb = _TimestepSizeEmbeddings(width, size_conditions)
        self.linear = Linear(width, 6 * width)
        self.width = width

    def forward(
        self, op: Op, timestep: Value, resolution: Value | None = None, aspect_ratio: Value | None = None
    ) -> tuple[Value, Value]:
        embedded = self.emb(op, timestep, resolution, aspect_ratio)
        return op.Reshape(self.linear(op, silu(op, embedded)), int64s(op, 0, 6, self.width)), embedded


def sincos_positions(width: int, sample_size: int, patch_size: int, interpolation_scale: float) -> dict[str, Any]:
    """The manifest's object from which `edgedit.positions.pos_embed_table` makes the `pos_embed` input."""
    if width % 4:
        raise ConversionError(f"a token width of {width} is not supported: sine-cosine positions need a multiple of 4")
    if sample_size < patch_size:
        raise ConversionError(f"sample_size={sample_size} is not supported: it is smaller than patch_size={patch_size}")
    if interpolation_scale <= 0:
        raise ConversionError(
            f"interpolation_scale={interpolation_scale!r} is not supported: it must be a number above 0"
        )
    return {
        "kind": "sincos_2d",
        "dim": width,
        "base_size": sample_size // patch_size,
        "interpolation_scale": interpolation_scale,
        "patch_size": patch_size,
    }


def transformer_inputs(
    latent_channels: int, text_channels: int, positions: Mapping[str, Any] | None, *conditions: TensorSpec
) -> tuple[TensorSpec, ...]:
    """Inputs of a text-conditioned transformer in the order in which `forward` takes them; `conditions` come last."""
    table = () if positions is None else (TensorSpec("pos_embed", "float32", (1, "tokens", int(positions["dim"]))),)
    return (
        TensorSpec("latents", "float32", ("batch", latent_channels, "height", "width")),
        TensorSpec("timestep", "float32", ("batch",)),
        TensorSpec("encoder_hidden_states", "float32", ("batch", "length", text_channels)),
        TensorSpec("encoder_attention_mask", "float32", ("batch", "length")),
        *table,
        *conditions,
    )
