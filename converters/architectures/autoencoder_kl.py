"""AutoencoderKL: the variational autoencoder of latent diffusion, as diffusers' class of that name.

Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models" (2022), appendix G: residual blocks with
group norm, and in the middle one attention of a single head over every position of the map.

The decoder takes latents as the encoder drew them (the runtime has undone scale and shift) and returns what
`vae.decode(z).sample` returns, unclamped. The encoder returns the moments that diffusers' DiagonalGaussianDistribution
is given: mean and log-variance side by side, the log-variance not yet clamped to [-30, 20].
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from edgedit.converters.architectures.autoencoder_layers import (
    DECODER_ONLY,
    ENCODER_ONLY,
    Activation,
    activation,
    image_spec,
    latents_spec,
    upsample,
)
from edgedit.converters.architectures.configuration import resolve
from edgedit.converters.architectures.layers import (
    Conv2d,
    GroupNorm,
    Linear,
    Module,
    ModuleList,
    Op,
    Value,
    map_to_tokens,
    silu,
    spatial_shape,
    tokens_to_map,
)
from edgedit.converters.graph import Component
from edgedit.errors import ConversionError

__all__ = ["build_decoder", "build_encoder"]

_EPS = 1e-6
_DEFAULTS: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D"],
    "block_out_channels": [64],
    "layers_per_block": 1,
    "act_fn": "silu",
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": None,
    "scaling_factor": 0.18215,
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
    "force_upcast": True,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
}
_DOWN, _DOWN_ATTENTION = "DownEncoderBlock2D", "AttnDownEncoderBlock2D"
_UP, _UP_ATTENTION = "UpDecoderBlock2D", "AttnUpDecoderBlock2D"


class ResnetBlock(Module):
    """diffusers ResnetBlock2D without time embedding: twice norm, activation, 3×3 convolution, and a shortcut."""

    def __init__(self, in_channels: int, out_channels: int, groups: int, act: Activation) -> None:
        super().__init__()
        self.norm1 = GroupNorm(groups, in_channels, _EPS)
        self.conv1 = Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = GroupNorm(groups, out_channels, _EPS)
        self.conv2 = Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None
        self.act = act

    def forward(self, op: Op, x: Value) -> Value:
        y = self.conv1(op, self.act(op, self.norm1(op, x)))
        y = self.conv2(op, self.act(op, self.norm2(op, y)))
        return op.Add(x if self.conv_shortcut is None else self.conv_shortcut(op, x), y)


class MapAttention(Module):
    """diffusers Attention over the H·W positions of a map, one head of all channels, with group norm and residual."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = GroupNorm(groups, channels, _EPS)
        self.to_q, self.to_k, self.to_v = (Linear(channels, channels) for _ in range(3))
        self.to_out = ModuleList([Linear(channels, channels)])
        self.channels = channels

    def forward(self, op: Op, x: Value) -> Value:
        tokens = map_to_tokens(op, self.group_norm(op, x), self.channels)
        q, k, v = self.to_q(op, tokens), self.to_k(op, tokens), self.to_v(op, tokens)
        y = self.to_out[0](op, op.Attention(q, k, v, q_num_heads=1, kv_num_heads=1))
        return op.Add(tokens_to_map(op, y, self.channels, spatial_shape(op, x)), x)


class Downsample(Module):
    """diffusers Downsample2D: 3×3 at stride 2, padded at the right and the bottom only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, stride=2, padding=(0, 0, 1, 1))

    def forward(self, op: Op, x: Value) -> Value:
        return self.conv(op, x)


class Upsample(Module):
    """diffusers Upsample2D: nearest ×2, then 3×3."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def forward(self, op: Op, x: Value) -> Value:
        return self.conv(op, upsample(op, x))


