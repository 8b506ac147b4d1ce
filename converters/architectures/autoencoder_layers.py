"""Pieces of the autoencoders: activations by diffusers' names, resampling of maps, norms over the channels of a map.

Maps are [B, C, H, W] and stay so: a norm over the channels is written as a reduction and a linear layer as a 1×1
convolution, since transposing the large maps of a decoder costs more than either.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from edgedit.converters.architectures.layers import (
    Conv2d,
    Module,
    Op,
    Parameter,
    Value,
    constant,
    gelu,
    int64s,
    relu,
    silu,
)
from edgedit.converters.graph import TensorSpec
from edgedit.errors import ConversionError

__all__ = [
    "DECODER_ONLY",
    "ENCODER_ONLY",
    "NORMS",
    "UPSAMPLE_MODES",
    "Activation",
    "BatchNorm",
    "ChannelRMSNorm",
    "DownBlock",
    "MapLinear",
    "UpBlock",
    "activation",
    "average_channels",
    "image_spec",
    "latents_spec",
    "mish",
    "pixel_shuffle",
    "pixel_unshuffle",
    "repeat_channels",
    "upsample",
]

Activation = Callable[[Op, Value], Value]

#: Reasons in `Component.drop`, for the half of the checkpoint that the other graph consumes.
ENCODER_ONLY, DECODER_ONLY = "belongs to the encoder", "belongs to the decoder"

NORM_EPS = 1e-5

#: Resize attributes that agree with torch.nn.Upsample(scale_factor=a whole number) of that mode, align_corners unset.
UPSAMPLE_MODES: dict[str, dict[str, Any]] = {
    "nearest": {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"},
    "nearest-exact": {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"},
    "bilinear": {"mode": "linear", "coordinate_transformation_mode": "half_pixel"},
    "bicubic": {"mode": "cubic", "coordinate_transformation_mode": "half_pixel", "cubic_coeff_a": -0.75},
}


def mish(op: Op, x: Value) -> Value:
    """x * tanh(log(1 + exp(x))).

    With p = sigmoid(x) and q = sigmoid(-x) the tanh is p (1 + q) / (1 + q^2), which neither overflows nor cancels.
    """
    p, q = op.Sigmoid(x), op.Sigmoid(op.Neg(x))
    return op.Mul(x, op.Div(op.Mul(p, op.Add(q, 1.0)), op.Add(op.Mul(q, q), 1.0)))


_ACTIVATIONS: dict[str, Activation] = {"swish": silu, "silu": silu, "mish": mish, "gelu": gelu, "relu": relu}


def activation(key: str, name: object) -> Activation:
    """The function of diffusers' `get_activation(name)`; ConversionError naming the entry `key` when there is none."""
    found = _ACTIVATIONS.get(str(name).lower())
    if found is None:
        known = ", ".join(_ACTIVATIONS)
        raise ConversionError(f"configuration entry {key}={name!r} is not supported: it must be one of {known}")
    return found


def upsample(op: Op, x: Value, factor: int = 2, mode: str = "nearest") -> Value:
    """A map `factor` times as high and as wide, as torch.nn.functional.interpolate(scale_factor=factor, mode=mode)."""
    return op.Resize(x, None, [1.0, 1.0, float(factor), float(factor)], **UPSAMPLE_MODES[mode])


def image_spec(channels: int) -> TensorSpec:
    """The picture on either side: float32 [batch, channels, image_height, image_width], in [-1, 1]."""
    return TensorSpec("image", "float32", ("batch", channels, "image_height", "image_width"))


def latents_spec(channels: int, name: str = "latents") -> TensorSpec:
    """A latent map: float32 [batch, channels, height, width]."""
    return TensorSpec(name, "float32", ("batch", channels, "height", "width"))


def repeat_channels(op: Op, x: Value, channels: int, repeats: int) -> Value:
    """torch.repeat_interleave along the channels of a map that has `channels` of them."""
    return x if repeats == 1 else op.Gather(x, constant(op, np.repeat(np.arange(channels), repeats)), axis=1)


def average_channels(op: Op, x: Value, groups: int, size: int, like: Value) -> Value:
    """Mean over each of `groups` runs of `size` neighbouring channels; `like` has the shape of the result."""
    if size == 1:
        return x
    means = op.ReduceMean(op.Reshape(x, int64s(op, 0, groups, size, -1)), int64s(op, 2), keepdims=0)
    return op.Reshape(means, op.Shape(like))


def pixel_unshuffle(op: Op, x: Value, channels: int) -> Value:
    """torch.nn.functional.pixel_unshuffle(x, 2): SpaceToDepth, with the four places of each channel side by side."""
    order = np.arange(4 * channels).reshape(4, channels).T.reshape(-1)
    return op.Gather(op.SpaceToDepth(x, blocksize=2), constant(op, order), axis=1)


