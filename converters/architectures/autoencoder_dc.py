"""AutoencoderDC: the deep-compression autoencoder of SANA, as diffusers' class of that name.

Chen et al., "Deep Compression Autoencoder for Efficient High-Resolution Diffusion Models" (2024), section 3: residual
autoencoding, where every change of resolution has a shortcut that moves space to channels and averages or repeats them.
Deep levels are EfficientViT blocks (Cai et al., 2022): multi-scale ReLU linear attention over the whole map, then a
gated depthwise convolution.

The decoder takes unscaled latents and returns what `vae.decode(z).sample` returns, unclamped; the encoder returns what
`vae.encode(image).latent` is.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from onnxscript.nn import Sequential

from edgedit.converters.architectures.autoencoder_layers import (
    DECODER_ONLY,
    ENCODER_ONLY,
    NORMS,
    Activation,
    ChannelRMSNorm,
    DownBlock,
    MapLinear,
    UpBlock,
    activation,
    average_channels,
    image_spec,
    latents_spec,
    repeat_channels,
)
from edgedit.converters.architectures.configuration import resolve
from edgedit.converters.architectures.layers import Conv2d, Module, ModuleList, Op, Value, int64s, silu, spatial_shape
from edgedit.converters.graph import Component
from edgedit.errors import ConversionError

__all__ = ["build_decoder", "build_encoder"]

_ATTENTION_EPS = 1e-15
_RESIDUAL, _ATTENTION = "ResBlock", "EfficientViTBlock"

#: None stands for a default that may be one value for all levels or a list, and is filled in by `_resolve`.
_DEFAULTS: dict[str, Any] = {
    "in_channels": 3,
    "latent_channels": 32,
    "attention_head_dim": 32,
    "encoder_block_types": None,
    "decoder_block_types": None,
    "encoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
    "decoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
    "encoder_layers_per_block": [2, 2, 2, 3, 3, 3],
    "decoder_layers_per_block": [3, 3, 3, 3, 3, 3],
    "encoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
    "decoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
    "upsample_block_type": "pixel_shuffle",
    "downsample_block_type": "pixel_unshuffle",
    "decoder_norm_types": None,
    "decoder_act_fns": None,
    "encoder_out_shortcut": True,
    "decoder_in_shortcut": True,
    "decoder_conv_act_fn": "relu",
    "scaling_factor": 1.0,
}
#: Published configurations of SANA's autoencoder write "Conv".
_RESAMPLERS = {
    "upsample_block_type": ("pixel_shuffle", "interpolate"),
    "downsample_block_type": ("pixel_unshuffle", "conv", "Conv"),
}
_PER_LEVEL = {
    "encoder_block_types": _RESIDUAL,
    "decoder_block_types": _RESIDUAL,
    "decoder_norm_types": "rms_norm",
    "decoder_act_fns": "silu",
}


class Scale(Module):
    """diffusers SanaMultiscaleAttentionProjection: depthwise k×k, then 1×1 within every head's q, k or v."""

    def __init__(self, channels: int, heads: int, kernel_size: int) -> None:
        super().__init__()
        self.proj_in = Conv2d(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels, bias=False)
        self.proj_out = Conv2d(channels, channels, 1, groups=3 * heads, bias=False)

    def forward(self, op: Op, x: Value) -> Value:
        return self.proj_out(op, self.proj_in(op, x))


