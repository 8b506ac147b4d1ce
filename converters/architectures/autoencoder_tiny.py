"""AutoencoderTiny (TAESD): a small distilled autoencoder for previews, as diffusers' class of that name.

The decoder squashes its latents with 3 tanh(x / 3) and maps its last convolution's [0, 1] to [-1, 1] (2x - 1), both of
which are part of `vae.decode(x).sample`; it clamps nothing. The encoder maps the picture to [0, 1] first and returns
what `vae.encode(x).latents` is. `latent_magnitude` and `latent_shift` only serve to store latents as bytes
(x / (2 magnitude) + shift lies in [0, 1]); the graphs do not use them and `runtime` carries them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from onnxscript.nn import Sequential

from edgedit.converters.architectures.autoencoder_layers import (
    DECODER_ONLY,
    ENCODER_ONLY,
    UPSAMPLE_MODES,
    Activation,
    activation,
    image_spec,
    latents_spec,
    upsample,
)
from edgedit.converters.architectures.configuration import resolve
from edgedit.converters.architectures.layers import Conv2d, Module, Op, Value, relu
from edgedit.converters.graph import Component
from edgedit.errors import ConversionError

__all__ = ["build_decoder", "build_encoder"]

_DEFAULTS: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "encoder_block_out_channels": [64, 64, 64, 64],
    "decoder_block_out_channels": [64, 64, 64, 64],
    "act_fn": "relu",
    "upsample_fn": "nearest",
    "latent_channels": 4,
    "upsampling_scaling_factor": 2,
    "num_encoder_blocks": [1, 3, 3, 3],
    "num_decoder_blocks": [3, 3, 3, 1],
    "latent_magnitude": 3.0,
    "latent_shift": 0.5,
    "force_upcast": False,
    "scaling_factor": 1.0,
    "shift_factor": 0.0,
    # diffusers writes this copy of decoder_block_out_channels and never reads it.
    "block_out_channels": None,
}


class Activate(Module):
    """An activation that holds a place in a Sequential."""

    def __init__(self, act: Activation) -> None:
        super().__init__()
        self.act = act

    def forward(self, op: Op, x: Value) -> Value:
        return self.act(op, x)


class Upsample(Module):
    """torch.nn.Upsample."""

    def __init__(self, factor: int, mode: str) -> None:
        super().__init__()
        self.factor, self.mode = factor, mode

    def forward(self, op: Op, x: Value) -> Value:
        return upsample(op, x, self.factor, self.mode)


class TinyBlock(Module):
    """diffusers AutoencoderTinyBlock: three 3×3 convolutions beside the identity; the sum always ends in a ReLU."""

    def __init__(self, channels: int, act: Activation) -> None:
        super().__init__()
        places = [Activate(act) if i % 2 else Conv2d(channels, channels, 3, padding=1) for i in range(5)]
        self.conv = Sequential(*places)

    def forward(self, op: Op, x: Value) -> Value:
        return relu(op, op.Add(self.conv(op, x), x))


class Encoder(Module):
    """diffusers EncoderTiny: [B, in_channels, H, W] in [0, 1] → [B, latent_channels, H/f, W/f]."""

    def __init__(self, c: Mapping[str, Any]) -> None:
        super().__init__()
        width, act = c["encoder_block_out_channels"][0], activation("act_fn", c["act_fn"])
        layers: list[Module] = []
        for i, blocks in enumerate(c["num_encoder_blocks"]):
            first = Conv2d(c["in_channels"], width, 3, padding=1)
            layers.append(first if i == 0 else Conv2d(width, width, 3, stride=2, padding=1, bias=False))
            layers.extend(TinyBlock(width, act) for _ in range(blocks))
        self.layers = Sequential(*layers, Conv2d(width, c["latent_channels"], 3, padding=1))

    def forward(self, op: Op, x: Value) -> Value:
        return self.layers(op, x)


class Decoder(Module):
    """diffusers DecoderTiny between squashing and rescaling: [B, latent_channels, H, W] → [B, out_channels, fH, fW]."""

    def __init__(self, c: Mapping[str, Any]) -> None:
        super().__init__()
        width, act = c["decoder_block_out_channels"][0], activation("act_fn", c["act_fn"])
        layers: list[Module] = [Conv2d(c["latent_channels"], width, 3, padding=1), Activate(act)]
        for i, blocks in enumerate(c["num_decoder_blocks"]):
            layers.extend(TinyBlock(width, act) for _ in range(blocks))
            if i < len(c["num_decoder_blocks"]) - 1:
                layers.append(Upsample(c["upsampling_scaling_factor"], c["upsample_fn"]))
                layers.append(Conv2d(width, width, 3, padding=1, bias=False))
        self.layers = Sequential(*layers, Conv2d(width, c["out_channels"], 3, padding=1))

    def forward(self, op: Op, x: Value) -> Value:
        return self.layers(op, x)


class EncoderHalf(Module):
    """`vae.encode(image).latents`."""

    def __init__(self, c: Mapping[str, Any]) -> None:
        super().__init__()
        self.encoder = Encoder(c)

    def forward(self, op: Op, image: Value) -> Value:
        return self.encoder(op, op.Div(op.Add(image, 1.0), 2.0))


class DecoderHalf(Module):
    """`vae.decode(latents).sample`."""

    def __init__(self, c: Mapping[str, Any]) -> None:
        super().__init__()
        self.decoder = Decoder(c)

    def forward(self, op: Op, latents: Value) -> Value:
        squashed = op.Mul(op.Tanh(op.Div(latents, 3.0)), 3.0)
        return op.Sub(op.Mul(self.decoder(op, squashed), 2.0), 1.0)


def _resolve(config: Mapping[str, Any]) -> dict[str, Any]:
    c = resolve(config, _DEFAULTS, allowed={"upsample_fn": tuple(UPSAMPLE_MODES)})
    for half in ("encoder", "decoder"):
        widths, blocks = c[f"{half}_block_out_channels"], c[f"num_{half}_blocks"]
        # diffusers builds other widths, and then fails to run them: no layer takes one width to the next.
        if len(widths) != len(blocks) or len(set(widths)) != 1:
            raise ConversionError(
                f"configuration entry {half}_block_out_channels={widths!r} is not supported: "
                f"it must be one width, repeated for each entry of num_{half}_blocks={blocks!r}"
            )
    return c


def _component(name: str, c: Mapping[str, Any], scale_factor: int, **parts: Any) -> Component:
    constants = (
        "latent_channels",
        "scaling_factor",
        "shift_factor",
        "latent_magnitude",
        "latent_shift",
        "force_upcast",
    )
    runtime = {"scale_factor": scale_factor, **{key: c[key] for key in constants}}
    return Component(name=name, architecture="AutoencoderTiny", runtime=runtime, **parts)


def build_decoder(config: Mapping[str, Any]) -> Component:
    """Decoder of a diffusers AutoencoderTiny `config.json`: `latents` → `image` (see the module docstring).

    Raises ConversionError for a value that the graph cannot represent.
    """
    c = _resolve(config)
    return _component(
        "decoder",
        c,
        c["upsampling_scaling_factor"] ** (len(c["num_decoder_blocks"]) - 1),
        module=DecoderHalf(c),
        inputs=(latents_spec(c["latent_channels"]),),
        outputs=(image_spec(c["out_channels"]),),
        drop=((r"encoder\..*", ENCODER_ONLY),),
    )


def build_encoder(config: Mapping[str, Any]) -> Component:
    """Encoder of a diffusers AutoencoderTiny `config.json`: `image` → `latents` (see the module docstring).

    Raises ConversionError for a value that the graph cannot represent.
    """
    c = _resolve(config)
    return _component(
        "encoder",
        c,
        2 ** (len(c["num_encoder_blocks"]) - 1),
        module=EncoderHalf(c),
        inputs=(image_spec(c["in_channels"]),),
        outputs=(latents_spec(c["latent_channels"]),),
        drop=((r"decoder\..*", DECODER_ONLY),),
    )
