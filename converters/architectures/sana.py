"""SANA's transformer: diffusers' SanaTransformer2DModel, with the guidance embedding of SANA-Sprint.

Xie et al., "SANA" (2024), figure 5 and section 2.2; Xie et al., "SANA 1.5" (2025) for the norms of query and key; Chen
et al., "SANA-Sprint" (2025) for the guidance embedding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edgedit.converters.architectures.attention import qk_norms
from edgedit.converters.architectures.blocks import (
    SINUSOID_WIDTH,
    AdaLayerNormSingle,
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
    Conv2d,
    LayerNorm,
    Linear,
    Module,
    ModuleList,
    Op,
    Parameter,
    RMSNorm,
    TimestepEmbedding,
    Value,
    int64s,
    map_to_tokens,
    padding_bias,
    silu,
    spatial_shape,
    timestep_sinusoid,
    tokens_to_map,
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

__all__ = ["SanaTransformer", "build_transformer"]

_DEFAULTS: dict[str, Any] = {
    "in_channels": 32,
    "out_channels": 32,
    "num_attention_heads": 70,
    "attention_head_dim": 32,
    "num_layers": 20,
    "num_cross_attention_heads": 20,
    "cross_attention_head_dim": 112,
    "cross_attention_dim": 2240,
    "caption_channels": 2304,
    "mlp_ratio": 2.5,
    "dropout": 0.0,
    "attention_bias": False,
    "sample_size": 32,
    "patch_size": 1,
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "interpolation_scale": None,
    "guidance_embeds": False,
    "guidance_embeds_scale": 0.1,
    "qk_norm": None,
    "timestep_scale": 1.0,
    # The "attention" of a checkpoint's own record.
    "self_attention": None,
}
_OPTIONAL = {"out_channels": 32, "interpolation_scale": 1.0, "qk_norm": "rms_norm_across_heads"}
_DROP = ((r"patch_embed\.pos_embed", "the table of positions depends on the size, so the graph takes it as an input"),)
_CAPTION_NORM_EPS = 1e-5
_FINAL_NORM_EPS = 1e-6


class GuidedTimeEmbedding(Module):
    """SanaCombinedTimestepGuidanceEmbeddings: AdaLayerNormSingle of the timestep's and the guidance scale's embeddings.

    timestep [B], guidance [B] → modulation [B, 6, D], conditioning [B, D].
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.timestep_embedder = TimestepEmbedding(SINUSOID_WIDTH, width)
        self.guidance_embedder = TimestepEmbedding(SINUSOID_WIDTH, width)
        self.linear = Linear(width, 6 * width)
        self.width = width

    def forward(self, op: Op, timestep: Value, guidance: Value) -> tuple[Value, Value]:
        time = self.timestep_embedder(op, timestep_sinusoid(op, timestep, SINUSOID_WIDTH))
        guide = self.guidance_embedder(op, timestep_sinusoid(op, guidance, SINUSOID_WIDTH))
        conditioning = op.Add(time, guide)
        return op.Reshape(self.linear(op, silu(op, conditioning)), int64s(op, 0, 6, self.width)), conditioning


class MixFeedForward(Module):
    """SANA's Mix-FFN, diffusers' GLUMBConv, on a map [B, D, H, W]: 1×1, SiLU, 3×3 depthwise, gate, 1×1.

    The 3×3 convolution is what tells the network where a token is: SANA has no positions unless it is given a table.
    """

    def __init__(self, width: int, ratio: float) -> None:
        super().__init__()
        hidden = int(ratio * width)
        self.conv_inverted = Conv2d(width, 2 * hidden, 1)
        self.conv_depth = Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden)
        self.conv_point = Conv2d(hidden, width, 1, bias=False)

    def forward(self, op: Op, x: Value) -> Value:
        x = self.conv_depth(op, silu(op, self.conv_inverted(op, x)))
        x, gate = op.Split(x, axis=1, num_outputs=2, _outputs=2)
        return self.conv_point(op, op.Mul(x, silu(op, gate)))


class SanaBlock(Module):
    """Linear self-attention and Mix-FFN under adaLN-single, text cross-attention between them without norm or gate."""

    def __init__(self, c: Mapping[str, Any], operator: Operator) -> None:
        super().__init__()
        heads, head_dim, eps = c["num_attention_heads"], c["attention_head_dim"], c["norm_eps"]
        text_heads, text_head_dim = c["num_cross_attention_heads"], c["cross_attention_head_dim"]
        self.width = heads * head_dim
        self.scale_shift_table = Parameter([6, self.width])
        self.norm1 = LayerNorm(self.width, eps, affine=False)
        bias, qk_norm = c["attention_bias"], c["qk_norm"]
        self.attn1 = self_attention(operator, self.width, heads, head_dim, bias=bias, qk_norm=qk_norm)
        norms = qk_norms(c["qk_norm"], text_heads * text_head_dim)
        self.attn2 = Attention(self.width, text_heads, text_head_dim, **norms)
        self.norm2 = LayerNorm(self.width, eps, affine=c["norm_elementwise_affine"])
        self.ff = MixFeedForward(self.width, c["mlp_ratio"])

    def forward(self, op: Op, x: Value, text: Value, text_bias: Value, modulation: Value, grid: TokenGrid) -> Value:
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = table_rows(op, self.scale_shift_table, modulation, 6)
        h = modulate(op, self.norm1(op, x), shift_1, scale_1)
        x = op.Add(x, op.Mul(gate_1, self.attn1(op, h, grid)))
        x = op.Add(x, self.attn2(op, x, text, text_bias))
        h = modulate(op, self.norm2(op, x), shift_2, scale_2)
        h = map_to_tokens(op, self.ff(op, tokens_to_map(op, h, self.width, grid.size)), self.width)
        return op.Add(x, op.Mul(gate_2, h))