class LinearAttention(Module):
    """diffusers SanaMultiscaleLinearAttention with its residual: O = (V Kᵀ) Q / (1ᵀ Kᵀ Q + 1e-15), Q and K after ReLU.

    Columns of Q, K, V [head_dim, H W] are positions. Where H W <= head_dim diffusers multiplies Kᵀ Q first, which gives
    the same number but for rounding; this order serves every size. A head is a run of 3 head_dim channels of q | k | v
    as a whole, and its Q, K and V are the thirds of that run, wherever in q | k | v they lie.
    """

    def __init__(self, channels: int, head_dim: int, kernel_sizes: Sequence[int], norm: str) -> None:
        super().__init__()
        heads = channels // head_dim
        inner = heads * head_dim
        self.to_q, self.to_k, self.to_v = (MapLinear(channels, inner) for _ in range(3))
        self.to_qkv_multiscale = ModuleList([Scale(3 * inner, heads, size) for size in kernel_sizes])
        self.to_out = MapLinear(inner * (1 + len(kernel_sizes)), channels)
        self.norm_out = NORMS[norm](channels)
        self.heads, self.head_dim = heads, head_dim

    def _attend(self, op: Op, qkv: Value) -> Value:
        d = self.head_dim
        q, k, v = op.Split(op.Reshape(qkv, int64s(op, 0, self.heads, 3 * d, -1)), axis=2, num_outputs=3, _outputs=3)
        q, k = op.Relu(q), op.Relu(k)
        states = op.MatMul(v, op.Transpose(k, perm=[0, 1, 3, 2]))
        total = op.Unsqueeze(op.ReduceSum(k, int64s(op, 3), keepdims=0), int64s(op, 2))
        weight = op.Add(op.MatMul(total, q), _ATTENTION_EPS)
        return op.Div(op.MatMul(states, q), weight)

    def forward(self, op: Op, x: Value) -> Value:
        qkv = op.Concat(self.to_q(op, x), self.to_k(op, x), self.to_v(op, x), axis=1)
        # Heads of one scale never meet those of another: joining their results copies a third of joining them before.
        heads = [self._attend(op, scale) for scale in (qkv, *(scale(op, qkv) for scale in self.to_qkv_multiscale))]
        joined = heads[0] if len(heads) == 1 else op.Concat(*heads, axis=1)
        channels = len(heads) * self.heads * self.head_dim
        y = op.Reshape(joined, op.Concat(int64s(op, 0, channels), spatial_shape(op, x), axis=0))
        return op.Add(self.norm_out(op, self.to_out(op, y)), x)


