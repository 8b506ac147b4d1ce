"""PixArt's transformer: diffusers' PixArtTransformer2DModel, and the compressed attention of PixArt-Sigma.

Chen et al., "PixArt-alpha" (2023), figure 4 and section 2.3; Chen et al., "PixArt-Sigma" (2024), section 3.2.
Old diffusers checkpoints call the same network Transformer2DModel with `norm_type` "ada_norm_single".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edgedit.converters.architectures.attention import KVCompression
from edgedit.converters.architectures.blocks import (
    FEED_FORWARD_ACTIVATIONS,
    AdaLayerNormSingle,
    FeedForward,
    PatchEmbed,
    TextProjection,
    modulate,
    sincos_positions,
    table_rows,
    transformer_inputs,
    unpatchify,
)
from edgedit.converters.architectures.configuration import resolve
from edgedit.converters.architectures.layers import (
    Attention,
    LayerNorm,
    Linear,
    Module,
    ModuleList,
    Op,
    Parameter,
    Value,
    int64s,
    padding_bias,
    spatial_shape,
)
from edgedit.converters.architectures.operators import (
    Operator,
    attention_scale_input,
    describe_operators,
    operators_of,
    self_attention,
)
from edgedit.converters.architectures.token_grid import TokenGrid
from edgedit.converters.graph import Component, TensorSpec
from edgedit.errors import ConversionError

__all__ = ["PixArtTransformer", "build_transformer"]

_DEFAULTS: dict[str, Any] = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 28,
    "dropout": 0.0,
    "norm_num_groups": 32,
    "cross_attention_dim": 1152,
    "attention_bias": True,
    "sample_size": 128,
    "patch_size": 2,
    "activation_fn": "gelu-approximate",
    "num_embeds_ada_norm": 1000,
    "upcast_attention": False,
    "norm_type": "ada_norm_single",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "interpolation_scale": None,
    "use_additional_conditions": None,
    "caption_channels": None,
    "attention_type": "default",
    # Entries of the original repository that diffusers' class lacks.
    "kv_compress_config": None,
    "qk_norm": None,
    # The "attention" of a checkpoint's own record.
    "self_attention": None,
    # Entries of Transformer2DModel, the class under which the first checkpoints were saved.
    "num_vector_embeds": None,
    "use_linear_projection": False,
    "only_cross_attention": False,
    "double_self_attention": False,
}
_OPTIONAL = {
    "out_channels": 8,
    "caption_channels": 4096,
    "interpolation_scale": 1.0,
    "use_additional_conditions": True,
    "qk_norm": "layer_norm_across_heads",
}
_ALLOWED: dict[str, tuple[Any, ...]] = {
    "activation_fn": tuple(FEED_FORWARD_ACTIVATIONS),
    "norm_type": ("ada_norm_single",),
    "attention_type": ("default",),
    "num_vector_embeds": (None,),
    "use_linear_projection": (False,),
    "only_cross_attention": (False,),
    "double_self_attention": (False,),
}
_DROP = ((r"pos_embed\.pos_embed", "the table of positions depends on the size, so the graph takes it as an input"),)
_FINAL_NORM_EPS = 1e-6


class PixArtBlock(Module):
    """Self-attention and feed-forward under adaLN-single, text cross-attention between them without norm or gate."""

    def __init__(self, c: Mapping[str, Any], operator: Operator) -> None:
        super().__init__()
        heads, head_dim, bias = c["num_attention_heads"], c["attention_head_dim"], c["attention_bias"]
        width, eps, affine = heads * head_dim, c["norm_eps"], c["norm_elementwise_affine"]
        self.scale_shift_table = Parameter([6, width])
        self.norm1, self.norm2 = LayerNorm(width, eps, affine=affine), LayerNorm(width, eps, affine=affine)
        self.attn1 = self_attention(operator, width, heads, head_dim, bias=bias, qk_norm=c["qk_norm"])
        self.attn2 = Attention(width, heads, head_dim, context_width=c["cross_attention_dim"], bias=bias)
        self.ff = FeedForward(width, c["activation_fn"])

    def forward(self, op: Op, x: Value, text: Value, text_bias: Value, modulation: Value, grid: TokenGrid) -> Value:
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = table_rows(op, self.scale_shift_table, modulation, 6)
        h = modulate(op, self.norm1(op, x), shift_1, scale_1)
        x = op.Add(x, op.Mul(gate_1, self.attn1(op, h, grid)))
        x = op.Add(x, self.attn2(op, x, text, text_bias))
        h = modulate(op, self.norm2(op, x), shift_2, scale_2)
        return op.Add(x, op.Mul(gate_2, self.ff(op, h)))


class PixArtTransformer(Module):
    """The whole network; `forward` takes the inputs of `build_transformer`'s Component in their order."""

    def __init__(self, c: Mapping[str, Any], operators: Sequence[Operator]) -> None:
        super().__init__()
        width, self.patch_size = c["num_attention_heads"] * c["attention_head_dim"], c["patch_size"]
        self.out_channels = c["out_channels"]
        self.takes_scale = any(operator.takes_scale for operator in operators)
        self.pos_embed = PatchEmbed(c["in_channels"], width, self.patch_size)
        self.adaln_single = AdaLayerNormSingle(width, size_conditions=c["use_additional_conditions"])
        self.projects_caption = c["caption_channels"] is not None
        if self.projects_caption:
            self.caption_projection = TextProjection(c["caption_channels"], width)
        self.transformer_blocks = ModuleList([PixArtBlock(c, operator) for operator in operators])
        self.norm_out = LayerNorm(width, _FINAL_NORM_EPS, affine=False)
        self.scale_shift_table = Parameter([2, width])
        self.proj_out = Linear(width, self.patch_size**2 * self.out_channels)

    def forward(
        self,
        op: Op,
        latents: Value,
        timestep: Value,
        encoder_hidden_states: Value,
        encoder_attention_mask: Value,
        pos_embed: Value,
        *optional: Value,
    ) -> Value:
        given = iter(optional)
        attention_scale = next(given) if self.takes_scale else None
        resolution, aspect_ratio = next(given, None), next(given, None)
        size = spatial_shape(op, latents)
        grid = op.Div(size, int64s(op, self.patch_size))
        x = self.pos_embed(op, latents, pos_embed)
        modulation, embedded = self.adaln_single(op, timestep, resolution, aspect_ratio)
        text = encoder_hidden_states
        if self.projects_caption:
            text = self.caption_projection(op, text)
        text_bias = padding_bias(op, encoder_attention_mask, x)
        tokens = TokenGrid(grid, attention_scale)
        for block in self.transformer_blocks:
            x = block(op, x, text, text_bias, modulation, tokens)
        shift, scale = table_rows(op, self.scale_shift_table, op.Unsqueeze(embedded, int64s(op, 1)), 2)
        x = self.proj_out(op, modulate(op, self.norm_out(op, x), shift, scale))
        return unpatchify(op, x, grid, size, patch_size=self.patch_size, channels=self.out_channels)