class Block(Module):
    """One resolution: residual blocks, each followed by attention in the Attn types, then a resampler or none."""

    def __init__(self, channels: Sequence[int], groups: int, act: Activation, *, attention: bool) -> None:
        super().__init__()
        self.resnets = ModuleList([ResnetBlock(a, b, groups, act) for a, b in itertools.pairwise(channels)])
        self.attentions = ModuleList([MapAttention(b, groups) for b in channels[1:]] if attention else [])
        self.downsamplers, self.upsamplers = ModuleList(), ModuleList()

    def forward(self, op: Op, x: Value) -> Value:
        for i, resnet in enumerate(self.resnets):
            x = resnet(op, x)
            if len(self.attentions):
                x = self.attentions[i](op, x)
        for resample in (*self.downsamplers, *self.upsamplers):
            x = resample(op, x)
        return x


class MidBlock(Module):
    """diffusers UNetMidBlock2D: residual block, attention or none, residual block."""

    def __init__(self, channels: int, groups: int, act: Activation, *, attention: bool) -> None:
        super().__init__()
        self.resnets = ModuleList([ResnetBlock(channels, channels, groups, act) for _ in range(2)])
        self.attentions = ModuleList([MapAttention(channels, groups)] if attention else [])

    def forward(self, op: Op, x: Value) -> Value:
        x = self.resnets[0](op, x)
        for attention in self.attentions:
            x = attention(op, x)
        return self.resnets[1](op, x)


class Encoder(Module):
    """Picture [B, in_channels, H, W] → [B, 2·latent_channels, H/f, W/f], before `quant_conv`."""

    def __init__(self, c: Mapping[str, Any]) -> None:
        super().__init__()
        widths, groups, act = c["block_out_channels"], c["norm_num_groups"], activation("act_fn", c["act_fn"])
        self.conv_in = Conv2d(c["in_channels"], widths[0], 3, padding=1)
        blocks = []
        for i, kind in enumerate(c["down_block_types"]):
            channels = [widths[max(i - 1, 0)]] + [widths[i]] * c["layers_per_block"]
            blocks.append(Block(channels, groups, act, attention=kind == _DOWN_ATTENTION))
            if i < len(widths) - 1:
                blocks[i].downsamplers.append(Downsample(widths[i]))
        self.down_blocks = ModuleList(blocks)
        self.mid_block = MidBlock(widths[-1], groups, act, attention=c["mid_block_add_attention"])
        self.conv_norm_out = GroupNorm(groups, widths[-1], _EPS)
        self.conv_out = Conv2d(widths[-1], 2 * c["latent_channels"], 3, padding=1)

    def forward(self, op: Op, x: Value) -> Value:
        x = self.conv_in(op, x)
        for block in self.down_blocks:
            x = block(op, x)
        return self.conv_out(op, silu(op, self.conv_norm_out(op, self.mid_block(op, x))))


class Decoder(Module):
    """Latents [B, latent_channels, H, W] after `post_quant_conv` → picture [B, out_channels, f·H, f·W]."""

    def __init__(self, c: Mapping[str, Any]) -> None:
        super().__init__()
        widths, groups, act = c["block_out_channels"][::-1], c["norm_num_groups"], activation("act_fn", c["act_fn"])
        self.conv_in = Conv2d(c["latent_channels"], widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], groups, act, attention=c["mid_block_add_attention"])
        blocks = []
        for i, kind in enumerate(c["up_block_types"]):
            channels = [widths[max(i - 1, 0)]] + [widths[i]] * (c["layers_per_block"] + 1)
            blocks.append(Block(channels, groups, act, attention=kind == _UP_ATTENTION))
            if i < len(widths) - 1:
                blocks[i].upsamplers.append(Upsample(widths[i]))
        self.up_blocks = ModuleList(blocks)
        self.conv_norm_out = GroupNorm(groups, widths[-1], _EPS)
        self.conv_out = Conv2d(widths[-1], c["out_channels"], 3, padding=1)

    def forward(self, op: Op, x: Value) -> Value:
        x = self.mid_block(op, self.conv_in(op, x))
        for block in self.up_blocks:
            x = block(op, x)
        return self.conv_out(op, silu(op, self.conv_norm_out(op, x)))