class GatedConv(Module):
    """diffusers GLUMBConv (expansion 4) with norm and residual."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = 8 * channels
        self.conv_inverted = Conv2d(channels, hidden, 1)
        self.conv_depth = Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.conv_point = Conv2d(hidden // 2, channels, 1, bias=False)
        self.norm = ChannelRMSNorm(channels)

    def forward(self, op: Op, x: Value) -> Value:
        y = self.conv_depth(op, silu(op, self.conv_inverted(op, x)))
        y, gate = op.Split(y, axis=1, num_outputs=2, _outputs=2)
        return op.Add(self.norm(op, self.conv_point(op, op.Mul(y, silu(op, gate)))), x)


class EfficientViTBlock(Module):
    """Linear attention, then the gated convolution."""

    def __init__(self, channels: int, head_dim: int, kernel_sizes: Sequence[int], norm: str) -> None:
        super().__init__()
        self.attn = LinearAttention(channels, head_dim, kernel_sizes, norm)
        self.conv_out = GatedConv(channels)

    def forward(self, op: Op, x: Value) -> Value:
        return self.conv_out(op, self.attn(op, x))


class ResBlock(Module):
    """Convolution, activation, convolution, norm, residual."""

    def __init__(self, channels: int, norm: str, act: Activation | None) -> None:
        super().__init__()
        self.conv1 = Conv2d(channels, channels, 3, padding=1)
        self.conv2 = Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = NORMS[norm](channels)
        self.act = act

    def forward(self, op: Op, x: Value) -> Value:
        y = self.conv1(op, x)
        y = self.conv2(op, y if self.act is None else self.act(op, y))
        return op.Add(self.norm(op, y), x)


def _level(c: Mapping[str, Any], half: str, i: int) -> list[Module]:
    """The blocks of one level, without the change of resolution."""
    channels, blocks = c[f"{half}_block_out_channels"][i], c[f"{half}_layers_per_block"][i]
    norm = c["decoder_norm_types"][i] if half == "decoder" else "rms_norm"
    if c[f"{half}_block_types"][i] == _ATTENTION:
        sizes = c[f"{half}_qkv_multiscales"][i]
        return [EfficientViTBlock(channels, c["attention_head_dim"], sizes, norm) for _ in range(blocks)]
    name = c["decoder_act_fns"][i] if half == "decoder" else "silu"
    act = None if name is None else activation("decoder_act_fns", name)
    return [ResBlock(channels, norm, act) for _ in range(blocks)]


class Encoder(Module):
    """Picture [B, in_channels, H, W] → latents [B, latent_channels, H/f, W/f]."""

    def __init__(self, c: Mapping[str, Any]) -> None:
        super().__init__()
        widths, counts = c["encoder_block_out_channels"], c["encoder_layers_per_block"]
        unshuffle = c["downsample_block_type"] == "pixel_unshuffle"
        if counts[0] > 0:
            self.conv_in = Conv2d(c["in_channels"], widths[0], 3, padding=1)
        else:
            self.conv_in = DownBlock(c["in_channels"], widths[1], unshuffle=unshuffle, shortcut=False)
        levels = [_level(c, "encoder", i) for i in range(len(widths))]
        for i, level in enumerate(levels[:-1]):
            if level:
                level.append(DownBlock(widths[i], widths[i + 1], unshuffle=unshuffle, shortcut=True))
        self.down_blocks = ModuleList([Sequential(*level) for level in levels])
        self.conv_out = Conv2d(widths[-1], c["latent_channels"], 3, padding=1)
        self.latent_channels, self.run = c["latent_channels"], widths[-1] // c["latent_channels"]
        self.shortcut = c["encoder_out_shortcut"]

    def forward(self, op: Op, x: Value) -> Value:
        x = self.conv_in(op, x)
        for level in self.down_blocks:
            x = level(op, x) if len(level) else x
        y = self.conv_out(op, x)
        return op.Add(y, average_channels(op, x, self.latent_channels, self.run, like=y)) if self.shortcut else y


class Decoder(Module):
    """Latents [B, latent_channels, H, W] → picture [B, in_channels, f·H, f·W]."""

    def __init__(self, c: Mapping[str, Any]) -> None:
        super().__init__()
        widths, counts = c["decoder_block_out_channels"], c["decoder_layers_per_block"]
        interpolate = c["upsample_block_type"] == "interpolate"
        self.conv_in = Conv2d(c["latent_channels"], widths[-1], 3, padding=1)
        levels = [_level(c, "decoder", i) for i in range(len(widths))]
        for i, level in enumerate(levels[:-1]):
            if level:
                level.insert(0, UpBlock(widths[i + 1], widths[i], interpolate=interpolate, shortcut=True))
        self.up_blocks = ModuleList([Sequential(*level) for level in levels])
        width = widths[0] if counts[0] > 0 else widths[1]
        self.norm_out = ChannelRMSNorm(width)
        if counts[0] > 0:
            self.conv_out = Conv2d(width, c["in_channels"], 3, padding=1)
        else:
            self.conv_out = UpBlock(width, c["in_channels"], interpolate=interpolate, shortcut=False)
        self.act = activation("decoder_conv_act_fn", c["decoder_conv_act_fn"])
        self.latent_channels, self.repeats = c["latent_channels"], widths[-1] // c["latent_channels"]
        self.shortcut = c["decoder_in_shortcut"]

    def forward(self, op: Op, latents: Value) -> Value:
        x = self.conv_in(op, latents)
        if self.shortcut:
            x = op.Add(x, repeat_channels(op, latents, self.latent_channels, self.repeats))
        for level in reversed(list(self.up_blocks)):
            x = level(op, x) if len(level) else x
        return self.conv_out(op, self.act(op, self.norm_out(op, x)))


class Half(Module):
    """The half of the autoencoder that its keys' first word names: `encoder` or `decoder`."""

    def __init__(self, c: Mapping[str, Any], half: str) -> None:
        super().__init__()
        self.half = half
        setattr(self, half, Encoder(c) if half == "encoder" else Decoder(c))

    def forward(self, op: Op, x: Value) -> Value:
        return getattr(self, self.half)(op, x)