def _resolve(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with every value that the class derives from another; refuses what the graph cannot do."""
    c = resolve(config, _DEFAULTS, optional=_OPTIONAL, allowed=_ALLOWED)
    width = c["num_attention_heads"] * c["attention_head_dim"]
    if c["out_channels"] is None:
        c["out_channels"] = c["in_channels"]
    if c["use_additional_conditions"] is None:
        c["use_additional_conditions"] = c["sample_size"] == 128
    if c["interpolation_scale"] is None:
        c["interpolation_scale"] = max(c["sample_size"] // 64, 1)
    if c["use_additional_conditions"] and width % 3:
        raise ConversionError(
            f"use_additional_conditions=True is not supported at width {width}: picture height, picture width and "
            "aspect ratio each take a third of it"
        )
    if c["caption_channels"] is not None and c["cross_attention_dim"] != width:
        raise ConversionError(
            f"cross_attention_dim={c['cross_attention_dim']!r} is not supported: with caption_channels it must be the "
            f"width of the network, {width}"
        )
    return c


def build_transformer(config: Mapping[str, Any]) -> Component:
    """PixArt of a diffusers `config.json` (PixArtTransformer2DModel); output [batch, out_channels, height, width].

    Two options of PixArt-Sigma's repository, which diffusers' class lacks: `kv_compress_config` {"sampling",
    "scale_factor", "kv_compress_layer"} compresses keys and values (parameters `attn1.sr` and `attn1.norm`), and
    `qk_norm` "layer_norm_across_heads" norms query and key of the self-attention (`attn1.norm_q`, `attn1.norm_k`).
    `self_attention` is the "attention" list of the checkpoint's own record; what it says of a block goes first.
    A learned variance (`learned_sigma`) is the second half of the output's channels; the runtime drops it.
    Height and width must be multiples of patch_size. Raises ConversionError for what the graph cannot represent.
    """
    c = _resolve(config)
    width, layers = c["num_attention_heads"] * c["attention_head_dim"], c["num_layers"]
    compression = KVCompression.from_config(c["kv_compress_config"], layers)
    compressed = {}
    if compression is not None:
        options = {"factor": compression.factor, "sampling": compression.sampling}
        compressed = dict.fromkeys(compression.layers, Operator("kv", options))
    operators = operators_of(c["self_attention"], layers, width, compressed)
    positions = sincos_positions(width, c["sample_size"], c["patch_size"], c["interpolation_scale"])
    text_channels = c["cross_attention_dim"] if c["caption_channels"] is None else c["caption_channels"]
    conditions = attention_scale_input(operators)
    if c["use_additional_conditions"]:
        conditions += (
            TensorSpec("resolution", "float32", ("batch", 2)),
            TensorSpec("aspect_ratio", "float32", ("batch", 1)),
        )
    return Component(
        name="transformer",
        architecture="PixArtTransformer2DModel",
        module=PixArtTransformer(c, operators),
        inputs=transformer_inputs(c["in_channels"], text_channels, positions, *conditions),
        outputs=(TensorSpec("prediction", "float32", ("batch", c["out_channels"], "height", "width")),),
        drop=_DROP,
        runtime={
            "patch_size": c["patch_size"],
            "in_channels": c["in_channels"],
            "out_channels": c["out_channels"],
            "learned_sigma": c["out_channels"] == 2 * c["in_channels"],
            "sample_size": c["sample_size"],
            "positions": positions,
            "resolution_aspect_ratio": c["use_additional_conditions"],
            "guidance_embeds": False,
            "guidance_embeds_scale": None,
            "timestep_scale": 1.0,
            "caption_channels": text_channels,
            "self_attention": describe_operators(operators),
        },
    )