class SanaTransformer(Module):
    """The whole network; `forward` takes the inputs of `build_transformer`'s Component in their order."""

    def __init__(self, c: Mapping[str, Any], operators: Sequence[Operator]) -> None:
        super().__init__()
        width, self.patch_size = c["num_attention_heads"] * c["attention_head_dim"], c["patch_size"]
        self.out_channels, self.guided = c["out_channels"], c["guidance_embeds"]
        self.has_positions = c["interpolation_scale"] is not None
        self.takes_scale = any(operator.takes_scale for operator in operators)
        self.patch_embed = PatchEmbed(c["in_channels"], width, self.patch_size)
        self.time_embed: Module = GuidedTimeEmbedding(width) if self.guided else AdaLayerNormSingle(width)
        self.caption_projection = TextProjection(c["caption_channels"], width)
        self.caption_norm = RMSNorm(width, _CAPTION_NORM_EPS)
        self.transformer_blocks = ModuleList([SanaBlock(c, operator) for operator in operators])
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
        *optional: Value,
    ) -> Value:
        given = iter(optional)
        pos_embed = next(given) if self.has_positions else None
        attention_scale = next(given) if self.takes_scale else None
        conditions = [timestep, next(given)] if self.guided else [timestep]
        size = spatial_shape(op, latents)
        grid = op.Div(size, int64s(op, self.patch_size)) if self.patch_size > 1 else size
        x = self.patch_embed(op, latents, pos_embed)
        modulation, embedded = self.time_embed(op, *conditions)
        text = self.caption_norm(op, self.caption_projection(op, encoder_hidden_states))
        text_bias = padding_bias(op, encoder_attention_mask, x)
        tokens = TokenGrid(grid, attention_scale)
        for block in self.transformer_blocks:
            x = block(op, x, text, text_bias, modulation, tokens)
        shift, scale = table_rows(op, self.scale_shift_table, op.Unsqueeze(embedded, int64s(op, 1)), 2)
        x = self.proj_out(op, modulate(op, self.norm_out(op, x), shift, scale))
        return unpatchify(op, x, grid, size, patch_size=self.patch_size, channels=self.out_channels)


def _resolve(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with the class's defaults filled in; refuses what the graph cannot do."""
    c = resolve(config, _DEFAULTS, optional=_OPTIONAL)
    width = c["num_attention_heads"] * c["attention_head_dim"]
    if c["out_channels"] is None:
        c["out_channels"] = c["in_channels"]
    if c["cross_attention_dim"] != width:
        raise ConversionError(
            f"cross_attention_dim={c['cross_attention_dim']!r} is not supported: it must be the width of the network, "
            f"{width}"
        )
    return c


def build_transformer(config: Mapping[str, Any]) -> Component:
    """SANA of a diffusers `config.json` (SanaTransformer2DModel); output [batch, out_channels, height, width].

    With `interpolation_scale` the graph takes `pos_embed`, with `guidance_embeds` (SANA-Sprint) it takes `guidance`:
    the guidance scale times `guidance_embeds_scale`. `timestep` is what diffusers hands to the network: already times
    `timestep_scale`, and for Sprint sin s / (cos s + sin s) of the TrigFlow time s. `self_attention` is the "attention"
    list of the checkpoint's own record; a block that it does not name has SANA's. Height and width must be multiples of
    patch_size. Raises ConversionError for what the graph cannot represent.
    """
    c = _resolve(config)
    width = c["num_attention_heads"] * c["attention_head_dim"]
    own = Operator("relu", {"heads": c["num_attention_heads"]})
    operators = operators_of(c["self_attention"], c["num_layers"], width, own)
    positions = None
    if c["interpolation_scale"] is not None:
        positions = sincos_positions(width, c["sample_size"], c["patch_size"], c["interpolation_scale"])
    conditions = attention_scale_input(operators)
    if c["guidance_embeds"]:
        conditions += (TensorSpec("guidance", "float32", ("batch",)),)
    return Component(
        name="transformer",
        architecture="SanaTransformer2DModel",
        module=SanaTransformer(c, operators),
        inputs=transformer_inputs(c["in_channels"], c["caption_channels"], positions, *conditions),
        outputs=(TensorSpec("prediction", "float32", ("batch", c["out_channels"], "height", "width")),),
        drop=_DROP,
        runtime={
            "patch_size": c["patch_size"],
            "in_channels": c["in_channels"],
            "out_channels": c["out_channels"],
            "learned_sigma": c["out_channels"] == 2 * c["in_channels"],
            "sample_size": c["sample_size"],
            "positions": positions,
            "resolution_aspect_ratio": False,
            "guidance_embeds": c["guidance_embeds"],
            "guidance_embeds_scale": c["guidance_embeds_scale"] if c["guidance_embeds"] else None,
            "timestep_scale": c["timestep_scale"],
            "caption_channels": c["caption_channels"],
            "self_attention": describe_operators(operators),
        },
    )