class EncoderHalf(Module):
    """What `vae.encode` computes up to the distribution."""

    def __init__(self, c: Mapping[str, Any]) -> None:
        super().__init__()
        self.encoder = Encoder(c)
        self.quant_conv = Conv2d(2 * c["latent_channels"], 2 * c["latent_channels"], 1) if c["use_quant_conv"] else None

    def forward(self, op: Op, image: Value) -> Value:
        x = self.encoder(op, image)
        return x if self.quant_conv is None else self.quant_conv(op, x)


class DecoderHalf(Module):
    """What `vae.decode` computes."""

    def __init__(self, c: Mapping[str, Any]) -> None:
        super().__init__()
        self.post_quant_conv = (
            Conv2d(c["latent_channels"], c["latent_channels"], 1) if c["use_post_quant_conv"] else None
        )
        self.decoder = Decoder(c)

    def forward(self, op: Op, latents: Value) -> Value:
        return self.decoder(op, latents if self.post_quant_conv is None else self.post_quant_conv(op, latents))


def _resolve(config: Mapping[str, Any]) -> dict[str, Any]:
    c = resolve(config, _DEFAULTS)
    widths, groups = c["block_out_channels"], c["norm_num_groups"]
    for key, kinds in (("down_block_types", (_DOWN, _DOWN_ATTENTION)), ("up_block_types", (_UP, _UP_ATTENTION))):
        if not set(c[key]) <= set(kinds):
            raise ConversionError(
                f"configuration entry {key}={c[key]!r} is not supported: it takes {' and '.join(kinds)}"
            )
        if len(c[key]) != len(widths):
            raise ConversionError(
                f"configuration entry {key}={c[key]!r} does not go with block_out_channels={widths!r}"
            )
    if any(width % groups for width in widths):
        raise ConversionError(
            f"configuration entry norm_num_groups={groups} does not divide block_out_channels={widths!r}"
        )
    return c


def _component(name: str, c: Mapping[str, Any], **parts: Any) -> Component:
    runtime = {
        "latent_channels": c["latent_channels"],
        "scale_factor": 2 ** (len(c["block_out_channels"]) - 1),
        "scaling_factor": c["scaling_factor"],
        "shift_factor": c["shift_factor"] or 0.0,
        "latents_mean": c["latents_mean"],
        "latents_std": c["latents_std"],
        "sample_size": c["sample_size"],
        "force_upcast": c["force_upcast"],
    }
    return Component(name=name, architecture="AutoencoderKL", runtime=runtime, **parts)


def build_decoder(config: Mapping[str, Any]) -> Component:
    """Decoder of a diffusers AutoencoderKL `config.json`: `latents` → `image` (see the module docstring).

    Raises ConversionError for a value that the graph cannot represent.
    """
    c = _resolve(config)
    drop = [(r"encoder\..*", ENCODER_ONLY)] + [(r"quant_conv\..*", ENCODER_ONLY)] * bool(c["use_quant_conv"])
    latents, image = latents_spec(c["latent_channels"]), image_spec(c["out_channels"])
    return _component("decoder", c, module=DecoderHalf(c), inputs=(latents,), outputs=(image,), drop=tuple(drop))


def build_encoder(config: Mapping[str, Any]) -> Component:
    """Encoder of a diffusers AutoencoderKL `config.json`: `image` → `moments`, mean | log-variance (2C channels).

    Raises ConversionError for a value that the graph cannot represent.
    """
    c = _resolve(config)
    drop = [(r"decoder\..*", DECODER_ONLY)] + [(r"post_quant_conv\..*", DECODER_ONLY)] * bool(c["use_post_quant_conv"])
    image, moments = image_spec(c["in_channels"]), latents_spec(2 * c["latent_channels"], "moments")
    return _component("encoder", c, module=EncoderHalf(c), inputs=(image,), outputs=(moments,), drop=tuple(drop))