def pixel_shuffle(op: Op, x: Value) -> Value:
    """torch.nn.functional.pixel_shuffle(x, 2)."""
    return op.DepthToSpace(x, blocksize=2, mode="CRD")


def per_channel(op: Op, vector: Value) -> Value:
    """[C] → [C, 1, 1], which broadcasts over a map."""
    return op.Unsqueeze(vector, int64s(op, 1, 2))


class ChannelRMSNorm(Module):
    """diffusers RMSNorm with bias, over the channels of a map."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = Parameter([channels]), Parameter([channels])

    def forward(self, op: Op, x: Value) -> Value:
        mean_square = op.ReduceMean(op.Mul(x, x), int64s(op, 1), keepdims=1)
        y = op.Div(x, op.Sqrt(op.Add(mean_square, NORM_EPS)))
        return op.Add(op.Mul(y, per_channel(op, self.weight)), per_channel(op, self.bias))


class BatchNorm(Module):
    """torch.nn.BatchNorm2d in evaluation: an affine map per channel, from the running statistics."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = Parameter([channels]), Parameter([channels])
        self.running_mean, self.running_var = Parameter([channels]), Parameter([channels])

    def forward(self, op: Op, x: Value) -> Value:
        scale = op.Div(self.weight, op.Sqrt(op.Add(self.running_var, NORM_EPS)))
        shift = op.Sub(self.bias, op.Mul(self.running_mean, scale))
        return op.Add(op.Mul(x, per_channel(op, scale)), per_channel(op, shift))


NORMS: dict[str, type[Module]] = {"rms_norm": ChannelRMSNorm, "batch_norm": BatchNorm}


class MapLinear(Module):
    """torch.nn.Linear without bias over the channels of a map: its [out, in] weight as a 1×1 convolution."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = Parameter([out_features, in_features])

    def forward(self, op: Op, x: Value) -> Value:
        return op.Conv(x, op.Unsqueeze(self.weight, int64s(op, 2, 3)), kernel_shape=[1, 1])


class DownBlock(Module):
    """diffusers DCDownBlock2d: [B, C, H, W] → [B, out_channels, H/2, W/2].

    Convolution at stride 2, or with `unshuffle` at stride 1 and then space to channels; the shortcut moves space to
    channels and averages runs of 4 C / out_channels of them.
    """

    def __init__(self, in_channels: int, out_channels: int, *, unshuffle: bool, shortcut: bool) -> None:
        super().__init__()
        width = out_channels // 4 if unshuffle else out_channels
        self.conv = Conv2d(in_channels, width, 3, stride=1 if unshuffle else 2, padding=1)
        self.in_channels, self.out_channels, self.width = in_channels, out_channels, width
        self.run = 4 * in_channels // out_channels
        self.unshuffle, self.shortcut = unshuffle, shortcut

    def forward(self, op: Op, x: Value) -> Value:
        y = self.conv(op, x)
        if self.unshuffle:
            y = pixel_unshuffle(op, y, self.width)
        if not self.shortcut:
            return y
        x = pixel_unshuffle(op, x, self.in_channels)
        return op.Add(y, average_channels(op, x, self.out_channels, self.run, like=y))


class UpBlock(Module):
    """diffusers DCUpBlock2d: [B, C, H, W] → [B, out_channels, 2H, 2W].

    Convolution and then channels to space, or with `interpolate` nearest upsampling and then convolution; the shortcut
    repeats every channel 4 out_channels / C times and moves channels to space.
    """

    def __init__(self, in_channels: int, out_channels: int, *, interpolate: bool, shortcut: bool) -> None:
        super().__init__()
        self.conv = Conv2d(in_channels, out_channels if interpolate else 4 * out_channels, 3, padding=1)
        self.in_channels, self.repeats = in_channels, 4 * out_channels // in_channels
        self.interpolate, self.shortcut = interpolate, shortcut

    def forward(self, op: Op, x: Value) -> Value:
        if not self.interpolate:
            y = self.conv(op, x)
            return pixel_shuffle(op, op.Add(y, self._repeated(op, x)) if self.shortcut else y)
        large = upsample(op, x)
        y = self.conv(op, large)
        if not self.shortcut:
            return y
        # A channel repeated four times and shuffled is the enlarged channel.
        return op.Add(y, large if self.repeats == 4 else pixel_shuffle(op, self._repeated(op, x)))

    def _repeated(self, op: Op, x: Value) -> Value:
        return repeat_channels(op, x, self.in_channels, self.repeats)