def _resolve(config: Mapping[str, Any], half: str) -> dict[str, Any]:
    c = resolve(config, _DEFAULTS, allowed=_RESAMPLERS)
    widths, latent_channels = c[f"{half}_block_out_channels"], c["latent_channels"]
    for key, default in _PER_LEVEL.items():
        value = default if c[key] is None else c[key]
        c[key] = value if isinstance(value, list) else [value] * len(widths)

    def require(key: str, met: bool, wanted: str) -> None:
        if not met:
            raise ConversionError(f"configuration entry {key}={c[key]!r} is not supported: it must {wanted}")

    for key in [key for key in c if key.startswith(half) and isinstance(c[key], list)]:
        require(key, len(c[key]) == len(widths), f"be as long as {half}_block_out_channels={widths!r}")
    types, counts, sizes = (c[f"{half}_{key}"] for key in ("block_types", "layers_per_block", "qkv_multiscales"))
    require(f"{half}_block_types", {*types} <= {_RESIDUAL, _ATTENTION}, f"hold {_RESIDUAL} or {_ATTENTION}")
    require(f"{half}_layers_per_block", 0 not in counts[1:-1] and counts != [0], "have no 0 but at its ends")
    require(f"{half}_qkv_multiscales", all(size % 2 for level in sizes for size in level), "hold odd sizes")
    attended = [width for width, kind in zip(widths, types, strict=True) if kind == _ATTENTION]
    require("attention_head_dim", all(width >= c["attention_head_dim"] for width in attended), f"fit into {attended}")
    changes = [pair for pair, count in zip(itertools.pairwise(widths), counts, strict=False) if count]
    divide = all(4 * a % b == 0 for a, b in changes)
    require(f"{half}_block_out_channels", divide, "divide four times the width before, at every level")
    if half == "decoder":
        require("decoder_norm_types", {*c["decoder_norm_types"]} <= {*NORMS}, f"hold {' or '.join(NORMS)}")
    elif c["downsample_block_type"] == "pixel_unshuffle":
        require("encoder_block_out_channels", all(w % 4 == 0 for w in widths[1:]), "hold multiples of 4 to unshuffle")
    if c["decoder_in_shortcut" if half == "decoder" else "encoder_out_shortcut"]:
        require(
            f"{half}_block_out_channels", widths[-1] % latent_channels == 0, f"end in a multiple of {latent_channels}"
        )
    return c


def _component(config: Mapping[str, Any], half: str, other: str, reason: str) -> Component:
    c = _resolve(config, half)
    latents, image = latents_spec(c["latent_channels"]), image_spec(c["in_channels"])
    return Component(
        name=half,
        architecture="AutoencoderDC",
        module=Half(c, half),
        inputs=(image,) if half == "encoder" else (latents,),
        outputs=(latents,) if half == "encoder" else (image,),
        drop=((rf"{other}\..*", reason), (r".*\.num_batches_tracked", "counts training steps")),
        runtime={
            "latent_channels": c["latent_channels"],
            "scale_factor": 2 ** (len(c[f"{half}_block_out_channels"]) - 1),
            "scaling_factor": c["scaling_factor"],
            "shift_factor": 0.0,
        },
    )


def build_decoder(config: Mapping[str, Any]) -> Component:
    """Decoder of a diffusers AutoencoderDC `config.json`: `latents` → `image` (see the module docstring).

    Raises ConversionError for a value that the graph cannot represent.
    """
    return _component(config, "decoder", "encoder", ENCODER_ONLY)


def build_encoder(config: Mapping[str, Any]) -> Component:
    """Encoder of a diffusers AutoencoderDC `config.json`: `image` → `latents`.

    Height and width of the picture must be multiples of `runtime["scale_factor"]`.
    Raises ConversionError for a value that the graph cannot represent.
    """
    return _component(config, "encoder", "decoder", DECODER_ONLY)
